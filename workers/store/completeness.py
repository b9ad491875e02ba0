"""Queries of the completeness report: outcomes, dead letters, refused items, gaps, backfills, days with data."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy import Connection, Engine, text

from app.catalogue import Resource, catalogue
from workers.store.coverage import ResourceKey, days_stored
from workers.store.engine import execute, transaction
from workers.store.schema import record_table
from workers.store.sql import quoted

PAGE = 200  # users per transaction
LEDGER = text("""
SELECT aggregator AS provider, CAST(received_at AT TIME ZONE 'UTC' AS date) AS day, outcome,
       count(*) AS deliveries, sum(attempts)::bigint AS attempts
FROM headrace.deliveries WHERE received_at >= :since AND received_at < :until GROUP BY 1, 2, 3""")
DEAD_LETTERS = text("""
SELECT aggregator AS provider, CAST(received_at AT TIME ZONE 'UTC' AS date) AS day, count(*) AS dead_letters
FROM headrace.dead_letters WHERE item = '' AND received_at >= :since AND received_at < :until GROUP BY 1, 2""")
# The resource is the third part of Junction's event types, and the second of `fetch.RESOURCE`. Terra's have one part.
REFUSED_ITEMS = text("""
SELECT coalesce(user_id, '') AS user_id,
       CASE WHEN event_type LIKE 'fetch.%' THEN split_part(event_type, '.', 2)
            ELSE coalesce(nullif(split_part(event_type, '.', 3), ''), event_type, '') END AS resource,
       coalesce(sum(items) FILTER (WHERE message_id <> 'history'), 0)::bigint AS of_webhooks,
       coalesce(sum(items) FILTER (WHERE message_id = 'history'), 0)::bigint AS of_history,
       mode() WITHIN GROUP (ORDER BY reason) AS reason, (sum(sum(items)) OVER ())::bigint AS total
