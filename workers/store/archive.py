"""The archive of sealed deliveries, for replays. One partition per day, created ahead and dropped by age."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Connection, Engine, text

from app.delivery import Delivery
from workers.store.engine import delete_in_batches, transaction
from workers.store.ledger import DELIVERY_COLUMNS, to_delivery

DAYS_AHEAD = 7
PARTITIONS = text("""
SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = 'headrace.archive'::regclass""")
ONE_AT_A_TIME = text("SELECT pg_advisory_xact_lock(hashtext('headrace.partitions'))")
IS_OWNER = text("SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = 'headrace.archive'::regclass")
DELETE = text("""
DELETE FROM headrace.archive WHERE received_at < :before AND (tableoid, ctid) IN (
    SELECT tableoid, ctid FROM headrace.archive WHERE received_at < :before LIMIT :limit)""")
IN_DEFAULT_PARTITION = text("""
SELECT 1 FROM headrace.archive_other WHERE received_at >= :start AND received_at < :end LIMIT 1""")
DELETE_FROM_DEFAULT_PARTITION = text("DELETE FROM headrace.archive_other WHERE received_at < :before")
BATCH = 10_000
COUNT = text("""
SELECT count(*) FROM headrace.archive WHERE received_at >= :since AND received_at < :until
   AND (CAST(:pattern AS text) IS NULL OR event_type LIKE :pattern)""")
# One query per hour of deliveries instead of one cursor: a replay may take hours, and so long a transaction would block
# vacuum.
READ = text(f"""
SELECT {DELIVERY_COLUMNS}
FROM headrace.archive WHERE received_at >= :since AND received_at < :until
   AND (CAST(:pattern AS text) IS NULL OR event_type LIKE :pattern)
ORDER BY received_at, aggregator, message_id""")
EDGES = text("""
SELECT min(received_at) AS first, max(received_at) AS last
FROM headrace.archive WHERE received_at >= :since AND received_at < :until""")
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class ArchiveWindow:
    """Selects archived deliveries by the time of receipt, `until` excluded, and by a glob of the event type."""

    since: datetime
    until: datetime
    event_type: str | None = None

    @property
    def values(self) -> dict[str, object]:
        """The parameters of the queries; `pattern` is the glob as a LIKE pattern."""
        pattern = self.event_type
        if pattern is not None:
            pattern = pattern.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            pattern = pattern.replace("*", "%").replace("?", "_")
        return {"since": self.since, "until": self.until, "pattern": pattern}


def maintain_partitions(engine: Engine, keep_days: int | None, today: date | None = None) -> list[str]:
    """Creates the partitions of the next 7 days and deletes older deliveries. Returns the names of dropped partitions.

    Without `keep_days` nothing is deleted. A role that does not own the table can neither create nor drop partitions:
    it deletes rows in batches.
    """
    today = today or datetime.now(UTC).date()
    with transaction(engine) as connection:
        is_owner = connection.scalar(IS_OWNER)
        if is_owner:
            connection.execute(ONE_AT_A_TIME)
            _create_ahead(connection, today)
    if keep_days is None:
        return []
    before = datetime.combine(today, datetime.min.time(), UTC) - timedelta(days=keep_days)
    if is_owner:
        return _drop(engine, before)
    for _ in delete_in_batches(engine, DELETE, {"before": before}, BATCH):
        pass
    return []


def _create_ahead(connection: Connection, today: date) -> None:
    present = _partitions(connection)
    for day in (today + timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)):
        if _name(day) in present:
            continue
        start, end = (f"{edge} 00:00:00+00" for edge in (day, day + timedelta(days=1)))
        # If the partition was not created in time, the day's rows stay in the default partition until they expire.
        if not connection.execute(IN_DEFAULT_PARTITION, {"start": start, "end": end}).first():
            bounds = f"FROM ('{start}') TO ('{end}')"
            connection.execute(
                text(f"CREATE TABLE headrace.{_name(day)} PARTITION OF headrace.archive FOR VALUES {bounds}")
            )


def _partitions(connection: Connection) -> set[str]:
    return {name.rpartition(".")[2] for name in connection.scalars(PARTITIONS)}


def _drop(engine: Engine, before: datetime) -> list[str]:
    with transaction(engine) as connection:
        connection.execute(ONE_AT_A_TIME)
        oldest = _name(before.date())
        old = sorted(name for name in _partitions(connection) if name.startswith("archive_2") and name < oldest)
        for name in old:
            connection.execute(text(f"DROP TABLE headrace.{name}"))
        connection.execute(DELETE_FROM_DEFAULT_PARTITION, {"before": before})
        return old


def _name(day: date) -> str:
    return f"archive_{day:%Y%m%d}"


def count(engine: Engine, window: ArchiveWindow) -> int:
    """The number of archived deliveries in a window."""
    with transaction(engine) as connection:
        return int(connection.scalar(COUNT, window.values) or 0)


def read(engine: Engine, window: ArchiveWindow) -> Iterator[list[Delivery]]:
    """The archived deliveries of a window, one list per hour, oldest first."""
    with transaction(engine) as connection:
        edges = connection.execute(EDGES, window.values).one()
    if edges.first is None:
        return
    start: datetime = edges.first
    while start <= edges.last:
        hour = window.values | {"since": start, "until": min(start + HOUR, window.until)}
        with transaction(engine) as connection:
            found = [to_delivery(row) for row in connection.execute(READ, hour)]
        yield found
        start += HOUR
