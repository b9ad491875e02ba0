"""Dead letters: deliveries and single items that could not be applied, sealed, with the reason."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from msgspec.structs import asdict
from sqlalchemy import Connection, Engine, text

from app.delivery import Delivery
from workers.store.engine import execute, transaction
from workers.store.ledger import DELIVERY_COLUMNS, KEYS, DeliveryKey, to_delivery
from workers.store.sql import RowParameters

LIST = text("""
SELECT dead_letter.id, dead_letter.aggregator, dead_letter.message_id,
       coalesce(dead_letter.event_type, entry.event_type) AS event_type,
       coalesce(dead_letter.user_id, entry.user_id) AS user_id, dead_letter.received_at,
       dead_letter.died_at, dead_letter.reason, coalesce(entry.attempts, 1) AS attempts,
       octet_length(dead_letter.sealed) AS sealed_bytes, dead_letter.reference, dead_letter.item, dead_letter.items
FROM headrace.dead_letters dead_letter LEFT JOIN headrace.deliveries entry USING (aggregator, message_id)
WHERE (CAST(:ids AS bigint[]) IS NULL OR dead_letter.id = ANY(:ids))
  AND (CAST(:reason AS text) IS NULL OR position(lower(:reason) IN lower(dead_letter.reason)) > 0)
ORDER BY dead_letter.id DESC LIMIT :limit""")
GET = text(f"SELECT {DELIVERY_COLUMNS} FROM headrace.dead_letters WHERE id = :id")
# In pages of 10, because one dead letter may have many megabytes.
READ = text("""
SELECT dead_letter.id, coalesce(dead_letter.user_id, entry.user_id) AS user_id,
       dead_letter.aggregator, dead_letter.message_id,
       extract(epoch FROM dead_letter.received_at)::float8 AS received_at, sealed, ordering_ms, dead_letter.reference,
       dead_letter.digest
FROM headrace.dead_letters dead_letter LEFT JOIN headrace.deliveries entry USING (aggregator, message_id)
WHERE dead_letter.id > :after ORDER BY dead_letter.id LIMIT 10""")
UPDATE_REASON = text("""
UPDATE headrace.dead_letters SET reason = :reason WHERE id = :id AND CAST(:reason AS text) IS NOT NULL""")
UPDATE_REASON_IN_LEDGER = text("""
UPDATE headrace.deliveries SET error = :reason
WHERE aggregator = :aggregator AND message_id = :message_id AND outcome = 'dead'""")
MARK_RESOLVED = text("""
UPDATE headrace.deliveries SET outcome = 'applied', error = NULL, applied_at = now()
WHERE aggregator = :aggregator AND message_id = :message_id AND outcome = 'dead'""")
DELETE = text("DELETE FROM headrace.dead_letters WHERE id = ANY(:ids)")
# Items of these deliveries that the last replay did not refuse again.
STILL = RowParameters("aggregator text, message_id text, item text", "still")
DELETE_ITEMS = text(f"""
DELETE FROM headrace.dead_letters
WHERE (aggregator, message_id) IN (SELECT * FROM {KEYS})
  AND item <> '' AND (aggregator, message_id, item) NOT IN (SELECT * FROM {STILL})
RETURNING aggregator, message_id""")
MARK_ITEMS_RESOLVED = text("""
UPDATE headrace.deliveries entry SET error = 'the refused items were applied by a replay'
WHERE aggregator = :aggregator AND message_id = :message_id AND outcome <> 'dead' AND NOT EXISTS (
    SELECT 1 FROM headrace.dead_letters other
    WHERE (other.aggregator, other.message_id) = (entry.aggregator, entry.message_id))""")
ADD = text("""
INSERT INTO headrace.dead_letters
    (aggregator, message_id, event_type, user_id, received_at, reason, ordering_ms, reference, digest, sealed, item,
     items)
VALUES (:aggregator, :message_id, :event_type, :user_id, :received_at, :reason, :ordering_ms, :reference, :digest,
        :sealed, :item, :items)
ON CONFLICT (aggregator, message_id, item) DO NOTHING""")
IS_COUNTED = text("""
SELECT 1 FROM headrace.dead_letters
WHERE (aggregator, message_id) = (:aggregator, :message_id) AND starts_with(item, :counter) LIMIT 1""")
HISTORY = "history"  # the message id of items of fetched pages, which belong to no delivery
FETCH_ID = re.compile(r"fetch-(\d+)-[0-9a-f]+")
# The `item` of a dead letter that counts refused items without their content, with the backfill that fetched them.
COUNTER = "others-"
COUNTER_ITEM = re.compile(r"others-(\d+)-[0-9a-f]+")


@dataclass(frozen=True)
class DeadLetter:
    """A dead letter without its content."""

    id: int
    aggregator: str
    message_id: str
    event_type: str | None
    user_id: str | None
    received_at: datetime
    died_at: datetime
    reason: str
    attempts: int
    sealed_bytes: int
    reference: str | None = None  # of a fetched response: the record whose stream was requested
    item: str = ""  # the digest of a single item of the delivery, or a counter of items; '' for the whole delivery
    items: int = 1  # the number of refused items that it stands for

    @property
    def is_counter(self) -> bool:
        """Whether it counts refused items without their content."""
        return self.item.startswith(COUNTER)

    @property
    def backfill_id(self) -> int | None:
        """The backfill whose response was rejected, or whose items are counted; None if this is a delivery."""
        found = COUNTER_ITEM.fullmatch(self.item)
        return int(found[1]) if found else backfill_of(self.message_id)


class SealedDeadLetter(NamedTuple):
    """A dead letter with its sealed content, and its user if known."""

    id: int
    user_id: str | None
    delivery: Delivery


def backfill_of(message_id: str) -> int | None:
    """The id of the backfill in the message id of a dead letter, or None."""
    found = FETCH_ID.fullmatch(message_id)
    return int(found[1]) if found else None


def counter(digest: str, backfill_id: int | None) -> str:
    """The `item` of a dead letter that counts the refused items of a delivery, or of a backfill's pages."""
    return f"{COUNTER}{digest}" if backfill_id is None else f"{COUNTER}{backfill_id}-{digest}"


