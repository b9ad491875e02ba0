"""Dead letters: what could not be applied, sealed as it came, with the reason."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, Engine, text

from app.delivery import Delivery
from workers.store.engine import transaction
from workers.store.ledger import DeliveryKey, _named

LIST = text("""
SELECT letter.id, letter.aggregator, letter.message_id, coalesce(letter.event_type, entry.event_type) AS event_type,
       entry.user_id, letter.received_at, letter.died_at, letter.reason, coalesce(entry.attempts, 1) AS attempts,
       octet_length(letter.sealed) AS sealed_bytes, letter.reference
FROM headrace.dead_letters letter LEFT JOIN headrace.deliveries entry USING (aggregator, message_id)
WHERE (CAST(:ids AS bigint[]) IS NULL OR letter.id = ANY(:ids))
  AND (CAST(:reason AS text) IS NULL OR position(lower(:reason) IN lower(letter.reason)) > 0)
ORDER BY letter.id DESC LIMIT :limit""")
GET = text("""
SELECT aggregator, message_id, extract(epoch FROM received_at)::float8 AS received_at, sealed, ordering_ms, reference
FROM headrace.dead_letters WHERE id = :id""")
# A few at a time: one may be of many megabytes.
READ = text("""
SELECT letter.id, entry.user_id, letter.aggregator, letter.message_id,
       extract(epoch FROM letter.received_at)::float8 AS received_at, sealed, ordering_ms, letter.reference
FROM headrace.dead_letters letter LEFT JOIN headrace.deliveries entry USING (aggregator, message_id)
WHERE letter.id > :after ORDER BY letter.id LIMIT 10""")
UPDATE_REASON = text("""
UPDATE headrace.dead_letters SET reason = :reason
WHERE aggregator = :aggregator AND message_id = :message_id AND CAST(:reason AS text) IS NOT NULL""")
UPDATE_REASON_IN_LEDGER = text("""
UPDATE headrace.deliveries SET error = :reason
WHERE aggregator = :aggregator AND message_id = :message_id AND outcome = 'dead'""")
MARK_RESOLVED = text("""
UPDATE headrace.deliveries SET outcome = 'applied', error = NULL, applied_at = now()
WHERE aggregator = :aggregator AND message_id = :message_id AND outcome = 'dead'""")
OF_FETCH = re.compile(r"fetch-(\d+)-[0-9a-f]+")


@dataclass(frozen=True)
class DeadLetter:
    """A dead letter, without what it holds."""

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
    reference: str | None = None  # of an answer: the record whose stream was asked for

    @property
    def name(self) -> DeliveryKey:
        """Its delivery."""
        return self.aggregator, self.message_id

    @property
    def backfill_id(self) -> int | None:
        """The backfill whose request was refused, if it is the answer to one and no delivery."""
        return backfill_of(self.message_id)


class SealedDeadLetter(NamedTuple):
    """A dead letter with what it holds, and whose it is if anybody could tell."""

    id: int
    user_id: str | None
    delivery: Delivery


def backfill_of(message_id: str) -> int | None:
    """The id of the backfill in the message id of a dead letter, or None."""
    found = OF_FETCH.fullmatch(message_id)
    return int(found[1]) if found else None


def listed(
    engine: Engine, ids: Sequence[int] | None = None, reason: str | None = None, limit: int = 100
) -> list[DeadLetter]:
    """Dead letters, the newest first; `reason` is a part of theirs."""
    values = {"ids": list(ids) if ids else None, "reason": reason or None, "limit": limit}
    with transaction(engine) as connection:
        return [DeadLetter(**row) for row in connection.execute(LIST, values).mappings()]


def delivery(engine: Engine, entry: DeadLetter) -> Delivery:
    """The delivery of a dead letter, still sealed."""
    with transaction(engine) as connection:
        return Delivery(*connection.execute(GET, {"id": entry.id}).one())


def read(engine: Engine) -> Iterator[SealedDeadLetter]:
    """Every dead letter, the oldest first, with those that are written meanwhile."""
    after = 0
    while True:
        with transaction(engine) as connection:
            found = [
                SealedDeadLetter(row[0], row[1], Delivery(*row[2:]))
                for row in connection.execute(READ, {"after": after})
            ]
        if not found:
            return
        yield from found
        after = found[-1].id


def update_reason(engine: Engine, entry: DeadLetter, reason: str | None) -> None:
    """Records the reason of the last failed replay of a dead letter."""
    values = {"aggregator": entry.aggregator, "message_id": entry.message_id, "reason": reason}
    with transaction(engine) as connection:
        connection.execute(UPDATE_REASON, values)
        connection.execute(UPDATE_REASON_IN_LEDGER, values)


def mark_resolved(engine: Engine, entry: DeadLetter) -> None:
    """What was set aside whole has been applied."""
    with transaction(engine) as connection:
        delete_dead_letters(connection, [entry.name])
        connection.execute(MARK_RESOLVED, {"aggregator": entry.aggregator, "message_id": entry.message_id})


def drop(engine: Engine, entries: Sequence[DeadLetter]) -> int:
    """Deletes dead letters; the ledger keeps their entries as dead. Returns the number deleted."""
    with transaction(engine) as connection:
        return len(delete_dead_letters(connection, [entry.name for entry in entries]))


DELETE = text("""
DELETE FROM headrace.dead_letters AS letter
USING unnest(CAST(:aggregators AS text[]), CAST(:ids AS text[])) AS mended(aggregator, message_id)
WHERE (letter.aggregator, letter.message_id) = (mended.aggregator, mended.message_id)
RETURNING letter.aggregator, letter.message_id""")
ADD = text("""
INSERT INTO headrace.dead_letters
    (aggregator, message_id, event_type, received_at, reason, ordering_ms, reference, sealed)
VALUES (:aggregator, :message_id, :event_type, :received_at, :reason, :ordering_ms, :reference, :sealed)
ON CONFLICT (aggregator, message_id) DO NOTHING""")


def delete_dead_letters(connection: Connection, names: Sequence[DeliveryKey]) -> set[DeliveryKey]:
    """Deletes dead letters that were replayed or discarded. Returns those deleted."""
    return _named(connection, DELETE, names)


def add_dead_letter(connection: Connection, delivery: Delivery, event_type: str | None, reason: str) -> None:
    """Keeps a delivery that cannot be applied, sealed as it came."""
    connection.execute(
        ADD,
        {
            "aggregator": delivery.aggregator,
            "message_id": delivery.message_id,
            "event_type": event_type,
            "received_at": delivery.received,
            "reason": reason,
            "ordering_ms": delivery.ordering_ms,
            "reference": delivery.reference,
            "sealed": delivery.sealed,
        },
    )
