"""Applies messages: how many deliveries go into one transaction, which are retried, and which become dead letters."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery, unpack
from app.errors import ConnectionLost, RetryAlone, TryLater, Unprocessable, is_outage
from app.observability import metrics, tracing
from workers.ingest.commit import Committer
from workers.ingest.crashes import MAX_CRASHES, CrashCounter
from workers.ingest.outcomes import (
    MAX_LIVE_BYTES,
    Applied,
    ParsedDelivery,
    Unsettled,
    combine,
    fallback,
    is_last_try,
    once_each,
    reason_of,
)
from workers.ingest.parse import Parser

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
        self._parser = Parser(engine, settings)
        self._crashes = CrashCounter(engine)
        self._committer = Committer(engine, settings, self._parser.sealer, self._crashes)

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
        batch = [ParsedDelivery(one, limit=MAX_LIVE_BYTES) for one in deliveries]
        return self.apply_batch(batch, redelivered=redelivered, failures=failures)

    def apply_batch(self, batch: Sequence[ParsedDelivery], *, redelivered: bool = False, failures: int = 0) -> Applied:
        """As `apply`, for deliveries that need not be parsed yet. Those that are too large are left `for_download`."""
        tracing.set_batch_size(len(batch))
        unique = once_each(batch)
        if len(unique) < len(batch):
            unique = self._parser.once_each_genuine(batch)
        if redelivered or len(unique) == 1:
            applied = self._apply_one_by_one(unique, failures, is_suspect=redelivered)
            if len(unique) == 1 and applied.unsettled and (error := applied.unsettled[0].error):
                raise error
        else:
            opened = self._parser.parse_fitting(unique)
            applied = self._apply_together(opened) or self._apply_one_by_one(opened, 0)
            left = (Unsettled(one.delivery) for one in unique[len(opened) :])  # they become messages of their own
            applied = replace(applied, unsettled=(*applied.unsettled, *left))
        return _record_metrics(applied)

    def reject(self, delivery: Delivery, reason: str) -> Applied:
        """Stores a delivery as a dead letter. Raises TryLater."""
        return self._reject(ParsedDelivery(delivery, parsed=self._parser.identify(delivery), reason=reason))

    def dead_letter_raw(self, raw: bytes, reason: str) -> Applied:
        """Stores a raw message that is invalid as a dead letter, with its digest as the id. Raises TryLater."""
        return self._reject(self._parser.raw_message(raw, reason))

    def _reject(self, one: ParsedDelivery) -> Applied:
        (one,) = self._parser.as_attempts([one])
        return _record_metrics(self._commit_alone(one, is_last=True))

    def parse(self, one: ParsedDelivery) -> ParsedDelivery:
        """A delivery to pass to `apply_batch`, parsed."""
        return self._parser.parse(one)

    def replay_raw_message(self, message: Delivery) -> Applied:
        """Applies a raw message that became a dead letter. Raises Unprocessable if it is still invalid."""
        return self._apply_now([ParsedDelivery(one) for one in self._parser.deliveries_of(message)])

    def replay(self, deliveries: Sequence[Delivery]) -> Applied:
        """Applies archived or dead deliveries. Raises TryLater."""
        return self._apply_now([ParsedDelivery(one, is_replay=True) for one in deliveries])

    def replay_item(self, item: Delivery) -> str | None:
        """Applies a refused item of a delivery. Returns the reason if it is refused again. Raises TryLater."""
        opened = self._parser.parse(ParsedDelivery(item, is_replay=True, is_item=True))
        try:
            applied = self._commit_alone(opened)
        except RetryAlone as error:
            return reason_of(error)
        reasons = [one.error for one in applied.settled if one.outcome == "dead"]
        reasons += [one.reason for one in (opened.parsed.refused if opened.parsed else ())]
        return reasons[0] if reasons else None

    def _apply_now(self, batch: Sequence[ParsedDelivery]) -> Applied:
        """For commands, which have no retries: a delivery that fails alone is dead."""
        left, parts = once_each(batch), list[Applied]()
        while left:
            opened = self._parser.parse_fitting(left)
            together = self._apply_together(opened)
            parts += [together] if together else [self._apply_alone(one, NO_MORE) for one in opened]
            left = left[len(opened) :]
        return _record_metrics(combine(parts))

    def _apply_together(self, opened: Sequence[ParsedDelivery]) -> Applied | None:
        """Applies deliveries in one transaction. None if that fails, or there is only one: each must be tried alone."""
        if len(opened) == 1:
            return None
        try:
            return self._committer.commit(self._parser.as_attempts(opened))
        except Exception as error:
            if is_outage(error):
                raise
            log.info("applying the %d deliveries of a message one by one: %s", len(opened), reason_of(error))
            return None

    def _apply_one_by_one(self, batch: Sequence[ParsedDelivery], failures: int, *, is_suspect: bool = False) -> Applied:
        """Applies each delivery in its own transaction; those that have crashed a process come last.

        Raises TryLater: an outage keeps the whole message in the queue.
        """
        tries = 1 + failures
        until = time.monotonic() + MAX_ALONE_SECONDS
        parts, unsettled = [], []
        for one in self._crashes.safest_first(batch) if is_suspect else batch:
            if time.monotonic() > until:
                unsettled.append(Unsettled(one.delivery))
                continue
            try:
                # The crash is counted before the delivery is opened; the count is cleared when it is committed.
                reason = CRASHES if is_suspect and self._crashes.is_poison(one) else one.reason
                tried = replace(one, reason=reason, is_retry=tries > 1 or len(batch) > 1)
                parts.append(self._apply_alone(tried, tries))
            except Exception as error:
                if isinstance(error, ConnectionLost):
                    self._crashes.forget()
                else:
                    self._crashes.release()
                if is_outage(error):
                    raise
                unsettled.append(Unsettled(one.delivery, tries, error))
        return replace(combine(parts), unsettled=tuple(unsettled))

    def _apply_alone(self, one: ParsedDelivery, tries: int) -> Applied:
        """Raises RetryAlone. If the last try fails, the delivery becomes a dead letter instead."""
        try:
            (one,) = self._parser.as_attempts([one])
            return self._commit_alone(one)
        except RetryAlone as error:
            if not is_last_try(tries, error) or (error.cause == "storage" and not self._applies_others(tries)):
                raise
            return self._commit_alone(replace(one, reason=reason_of(error)), is_last=True)

    def _applies_others(self, tries: int) -> bool:
        """Whether the disk works for other deliveries. If it does not, each of them would become a dead letter."""
        return tries >= NO_MORE or time.monotonic() < self._committer.applied_at + RECENT_SECONDS

    def _commit_alone(self, one: ParsedDelivery, *, is_last: bool = False) -> Applied:
        """Commits a delivery; if that fails, its `fallback`. Raises TryLater.

        If `is_last`, RetryAlone is raised only after the last fallback: the row of the user may be locked or damaged.
        """
        while True:
            try:
                return self._committer.commit([one])
            except Exception as error:
                is_later = isinstance(error, TryLater) and not (is_last and isinstance(error, RetryAlone))
                rest = None if is_later else fallback(one, error)
                if rest is None:
                    raise
                one = rest


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