def listed(
    engine: Engine, ids: Sequence[int] | None = None, reason: str | None = None, limit: int = 100
) -> list[DeadLetter]:
    """Dead letters, newest first; `reason` is a part of their reasons, in any case of letters."""
    values = {"ids": list(ids) if ids else None, "reason": reason or None, "limit": limit}
    return [DeadLetter(**row._asdict()) for row in execute(engine, LIST, values)]


def delivery(engine: Engine, entry: DeadLetter) -> Delivery:
    with transaction(engine) as connection:
        return to_delivery(connection.execute(GET, {"id": entry.id}).one())


def is_counted(engine: Engine, entry: DeadLetter) -> bool:
    """Whether a dead letter counts refused items of the delivery."""
    key = {"aggregator": entry.aggregator, "message_id": entry.message_id, "counter": COUNTER}
    return bool(execute(engine, IS_COUNTED, key))


def read(engine: Engine) -> Iterator[SealedDeadLetter]:
    """Every dead letter, oldest first, including those that are added meanwhile."""
    after = 0
    while rows := execute(engine, READ, {"after": after}):
        yield from (SealedDeadLetter(row.id, row.user_id, to_delivery(row[2:])) for row in rows)
        after = rows[-1].id


def update_reason(engine: Engine, entry: DeadLetter, reason: str | None) -> None:
    """Records the reason of the last failed replay of a dead letter."""
    values = {"id": entry.id, "aggregator": entry.aggregator, "message_id": entry.message_id, "reason": reason}
    with transaction(engine, confirm=True) as connection:
        connection.execute(UPDATE_REASON, values)
        if not entry.item:
            connection.execute(UPDATE_REASON_IN_LEDGER, values)


def mark_resolved(engine: Engine, entry: DeadLetter) -> None:
    """Deletes the dead letter of an item or a raw message that was replayed, and corrects its ledger entry."""
    key = {"aggregator": entry.aggregator, "message_id": entry.message_id}
    with transaction(engine, confirm=True) as connection:
        connection.execute(DELETE, {"ids": [entry.id]})
        connection.execute(MARK_ITEMS_RESOLVED if entry.item else MARK_RESOLVED, key)


def drop(engine: Engine, entries: Sequence[DeadLetter]) -> int:
    """Deletes dead letters; the ledger keeps their entries. Returns the number deleted."""
    with transaction(engine, confirm=True) as connection:
        return connection.execute(DELETE, {"ids": [entry.id for entry in entries]}).rowcount


def add_dead_letter(
    connection: Connection, delivery: Delivery, reason: str, event_type: str | None = None, user_id: str | None = None
) -> None:
    """Stores a delivery that cannot be applied, sealed as received."""
    add_items(connection, [RefusedItem(delivery, reason, event_type, user_id)])


@dataclass(frozen=True)
class RefusedItem:
    """A dead letter to add: a sealed delivery, or an event with a single item of one."""

    delivery: Delivery
    reason: str
    event_type: str | None
    user_id: str | None
    item: str = ""
    items: int = 1


def add_items(connection: Connection, items: Sequence[RefusedItem]) -> None:
    """Stores dead letters. Those that are stored already stay as they are."""
    rows = [
        asdict(one.delivery)
        | {"received_at": one.delivery.received, "event_type": one.event_type, "user_id": one.user_id}
        | {"reason": one.reason, "item": one.item, "items": one.items}
        for one in items
    ]
    if rows:
        connection.execute(ADD, rows)


def replace_items(connection: Connection, keys: Sequence[DeliveryKey], items: Sequence[RefusedItem]) -> None:
    """Stores the items that the replay of these deliveries has refused, and deletes those it has not refused again."""
    still = STILL.values((one.delivery.aggregator, one.delivery.message_id, one.item) for one in items)
    resolved = connection.execute(DELETE_ITEMS, KEYS.values(keys) | still).all()
    add_items(connection, items)
    for aggregator, message_id in sorted(set(map(tuple, resolved))):
        connection.execute(MARK_ITEMS_RESOLVED, {"aggregator": aggregator, "message_id": message_id})
