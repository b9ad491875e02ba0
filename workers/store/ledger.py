"""The ledger: a row per delivery id, in the transaction of its effect; what was applied, and what could not be."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import Connection, TextClause, text

from app.delivery import Delivery

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
    RETURNING aggregator, message_id, outcome, applied_at = now() AND outcome <> 'dead' AS is_changed
), mended AS (
    DELETE FROM headrace.dead_letters AS letter USING settled
    WHERE is_changed AND (letter.aggregator, letter.message_id) = (settled.aggregator, settled.message_id)
), kept AS (
    INSERT INTO headrace.archive
        (received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, sealed)
    SELECT received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, sealed
    FROM unnest(CAST(:received_at AS timestamptz[]), CAST(:aggregator AS text[]), CAST(:message_id AS text[]),
                CAST(:event_type AS text[]), CAST(:user_id AS text[]), CAST(:ordering_ms AS bigint[]),
                CAST(:reference AS text[]), CAST(:sealed AS bytea[]))
         AS given(received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, sealed)
    JOIN settled USING (aggregator, message_id) WHERE is_changed
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


class OutcomeRow(msgspec.Struct):
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


DeliveryKey = tuple[str, str]  # aggregator, message id


class ArchivedDelivery(NamedTuple):
    """A delivery that is to be kept sealed as it came, so that it can be applied again."""

    delivery: Delivery
    event_type: str | None
    user_id: str | None


def settle(
    connection: Connection,
    settled: Sequence[OutcomeRow],
    kept: Sequence[ArchivedDelivery] = (),
    *,
    replayed: bool = False,
) -> set[DeliveryKey]:
    """Records outcomes, and returns which are dead. The first one stands, unless that is `dead`.

    Then a later attempt has mended it, and its dead letter goes; a replay changes only what was dead or left out. Of
    `kept`, what was seen for the first time and is alive, or was mended just now, is kept.
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


def settled_already(connection: Connection, names: Sequence[DeliveryKey]) -> set[DeliveryKey]:
    """Which of these a replay cannot settle otherwise: they were neither dead nor left out."""
    return _named(connection, SETTLED_ALREADY, names)


def _named(connection: Connection, statement: TextClause, names: Sequence[DeliveryKey]) -> set[DeliveryKey]:
    if not names:
        return set()
    aggregators, ids = zip(*names, strict=True)
    found = connection.execute(statement, {"aggregators": list(aggregators), "ids": list(ids)})
    return {(row.aggregator, row.message_id) for row in found}
