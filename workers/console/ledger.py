"""Searches in the delivery ledger, with the indexes that it has, in pages by key.

The ledger has an index of ids, and a BRIN index of the time of receipt, by which nothing can be sorted. So a search by
time reads periods, the newest first, until a page is full. Each is four times as long as the last if that was quick.
A rare outcome or type may need all periods; the search then stops after a second, and its page offers to continue.
"""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

AGGREGATORS = ("junction", "terra", "unknown")
OUTCOMES = ("applied", "duplicate", "stale", "ignored", "dead")
PAGE_ROWS = 50
FIRST_PERIOD, MAX_NEWEST, GROWTH = timedelta(minutes=1), timedelta(hours=2), 4
QUICK_SECONDS = 0.05  # a period that took longer is not followed by a longer one
MAX_SECONDS = 1.0
COLUMNS = """d.aggregator, d.message_id, d.event_type, d.user_id, d.received_at, d.applied_at, d.outcome, d.attempts,
d.error"""
MATCHES = """(CAST(:outcome AS text) IS NULL OR d.outcome = :outcome)
  AND (CAST(:event_type AS text) IS NULL OR d.event_type LIKE :event_type)"""
KEY = "(d.received_at, d.aggregator, d.message_id)"
BEFORE = f"{KEY} < (:before_at, :before_aggregator, :before_id)"
IN_PERIOD = text(f"""
SELECT {COLUMNS} FROM headrace.deliveries d
WHERE d.received_at >= :start AND d.received_at <= :stop AND {MATCHES} AND {BEFORE}
ORDER BY d.received_at DESC, d.aggregator DESC, d.message_id DESC LIMIT :limit""")
BY_ID = text(f"""
SELECT {COLUMNS} FROM headrace.deliveries d
WHERE d.aggregator = ANY(:aggregators) AND d.message_id = :message_id ORDER BY d.aggregator""")
# The archive has an index by user, and the ledger has none. Dead letters are few.
BY_USER = text(f"""
SELECT {COLUMNS} FROM (
    (SELECT aggregator, message_id FROM headrace.archive d
     WHERE user_id = ANY(:users) AND d.received_at >= :start AND d.received_at <= :stop AND {BEFORE}
     ORDER BY received_at DESC, aggregator DESC, message_id DESC LIMIT :most)
    UNION (SELECT aggregator, message_id FROM headrace.dead_letters WHERE user_id = ANY(:users) AND item = '')
) AS theirs JOIN headrace.deliveries d USING (aggregator, message_id)
WHERE {MATCHES} AND {BEFORE} AND d.received_at >= :start AND d.received_at <= :stop
ORDER BY d.received_at DESC, d.aggregator DESC, d.message_id DESC LIMIT :limit""")
OLDEST = text("SELECT min(first_seen) FROM headrace.users")
MINUTES = text("""
SELECT date_trunc('minute', received_at) AS minute, count(*) AS received,
       count(*) FILTER (WHERE outcome = 'dead') AS dead,
       coalesce(avg(extract(epoch FROM applied_at - received_at)), 0)::float8 AS delay
FROM headrace.deliveries WHERE received_at >= :start AND received_at < :stop GROUP BY 1""")
FAR = datetime(9999, 1, 1, tzinfo=UTC)


class Key(NamedTuple):
    """The last delivery of a page: the next page begins after it."""

    received_at: datetime
    aggregator: str
    message_id: str


@dataclass(frozen=True)
class Search:
    """Which deliveries to find. An event type may end with `*`."""

    users: tuple[str, ...] = ()
    event_type: str = ""
    outcome: str = ""
    since: datetime | None = None
    until: datetime | None = None
    before: Key | None = None


@dataclass(frozen=True)
class LedgerPage:
    rows: list[dict[str, Any]] = field(default_factory=list)
    next: Key | None = None  # of the next page; None: there is no more
    is_cut: bool = False  # the search took too long, and continues with `next`


