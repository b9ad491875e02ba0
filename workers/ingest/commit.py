"""Commits parsed deliveries: their data, their events, their outcomes and their dead letters in one transaction."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sqlalchemy import Connection, Engine

from app.config.settings import Settings
from app.observability import metrics, tracing
from app.sealing import Sealer
from workers.actions import LargeRequest, LostDelivery, Notice, Origin, Parsed, SeriesKey, UserIdChange
from workers.ingest.crashes import CrashCounter
from workers.ingest.outcomes import Applied, ParsedDelivery, outcome_of, with_merged_user, without_erased
from workers.ingest.ownership import claims, merged_ids, without_other_owners
from workers.ingest.refused import count, dead_letters_of
from workers.store import lost_deliveries
from workers.store.backfills import BackfillRequest, open_backfill
from workers.store.dead_letters import RefusedItem, add_items, replace_items
from workers.store.engine import WAIT_LITTLE, transaction
from workers.store.ledger import ArchivedDelivery, DeliveryKey, expect, settle, settled_already
from workers.store.samples import Written
from workers.store.series import SeriesNumbers
from workers.store.user_merges import merge_user
from workers.store.users import upsert_users
from workers.store.writer import BatchItem, write


class Committer:
    """Commits batches of parsed deliveries. One per worker process."""

    def __init__(self, engine: Engine, settings: Settings, sealer: Sealer, crashes: CrashCounter) -> None:
        self._engine, self._settings, self._sealer, self._crashes = engine, settings, sealer, crashes
        self._series = SeriesNumbers(engine)
        self.applied_at = -math.inf  # when a delivery was last applied, in seconds of the monotonic clock

    def commit(self, batch: Sequence[ParsedDelivery]) -> Applied:
        """Applies and settles a batch, except the deliveries for the lane `download`. Raises the error of a statement.

        All deliveries have the same `is_replay` and `is_retry`.
        """
        here = [one for one in batch if not one.is_for_download]
        origin = batch[0].origin
        numbers = self._numbers(here)
        applied = Applied([], [])
        with (
            tracing.span("commit", deliveries=len(here)),
            transaction(self._engine, confirm=batch[0].is_replay) as connection,
        ):
            if batch[0].is_retry:
                connection.execute(WAIT_LITTLE)
            users = upsert_users(connection, claims(here))
            here = without_erased(without_other_owners(here, users), users)
            merged = merged_ids(here, users)
            if not merged:
                applied = self._write(connection, here, numbers, origin)
        if merged:  # in a new transaction: the rows of the new user_id may have series that are not registered yet
            return self.commit([with_merged_user(one, merged) for one in batch])
        self._crashes.forget()
        if any(one.reason is None for one in here):
            self.applied_at = time.monotonic()
        metrics.count_rows(applied.rows, origin)
        # Not when they are parsed: a delivery may be parsed again before it is committed.
        parsed = [one.parsed for one in here if one.parsed and not one.reason and not one.is_item]
        metrics.DUPLICATE_SAMPLES.inc(sum(one.duplicate_samples for one in parsed))
        metrics.SAMPLES_WITHOUT_TIMESTAMP.inc(sum(one.samples_without_timestamp for one in parsed))
        metrics.REFUSED_ITEMS.labels(origin).inc(sum(count(one.refused) for one in parsed))
        return replace(applied, for_download=tuple(one.delivery for one in batch if one.is_for_download))

    def _numbers(self, here: Sequence[ParsedDelivery]) -> dict[SeriesKey, int]:
        numbers: dict[SeriesKey, int] = {}
        for aggregator in dict.fromkeys(one.delivery.aggregator for one in here):
            own = (one for one in here if one.delivery.aggregator == aggregator)
            numbers |= self._series.prepare(aggregator, [action for one in own for action in one.actions])
        return numbers

    def _write(
        self, connection: Connection, batch: Sequence[ParsedDelivery], numbers: Mapping[SeriesKey, int], origin: Origin
    ) -> Applied:
        is_replay = origin == "replay"
        items = [BatchItem(n, action) for n, one in enumerate(batch) for action in one.actions]
        known = settled_already(connection, [one.key for one in batch]) if is_replay else set()
        seen = {n for n, one in enumerate(batch) if one.key in known}  # a replay cannot change their outcome
        with tracing.span("merge", actions=len(items)):
            written = write(connection, items, origin, numbers, seen)
        backfills = _apply_events(connection, batch, items, written)
        settled = [outcome_of(n, one, written) for n, one in enumerate(batch)]
        unseen = [n for n, one in enumerate(batch) if n not in seen and not one.is_item]
        archived = _to_archive(batch[n] for n in unseen) if self._settings.keep_days else ()
        with tracing.span("settle"):
            dead = settle(connection, [settled[n] for n in unseen], archived, replayed=is_replay)
        self._add_dead_letters(connection, batch, dead, origin)
        self._crashes.clear(connection)
        return Applied(settled, backfills, rows=written.rows)

    def _add_dead_letters(
        self, connection: Connection, batch: Sequence[ParsedDelivery], dead: set[DeliveryKey], origin: Origin
    ) -> None:
        """Stores dead deliveries, and refused items of others. A replay also deletes the items that it has applied."""
        items: list[RefusedItem] = []
        read: list[DeliveryKey] = []
        for one in batch:
            parsed = one.parsed or Parsed("")
            if one.reason and one.key in dead:
                items.append(RefusedItem(one.delivery, one.reason, parsed.event_type or None, parsed.user_id))
            elif not one.reason and not one.is_item:
                read.append(one.key)
                items += dead_letters_of(parsed.refused, one.delivery, parsed.event_type, parsed.user_id, self._sealer)
        if origin == "replay":
            replace_items(connection, read, items)
        else:
            add_items(connection, items)


def _apply_events(
    connection: Connection, parsed: Sequence[ParsedDelivery], batch: Sequence[BatchItem], written: Written
) -> list[int]:
    """Applies the actions that are not health data, and returns the ids of the backfills to fetch.

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


def _to_archive(opened: Iterable[ParsedDelivery]) -> list[ArchivedDelivery]:
    return [
        ArchivedDelivery(one.delivery, one.parsed.event_type, one.parsed.user_id)
        for one in opened
        if one.parsed and not one.reason and not one.is_erased
    ]
