"""Coverage of users' data: fetched windows, days with data, periods without a delivery, and the table of gaps."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from sqlalchemy import Connection, TextClause, text

from app.catalogue import catalogue
from workers.aggregators.common import MAX_AHEAD
from workers.store.schema import record_table
from workers.store.sql import RowParameters, quoted

FETCHED = text("""
SELECT b.user_id, b.provider, b.resource, b.requested_by, c.window_start AS start, c.window_end AS "end", c.created_at,
       b.finished_at,
       CASE WHEN c.status = 'done' THEN 'done' WHEN b.status = 'failed' THEN 'lost' ELSE 'open' END AS state
FROM headrace.backfills b JOIN headrace.chunks c ON c.backfill_id = b.id
WHERE b.user_id = ANY(:users) AND b.item = ''""")
CONNECTIONS = text("SELECT provider, status FROM headrace.connections WHERE user_id = :user_id ORDER BY provider")
GRANTS = text("SELECT provider, resource, granted FROM headrace.grants WHERE user_id = :user_id")
SPANS = RowParameters("user_id text, provider text, resource text, span_start date, span_end date", "asked")
# Probes the index once per day: counting would read every sample of the day.
DAYS_OF_SAMPLES = text(f"""
SELECT DISTINCT user_id, provider, resource, CAST(day AS date) AS day
FROM {SPANS} JOIN headrace.series n USING (user_id, provider, resource)
CROSS JOIN LATERAL generate_series(span_start::timestamp, span_end::timestamp, interval '1 day') AS day
WHERE EXISTS (SELECT 1 FROM headrace.samples s WHERE s.series_id = n.id
              AND s.ts >= day AT TIME ZONE 'UTC' AND s.ts < (day + interval '1 day') AT TIME ZONE 'UTC')""")
# Data of the year 2105, from a device with a wrong clock, would hide that the last month is missing.
LATEST = f"now() + interval '{MAX_AHEAD.days} days'"
NEWEST_SAMPLES = text(f"""
SELECT n.user_id, n.provider, n.resource, max(newest.ts) AS newest
FROM headrace.series n
CROSS JOIN LATERAL (SELECT ts FROM headrace.samples s WHERE s.series_id = n.id AND ts <= {LATEST}
                    ORDER BY ts DESC LIMIT 1) AS newest
WHERE n.user_id = ANY(:users) GROUP BY 1, 2, 3""")
# Runs of 24 hours or more without any delivery: the endpoint was down, or no sender reached it.
OUTAGES = text("""
WITH hours AS (
    SELECT hour, EXISTS (SELECT 1 FROM headrace.deliveries d
                         WHERE d.aggregator = 'junction' AND d.received_at >= hour
                           AND d.received_at < hour + interval '1 hour') AS received
    FROM generate_series(date_trunc('hour', greatest(CAST(:since AS timestamptz), (
        SELECT coalesce(min(first_seen), now()) FROM headrace.users))), now(), interval '1 hour') AS hour),
runs AS (SELECT hour, hour - row_number() OVER (ORDER BY hour) * interval '1 hour' AS run FROM hours WHERE NOT received)
SELECT min(hour) AS silent_from, least(max(hour) + interval '1 hour', now()) AS silent_to
FROM runs GROUP BY run HAVING count(*) >= 24""")
KEEP = text("""
INSERT INTO headrace.gaps AS stored
    (user_id, provider, resource, part, whose, reason, is_pulling, window_start, window_end)
VALUES (:user_id, :provider, :resource, :part, :whose, :reason, :is_pulling, :window_start, :window_end)
ON CONFLICT (user_id, provider, resource, part) DO UPDATE SET whose = excluded.whose, reason = excluded.reason,
    is_pulling = excluded.is_pulling, window_start = excluded.window_start, window_end = excluded.window_end,
    since = CASE WHEN stored.whose = excluded.whose THEN stored.since ELSE now() END, seen_at = now()""")
FORGET = text("DELETE FROM headrace.gaps WHERE user_id = ANY(:users) AND part = :part AND seen_at < now()")
FORGET_PART = text("DELETE FROM headrace.gaps WHERE part = :part")
PULLING = text("SELECT user_id, provider, resource FROM headrace.gaps WHERE user_id = ANY(:users) AND is_pulling")
Responsible = Literal["ours", "aggregator", "provider"]
Window = tuple[datetime, datetime]


class ResourceKey(NamedTuple):
    """One resource of one of a user's connections."""

    user_id: str
    provider: str
    resource: str


@dataclass(frozen=True)
class Gap:
    """Data that the aggregator has or should have, and that is not stored. `whose` is the responsible party.

    ours        Headrace never fetched it, or lost it: fetch the windows
    aggregator  the aggregator has not pulled it yet, or counts data that it does not return
    provider    the provider did not send it to the aggregator
    """

    key: ResourceKey
    whose: Responsible
    reason: str
    windows: tuple[Window, ...] = ()
    is_pulling: bool = False


@dataclass(frozen=True)
class Fetched:
    """A window of a backfill: done, open, or lost with a failed backfill."""

    start: datetime
    end: datetime
    requested_by: str
    state: Literal["done", "open", "lost"]
    created_at: datetime
    finished_at: datetime | None


