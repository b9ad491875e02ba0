"""Applies messages: opens every delivery, merges what they say and settles them, all in one transaction."""

import contextlib
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, seal, unpack
from app.errors import TryLater, Unprocessable
from app.observability import metrics, tracing
from app.sealing import Sealer
from workers.actions import LargeRequest, Notice, Origin, Samples, UserIdChange
from workers.aggregators import AGGREGATORS
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
    without_erased,
)
from workers.store.backfills import BackfillRequest, open_backfill
from workers.store.dead_letters import add_dead_letter
from workers.store.engine import transaction
from workers.store.large_requests import expect
from workers.store.ledger import OutcomeRow, settle, settled_already
from workers.store.series import SeriesKey, SeriesNumbers
from workers.store.user_merges import merge_user
from workers.store.users import upsert_users
from workers.store.writer import BatchItem, Written, write

UNKNOWN = "unknown"  # stands for the aggregator of what is no message of ours
log = logging.getLogger(__name__)


class Applier:
    """Turns messages into rows. One for the life of a worker process."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._sealer = Sealer(settings.encryption_keys)
        self._series = SeriesNumbers(engine)
        self._crashes = CrashCounter(engine)

    def apply(self, packed: str, *, redelivered: bool = False) -> Applied:
        """Applies a message. Raises TryLater, having changed nothing that applying it again would not.

        All deliveries go in one transaction. If PostgreSQL refuses the data of one of them, each goes in its own, so
        that the others land and only that one becomes a dead letter. A redelivered message is applied one by one as
        well: a worker may have crashed while it was at it, and one of its deliveries may be the cause.
        """
        try:
            deliveries = unpack(packed)
        except Unprocessable as reason:  # not ours, or of a newer version: kept as it is, until somebody can read it
            return self.dead_letter_raw(packed.encode(), str(reason))
        return self.apply_deliveries(deliveries, redelivered=redelivered)

    def apply_deliveries(self, deliveries: Sequence[Delivery], *, redelivered: bool = False) -> Applied:
        """As `apply`, for deliveries that are at hand."""
        once = once_each(deliveries)
        tracing.set_batch_size(len(deliveries))
        return self._counted(self._apply_one_by_one(once) if redelivered else self._apply_batch(once, "webhook"))

    def reject(self, delivery: Delivery, reason: str) -> Applied:
        """Sets a delivery aside. Raises TryLater."""
        return self._counted(self._commit([ParsedDelivery(delivery, 1, reason=reason)]))

    def dead_letter_raw(self, raw: bytes, reason: str) -> Applied:
        """Keeps what came from the broker and is no message of deliveries, under its digest. Raises TryLater."""
        message = seal(UNKNOWN, Receipt(hashlib.sha256(raw).hexdigest()), raw, self._sealer)
        return self._counted(self._commit([ParsedDelivery(message, 1, reason=reason)]))

    def replay_raw_message(self, message: Delivery) -> Applied:
        """Applies what was set aside. Raises Unprocessable if it is no message of deliveries."""
        raw = self._sealer.open(message.sealed, message.key)
        return self._counted(self._apply_batch(once_each(extract_deliveries(raw)), "webhook"))

    def replay(self, deliveries: Sequence[Delivery]) -> Applied:
        """Applies deliveries that were kept, or were dead. Raises TryLater."""
        return self._apply_batch(once_each(deliveries), "replay")

    def _apply_batch(self, batch: Sequence[ParsedDelivery], origin: Origin) -> Applied:
        parsed = [self._parse(one, origin) for one in batch]
        try:
            return self._commit(parsed, origin)
        except TryLater:
            raise
        except Exception as error:  # noqa: BLE001 - one of them is at fault; which one, each alone will tell
            log.info("a message of %d deliveries is applied one by one: %s", len(parsed), reason_of(error))
            return combine([self._commit_alone(one, origin) for one in parsed])

    def _apply_one_by_one(self, batch: Sequence[ParsedDelivery]) -> Applied:
        """A redelivered message: a crash is counted before each delivery, and cleared with its commit."""
        parts = []
        for one in self._crashes.safest_first(batch):
            reason = f"its worker died with it, {MAX_CRASHES + 1} times"
            parsed = replace(one, reason=reason) if self._crashes.is_poison(one) else self._parse(one)
            try:
                parts.append(self._commit_alone(parsed, "webhook"))
            except TryLater:
                self._crashes.release()
                raise
        return combine(parts)

    def _counted(self, applied: Applied) -> Applied:
        now = time.time()
        for settled in applied.settled:
            metrics.DELIVERY_SECONDS.labels(settled.aggregator).observe(max(now - settled.received_at.timestamp(), 0))
            _log_outcome(settled)
        for (aggregator, outcome), count in Counter((s.aggregator, s.outcome) for s in applied.settled).items():
            metrics.OUTCOMES.labels(aggregator, outcome).inc(count)
        tracing.set_attributes(**{str(outcome): count for outcome, count in applied.outcomes.items()})
        return applied

    def _parse(self, one: ParsedDelivery, origin: Origin = "webhook") -> ParsedDelivery:
        delivery = one.delivery
        aggregator = AGGREGATORS.get(delivery.aggregator)
        if aggregator is None:
            return replace(one, reason="from an aggregator that this worker does not know")
        try:
            with tracing.span("open", aggregator=delivery.aggregator, delivery=delivery.message_id):
                body = self._sealer.open(delivery.sealed, delivery.key)
                parsed = aggregator.parse(delivery, body, self._settings)
        except Exception as error:  # noqa: BLE001 - the edge of a delivery: it is kept, whatever is wrong with it
            return replace(one, reason=reason_of(error))
        if parsed.duplicate_samples:
            metrics.DUPLICATE_SAMPLES.inc(parsed.duplicate_samples)
        if parsed.samples_without_timestamp:
            metrics.SAMPLES_WITHOUT_TIMESTAMP.inc(parsed.samples_without_timestamp)
        understood = replace(one, parsed=parsed)
        if origin == "replay" and understood.is_claim_check:
            return replace(one, reason="it only announced a URL, and that has expired")
        return understood

    def _commit_alone(self, one: ParsedDelivery, origin: Origin) -> Applied:
        try:
            return self._commit([one], origin)
        except TryLater:
            raise
        except Exception as error:
            if one.reason is None:
                refused = replace(one, reason=reason_of(error))
            elif one.parsed is not None:  # the name of the user, or of the event, may be what is refused
                refused = replace(one, parsed=None)
            else:
                raise
            return self._commit_alone(refused, origin)

    def _commit(self, batch: Sequence[ParsedDelivery], origin: Origin = "webhook") -> Applied:
        by_reference = tuple(one.delivery for one in batch if one.is_claim_check)
        here = [one for one in batch if not one.is_claim_check]
        numbers = self._series.of(a.series for one in here for a in one.actions if isinstance(a, Samples))
        applied = Applied([], [])
        with tracing.span("commit", deliveries=len(here)), transaction(self._engine) as connection:
            users = upsert_users(connection, client_ids(here))
            merged = {name: user.merged_into for name, user in users.items() if user.merged_into}
            if not merged:
                applied = self._write(connection, without_erased(here, users), numbers, origin)
        if merged:  # begun again, because other rows are meant, and series that may have no number yet
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
        announced = _apply_events(connection, parsed, batch, written)
        settled = [outcome_of(n, one, written) for n, one in enumerate(parsed)]
        unseen = [n for n in range(len(parsed)) if n not in seen]
        archived = to_archive([parsed[n] for n in unseen]) if self._settings.keep_days else ()
        with tracing.span("settle"):
            dead = settle(connection, [settled[n] for n in unseen], archived, replayed=origin == "replay")
        _add_dead_letters(connection, parsed, dead)
        self._crashes.clear(connection)
        return Applied(settled, announced, rows=written.rows)


def extract_deliveries(raw: bytes) -> list[Delivery]:
    """The deliveries in what was set aside: a message, or the first argument of a task. Raises Unprocessable."""
    with contextlib.suppress(msgspec.DecodeError, LookupError):
        raw = str(msgspec.json.decode(raw, type=list[list[str] | Any])[0][0]).encode()
    return unpack(raw.decode(errors="replace"))


def _log_outcome(settled: OutcomeRow) -> None:
    """What became of a delivery: for somebody on call if it was set aside, otherwise for who looks closely."""
    is_dead = settled.outcome == "dead"
    if is_dead or log.isEnabledFor(logging.DEBUG):
        ids = {"aggregator": settled.aggregator, "delivery": settled.message_id}
        reason = f": {settled.error}" if is_dead else ""
        log.log(logging.WARNING if is_dead else logging.DEBUG, "%s%s", settled.outcome, reason, extra=ids)


def _apply_events(
    connection: Connection, parsed: Sequence[ParsedDelivery], batch: Sequence[BatchItem], written: Written
) -> list[int]:
    """Takes in what is no data: notices of history, large requests, reconnections. Returns the backfills to go on with.

    A reconnection comes last: it moves what this very message has brought under the old id, too.
    """
    announced = []
    for one in sorted(batch, key=lambda one: isinstance(one.action, UserIdChange)):
        came = parsed[one.n].delivery
        match one.action:
            case Notice() as notice:
                asked = BackfillRequest(came.aggregator, came.message_id, "notice", came.received)
                backfill_id = open_backfill(connection, asked, notice)
                announced += [backfill_id] if backfill_id is not None else []
                written.changed[one.n] += backfill_id is not None
            case LargeRequest() as large:
                written.changed[one.n] += expect(connection, came.aggregator, large)
            case UserIdChange() as reconnected:
                written.changed[one.n] += merge_user(connection, reconnected.old_user_id, reconnected.user_id)
    return announced


def _already_settled(connection: Connection, parsed: Sequence[ParsedDelivery]) -> set[int]:
    """Which of these were settled for good: nothing that a replay may find changes what the ledger says of them."""
    names = [(one.delivery.aggregator, one.delivery.message_id) for one in parsed]
    known = settled_already(connection, names)
    return {n for n, name in enumerate(names) if name in known}


def _add_dead_letters(connection: Connection, parsed: Sequence[ParsedDelivery], dead: set[tuple[str, str]]) -> None:
    for one in parsed:
        if one.reason and (one.delivery.aggregator, one.delivery.message_id) in dead:
            add_dead_letter(connection, one.delivery, None, one.reason)
