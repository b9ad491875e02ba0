"""Applies messages: decrypts and parses the deliveries, merges their data and records outcomes, in one transaction."""

import contextlib
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from msgspec.structs import replace as replace_struct
from sqlalchemy import Connection, Engine

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, seal, unpack
from app.errors import TryLater, Unprocessable
from app.observability import metrics, tracing
from app.sealing import Sealer
from workers.actions import LargeRequest, LostDelivery, Notice, Origin, Parsed, SeriesKey, UserIdChange
from workers.aggregators.registry import AGGREGATORS
from workers.ingest import refused
from workers.ingest.crashes import MAX_CRASHES, CrashCounter
from workers.ingest.outcomes import (
    Applied,
    ParsedDelivery,
    client_ids,
    combine,
    once_each,
    outcome_of,
    reason_of,
    to_archive,
    with_merged_user,
    with_repaired_records,
    without_erased,
)
from workers.store import lost_deliveries
from workers.store.backfills import BackfillRequest, open_backfill
from workers.store.dead_letters import add_dead_letter, add_items, replace_items
from workers.store.engine import transaction
from workers.store.large_requests import expect
from workers.store.ledger import first_arrivals, settle, settled_already
from workers.store.series import SeriesNumbers
from workers.store.user_merges import merge_user
from workers.store.users import upsert_users
from workers.store.writer import BatchItem, Written, write

UNKNOWN = "unknown"  # the aggregator of dead letters that are raw messages
log = logging.getLogger(__name__)


