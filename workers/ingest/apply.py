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
from sqlalchemy import Connection, Engine

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal, sealed_again, unpack, unpack_stored
from app.errors import ConnectionLost, NotAuthentic, RetryAlone, TooLarge, TryLater, Unprocessable
from app.observability import metrics, tracing
from app.sealing import LARGEST, Sealer
from workers.actions import Download, Origin, Parsed, SeriesKey
from workers.aggregators.registry import AGGREGATORS
from workers.ingest import refused
from workers.ingest.attempts import as_attempts
from workers.ingest.crashes import MAX_CRASHES, CrashCounter
from workers.ingest.events import apply_events
from workers.ingest.outcomes import (
    MAX_LIVE_BYTES,
    MAX_MESSAGE_BYTES,
    Applied,
    ParsedDelivery,
    Unsettled,
    combine,
    is_last_try,
    once_each,
    outcome_of,
    reason_of,
    to_archive,
    with_merged_user,
    with_repaired_records,
    without_erased,
)
from workers.ingest.ownership import claims, merged_ids, without_other_owners
from workers.store.dead_letters import add_dead_letter, add_items, replace_items
from workers.store.engine import WAIT_LITTLE, transaction
from workers.store.ledger import settle, settled_already
from workers.store.series import SeriesNumbers
from workers.store.users import upsert_users
from workers.store.writer import BatchItem, write

UNKNOWN = "unknown"  # the aggregator of dead letters that are raw messages
# Deliveries that are not tried within this time become messages of their own at once: with one more statement of 45 s,
# the message is still acknowledged before the visibility timeout of 60 s.
MAX_ALONE_SECONDS = 10.0
CRASHES = f"the worker, or PostgreSQL's process, crashed {MAX_CRASHES + 1} times while processing this delivery"
RECENT_SECONDS = 60.0  # longer than the longest delay between two tries
NO_MORE = 1 << 30  # tries: the delivery becomes a dead letter if this try fails
log = logging.getLogger(__name__)