FROM headrace.dead_letters WHERE item <> '' AND received_at >= :since AND received_at < :until
GROUP BY 1, 2 ORDER BY sum(items) DESC, 1, 2 LIMIT :limit""")
GAPS = text("""
SELECT user_id, provider, resource, whose, reason, window_start, window_end, since FROM headrace.gaps
ORDER BY user_id, provider, resource, part LIMIT :limit""")
COUNT_GAPS = text("SELECT whose, count(*) AS gaps FROM headrace.gaps GROUP BY whose ORDER BY whose")
UNFINISHED = text("""
SELECT id, user_id, provider, resource, status, window_start, window_end, error FROM headrace.backfills
WHERE item = '' AND (status IN ('pending', 'running', 'paused') OR status = 'failed' AND finished_at >= :since)
ORDER BY status IN ('pending', 'running'), id LIMIT :limit""")  # those that an operator must resume come first
IS_PRESENT = "erased_at IS NULL AND merged_into IS NULL"
PEOPLE = text(f"SELECT user_id FROM headrace.users WHERE user_id > :after AND {IS_PRESENT} ORDER BY 1 LIMIT :limit")
COUNT_PEOPLE = text(f"SELECT count(*) FROM headrace.users WHERE {IS_PRESENT}")
SERIES = text("SELECT DISTINCT user_id, provider, resource FROM headrace.series WHERE user_id = ANY(:users)")


@dataclass(frozen=True)
class OutcomeCount:
    """The number of deliveries of a day with an outcome, and of the attempts to deliver them."""

    provider: str
    day: date
    outcome: str
    deliveries: int
    attempts: int


@dataclass(frozen=True)
class RefusedItems:
    """The number of refused items of a user and resource, and their most frequent reason."""

    user_id: str  # '' if it could not be read
    resource: str  # for Terra the event type
    of_webhooks: int
    of_history: int
    reason: str


@dataclass(frozen=True)
class OpenGap:
    """A gap that the last reconciliation found. `whose` is the responsible party."""

    user_id: str
    provider: str
    resource: str
    whose: str
    reason: str
    window_start: datetime | None
    window_end: datetime | None
    since: datetime


@dataclass(frozen=True)
class Unfinished:
    """A backfill that is open or failed."""

    id: int
    user_id: str
    provider: str
    resource: str
    status: str
    window_start: datetime | None
    window_end: datetime | None
    error: str | None


def ledger(engine: Engine, since: datetime, until: datetime) -> Iterator[OutcomeCount]:
    """Outcomes by day (UTC) of the first attempt that was received. One transaction per day."""
    while since < until:
        midnight = datetime.combine(since.astimezone(UTC).date(), time(), UTC) + timedelta(days=1)
        end = min(midnight, until)
        yield from (OutcomeCount(**row._asdict()) for row in execute(engine, LEDGER, {"since": since, "until": end}))
        since = end


def dead_letters(connection: Connection, since: datetime, until: datetime) -> dict[tuple[str, date], int]:
    """Present dead letters by aggregator and day: deliveries and fetched pages, without single refused items."""
    rows = connection.execute(DEAD_LETTERS, {"since": since, "until": until})
    return {(row.provider, row.day): row.dead_letters for row in rows}


def refused_items(
    connection: Connection, since: datetime, until: datetime, limit: int
) -> tuple[int, list[RefusedItems]]:
    """The number of refused items of webhooks and history, and the first `limit` rows by user and resource."""
    values = {"since": since, "until": until, "limit": limit}
    rows = connection.execute(REFUSED_ITEMS, values).all()
    found = [RefusedItems(row.user_id, row.resource, row.of_webhooks, row.of_history, row.reason) for row in rows]
    return rows[0].total if rows else 0, found


def gaps(connection: Connection, limit: int) -> tuple[dict[str, int], list[OpenGap]]:
    """The number of open gaps by responsible party, and the first `limit` gaps."""
    counts = {row.whose: row.gaps for row in connection.execute(COUNT_GAPS)}
    return counts, [OpenGap(**row) for row in connection.execute(GAPS, {"limit": limit}).mappings()]


def unfinished(connection: Connection, since: datetime, limit: int) -> list[Unfinished]:
    """Open backfills, and those that failed since a moment. Failed and paused ones come first."""
    rows = connection.execute(UNFINISHED, {"since": since, "limit": limit})
    return [Unfinished(**row) for row in rows.mappings()]


def count_people(connection: Connection) -> int:
    return int(connection.scalar(COUNT_PEOPLE) or 0)


def days(
    engine: Engine, since: datetime, until: datetime
) -> Iterator[tuple[list[str], Mapping[ResourceKey, set[int]]]]:
    """The days with data (ordinals, UTC), for 200 users at a time. One transaction per page of users."""
    after = ""
    while True:
        with transaction(engine) as connection:
            users = list(connection.scalars(PEOPLE, {"after": after, "limit": PAGE}))
            if not users:
                return
            yield users, _days_of(connection, users, since, until)
        after = users[-1]


def _days_of(
    connection: Connection, users: Sequence[str], since: datetime, until: datetime
) -> dict[ResourceKey, set[int]]:
    spans = {ResourceKey(**row): (since, until) for row in connection.execute(SERIES, {"users": users}).mappings()}
    found = defaultdict(set, days_stored(connection, spans))
    for resource in catalogue().values():
        if resource.day_field and not resource.is_series:
            query = _days_of_records(resource, resource.day_field)
            values = {"users": users, "since": since.date(), "until": until.date()}
            for row in connection.execute(text(query), values):
                found[ResourceKey(row.user_id, row.provider, resource.name)].add(row.day.toordinal())
    return found


def _days_of_records(resource: Resource, field: str) -> str:
    day = f"CAST({quoted(field)} AS date)"
    return f"""
SELECT DISTINCT user_id, provider, {day} AS day FROM {record_table(resource)}
WHERE user_id = ANY(:users) AND {day} BETWEEN :since AND :until AND NOT deleted"""
