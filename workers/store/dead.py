"""Dead letters: what could not be applied, sealed as it came, with the reason."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Engine, text

from app.delivery import Delivery
from workers.store.engine import transaction
from workers.store.ledger import Name, exhume

LIST = text("""
SELECT letter.id, letter.aggregator, letter.message_id, coalesce(letter.event_type, entry.event_type) AS event_type,
       entry.user_id, letter.received_at, letter.died_at, letter.reason, coalesce(entry.attempts, 1) AS attempts,
       octet_length(letter.sealed) AS sealed_bytes, letter.reference
FROM headrace.dead_letters letter LEFT JOIN headrace.deliveries entry USING (aggregator, message_id)
WHERE (CAST(:ids AS bigint[]) IS NULL OR letter.id = ANY(:ids))
  AND (CAST(:reason AS text) IS NULL OR position(lower(:reason) IN lower(letter.reason)) > 0)
ORDER BY letter.id DESC LIMIT :most""")
GET = text("""
SELECT aggregator, message_id, extract(epoch FROM received_at)::float8 AS received_at, sealed, ordering_ms, reference
FROM headrace.dead_letters WHERE id = :id""")
# A few at a time: one may be of many megabytes.
READ = text("""
SELECT letter.id, entry.user_id, letter.aggregator, letter.message_id,
       extract(epoch FROM letter.received_at)::float8 AS received_at, sealed, ordering_ms, letter.reference
FROM headrace.dead_letters letter LEFT JOIN headrace.deliveries entry USING (aggregator, message_id)
WHERE letter.id > :after ORDER BY letter.id LIMIT 10""")
RESTATE = text("""
UPDATE headrace.dead_letters SET reason = :reason
WHERE aggregator = :aggregator AND message_id = :message_id AND CAST(:reason AS text) IS NOT NULL""")
RESTATE_IN_LEDGER = text("""
UPDATE headrace.deliveries SET error = :reason
WHERE aggregator = :aggregator AND message_id = :message_id AND outcome = 'dead'""")
MENDED = text("""
UPDATE headrace.deliveries SET outcome = 'applied', error = NULL, applied_at = now()
WHERE aggregator = :aggregator AND message_id = :message_id AND outcome = 'dead'""")
OF_FETCH = re.compile(r"fetch-(\d+)-[0-9a-f]+")


@dataclass(frozen=True)
class Letter:
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
    def name(self) -> Name:
        """Its delivery."""
        return self.aggregator, self.message_id

    @property
    def backfill_id(self) -> int | None:
        """The backfill whose request was refused, if it is the answer to one and no delivery."""
        return backfill_of(self.message_id)


class Held(NamedTuple):
    """A dead letter with what it holds, and whose it is if anybody could tell."""

    id: int
    user_id: str | None
    delivery: Delivery


def backfill_of(message_id: str) -> int | None:
    """The backfill that a letter's name tells of, if it does."""
    found = OF_FETCH.fullmatch(message_id)
    return int(found[1]) if found else None


def listed(
    engine: Engine, ids: Sequence[int] | None = None, reason: str | None = None, most: int = 100
) -> list[Letter]:
    """Dead letters, the newest first; `reason` is a part of theirs."""
    values = {"ids": list(ids) if ids else None, "reason": reason or None, "most": most}
    with transaction(engine) as connection:
        return [Letter(**row) for row in connection.execute(LIST, values).mappings()]


def delivery(engine: Engine, letter: Letter) -> Delivery:
    """What a letter holds, still sealed."""
    with transaction(engine) as connection:
        return Delivery(*connection.execute(GET, {"id": letter.id}).one())


def read(engine: Engine) -> Iterator[Held]:
    """Every dead letter, the oldest first, with those that are written meanwhile."""
    after = 0
    while True:
        with transaction(engine) as connection:
            found = [Held(row[0], row[1], Delivery(*row[2:])) for row in connection.execute(READ, {"after": after})]
        if not found:
            return
        yield from found
        after = found[-1].id


def restate(engine: Engine, letter: Letter, reason: str | None) -> None:
    """Writes down why a letter is dead still, which may be another reason than it was."""
    values = {"aggregator": letter.aggregator, "message_id": letter.message_id, "reason": reason}
    with transaction(engine) as connection:
        connection.execute(RESTATE, values)
        connection.execute(RESTATE_IN_LEDGER, values)


def mended(engine: Engine, letter: Letter) -> None:
    """What was set aside whole has been applied."""
    with transaction(engine) as connection:
        exhume(connection, [letter.name])
        connection.execute(MENDED, {"aggregator": letter.aggregator, "message_id": letter.message_id})


def drop(engine: Engine, letters: Sequence[Letter]) -> int:
    """Throws letters away; the ledger remembers that they were dead. Returns how many there were."""
    with transaction(engine) as connection:
        return len(exhume(connection, [letter.name for letter in letters]))
