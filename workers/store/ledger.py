"""The delivery ledger: one row per delivery id with its outcome, written in the transaction that applies it.

Look-ups find entries by digest or id, in the months that can have them. Large requests, history that was requested
outside Headrace, are counted in the ledger too: their deliveries may arrive in any order.
"""

import operator
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import IntegrityError

from app.config.types import MAX_TOLERANCE_SECONDS
from app.delivery import Delivery
from app.errors import TryLater
from workers.actions import LargeRequest
from workers.aggregators import svix_ids
from workers.store.sql import RowParameters

DeliveryKey = tuple[str, str]  # aggregator, message id
JUST_APPLIED = "another worker has just applied the same delivery"
Outcome = Literal["applied", "duplicate", "stale", "ignored", "dead"]
# One statement: for a message of few deliveries a round trip costs more than the rows. The month of an entry is that of
# the transaction that inserted it. An attempt gets the month of its entry, because the unique index of a partitioned
# table has to contain the month: without it, ON CONFLICT would find only entries of the present month.
ARCHIVED = RowParameters(
    "event_type text, user_id text, received_at timestamptz, aggregator text, message_id text, ordering_ms bigint, "
    "reference text, digest bytea, sealed bytea"
)
OF_DELIVERY = operator.attrgetter(
    "received", "aggregator", "message_id", "ordering_ms", "reference", "digest", "sealed"
)
SETTLED = f"""
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
    ON CONFLICT (aggregator, message_id, month) DO UPDATE SET {{change}}
    RETURNING aggregator, message_id, outcome, applied_at = now() AND outcome <> 'dead' AS is_changed
), resolved AS (
    DELETE FROM headrace.dead_letters AS dead_letter USING settled
    WHERE is_changed AND (dead_letter.aggregator, dead_letter.message_id) = (settled.aggregator, settled.message_id)
), archived AS (
    INSERT INTO headrace.archive ({ARCHIVED.columns})
    SELECT {ARCHIVED.columns}
    FROM {ARCHIVED} JOIN settled USING (aggregator, message_id) WHERE is_changed
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
KEYS = RowParameters("aggregator text, message_id text")
SETTLED_ALREADY = text(f"""
SELECT aggregator, message_id FROM {KEYS} JOIN headrace.deliveries USING (aggregator, message_id)
WHERE outcome NOT IN ('dead', 'ignored')""")
UNIQUE_VIOLATION = "23505"
# Near a change of month, two transactions that apply attempts of one delivery at once would insert it into two months:
# neither sees the other's entry, and no unique index covers both months. Here the second waits for the first, and sees
# its entry. The locks are ordered against deadlocks. There are 4096, fewer than the lock table has entries by default.
LOCK = text("""
SELECT pg_advisory_xact_lock(hashtext('headrace.deliveries'), key) FROM (
    SELECT DISTINCT hashtext(name) & 4095 AS key FROM unnest(CAST(:names AS text[])) AS name ORDER BY key) AS keys""")
# More than the longest transaction of a worker, and than the difference between the hosts' clocks.
NEAR_CHANGE_OF_MONTH = timedelta(minutes=10)
# The endpoint accepts a signature within MAX_TOLERANCE_SECONDS before and after its time, so between the first and the
# last attempt with a digest there are two days at most. Svix's clock may be ahead of ours.
DIGEST_SPAN, CLOCK_SPAN = timedelta(seconds=2 * MAX_TOLERANCE_SECONDS), timedelta(hours=1)
# The entries of a batch, by digest or id: one index scan of each month. PostgreSQL executes the same conditions with OR
# as a scan of the table. The months are literals, so that older partitions are not even opened. The arrays are
# subqueries, whose length the planner does not know: with plain parameters, a plan for the present values looks cheaper
# than the stored one, and planning 14 months takes 1.5 ms.
ENTRIES = """
SELECT aggregator, message_id, digest, extract(epoch FROM received_at)::float8 AS received_at,
       outcome = 'dead' AS is_dead, month
FROM headrace.deliveries WHERE aggregator = ANY(CAST((SELECT :aggregators) AS text[])) AND {name} AND month >= '{month}'
"""
BY_DIGEST, BY_ID = "digest = ANY(CAST((SELECT :digests) AS bytea[]))", "message_id = ANY(CAST((SELECT :ids) AS text[]))"
EXPECT = text("""
INSERT INTO headrace.large_requests AS stored (aggregator, reference, user_id, provider, expected)
VALUES (:aggregator, :reference, :user_id, :provider, :expected)
ON CONFLICT (aggregator, reference) DO UPDATE SET expected = excluded.expected
WHERE excluded.expected IS NOT NULL AND stored.expected IS DISTINCT FROM excluded.expected""")


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
    values: dict[str, Any] = ARCHIVED.values(
        (one.event_type, one.user_id, *OF_DELIVERY(one.delivery)) for one in archived
    )
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
    found = connection.execute(SETTLED_ALREADY, KEYS.values(keys)) if keys else ()
    return {(row.aggregator, row.message_id) for row in found}


class Attempt(NamedTuple):
    """The fields of a delivery that identify it in the ledger."""

    aggregator: str
    message_id: str
    received_at: datetime
    digest: bytes | None

    @property
    def first_month(self) -> date:
        """The first month that can have an entry with this id. Junction's signed ids contain their time of creation."""
        created_at = svix_ids.created_at(self.message_id) if self.aggregator == "junction" else None
        return _month(created_at - CLOCK_SPAN) if created_at else date.min

    def may_be_of_earlier_month(self) -> bool:
        """Whether the ledger may have an entry with this id that is older than the present month."""
        return self.first_month < _month(datetime.now(UTC))


class FirstArrival(NamedTuple):
    """The ledger's entry of a delivery that has arrived before."""

    message_id: str  # of the first delivery with the same digest
    received_at: float  # unix seconds
    is_dead: bool
    has_digest: bool  # it was found by the digest: the signed time and body are the same
    month: date  # of the entry


def first_arrivals(connection: Connection, attempts: Sequence[Attempt]) -> dict[DeliveryKey, FirstArrival]:
    """The entries of deliveries that are in the ledger under their digest or their id."""
    statement = _statement(
        _month(min(one.received_at for one in attempts) - DIGEST_SPAN), min(one.first_month for one in attempts)
    )
    values = {
        "aggregators": sorted({one.aggregator for one in attempts}),
        "ids": [one.message_id for one in attempts],
        "digests": [one.digest for one in attempts if one.digest],
    }
    rows = connection.execute(statement, values).all()
    by_digest = {(row.aggregator, row.digest): row for row in rows if row.digest}
    by_id = {(row.aggregator, row.message_id): row for row in rows}
    found = {}
    for one in attempts:
        key = one.aggregator, one.message_id
        same = by_digest.get((one.aggregator, one.digest))
        if first := same or by_id.get(key):
            found[key] = FirstArrival(first.message_id, first.received_at, first.is_dead, same is not None, first.month)
    return found


@lru_cache
def _statement(first_digest: date, first_id: date) -> TextClause:
    by_digest, by_id = ENTRIES.format(name=BY_DIGEST, month=first_digest), ENTRIES.format(name=BY_ID, month=first_id)
    return text(f"{by_digest} UNION ALL {by_id}")


def _month(moment: datetime) -> date:
    return moment.astimezone(UTC).date().replace(day=1)


def expect(connection: Connection, aggregator: str, announced: LargeRequest) -> bool:
    """Records an announced large request and its number of deliveries, if known. False if nothing was new."""
    return connection.execute(EXPECT, asdict(announced) | {"aggregator": aggregator}).rowcount > 0
