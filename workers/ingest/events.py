"""Applies notices, large requests, lost deliveries and user id changes: the actions that are not health data."""

from collections.abc import Sequence

from sqlalchemy import Connection

from workers.actions import LargeRequest, LostDelivery, Notice, UserIdChange
from workers.ingest.outcomes import ParsedDelivery
from workers.store import lost_deliveries
from workers.store.backfills import BackfillRequest, open_backfill
from workers.store.ledger import expect
from workers.store.samples import Written
from workers.store.user_merges import merge_user
from workers.store.writer import BatchItem


def apply_events(
    connection: Connection, parsed: Sequence[ParsedDelivery], batch: Sequence[BatchItem], written: Written
) -> list[int]:
    """Returns the ids of the backfills to fetch.

    User id changes are applied last, so that they also move the data that this message wrote under the old id.
    """
    backfills = []
    for item in sorted(batch, key=lambda item: isinstance(item.action, UserIdChange)):
        delivery = parsed[item.n].delivery
        match item.action:
            case Notice() as notice:
                asked = BackfillRequest(delivery.aggregator, delivery.message_id, "notice", delivery.received)
                backfill_id = open_backfill(connection, asked, notice)
                backfills += [backfill_id] if backfill_id is not None else []
                written.changed[item.n] += backfill_id is not None
            case LargeRequest() as large:
                written.changed[item.n] += expect(connection, delivery.aggregator, large)
            case LostDelivery() as lost:
                written.changed[item.n] += lost_deliveries.report(connection, delivery, lost)
            case UserIdChange() as change:
                written.changed[item.n] += merge_user(connection, change.old_user_id, change.user_id)
    return backfills
