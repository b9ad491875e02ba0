"""One delivery: what it contains, by resource and id and without values, and whether that is stored."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, text

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from app.sealing import Sealer
from workers.actions import Action, Record, Samples
from workers.aggregators.registry import AGGREGATORS
from workers.store import provenance
from workers.store.ledger import DELIVERY_COLUMNS, to_delivery

MAX_SEALED_BYTES = 512 * 1024  # a larger body takes longer to read than a page may take
MAX_SHOWN = 200
SIZE = text("""
SELECT octet_length(sealed) AS bytes FROM headrace.archive
WHERE aggregator = :aggregator AND message_id = :message_id AND received_at BETWEEN :start AND :stop""")
DEAD = text("""
SELECT id, octet_length(sealed) AS bytes FROM headrace.dead_letters
WHERE aggregator = :aggregator AND message_id = :message_id ORDER BY item LIMIT 50""")
ARCHIVED = text(f"""
SELECT {DELIVERY_COLUMNS} FROM headrace.archive
WHERE aggregator = :aggregator AND message_id = :message_id AND received_at BETWEEN :start AND :stop LIMIT 1""")
OF_DEAD = text(f"SELECT {DELIVERY_COLUMNS} FROM headrace.dead_letters WHERE id = :id")


@dataclass(frozen=True)
class KeptBody:
    """The sealed body of a delivery, where there is one."""

    bytes: int = 0
    dead_letters: tuple[int, ...] = ()
    delivery: Delivery | None = None
    where: str = ""


@dataclass(frozen=True)
class Content:
    """A record, or the samples of a series, in a delivery."""

    resource: str
    user_id: str
    id: str
    first: datetime | None
    last: datetime | None
    rows: int
    version: datetime
    stored: str


def open_delivery(connection: Connection, aggregator: str, message_id: str, received_at: datetime) -> KeptBody:
    """The sealed body, unless it is too large for a page."""
    around = {"start": received_at - timedelta(seconds=1), "stop": received_at + timedelta(seconds=1)}
    values = {"aggregator": aggregator, "message_id": message_id} | around
    dead = connection.execute(DEAD, values).all()
    size = connection.scalar(SIZE, values)
    numbers = tuple(row.id for row in dead)
    if size is not None:
        row = connection.execute(ARCHIVED, values).one() if size <= MAX_SEALED_BYTES else None
        return KeptBody(size, numbers, to_delivery(row) if row else None, "archive")
    if dead:
        small = dead[0].bytes <= MAX_SEALED_BYTES
        row = connection.execute(OF_DEAD, {"id": dead[0].id}).one() if small else None
        return KeptBody(dead[0].bytes, numbers, to_delivery(row) if row else None, "dead letter")
    return KeptBody()


def contents_of(connection: Connection, settings: Settings, kept: KeptBody, entry: dict[str, Any]) -> list[Content]:
    """The records and series of the body; none if it cannot be opened or parsed, which is what its error says."""
    if kept.delivery is None or kept.delivery.aggregator not in AGGREGATORS:
        return []
    everything = replace(settings, resources=(), providers=())
    try:
        body = kept.delivery.open(Sealer(settings.encryption_keys))
        actions = AGGREGATORS[kept.delivery.aggregator].parse(kept.delivery, body, everything).actions
    except (Unprocessable, KeyError):
        return []
    return [one for action in actions for one in _contents(connection, action, entry)][:MAX_SHOWN]


def _contents(connection: Connection, action: Action, entry: dict[str, Any]) -> Iterator[Content]:
    if isinstance(action, Record):
        found = provenance.of_record(connection, catalogue()[action.resource], action.user_id, action.id)
        stored = _compared(action.version, found[0].version) if found else "not stored"
        yield Content(action.resource, action.user_id, action.id, None, None, 1, action.version, stored)
    elif isinstance(action, Samples) and action.rows:
        times = [one.ts for one in action.rows]
        resource, is_applied = catalogue()[action.resource], entry["outcome"] == "applied"
        found = provenance.of_sample(connection, resource, action.user_id, min(times)) if is_applied else []
        mine = [one for one in found if (one.provider, one.subtype) == (action.provider, action.subtype)]
        stored = _compared(action.version, mine[0].version) if mine else "not stored"
        yield Content(action.resource, action.user_id, "", min(times), max(times), len(times), action.version, stored)


def _compared(version: datetime, stored: datetime) -> str:
    if version == stored:
        return "stored"
    return "a newer version is stored" if version < stored else "an older version is stored"