def by_id(connection: Connection, message_id: str) -> list[dict[str, Any]]:
    """The deliveries with this id: at most one of each aggregator."""
    values = {"aggregators": list(AGGREGATORS), "message_id": message_id}
    return [dict(row) for row in connection.execute(BY_ID, values).mappings()]


def find(connection: Connection, search: Search, limit: int = PAGE_ROWS) -> LedgerPage:
    """A page of deliveries, newest first."""
    stop = search.until or datetime.now(UTC) + timedelta(minutes=5)
    if search.before:
        stop = min(stop, search.before.received_at)
    values = _values(search) | {"limit": limit + 1, "most": 10 * limit}
    if search.users:
        values |= {"users": list(search.users), "start": search.since or datetime.min.replace(tzinfo=UTC), "stop": stop}
        return _page([dict(row) for row in connection.execute(BY_USER, values).mappings()], limit)
    return _by_period(connection, values, search.since, stop, limit)


def _oldest(connection: Connection) -> datetime:
    """A moment before the first delivery: a user is known since their first one.

    It was received before it was applied, and deliveries without a user may be older: a week covers both.
    """
    first: datetime | None = connection.scalar(OLDEST)
    return (first or datetime.now(UTC)) - timedelta(days=7)


def _by_period(
    connection: Connection, values: dict[str, Any], start: datetime | None, stop: datetime, limit: int
) -> LedgerPage:
    """Without a start, the oldest delivery is looked up only if the newest hours do not fill the page."""
    rows: list[dict[str, Any]] = []
    period, began = FIRST_PERIOD, time.monotonic()
    while len(rows) <= limit:
        if start is None and period > MAX_NEWEST:
            start = _oldest(connection)
        if start and stop < start:
            break
        if (asked := time.monotonic()) - began > MAX_SECONDS:
            return LedgerPage(rows, Key(stop + timedelta(microseconds=1), "", ""), is_cut=True)
        edge = max(start, stop - period) if start else stop - period
        bounds = {"start": edge, "stop": stop, "limit": limit + 1 - len(rows)}
        rows += [dict(row) for row in connection.execute(IN_PERIOD, values | bounds).mappings()]
        stop = edge - timedelta(microseconds=1)
        period *= GROWTH if time.monotonic() - asked < QUICK_SECONDS else 1
    return _page(rows, limit)


def _page(rows: list[dict[str, Any]], limit: int) -> LedgerPage:
    if len(rows) <= limit:
        return LedgerPage(rows)
    last = rows[limit - 1]
    return LedgerPage(rows[:limit], Key(last["received_at"], last["aggregator"], last["message_id"]))


def _values(search: Search) -> dict[str, Any]:
    before = search.before or Key(FAR, "", "")
    pattern = search.event_type.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_").replace("*", "%")
    return {
        "outcome": search.outcome or None,
        "event_type": pattern or None,
        "before_at": before.received_at,
        "before_aggregator": before.aggregator,
        "before_id": before.message_id,
    }


class Rates:
    """Deliveries by minute. Minutes that are over do not change, and are read once."""

    def __init__(self, minutes: int = 30) -> None:
        self._minutes = minutes
        self._known: dict[datetime, dict[str, Any]] = {}

    def read(self, connection: Connection, now: datetime) -> list[dict[str, Any]]:
        """The last complete minutes, oldest first."""
        stop = now.replace(second=0, microsecond=0)
        wanted = [stop - timedelta(minutes=number) for number in range(self._minutes, 0, -1)]
        missing = [minute for minute in wanted if minute not in self._known]
        known = {minute: self._known[minute] for minute in wanted if minute in self._known}
        if missing:
            found = {
                row["minute"].astimezone(UTC): dict(row)
                for row in connection.execute(MINUTES, {"start": missing[0], "stop": stop}).mappings()
            }
            empty = {"received": 0, "dead": 0, "delay": 0.0}
            known |= {minute: found.get(minute, {"minute": minute, **empty}) for minute in missing}
        # A delivery of the last minute may still be queued: it is read again.
        self._known = {minute: one for minute, one in known.items() if minute < stop - timedelta(minutes=1)}
        return [known[minute] for minute in wanted]