def fetched(connection: Connection, users: Iterable[str]) -> Mapping[ResourceKey, list[Fetched]]:
    found: defaultdict[ResourceKey, list[Fetched]] = defaultdict(list)
    for row in connection.execute(FETCHED, {"users": list(users)}).mappings():
        window = dict(row)
        key = ResourceKey(window.pop("user_id"), window.pop("provider"), window.pop("resource"))
        found[key].append(Fetched(**window))
    return found


def connected(connection: Connection, user_id: str) -> dict[str, str]:
    """The status of the user's connections, by provider."""
    return {row.provider: row.status for row in connection.execute(CONNECTIONS, {"user_id": user_id})}


def granted(connection: Connection, user_id: str) -> dict[tuple[str, str], bool]:
    """Whether the user granted each resource, by provider and resource."""
    found = connection.execute(GRANTS, {"user_id": user_id})
    return {(row.provider, row.resource): row.granted for row in found}


def outages(connection: Connection, since: datetime) -> list[Window]:
    """Periods of 24 hours or more in which no delivery arrived."""
    return [(row.silent_from, row.silent_to) for row in connection.execute(OUTAGES, {"since": since})]


def days_stored(connection: Connection, spans: Mapping[ResourceKey, Window]) -> Mapping[ResourceKey, set[int]]:
    """The days with data (ordinals, UTC) within these spans. Empty for resources without days, such as profile."""
    found: defaultdict[ResourceKey, set[int]] = defaultdict(set)
    by_resource: defaultdict[tuple[str, str], dict[ResourceKey, Window]] = defaultdict(dict)
    for key, span in spans.items():
        # Samples one user at a time: a page of users with ten years of history would take more than a minute.
        by_resource[(key.user_id, "") if catalogue()[key.resource].is_series else ("", key.resource)][key] = span
    for (_, name), group in by_resource.items():
        query = _days_of_records(name) if name else DAYS_OF_SAMPLES
        if query is not None:
            rows = ((*key, *(edge.astimezone(UTC).date() for edge in span)) for key, span in group.items())
            for row in connection.execute(query, SPANS.values(rows)):
                found[ResourceKey(row.user_id, row.provider, row.resource)].add(row.day.toordinal())
    return found


def newest_stored(connection: Connection, keys: Iterable[ResourceKey]) -> Mapping[ResourceKey, datetime]:
    """The newest stored moment of each key; for records, the end of the newest day.

    Data that is dated more than two days ahead is ignored.
    """
    wanted = set(keys)
    users = {"users": sorted({key.user_id for key in wanted})}
    found: dict[ResourceKey, datetime] = {}
    for row in connection.execute(NEWEST_SAMPLES, users):
        found[ResourceKey(row.user_id, row.provider, row.resource)] = row.newest
    for name in sorted({key.resource for key in wanted}):
        if field := catalogue()[name].day_field:
            # A record that starts on a day may end on the next one, unless the day is a calendar date.
            day = f"CAST({quoted(field)} AS date)"
            newest = f"max({day})" + ("" if field == "calendar_date" else " + 1")
            query = f"""
SELECT user_id, provider, (({newest} + 1)::timestamp AT TIME ZONE 'UTC') - interval '1 microsecond' AS newest
FROM {record_table(catalogue()[name])} WHERE user_id = ANY(:users) AND {day} <= CAST({LATEST} AS date) GROUP BY 1, 2"""
            for row in connection.execute(text(query), users):
                found[ResourceKey(row.user_id, row.provider, name)] = row.newest
    return {key: moment for key, moment in found.items() if key in wanted}


def any_stored(connection: Connection, resource: str, users: Iterable[str]) -> set[ResourceKey]:
    """The keys with any record, for a resource without days."""
    query = text(f"SELECT user_id, provider FROM {record_table(catalogue()[resource])} WHERE user_id = ANY(:users)")
    return {
        ResourceKey(row.user_id, row.provider, resource) for row in connection.execute(query, {"users": list(users)})
    }


def _days_of_records(name: str) -> TextClause | None:
    resource = catalogue()[name]
    if (field := resource.day_field) is None:
        return None
    day = f"CAST(r.{quoted(field)} AS date)"
    return text(f"""
SELECT DISTINCT user_id, provider, resource, {day} AS day
FROM {SPANS} JOIN {record_table(resource)} r USING (user_id, provider)
WHERE {day} BETWEEN span_start AND span_end""")


def keep_gaps(connection: Connection, part: str, users: Sequence[str], gaps: Iterable[Gap]) -> None:
    """Replaces these users' gaps that one part of the reconciliation found."""
    rows = [
        gap.key._asdict()
        | {"part": part, "whose": gap.whose, "reason": gap.reason, "is_pulling": gap.is_pulling}
        | {"window_start": gap.windows[0][0] if gap.windows else None}
        | {"window_end": gap.windows[-1][1] if gap.windows else None}
        for gap in gaps
    ]
    if rows:
        connection.execute(KEEP, rows)
    connection.execute(FORGET, {"users": list(users), "part": part})


def forget_gaps(connection: Connection, part: str) -> None:
    """Removes all gaps that one part of the reconciliation found: for a part that does not compare every user."""
    connection.execute(FORGET_PART, {"part": part})


def still_pulling(connection: Connection, users: Sequence[str]) -> set[ResourceKey]:
    """The resources that the aggregator was still pulling at the last check."""
    return {ResourceKey(**row) for row in connection.execute(PULLING, {"users": list(users)}).mappings()}
