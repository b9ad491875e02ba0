"""The ledger: a row per delivery id, in the transaction of its effect; what was applied, and what could not be."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import Connection, Engine, TextClause, text

from app.delivery import Delivery
from workers.store.engine import transaction

Outcome = Literal["applied", "duplicate", "stale", "ignored", "dead"]

# One statement, because each is a round trip and costs a message of few deliveries more than its rows do.
SETTLED = """
WITH settled AS (
    INSERT INTO headrace.deliveries AS stored
        (aggregator, message_id, event_type, user_id, received_at, applied_at, outcome, attempts, error, reference)
    SELECT aggregator, message_id, event_type, user_id, received_at, now(), outcome, attempts, error, reference
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS given(aggregator text, message_id text, event_type text,
         user_id text, received_at timestamptz, outcome text, attempts int, error text, reference text)
    ORDER BY aggregator, message_id
    ON CONFLICT (aggregator, message_id) DO UPDATE SET {change}
    RETURNING aggregator, message_id, outcome, applied_at = now() AND outcome <> 'dead' AS is_news
), mended AS (
    DELETE FROM headrace.dead_letters AS letter USING settled
    WHERE is_news AND (letter.aggregator, letter.message_id) = (settled.aggregator, settled.message_id)
), kept AS (
    INSERT INTO headrace.kept (received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, sealed)
    SELECT received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, sealed
    FROM unnest(CAST(:received_at AS timestamptz[]), CAST(:aggregator AS text[]), CAST(:message_id AS text[]),
                CAST(:event_type AS text[]), CAST(:user_id AS text[]), CAST(:ordering_ms AS bigint[]),
                CAST(:reference AS text[]), CAST(:sealed AS bytea[]))
         AS given(received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, sealed)
    JOIN settled USING (aggregator, message_id) WHERE is_news
)
SELECT aggregator, message_id FROM settled WHERE outcome = 'dead'"""
SETTLE = text(
    SETTLED.format(
        change="""attempts = stored.attempts + excluded.attempts,
        applied_at = CASE WHEN stored.outcome = 'dead' THEN excluded.applied_at ELSE stored.applied_at END,
        outcome = CASE WHEN stored.outcome = 'dead' THEN excluded.outcome ELSE stored.outcome END,
        error = CASE WHEN stored.outcome = 'dead' THEN excluded.error ELSE stored.error END"""
    )
)
# A replay is no attempt of the sender's. It can only mend what was dead, or was left out by a setting.
SETTLE_AGAIN = text(
    SETTLED.format(
        change="""outcome = excluded.outcome, error = excluded.error,
        event_type = excluded.event_type, user_id = excluded.user_id,
        applied_at = CASE WHEN stored.outcome = 'dead' THEN excluded.applied_at ELSE stored.applied_at END
    WHERE (stored.outcome = 'dead' AND excluded.outcome <> 'dead')
       OR (stored.outcome = 'ignored' AND excluded.outcome NOT IN ('dead', 'ignored'))"""
    )
)
SETTLED_ALREADY = text("""
SELECT aggregator, message_id
FROM unnest(CAST(:aggregators AS text[]), CAST(:ids AS text[])) AS given(aggregator, message_id)
JOIN headrace.deliveries USING (aggregator, message_id) WHERE outcome NOT IN ('dead', 'ignored')""")
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


class Kept(NamedTuple):
    """A delivery that is to be kept sealed as it came, so that it can be applied again."""

    delivery: Delivery
    event_type: str | None
    user_id: str | None


def settle(
    connection: Connection, settled: Sequence[Settled], kept: Sequence[Kept] = (), *, replayed: bool = False
) -> set[Name]:
    """Records outcomes, and returns which are dead. The first one stands, unless that is `dead`.

    Then a later attempt has mended it, and its letter goes; a replay changes only what was dead or left out. Of `kept`,
    what was seen for the first time and is alive, or was mended just now, is kept.
    """
    if not settled:
        return set()
    deliveries = [one.delivery for one in kept]
    columns = ("received", "aggregator", "message_id", "ordering_ms", "reference", "sealed")
    values: dict[str, Any] = {name: [getattr(one, name) for one in deliveries] for name in columns}
    values["received_at"] = values.pop("received")
    values["event_type"], values["user_id"] = [one.event_type for one in kept], [one.user_id for one in kept]
    statement = SETTLE_AGAIN if replayed else SETTLE
    rows = connection.execute(statement, values | {"rows": msgspec.json.encode(settled).decode()})
    return {(row.aggregator, row.message_id) for row in rows}


def settled_already(connection: Connection, names: Sequence[Name]) -> set[Name]:
    """Which of these a replay cannot settle otherwise: they were neither dead nor left out."""
    return _named(connection, SETTLED_ALREADY, names)


def exhume(connection: Connection, names: Sequence[Name]) -> set[Name]:
    """Takes letters away that are dead no more, or that nobody wants. Returns which there were."""
    return _named(connection, EXHUME, names)


def _named(connection: Connection, statement: TextClause, names: Sequence[Name]) -> set[Name]:
    if not names:
        return set()
    aggregators, ids = zip(*names, strict=True)
    found = connection.execute(statement, {"aggregators": list(aggregators), "ids": list(ids)})
    return {(row.aggregator, row.message_id) for row in found}


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
