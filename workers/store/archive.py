"""The archive of sealed deliveries, for replays. It has one partition per day."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Engine, text

from app.delivery import Delivery
from workers.store.engine import execute, scalars
from workers.store.ledger import DELIVERY_COLUMNS, to_delivery

COUNT = text("""
SELECT count(*) FROM headrace.archive WHERE received_at >= :since AND received_at < :until
   AND (CAST(:pattern AS text) IS NULL OR event_type LIKE :pattern)""")
# One query per hour of deliveries instead of one cursor: a replay may take hours, and such a long transaction would
# block vacuum.
READ = text(f"""
SELECT {DELIVERY_COLUMNS}
FROM headrace.archive WHERE received_at >= :since AND received_at < :until
   AND (CAST(:pattern AS text) IS NULL OR event_type LIKE :pattern)
ORDER BY received_at, aggregator, message_id""")
FIND = text(f"""
SELECT {DELIVERY_COLUMNS} FROM headrace.archive
WHERE received_at = :received_at AND aggregator = :aggregator AND message_id = :message_id""")
EDGES = text("""
SELECT min(received_at) AS first, max(received_at) AS last
FROM headrace.archive WHERE received_at >= :since AND received_at < :until""")
EVENT_TYPES = text("SELECT DISTINCT event_type FROM headrace.archive WHERE event_type IS NOT NULL")
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


def count(engine: Engine, window: ArchiveWindow) -> int:
    return sum(scalars(engine, COUNT, window.values))


def event_types(engine: Engine) -> list[str]:
    """The event types of all archived deliveries. Reads the whole archive."""
    return scalars(engine, EVENT_TYPES)


def find(engine: Engine, aggregator: str, message_id: str, received_at: datetime) -> Delivery | None:
    """The archived delivery with this id that was received at this time."""
    values = {"aggregator": aggregator, "message_id": message_id, "received_at": received_at}
    return next(map(to_delivery, execute(engine, FIND, values)), None)


def read(engine: Engine, window: ArchiveWindow) -> Iterator[list[Delivery]]:
    """The archived deliveries of a window, one list per hour, oldest first."""
    (edges,) = execute(engine, EDGES, window.values)
    start: datetime | None = edges.first
    while start and start <= edges.last:
        hour = window.values | {"since": start, "until": min(start + HOUR, window.until)}
        yield [to_delivery(row) for row in execute(engine, READ, hour)]
        start += HOUR
