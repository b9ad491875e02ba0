"""Searches in the delivery ledger, with the indexes that it has, in pages by key.

The ledger has an index of ids, and a BRIN index of the time of receipt, by which nothing can be sorted. So a search by
time reads periods, the newest first, until a page is full. Each is four times as long as the last if that was quick.
A rare outcome or type may need all periods; the search then stops after a second, and its page offers to continue.
Deliveries of users are read from the archive, which has an index by user, and only before its first day by periods.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, get_args

from sqlalchemy import Connection, TextClause, text

from workers.console.formats import PAGE_ROWS
from workers.store.ledger import Outcome

AGGREGATORS = ("junction", "terra", "unknown")
OUTCOMES = get_args(Outcome)
FIRST_PERIOD, MAX_NEWEST, GROWTH = timedelta(minutes=1), timedelta(hours=2), 4
QUICK_SECONDS = 0.05  # a period that took longer is not followed by a longer one
MAX_SECONDS = 1.0
OLDER_SECONDS = 0.1  # for deliveries from before the archive, if the archive has some to show
BATCH = 500  # deliveries of users that a search reads at once, with their outcomes
COLUMNS = "d.event_type, d.user_id, d.applied_at, d.outcome, d.attempts, d.error"
MATCHES = """(CAST(:outcome AS text) IS NULL OR d.outcome = :outcome)
  AND (CAST(:event_type AS text) IS NULL OR d.event_type LIKE :event_type)"""
OF_USERS = "(CAST(:users AS text[]) IS NULL OR d.user_id = ANY(:users))"
IN_TIME = """received_at >= :start AND received_at <= :stop
  AND (received_at, aggregator, message_id) < (:before, :before_aggregator, :before_id)"""
ORDER = "ORDER BY received_at DESC, aggregator DESC, message_id DESC"
IN_PERIOD = text(f"""
SELECT aggregator, message_id, received_at, {COLUMNS} FROM headrace.deliveries d
WHERE {IN_TIME} AND {MATCHES} AND {OF_USERS} {ORDER} LIMIT :limit""")
BY_ID = text(f"""
SELECT aggregator, message_id, received_at, {COLUMNS} FROM headrace.deliveries d
WHERE aggregator = ANY(:aggregators) AND message_id = :message_id AND {IN_TIME} AND {MATCHES} AND {OF_USERS} {ORDER}""")
# Dead letters are few. With a short HEADRACE_LEDGER_DAYS, an archived delivery may be without an entry in the ledger.
ARCHIVED = text(f"""
SELECT aggregator, message_id, theirs.received_at, {COLUMNS}, d.outcome IS NOT NULL AND {MATCHES} AS is_match FROM (
    (SELECT aggregator, message_id, received_at FROM headrace.archive
     WHERE user_id = ANY(:users) AND {IN_TIME} {ORDER} LIMIT :batch)
    UNION ALL
    (SELECT aggregator, message_id, received_at FROM headrace.dead_letters
     WHERE user_id = ANY(:users) AND item = '' AND {IN_TIME} {ORDER} LIMIT :batch)
    {ORDER} LIMIT :batch
) AS theirs LEFT JOIN headrace.deliveries d USING (aggregator, message_id)
ORDER BY theirs.received_at DESC, aggregator DESC, message_id DESC""")
OLDEST = text("""
SELECT min(first_seen) FROM headrace.users WHERE CAST(:users AS text[]) IS NULL OR user_id = ANY(:users)""")
OLDEST_ARCHIVED = text("SELECT min(received_at) FROM headrace.archive")
MINUTES = text("""
SELECT date_trunc('minute', received_at) AS minute, count(*) AS received,
       count(*) FILTER (WHERE outcome = 'dead') AS dead,
       coalesce(avg(extract(epoch FROM applied_at - received_at)), 0)::float8 AS delay