class Applier:
    """Writes the data of messages to the database. One per worker process."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._sealer = Sealer(settings.encryption_keys)
        self._series = SeriesNumbers(engine)
        self._crashes = CrashCounter(engine)

    def apply(self, packed: str, *, redelivered: bool = False) -> Applied:
        """Applies a message. Raises TryLater if it must be retried; a retry never applies data twice.

        One transaction applies all deliveries. If PostgreSQL rejects it, each delivery gets its own transaction, so
        that only the rejected one becomes a dead letter. The deliveries of a redelivered message are applied one by one
        too, because one of them may have crashed the previous worker.
        """
        try:
            deliveries = unpack(packed)
        except Unprocessable as reason:  # invalid, or of a newer version: stored raw, to be replayed after an upgrade
            return self.dead_letter_raw(packed.encode(), str(reason))
        return self.apply_deliveries(deliveries, redelivered=redelivered)

    def apply_deliveries(self, deliveries: Sequence[Delivery], *, redelivered: bool = False) -> Applied:
        """As `apply`, for unpacked deliveries."""
        once = once_each(deliveries)
        tracing.set_batch_size(len(deliveries))
        return _record_metrics(self._apply_one_by_one(once) if redelivered else self._apply_batch(once, "webhook"))

    def reject(self, delivery: Delivery, reason: str) -> Applied:
        """Stores a delivery as a dead letter. Raises TryLater."""
        return _record_metrics(self._commit([ParsedDelivery(delivery, 1, reason=reason)]))

    def dead_letter_raw(self, raw: bytes, reason: str) -> Applied:
        """Stores a raw message that is invalid as a dead letter, with its digest as the id. Raises TryLater."""
        message = seal(UNKNOWN, Receipt(hashlib.sha256(raw).hexdigest()), raw, self._sealer)
        return _record_metrics(self._commit([ParsedDelivery(message, 1, reason=reason)]))

    def replay_raw_message(self, message: Delivery) -> Applied:
        """Applies a raw message that became a dead letter. Raises Unprocessable if it is still invalid."""
        raw = self._sealer.open(message.sealed, message.key)
        return _record_metrics(self._apply_batch(once_each(extract_deliveries(raw)), "webhook"))

    def replay(self, deliveries: Sequence[Delivery]) -> Applied:
        """Applies archived or dead deliveries. Raises TryLater."""
        return self._apply_batch(once_each(deliveries), "replay")

    def replay_item(self, item: Delivery) -> str | None:
        """Applies a refused item of a delivery. Returns the reason if it is refused again. Raises TryLater."""
        opened = self._parse(ParsedDelivery(item, 1, is_item=True), "replay")
        applied = self._commit_alone(opened, "replay")
        reasons = [one.error for one in applied.settled if one.outcome == "dead"]
        reasons += [one.reason for one in (opened.parsed.refused if opened.parsed else ())]
        return reasons[0] if reasons else None

    def _apply_batch(self, batch: Sequence[ParsedDelivery], origin: Origin) -> Applied:
        parsed = self._with_first_arrival([self._parse(one, origin) for one in batch])
        try:
            return self._commit(parsed, origin)
        except TryLater:
            raise
        except Exception as error:  # noqa: BLE001 - applied one by one, the failing delivery is found
            log.info("applying the %d deliveries of a message one by one: %s", len(parsed), reason_of(error))
            return combine([self._commit_alone(one, origin) for one in parsed])

    def _apply_one_by_one(self, batch: Sequence[ParsedDelivery]) -> Applied:
        """Applies a redelivered message. A crash is counted before each delivery, and cleared when it is committed."""
        parts = []
        for one in self._crashes.safest_first(batch):
            reason = f"the worker crashed {MAX_CRASHES + 1} times while processing this delivery"
            is_poison = self._crashes.is_poison(one)
            try:
                (parsed,) = self._with_first_arrival([replace(one, reason=reason) if is_poison else self._parse(one)])
                parts.append(self._commit_alone(parsed, "webhook"))
            except TryLater:
                self._crashes.release()
                raise
        return combine(parts)

    def _parse(self, one: ParsedDelivery, origin: Origin = "webhook") -> ParsedDelivery:
        delivery = one.delivery
        aggregator = AGGREGATORS.get(delivery.aggregator)
        if aggregator is None:
            return replace(one, reason="unknown aggregator")
        try:
            with tracing.span("open", aggregator=delivery.aggregator, delivery=delivery.message_id):
                body = self._sealer.open(delivery.sealed, delivery.key)
                parsed = aggregator.parse(delivery, body, self._settings)
        except Exception as error:  # noqa: BLE001 - whatever the error, the delivery becomes a dead letter
            return replace(one, reason=reason_of(error), parsed=self._identify(delivery))
        if parsed.duplicate_samples:
            metrics.DUPLICATE_SAMPLES.inc(parsed.duplicate_samples)
        if parsed.samples_without_timestamp:
            metrics.SAMPLES_WITHOUT_TIMESTAMP.inc(parsed.samples_without_timestamp)
        opened = replace(one, parsed=parsed)
        if origin == "replay" and opened.is_claim_check:
            return replace(one, reason="the delivery only contained a URL, which has expired")
        return opened

    def _identify(self, delivery: Delivery) -> Parsed | None:
        """The type and the user of a delivery that cannot be parsed, if they can be read."""
        try:
            return AGGREGATORS[delivery.aggregator].identify(self._sealer.open(delivery.sealed, delivery.key))
        except Exception as error:  # noqa: BLE001 - a body that breaks `parse` may break this too, for every retry
            log.debug("a delivery names no event: %s", reason_of(error))
            return None

    def _with_first_arrival(self, parsed: Sequence[ParsedDelivery]) -> list[ParsedDelivery]:
        """The deliveries. One without a clock of its sender that has arrived before keeps the time of that arrival.

        Otherwise its repetition would be newer than an update that arrived in between. Raises TryLater.
        """
        undated = [one.delivery for one in parsed if one.parsed and one.parsed.is_undated and not one.is_claim_check]
        if not undated:
            return list(parsed)
        with transaction(self._engine) as connection:
            known = first_arrivals(connection, [(one.aggregator, one.message_id) for one in undated])
        found = []
        for one in parsed:
            first = known.get((one.delivery.aggregator, one.delivery.message_id))
            if one.parsed and one.parsed.is_undated and first is not None and first < one.delivery.received_at:
                found.append(self._parse(replace(one, delivery=replace_struct(one.delivery, received_at=first))))
            else:
                found.append(one)
        return found

    def _commit_alone(self, one: ParsedDelivery, origin: Origin) -> Applied:
        try:
            return self._commit([one], origin)
        except TryLater:
            raise
        except Exception as error:
            if isinstance(error, Unprocessable) and one.reason is None and not one.is_repaired:
                with contextlib.suppress(Unprocessable):
                    return self._commit_alone(with_repaired_records(one), origin)
            if one.reason is None:
                rejected = replace(one, reason=reason_of(error))
            elif one.parsed is not None:  # PostgreSQL may have rejected the user_id or the event type
                rejected = replace(one, parsed=None)
            else:
                raise
            return self._commit_alone(rejected, origin)

    def _commit(self, batch: Sequence[ParsedDelivery], origin: Origin = "webhook") -> Applied:
        by_reference = tuple(one.delivery for one in batch if one.is_claim_check)
        here = [one for one in batch if not one.is_claim_check]
        numbers = self._series.of(key for one in here for key in one.series)
        applied = Applied([], [])
        with tracing.span("commit", deliveries=len(here)), transaction(self._engine) as connection:
            users = upsert_users(connection, client_ids(here))
            merged = {name: user.merged_into for name, user in users.items() if user.merged_into}
            if not merged:
                applied = self._write(connection, without_erased(here, users), numbers, origin)
        if merged:  # in a new transaction: the rows of the new user_id may have series that are not registered yet
            return self._commit([with_merged_user(one, merged) for one in batch], origin)
        self._crashes.committed()
        metrics.count_rows(applied.rows, origin)
        return replace(applied, by_reference=by_reference)

    def _write(
        self, connection: Connection, parsed: Sequence[ParsedDelivery], numbers: Mapping[SeriesKey, int], origin: Origin
    ) -> Applied:
        batch = [BatchItem(n, action) for n, one in enumerate(parsed) for action in one.actions]
        seen = _already_settled(connection, parsed) if origin == "replay" else ()
        with tracing.span("merge", actions=len(batch)):
            written = write(connection, batch, origin, numbers, seen)
        backfills = _apply_events(connection, parsed, batch, written)
        settled = [outcome_of(n, one, written) for n, one in enumerate(parsed)]
        unseen = [n for n, one in enumerate(parsed) if n not in seen and not one.is_item]
        archived = to_archive([parsed[n] for n in unseen]) if self._settings.keep_days else ()
        with tracing.span("settle"):
            dead = settle(connection, [settled[n] for n in unseen], archived, replayed=origin == "replay")
        _add_dead_letters(connection, parsed, dead)
        self._add_refused_items(connection, [one for one in parsed if not one.is_item], origin)
        self._crashes.clear(connection)
        return Applied(settled, backfills, rows=written.rows)

    def _add_refused_items(self, connection: Connection, parsed: Sequence[ParsedDelivery], origin: Origin) -> None:
        """Stores the refused items as dead letters. A replay also deletes those that it has applied."""
        items = []
        for one in parsed:
            if (known := one.parsed) and known.refused and not one.reason:
                items += refused.dead_letters_of(
                    known.refused, one.delivery, known.event_type, known.user_id, self._sealer
                )
                metrics.REFUSED_ITEMS.labels(origin).inc(refused.count(known.refused))
        if origin == "replay":
            replace_items(connection, [(one.delivery.aggregator, one.delivery.message_id) for one in parsed], items)
        else:
            add_items(connection, items)


def extract_deliveries(raw: bytes) -> list[Delivery]:
    """The deliveries of a raw message, or of the first argument of a Celery task. Raises Unprocessable."""
    with contextlib.suppress(msgspec.DecodeError, LookupError):
        raw = str(msgspec.json.decode(raw, type=list[list[str] | Any])[0][0]).encode()
    return unpack(raw.decode(errors="replace"))


def _record_metrics(applied: Applied) -> Applied:
    """Counts and logs outcomes: dead deliveries as warnings, others at level DEBUG."""
    now = time.time()
    for row in applied.settled:
        metrics.DELIVERY_SECONDS.labels(row.aggregator).observe(max(now - row.received_at.timestamp(), 0))
        is_dead = row.outcome == "dead"
        if is_dead or log.isEnabledFor(logging.DEBUG):
            ids = {"aggregator": row.aggregator, "delivery": row.message_id}
            reason = f": {row.error}" if is_dead else ""
            log.log(logging.WARNING if is_dead else logging.DEBUG, "%s%s", row.outcome, reason, extra=ids)
    for (aggregator, outcome), count in Counter((row.aggregator, row.outcome) for row in applied.settled).items():
        metrics.OUTCOMES.labels(aggregator, outcome).inc(count)
    tracing.set_attributes(**{str(outcome): count for outcome, count in applied.outcomes.items()})
    return applied


def _apply_events(
    connection: Connection, parsed: Sequence[ParsedDelivery], batch: Sequence[BatchItem], written: Written
) -> list[int]:
    """Applies notices, large requests, lost deliveries and user id changes. Returns the ids of the backfills to fetch.

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


def _already_settled(connection: Connection, parsed: Sequence[ParsedDelivery]) -> set[int]:
    """The indexes of deliveries whose recorded outcome a replay cannot change."""
    keys = [(one.delivery.aggregator, one.delivery.message_id) for one in parsed]
    known = settled_already(connection, keys)
    return {n for n, key in enumerate(keys) if key in known}


def _add_dead_letters(connection: Connection, parsed: Sequence[ParsedDelivery], dead: set[tuple[str, str]]) -> None:
    for one in parsed:
        if one.reason and (one.delivery.aggregator, one.delivery.message_id) in dead:
            event_type, user_id = (one.parsed.event_type or None, one.parsed.user_id) if one.parsed else (None, None)
            add_dead_letter(connection, one.delivery, one.reason, event_type, user_id)
