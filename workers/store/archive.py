"""Deliveries that are kept to be applied again: a partition a day, made ahead and dropped when it is old."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Connection, Engine, text

from app.delivery import Delivery
from workers.store.engine import transaction

DAYS_AHEAD = 7
PARTITIONS = text("""
SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = 'headrace.archive'::regclass""")
ONE_AT_A_TIME = text("SELECT pg_advisory_xact_lock(hashtext('headrace.partitions'))")
IS_OURS = text("SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = 'headrace.archive'::regclass")
DELETE = text("""
DELETE FROM headrace.archive WHERE received_at < :late AND (tableoid, ctid) IN (
    SELECT tableoid, ctid FROM headrace.archive WHERE received_at < :late LIMIT :limit)""")
BATCH = 10_000
COUNT = text("""
SELECT count(*) FROM headrace.archive WHERE received_at >= :since AND received_at < :until
   AND (CAST(:pattern AS text) IS NULL OR event_type LIKE :pattern)""")
# By the hour and not with one cursor over all: a replay may take hours, and a transaction that long holds vacuum up.
READ = text("""
SELECT aggregator, message_id, extract(epoch FROM received_at)::float8 AS received_at, sealed, ordering_ms, reference
FROM headrace.archive WHERE received_at >= :since AND received_at < :until
   AND (CAST(:pattern AS text) IS NULL OR event_type LIKE :pattern)
ORDER BY received_at, aggregator, message_id""")
EDGES = text("""
SELECT min(received_at) AS first, max(received_at) AS last
FROM headrace.archive WHERE received_at >= :since AND received_at < :until""")
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class ArchiveWindow:
    """Which kept deliveries are meant: by when they were received, and by a glob of their event type."""

    since: datetime
    until: datetime
    event_type: str | None = None

    @property
    def pattern(self) -> str | None:
        """The glob as SQL's LIKE wants it."""
        if self.event_type is None:
            return None
        escaped = self.event_type.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        return escaped.replace("*", "%").replace("?", "_")


def maintain_partitions(engine: Engine, keep_days: int | None, today: date | None = None) -> list[str]:
    """Makes the partitions of the next days and drops those that are older than is kept. Returns what it dropped.

    Without a number of days nothing is dropped.
    """
    today = today or datetime.now(UTC).date()
    with transaction(engine) as connection:
        is_ours = connection.scalar(IS_OURS)
        if is_ours:
            connection.execute(ONE_AT_A_TIME)
            _make_ahead(connection, today)
    if keep_days is None:
        return []
    late = datetime.combine(today, datetime.min.time(), UTC) - timedelta(days=keep_days)
    if not is_ours:
        _delete(engine, late)
        return []
    return _drop(engine, late)


def _make_ahead(connection: Connection, today: date) -> None:
    present = _partitions(connection)
    for ahead in range(DAYS_AHEAD + 1):
        _make(connection, today + timedelta(days=ahead), present)


def _partitions(connection: Connection) -> set[str]:
    return {name.rpartition(".")[2] for name in connection.scalars(PARTITIONS)}


def _drop(engine: Engine, late: datetime) -> list[str]:
    with transaction(engine) as connection:
        connection.execute(ONE_AT_A_TIME)
        oldest = _name(late.date())
        old = sorted(name for name in _partitions(connection) if name.startswith("archive_2") and name < oldest)
        for name in old:
            connection.execute(text(f"DROP TABLE headrace.{name}"))
        connection.execute(text("DELETE FROM headrace.archive_other WHERE received_at < :late"), {"late": late})
        return old


def _delete(engine: Engine, late: datetime) -> None:
    """What is old, row by row: a role that does not own the table may drop no partition, and make none."""
    gone = BATCH
    while gone == BATCH:
        with transaction(engine) as connection:
            gone = connection.execute(DELETE, {"late": late, "limit": BATCH}).rowcount


def _make(connection: Connection, day: date, present: set[str]) -> None:
    name, after = _name(day), day + timedelta(days=1)
    if name in present:
        return
    edges = f"FROM ('{day} 00:00:00+00') TO ('{after} 00:00:00+00')"
    taken = text("SELECT 1 FROM headrace.archive_other WHERE received_at >= :day AND received_at < :after LIMIT 1")
    if connection.execute(taken, {"day": f"{day} 00:00:00+00", "after": f"{after} 00:00:00+00"}).first():
        return  # nobody made it in time; these stay where they are, and go when they are old
    connection.execute(text(f"CREATE TABLE headrace.{name} PARTITION OF headrace.archive FOR VALUES {edges}"))


def _name(day: date) -> str:
    return f"archive_{day:%Y%m%d}"


def count(engine: Engine, window: ArchiveWindow) -> int:
    """How many deliveries are kept of a window."""
    with transaction(engine) as connection:
        return int(connection.scalar(COUNT, _values(window)) or 0)


def read(engine: Engine, window: ArchiveWindow) -> Iterator[list[Delivery]]:
    """The kept deliveries of a window, hour by hour, the oldest first."""
    with transaction(engine) as connection:
        edges = connection.execute(EDGES, _values(window)).one()
    if edges.first is None:
        return
    start: datetime = edges.first
    while start <= edges.last:
        part = _values(window) | {"since": start, "until": min(start + HOUR, window.until)}
        with transaction(engine) as connection:
            found = [Delivery(*row) for row in connection.execute(READ, part)]
        yield found
        start += HOUR


def _values(window: ArchiveWindow) -> dict[str, object]:
    return {"since": window.since, "until": window.until, "pattern": window.pattern}