FROM headrace.deliveries WHERE received_at >= :start AND received_at < :stop GROUP BY 1""")
EARLIEST, FAR = datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)  # no delivery is older or newer
MICROSECOND = timedelta(microseconds=1)


class Key(NamedTuple):
    """The last delivery of a page, as parameters of the page that begins after it."""

    before: datetime
    before_aggregator: str
    before_id: str


@dataclass(frozen=True)
class Search:
    """Which deliveries to find. An event type may contain `*`, for any text."""

    id: str = ""
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


def find(connection: Connection, search: Search, limit: int = PAGE_ROWS) -> LedgerPage:
    values = _values(search) | {"limit": limit + 1}
    start = max(search.since, EARLIEST) if search.since else None
    stop = min(one for one in (datetime.now(UTC) + timedelta(minutes=5), search.until, values["before"]) if one)
    stop = max(stop, EARLIEST)
    if search.id:
        values |= {"aggregators": list(AGGREGATORS), "start": start or EARLIEST, "stop": stop}
        return LedgerPage(_rows(connection, BY_ID, values))
    if search.users:
        return _of_users(connection, values, start or _oldest(connection, search.users), stop, limit)
    return _by_period(connection, values, start, stop)


def newest_of(connection: Connection, users: tuple[str, ...], limit: int) -> list[dict[str, Any]]:
    """The newest archived or dead deliveries of these users, without a search in the ledger."""
    now = datetime.now(UTC) + timedelta(minutes=5)
    return _archived(connection, _values(Search(users=users)), EARLIEST, now, limit).rows


def _rows(connection: Connection, query: TextClause, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(query, values).mappings()]


def _oldest(connection: Connection, users: tuple[str, ...] = ()) -> datetime:
    """A moment before the first delivery, or before that of these users: a user is known since their first one.

    It was received before it was applied, and deliveries without a user may be older: a week covers both.
    """
    first: datetime | None = connection.scalar(OLDEST, {"users": list(users) or None})
    return max((first or datetime.now(UTC)) - timedelta(days=7), EARLIEST)


def _of_users(
    connection: Connection, values: dict[str, Any], start: datetime, stop: datetime, limit: int
) -> LedgerPage:
    """From the archive, and from the ledger the deliveries that are older than the archive."""
    edge: datetime | None = connection.scalar(OLDEST_ARCHIVED)
    rows: list[dict[str, Any]] = []
    if edge and stop >= edge:
        page = _archived(connection, values, max(start, edge), stop, limit)
        if page.next:
            return page
        rows, stop = page.rows, edge - MICROSECOND
    return _by_period(connection, values, start, stop, rows)


def _archived(
    connection: Connection, values: dict[str, Any], start: datetime, stop: datetime, limit: int
) -> LedgerPage:
    """Reads batches by key, because few of a user's deliveries may match."""
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    batch = BATCH if values["outcome"] or values["event_type"] else limit + 1
    while True:
        found = _rows(connection, ARCHIVED, values | {"start": start, "stop": stop, "batch": batch})
        rows += [row for row in found if row["is_match"]]
        if len(rows) > limit or len(found) < batch:
            return _page(rows, limit)
        last = _key(found[-1])
        if time.monotonic() - began > MAX_SECONDS:
            return LedgerPage(rows, last, is_cut=True)
        values = values | last._asdict()


def _by_period(
    connection: Connection,
    values: dict[str, Any],
    start: datetime | None,
    stop: datetime,
    found: Sequence[dict[str, Any]] = (),
) -> LedgerPage:
    """A page that begins with the rows `found`.

    Without a start, the oldest delivery is looked up only if the newest hours do not fill the page.
    """
    rows, limit = list(found), values["limit"] - 1
    period, began, most = FIRST_PERIOD, time.monotonic(), OLDER_SECONDS if found else MAX_SECONDS
    while len(rows) <= limit:
        if start is None and period > MAX_NEWEST:
            start = _oldest(connection)
        if start and stop < start:
            break
        if (asked := time.monotonic()) - began > most:
            return LedgerPage(rows, Key(stop + MICROSECOND, "", ""), is_cut=True)
        edge = max(start, stop - period) if start else stop - period
        bounds = {"start": edge, "stop": stop, "limit": limit + 1 - len(rows)}
        rows += _rows(connection, IN_PERIOD, values | bounds)
        stop = edge - MICROSECOND
        period *= GROWTH if time.monotonic() - asked < QUICK_SECONDS else 1
    return _page(rows, limit)


def _page(rows: list[dict[str, Any]], limit: int) -> LedgerPage:
    return LedgerPage(rows) if len(rows) <= limit else LedgerPage(rows[:limit], _key(rows[limit - 1]))


def _key(row: Mapping[str, Any]) -> Key:
    return Key(row["received_at"], row["aggregator"], row["message_id"])


def _values(search: Search) -> dict[str, Any]:
    pattern = search.event_type.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_").replace("*", "%")
    return (search.before or Key(FAR, "", ""))._asdict() | {
        "message_id": search.id,
        "users": list(search.users) or None,
        "outcome": search.outcome or None,
        "event_type": pattern or None,
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
        known = self._known
        if missing := [minute for minute in wanted if minute not in known]:
            empty = {"received": 0, "dead": 0, "delay": 0.0}
            known = known | {minute: {"minute": minute, **empty} for minute in missing}
            rows = _rows(connection, MINUTES, {"start": missing[0], "stop": stop})
            known |= {row["minute"]: row for row in rows}
        # A delivery of the last minute may still be queued: it is read again.
        self._known = {minute: known[minute] for minute in wanted[:-1]}
        return [known[minute] for minute in wanted]