class Applier:
    """Writes the data of messages to the database. One per worker process."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._sealer = Sealer(settings.encryption_keys)
        self._series = SeriesNumbers(engine)
        self._crashes = CrashCounter(engine)
        self._applied_at = -RECENT_SECONDS

    def apply(self, packed: str, *, redelivered: bool = False, failures: int = 0) -> Applied:
        """Applies a message. A retry never applies data twice.

        One transaction applies all deliveries. Each delivery gets its own transaction
        - if PostgreSQL rejects the message, so that only the rejected delivery becomes a dead letter;
        - if the message is redelivered, because one of its deliveries may have crashed the previous worker. A message
          whose connection was lost MAX_LOST times counts as redelivered: one may have crashed PostgreSQL's process;
        - if PostgreSQL does not execute a statement. Deliveries that fail alone too are returned in `unsettled`, and
          become dead letters after several tries, of which there were `failures`.

        Raises TryLater if the whole message must be retried; RetryAlone counts as one of the `failures`.
        """
        try:
            deliveries = unpack(packed)
        except Unprocessable as reason:  # invalid, or of a newer version: stored raw, to be replayed after an upgrade
            return self.dead_letter_raw(packed.encode(), str(reason))
        return self.apply_deliveries(deliveries, redelivered=redelivered, failures=failures, limit=MAX_LIVE_BYTES)

    def apply_deliveries(
        self, deliveries: Sequence[Delivery], *, redelivered: bool = False, failures: int = 0, limit: int = LARGEST
    ) -> Applied:
        """As `apply`, for unpacked deliveries. Those with a body of more than `limit` bytes are left `for_download`."""
        batch = once_each(deliveries, limit)
        if len(batch) < len(deliveries):
            batch = self._genuine_first(deliveries, limit)
        tracing.set_batch_size(len(deliveries))
        if not redelivered and len(batch) > 1:
            applied = self._apply_batch(batch)
        else:
            applied = self._apply_one_by_one(batch, failures, is_suspect=redelivered)
        return _record_metrics(applied)

    def _genuine_first(self, deliveries: Sequence[Delivery], limit: int) -> list[ParsedDelivery]:
        """As `once_each`, for a message in which deliveries have the same id: a forged one must not replace another."""
        genuine, unread, forged = [], [], []
        for one in deliveries:
            try:
                one.open_received(self._sealer, limit)
            except NotAuthentic as error:
                forged.append(self._raw_message(pack([one]).encode(), reason_of(error)))
            except Unprocessable:  # its key is not configured, or it is large
                unread.append(one)
            else:
                genuine.append(one)
        return [*once_each([*genuine, *unread], limit), *forged]

    def reject(self, delivery: Delivery, reason: str) -> Applied:
        """Stores a delivery as a dead letter. Raises TryLater."""
        (opened,) = self._as_attempts([ParsedDelivery(delivery, 1, parsed=self._identify(delivery), reason=reason)])
        try:
            return _record_metrics(self._commit_alone(opened, "webhook"))
        except RetryAlone:  # the row of its user may be the one that is locked or damaged
            return _record_metrics(self._commit_alone(replace(opened, parsed=None), "webhook"))

    def dead_letter_raw(self, raw: bytes, reason: str) -> Applied:
        """Stores a raw message that is invalid as a dead letter, with its digest as the id. Raises TryLater."""
        return _record_metrics(self._commit(self._as_attempts([self._raw_message(raw, reason)])))

    def _raw_message(self, raw: bytes, reason: str) -> ParsedDelivery:
        message = seal(UNKNOWN, Receipt(hashlib.sha256(raw).hexdigest()), raw, self._sealer)
        return ParsedDelivery(message, 1, reason=reason)

    def download_of(self, delivery: Delivery, limit: int = LARGEST) -> Download | None:
        """The URL of a delivery of at most `limit` bytes that contains only a URL."""
        opened = self._parse(ParsedDelivery(delivery, 1, limit))
        return next((one for one in opened.actions if isinstance(one, Download)), None)

    def replay_raw_message(self, message: Delivery) -> Applied:
        """Applies a raw message that became a dead letter. Raises Unprocessable if it is still invalid."""
        deliveries = extract_deliveries(message.open(self._sealer))
        genuine = [sealed_again(one, self._sealer) for one in deliveries]
        return _record_metrics(self._apply_now(once_each(genuine), "webhook"))

    def replay(self, deliveries: Sequence[Delivery]) -> Applied:
        """Applies archived or dead deliveries. Raises TryLater."""
        return self._apply_now(once_each(deliveries), "replay")

    def replay_item(self, item: Delivery) -> str | None:
        """Applies a refused item of a delivery. Returns the reason if it is refused again. Raises TryLater."""
        opened = self._parse(ParsedDelivery(item, 1, is_item=True), "replay")
        try:
            applied = self._commit_alone(opened, "replay")
        except RetryAlone as error:
            return reason_of(error)
        reasons = [one.error for one in applied.settled if one.outcome == "dead"]
        reasons += [one.reason for one in (opened.parsed.refused if opened.parsed else ())]
        return reasons[0] if reasons else None

    def _apply_now(self, batch: Sequence[ParsedDelivery], origin: Origin) -> Applied:
        """For commands, which have no retries: a delivery that fails alone is dead."""
        parts: list[Applied] = []
        while batch:
            opened = self._parse_fitting(batch, origin)
            parts.append(self._apply_parsed_now(opened, origin))
            batch = batch[len(opened) :]
        return combine(parts)

    def _apply_parsed_now(self, opened: Sequence[ParsedDelivery], origin: Origin) -> Applied:
        if len(opened) > 1:
            try:
                return self._commit(self._as_attempts(opened, origin), origin)
            except Exception as error:
                if _is_outage(error):
                    raise
                log.info("applying %d deliveries one by one: %s", len(opened), reason_of(error))
        return combine([self._apply_alone(one, origin, NO_MORE) for one in opened])

    def _parse_fitting(self, batch: Sequence[ParsedDelivery], origin: Origin = "webhook") -> list[ParsedDelivery]:
        """The first deliveries, parsed, of which a worker may hold all in its memory."""
        opened, size = list[ParsedDelivery](), 0
        for one in batch:
            if size > MAX_MESSAGE_BYTES:
                break
            opened.append(self._parse(one, origin))
            size += opened[-1].size
        return opened

    def _apply_batch(self, batch: Sequence[ParsedDelivery]) -> Applied:
        """Applies as many deliveries as the memory of a worker holds. The others become messages of their own."""
        opened = self._as_attempts(self._parse_fitting(batch))
        left = tuple(Unsettled(one.delivery) for one in batch[len(opened) :])
        try:
            return replace(self._commit(opened), unsettled=left)
        except Exception as error:
            if _is_outage(error):
                raise
            log.info("applying the %d deliveries of a message one by one: %s", len(opened), reason_of(error))
            applied = self._apply_one_by_one(opened, 0)
            return replace(applied, unsettled=(*applied.unsettled, *left))

    def _apply_one_by_one(self, batch: Sequence[ParsedDelivery], failures: int, *, is_suspect: bool = False) -> Applied:
        """Applies each delivery in its own transaction. Raises TryLater, and the error of a message's only delivery.

        Deliveries that have crashed a process come last. An outage keeps the whole message in the queue.
        """
        tries = 1 + failures
        is_retry = tries > 1 or len(batch) > 1
        until = time.monotonic() + MAX_ALONE_SECONDS
        parts, unsettled = [], []
        for one in self._crashes.safest_first(batch) if is_suspect else batch:
            if time.monotonic() > until:
                unsettled.append(Unsettled(one.delivery))
                continue
            try:
                opened = self._parse_counted(one) if is_suspect else self._parse(one)
                parts.append(self._apply_alone(opened, "webhook", tries, is_retry=is_retry))
            except Exception as error:
                if isinstance(error, ConnectionLost):
                    self._crashes.keep()
                else:
                    self._crashes.release()
                if len(batch) == 1 or _is_outage(error):
                    raise
                unsettled.append(Unsettled(one.delivery, tries, error))
        return replace(combine(parts), unsettled=tuple(unsettled))

    def _parse_counted(self, one: ParsedDelivery) -> ParsedDelivery:
        """Counts a crash before the delivery is opened; the count is cleared when it is committed."""
        if self._crashes.is_poison(one):
            return replace(one, reason=CRASHES)
        return self._parse(one)

    def _apply_alone(self, opened: ParsedDelivery, origin: Origin, tries: int, *, is_retry: bool = False) -> Applied:
        """Raises RetryAlone. If the last try fails, the delivery becomes a dead letter instead."""
        try:
            (opened,) = self._as_attempts([opened], origin)
            return self._commit_alone(opened, origin, is_retry=is_retry)
        except RetryAlone as error:
            if not is_last_try(tries, error) or (error.cause == "storage" and not self._applies_others(tries)):
                raise
            dead = replace(opened, reason=reason_of(error))
            try:
                return self._commit_alone(dead, origin)
            except RetryAlone:  # the row of its user may be the one that is locked or damaged
                return self._commit_alone(replace(dead, parsed=None), origin)

    def _applies_others(self, tries: int) -> bool:
        """Whether the disk works for other deliveries. If it does not, each of them would become a dead letter."""
        return tries >= NO_MORE or time.monotonic() < self._applied_at + RECENT_SECONDS

    def _parse(self, one: ParsedDelivery, origin: Origin = "webhook") -> ParsedDelivery:
        if one.parsed or one.reason or one.is_large:
            return one
        delivery = one.delivery
        aggregator = AGGREGATORS.get(delivery.aggregator)
        if aggregator is None:
            return replace(one, reason="unknown aggregator")
        is_stored = origin == "replay"
        try:
            with tracing.span("open", aggregator=delivery.aggregator, delivery=delivery.message_id):
                body = delivery.open(self._sealer) if is_stored else delivery.open_received(self._sealer, one.limit)
                parsed = aggregator.parse(delivery, body, self._settings)
        except Exception as error:  # noqa: BLE001 - whatever the error, the delivery becomes a dead letter
            return self._unopened(one, error, is_stored=is_stored)
        if parsed.duplicate_samples:
            metrics.DUPLICATE_SAMPLES.inc(parsed.duplicate_samples)
        if parsed.samples_without_timestamp:
            metrics.SAMPLES_WITHOUT_TIMESTAMP.inc(parsed.samples_without_timestamp)
        opened = replace(one, parsed=parsed, size=len(body))
        if origin == "replay" and opened.is_claim_check:
            return replace(opened, reason="the delivery only contained a URL, which has expired")
        return opened

    def _unopened(self, one: ParsedDelivery, error: Exception, *, is_stored: bool) -> ParsedDelivery:
        if isinstance(error, TooLarge) and one.limit < LARGEST:
            return replace(one, is_large=True)
        if isinstance(error, NotAuthentic) and not is_stored:
            # Its id may be that of another delivery, so the ledger must not record it under that id.
            return self._raw_message(pack([one.delivery]).encode(), reason_of(error))
        return replace(one, reason=reason_of(error), parsed=self._identify(one.delivery))

    def _identify(self, delivery: Delivery) -> Parsed | None:
        """The type and the user of a delivery that cannot be parsed, if they can be read."""
        try:
            return AGGREGATORS[delivery.aggregator].identify(delivery.open(self._sealer))
        except Exception as error:  # noqa: BLE001 - a body that breaks `parse` may break this too, for every retry
            log.debug("a delivery names no event: %s", reason_of(error))
            return None

    def _as_attempts(self, parsed: Sequence[ParsedDelivery], origin: Origin = "webhook") -> list[ParsedDelivery]:
        return [self._parse(one, origin) for one in as_attempts(self._engine, self._sealer, parsed, origin)]

    def _commit_alone(self, one: ParsedDelivery, origin: Origin, *, is_retry: bool = False) -> Applied:
        try:
            return self._commit([one], origin, is_retry=is_retry)
        except TryLater:
            raise
        except Exception as error:
            if isinstance(error, Unprocessable) and one.reason is None and not one.is_repaired:
                with contextlib.suppress(Unprocessable):
                    return self._commit_alone(with_repaired_records(one), origin, is_retry=is_retry)
            if one.reason is None:
                rejected = replace(one, reason=reason_of(error))
            elif one.parsed is not None:  # PostgreSQL may have rejected the user_id or the event type
                rejected = replace(one, parsed=None)
            else:
                raise
            return self._commit_alone(rejected, origin, is_retry=is_retry)

    def _commit(
        self, batch: Sequence[ParsedDelivery], origin: Origin = "webhook", *, is_retry: bool = False
    ) -> Applied:
        for_download = tuple(one.delivery for one in batch if one.is_for_download)
        here = [one for one in batch if not one.is_for_download]
        numbers = self._numbers(here)
        applied = Applied([], [])
        is_command = origin == "replay"
        with (
            tracing.span("commit", deliveries=len(here)),
            transaction(self._engine, confirm=is_command) as connection,
        ):
            if is_retry:
                connection.execute(WAIT_LITTLE)
            users = upsert_users(connection, claims(here))
            here = without_other_owners(here, users)
            merged = merged_ids(here, users)
            if not merged:
                applied = self._write(connection, without_erased(here, users), numbers, origin)
        if merged:  # in a new transaction: the rows of the new user_id may have series that are not registered yet
            return self._commit([with_merged_user(one, merged) for one in batch], origin, is_retry=is_retry)
        self._crashes.committed()
        if any(one.reason is None for one in here):
            self._applied_at = time.monotonic()
        metrics.count_rows(applied.rows, origin)
        return replace(applied, for_download=for_download)

    def _numbers(self, here: Sequence[ParsedDelivery]) -> dict[SeriesKey, int]:
        numbers: dict[SeriesKey, int] = {}
        for aggregator in dict.fromkeys(one.delivery.aggregator for one in here):
            own = (one for one in here if one.delivery.aggregator == aggregator)
            numbers |= self._series.prepare(aggregator, [action for one in own for action in one.actions])
        return numbers

    def _write(
        self, connection: Connection, parsed: Sequence[ParsedDelivery], numbers: Mapping[SeriesKey, int], origin: Origin
    ) -> Applied:
        batch = [BatchItem(n, action) for n, one in enumerate(parsed) for action in one.actions]
        seen = _already_settled(connection, parsed) if origin == "replay" else ()
        with tracing.span("merge", actions=len(batch)):
            written = write(connection, batch, origin, numbers, seen)
        backfills = apply_events(connection, parsed, batch, written)
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
            read = [one.delivery for one in parsed if not one.reason]
            replace_items(connection, [(one.aggregator, one.message_id) for one in read], items)
        else:
            add_items(connection, items)


def _is_outage(error: Exception) -> bool:
    """Whether no delivery can be applied now."""
    return isinstance(error, TryLater) and not isinstance(error, RetryAlone)


def extract_deliveries(raw: bytes) -> list[Delivery]:
    """The deliveries of a raw message, or of the first argument of a Celery task. Raises Unprocessable."""
    with contextlib.suppress(msgspec.DecodeError, LookupError, TypeError, RecursionError, UnicodeError):
        raw = str(msgspec.json.decode(raw, type=list[list[str] | Any])[0][0]).encode()
    return unpack_stored(raw.decode(errors="replace"))


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
