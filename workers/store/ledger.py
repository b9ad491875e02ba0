"""The ledger: one row per delivery id, written in the transaction of its effect; and what could not be applied."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

import msgspec
from sqlalchemy import Connection, text

from app.delivery import Delivery

Outcome = Literal["applied", "duplicate", "stale", "ignored", "dead"]

SETTLE = text("""
INSERT INTO headrace.deliveries AS stored
    (aggregator, message_id, event_type, user_id, received_at, applied_at, outcome, attempts, error)
SELECT aggregator, message_id, event_type, user_id, received_at, now(), outcome, attempts, error
FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS given(aggregator text, message_id text, event_type text, user_id text,
     received_at timestamptz, outcome text, attempts int, error text)
ORDER BY aggregator, message_id
ON CONFLICT (aggregator, message_id) DO UPDATE SET
    attempts = stored.attempts + excluded.attempts,
    outcome = CASE WHEN stored.outcome = 'dead' THEN excluded.outcome ELSE stored.outcome END,
    error = CASE WHEN stored.outcome = 'dead' THEN excluded.error ELSE stored.error END
RETURNING aggregator, message_id, outcome, attempts > 1 AS again""")
EXHUME = text("DELETE FROM headrace.dead_letters WHERE aggregator = :aggregator AND message_id = :message_id")
BURY = text("""
INSERT INTO headrace.dead_letters
    (aggregator, message_id, event_type, received_at, reason, ordering_ms, reference, sealed)
VALUES (:aggregator, :message_id, :event_type, :received_at, :reason, :ordering_ms, :reference, :sealed)
ON CONFLICT (aggregator, message_id) DO NOTHING""")


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


def settle(connection: Connection, settled: Sequence[Settled]) -> set[tuple[str, str]]:
    """Records outcomes and returns which deliveries are dead now, as (aggregator, message id).

    The first outcome stands, unless it was `dead`: then a later attempt has mended it, and the letter goes.
    """
    if not settled:
        return set()
    rows = connection.execute(SETTLE, {"rows": msgspec.json.encode(settled).decode()}).all()
    mended = [row for row in rows if row.again and row.outcome != "dead"]
    if mended:
        connection.execute(EXHUME, [{"aggregator": one.aggregator, "message_id": one.message_id} for one in mended])
    return {(row.aggregator, row.message_id) for row in rows if row.outcome == "dead"}


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
