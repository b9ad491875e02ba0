"""Looks up deliveries in the ledger, by their digest or id, in the months that can have them."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

from sqlalchemy import Connection, TextClause, text

from app.config.types import MAX_TOLERANCE_SECONDS
from workers.aggregators import svix_ids

DeliveryKey = tuple[str, str]  # aggregator, message id
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
