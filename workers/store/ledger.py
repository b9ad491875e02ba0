"""The ledger: a row per delivery id, in the transaction of its effect; what was applied, and what could not be."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Engine, text

from app.delivery import Delivery
from workers.store.engine import transaction

Outcome = Literal["applied", "duplicate", "stale", "ignored", "dead"]

INSERT = """
INSERT INTO headrace.deliveries AS stored
    (aggregator, message_id, event_type, user_id, received_at, applied_at, outcome, attempts, error, reference)
SELECT aggregator, message_id, event_type, user_id, received_at, now(), outcome, attempts, error, reference
FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS given(aggregator text, message_id text, event_type text, user_id text,
     received_at timestamptz, outcome text, attempts int, error text, reference text)
ORDER BY aggregator, message_id"""
SETTLE = text(f"""{INSERT}
ON CONFLICT (aggregator, message_id) DO UPDATE SET
    attempts = stored.attempts + excluded.attempts,
    applied_at = CASE WHEN stored.outcome = 'dead' THEN excluded.applied_at ELSE stored.applied_at END,
    outcome = CASE WHEN stored.outcome = 'dead' THEN excluded.outcome ELSE stored.outcome END,
    error = CASE WHEN stored.outcome = 'dead' THEN excluded.error ELSE stored.error END
RETURNING aggregator, message_id, outcome, applied_at = now() AS is_news""")
# A replay is no attempt of the sender's. It can only mend what was dead, or was left out by a setting.
SETTLE_AGAIN = text(f"""{INSERT}
ON CONFLICT (aggregator, message_id) DO UPDATE SET outcome = excluded.outcome, error = excluded.error,
    event_type = excluded.event_type, user_id = excluded.user_id,
    applied_at = CASE WHEN stored.outcome = 'dead' THEN excluded.applied_at ELSE stored.applied_at END
WHERE (stored.outcome = 'dead' AND excluded.outcome <> 'dead')
   OR (stored.outcome = 'ignored' AND excluded.outcome NOT IN ('dead', 'ignored'))
RETURNING aggregator, message_id, outcome, applied_at = now() AS is_news""")
EXHUME = text("""
DELETE FROM headrace.dead_letters AS letter
USING unnest(CAST(:aggregators AS text[]), CAST(:ids AS text[])) AS mended(aggregator, message_id)
WHERE (letter.aggregator, letter.message_id) = (mended.aggregator, mended.message_id)
RETURNING letter.aggregator, letter.message_id""")
BURY = text("""
INSERT INTO headrace.dead_letters
    (aggregator, message_id, event_type, received_at, reason, ordering_ms, reference, sealed)
VALUES (:aggregator, :message_id, :event_type, :received_at, :reason, :ordering_ms, :reference, :sealed)
ON CONFLICT (aggregator, message_id) DO NOTHING""")
KEEP = text("""
INSERT INTO headrace.kept (received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, sealed)
SELECT * FROM unnest(CAST(:received_at AS timestamptz[]), CAST(:aggregator AS text[]), CAST(:message_id AS text[]),
    CAST(:event_type AS text[]), CAST(:user_id AS text[]), CAST(:ordering_ms AS bigint[]), CAST(:reference AS text[]),
    CAST(:sealed AS bytea[]))""")
SUSPECT = text("""
INSERT INTO headrace.suspects AS stored (name, crashes) VALUES (:name, 1)
ON CONFLICT (name) DO UPDATE SET crashes = stored.crashes + 1 RETURNING crashes""")
SUSPECTS = text("SELECT name, crashes FROM headrace.suspects WHERE name = ANY(:names)")
ACQUIT = text("DELETE FROM headrace.suspects WHERE name = ANY(:names)")


class Settled(msgspec.Struct):
    """What became of a delivery."""

    aggregator: str
    message_id: str
    event_type: str | None
    user_id: str | None
    received_at: datetime
    outcome: Outcome
    attempts: int = 1  # how often the delivery came, in this message
    error: str | None = None
    reference: str | None = None  # the large request that it is a part of


Name = tuple[str, str]  # aggregator, message id


@dataclass(frozen=True)
class Entered:
    """What came of entering deliveries in the ledger."""

    dead: set[Name]
    news: set[Name]  # seen for the first time and alive, or mended just now: to be kept


def settle(connection: Connection, settled: Sequence[Settled], *, replayed: bool = False) -> Entered:
    """Records outcomes. The first one stands, unless it was `dead`: then a later attempt has mended it.

    With that its letter goes. A replay changes only what was dead or left out.
    """
    if not settled:
        return Entered(set(), set())
    statement = SETTLE_AGAIN if replayed else SETTLE
    rows = connection.execute(statement, {"rows": msgspec.json.encode(settled).decode()}).all()
    dead = {(row.aggregator, row.message_id) for row in rows if row.outcome == "dead"}
    news = [(row.aggregator, row.message_id) for row in rows if row.is_news and row.outcome != "dead"]
    exhume(connection, news)
    return Entered(dead, set(news))


def exhume(connection: Connection, names: Sequence[Name]) -> set[Name]:
    """Takes letters away that are dead no more, or that nobody wants. Returns which there were."""
    if not names:
        return set()
    aggregators, ids = zip(*names, strict=True)
    found = connection.execute(EXHUME, {"aggregators": list(aggregators), "ids": list(ids)})
    return {(row.aggregator, row.message_id) for row in found}


def keep(connection: Connection, kept: Sequence[tuple[Delivery, str | None, str | None]]) -> None:
    """Keeps deliveries sealed as they came, with their event type and user, so that they can be applied again."""
    if kept:
        deliveries = [delivery for delivery, _, _ in kept]
        columns = ("aggregator", "message_id", "ordering_ms", "reference", "sealed")
        values: dict[str, Any] = {name: [getattr(one, name) for one in deliveries] for name in columns}
        values["received_at"] = [delivery.received for delivery in deliveries]
        values["event_type"], values["user_id"] = ([one[n] for one in kept] for n in (1, 2))
        connection.execute(KEEP, values)


def suspect(engine: Engine, name: str) -> int:
    """Notes that a worker is at something that a worker has died with; how often that is now. Committed at once."""
    with transaction(engine) as connection:
        return int(connection.scalar(SUSPECT, {"name": name}) or 0)


def suspects(engine: Engine, names: Sequence[str]) -> dict[str, int]:
    """Which of these workers have died with, and how often."""
    with transaction(engine) as connection:
        return {row.name: row.crashes for row in connection.execute(SUSPECTS, {"names": list(names)})}


def acquit(connection: Connection, names: Sequence[str]) -> None:
    """A worker has come through with these alive."""
    connection.execute(ACQUIT, {"names": list(names)})


def bury(connection: Connection, delivery: Delivery, event_type: str | None, reason: str) -> None:
    """Keeps a delivery that cannot be applied, sealed as it came."""
    connection.execute(
        BURY,
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
