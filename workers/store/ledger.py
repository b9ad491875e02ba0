"""The delivery ledger: one row per delivery id with its outcome, written in the transaction that applies it."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import IntegrityError

from app.delivery import Delivery
from app.errors import TryLater
from workers.store.ledger_lookup import Attempt, DeliveryKey, first_arrivals

JUST_APPLIED = "another worker has just applied the same delivery"
Outcome = Literal["applied", "duplicate", "stale", "ignored", "dead"]

# One statement: for a message of few deliveries a round trip costs more than the rows. The month of an entry is that of
# the transaction that inserted it. An attempt gets the month of its entry, because the unique index of a partitioned
# table has to contain the month: without it, ON CONFLICT would find only entries of the present month.
SETTLED = """
WITH settled AS (
    INSERT INTO headrace.deliveries AS stored
        (month, aggregator, message_id, event_type, user_id, received_at, applied_at, outcome, attempts, error,
         reference, team_id, digest)
    SELECT coalesce(month, headrace.ledger_month()), aggregator, message_id, event_type, user_id, received_at, now(),
           outcome, attempts, error, reference, team_id, decode(digest, 'hex')
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS given(aggregator text, message_id text, event_type text,
         user_id text, received_at timestamptz, outcome text, attempts int, error text, reference text, team_id text,
         digest text, month date)
    ORDER BY aggregator, message_id
    ON CONFLICT (aggregator, message_id, month) DO UPDATE SET {change}
    RETURNING aggregator, message_id, outcome, applied_at = now() AND outcome <> 'dead' AS is_changed
), resolved AS (
    DELETE FROM headrace.dead_letters AS dead_letter USING settled
    WHERE is_changed AND (dead_letter.aggregator, dead_letter.message_id) = (settled.aggregator, settled.message_id)
), archived AS (
    INSERT INTO headrace.archive
        (received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, digest, sealed)
    SELECT received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, digest, sealed
    FROM unnest(CAST(:received_at AS timestamptz[]), CAST(:aggregator AS text[]), CAST(:message_id AS text[]),
                CAST(:event_type AS text[]), CAST(:user_id AS text[]), CAST(:ordering_ms AS bigint[]),
                CAST(:reference AS text[]), CAST(:digest AS bytea[]), CAST(:sealed AS bytea[]))
         AS given(received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, digest, sealed)
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
# A replay is not an attempt of the sender. It changes only dead deliveries and those that a setting excluded.
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


UNIQUE_VIOLATION = "23505"
# Near a change of month, two transactions that apply attempts of one delivery at once would insert it into two months:
# neither sees the other's entry, and no unique index covers both months. Here the second waits for the first, and sees
# its entry. The locks are ordered against deadlocks. There are 4096, fewer than the lock table has entries by default.
LOCK = text("""
SELECT pg_advisory_xact_lock(hashtext('headrace.deliveries'), key) FROM (
    SELECT DISTINCT hashtext(name) & 4095 AS key FROM unnest(CAST(:names AS text[])) AS name ORDER BY key) AS keys""")
# More than the longest transaction of a worker, and than the difference between the hosts' clocks.
NEAR_CHANGE_OF_MONTH = timedelta(minutes=10)


class OutcomeRow(msgspec.Struct):
    """The outcome of a delivery."""

    aggregator: str
    message_id: str
    event_type: str | None
    user_id: str | None
    received_at: datetime
    outcome: Outcome
    attempts: int = 1  # how often the message contains the delivery
    error: str | None = None
    reference: str | None = None  # the large request that the delivery belongs to
    team_id: str | None = None  # the Junction team that sent it
    digest: str | None = None  # in hexadecimal
    month: date | None = None  # of its entry (`FirstArrival`); None: it has no entry, or one of the present month


# The columns of `headrace.archive` and `headrace.dead_letters` for `to_delivery`, in its order.
DELIVERY_COLUMNS = """aggregator, message_id, extract(epoch FROM received_at)::float8 AS received_at, sealed,
    ordering_ms, reference, digest"""


def to_delivery(row: Sequence[Any]) -> Delivery:
    """The sealed delivery of a row. Unpacking takes 2 us; attributes or the mapping of a Row take 12 to 22 us."""
    aggregator, message_id, received_at, sealed, ordering_ms, reference, digest = row
    return Delivery(aggregator, message_id, received_at, sealed, ordering_ms, reference, digest)


class ArchivedDelivery(NamedTuple):
    """A delivery to archive, sealed as received, so that it can be replayed."""

    delivery: Delivery
    event_type: str | None
    user_id: str | None


def settle(
    connection: Connection,
    settled: Sequence[OutcomeRow],
    archived: Sequence[ArchivedDelivery] = (),
    *,
    replayed: bool = False,
    now: datetime | None = None,
) -> set[DeliveryKey]:
    """Records outcomes, and returns which deliveries are now dead. The first outcome stands, unless it was `dead`.

    If a later attempt resolves a dead delivery, its dead letter is deleted. A replay changes only dead and ignored
    deliveries. Deliveries in `archived` are stored if they are new and not dead, or if they were resolved just now.

    `now` is for tests. Raises TryLater if another transaction has just stored one of their digests under another id.
    """
    if not settled:
        return set()
    if is_near_change_of_month(now or datetime.now(UTC)):
        _lock(connection, settled)
    deliveries = [one.delivery for one in archived]
    values: dict[str, Any] = {
        name: [getattr(delivery, name) for delivery in deliveries]
        for name in ("aggregator", "message_id", "ordering_ms", "reference", "digest", "sealed")
    }
    values["received_at"] = [delivery.received for delivery in deliveries]
    values["event_type"], values["user_id"] = [one.event_type for one in archived], [one.user_id for one in archived]
    values["rows"] = msgspec.json.encode(settled).decode()
    try:
        rows = connection.execute(SETTLE_AGAIN if replayed else SETTLE, values)
    except IntegrityError as error:
        if getattr(error.orig, "sqlstate", None) == UNIQUE_VIOLATION:  # of the digest: ON CONFLICT handles the id
            raise TryLater(JUST_APPLIED) from None
        raise
    return {(row.aggregator, row.message_id) for row in rows}


def is_near_change_of_month(now: datetime) -> bool:
    """Whether transactions that overlap now may have different months."""
    earlier, later = now - NEAR_CHANGE_OF_MONTH, now + NEAR_CHANGE_OF_MONTH
    return earlier.month != later.month


def _lock(connection: Connection, settled: Sequence[OutcomeRow]) -> None:
    """Waits for transactions that settle the same deliveries, then sets the months of entries that have been committed.

    Raises TryLater if another transaction has stored one of their digests.
    """
    names = [f"{one.aggregator}:{one.message_id}" for one in settled] + [one.digest for one in settled if one.digest]
    connection.execute(LOCK, {"names": names})
    known = first_arrivals(
        connection,
        [
            Attempt(one.aggregator, one.message_id, one.received_at, bytes.fromhex(one.digest) if one.digest else None)
            for one in settled
        ],
    )
    for one in settled:
        if first := known.get((one.aggregator, one.message_id)):
            if first.message_id != one.message_id:
                raise TryLater(JUST_APPLIED)
            one.month = first.month


def settled_already(connection: Connection, keys: Sequence[DeliveryKey]) -> set[DeliveryKey]:
    """The deliveries whose outcome a replay cannot change: those that are neither dead nor ignored."""
    return select_deliveries(connection, SETTLED_ALREADY, keys)


def select_deliveries(connection: Connection, statement: TextClause, keys: Sequence[DeliveryKey]) -> set[DeliveryKey]:
    """Runs a statement over `:aggregators` and `:ids`, and returns the keys of its rows."""
    if not keys:
        return set()
    values = {"aggregators": [aggregator for aggregator, _ in keys], "ids": [message_id for _, message_id in keys]}
    return {(row.aggregator, row.message_id) for row in connection.execute(statement, values)}
