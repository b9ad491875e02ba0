"""The batcher: deliveries that arrive during a publish are published together, as one message (group commit)."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import PublishFailed
from app.observability import metrics, tracing
from app.web.publishing import Publish

log = logging.getLogger(__name__)
# Consecutive failed publishes open the circuit: every request fails at once for a second, then the next one tries to
# publish. Without that, each request would wait 3 s for a frozen broker, and waiting requests would fill the memory.
FAILURES_TO_OPEN, OPEN_SECONDS = 2, 1.0


class _Pending(NamedTuple):
    """A delivery and the request that waits until it is published."""

    delivery: Delivery
    span: "tracing.ServerSpan | None"
    future: "asyncio.Future[None]"


class Batcher:
    """Publishes for all requests of a process, on their event loop, one message at a time.

    A message holds the deliveries that arrived during the last publish: under low load one, under high load many. A
    delivery never waits for others. Each request is answered by its deadline, even if the broker is broken.
    """

    def __init__(self, settings: Settings, publish: Publish) -> None:
        self._publish, self._deadline = publish, settings.enqueue_deadline_seconds
        self._max_deliveries, self._max_bytes = settings.message_deliveries, settings.message_bytes
        self._waiting: deque[_Pending] = deque()
        self._task: asyncio.Task[None] | None = None
        self._in_flight_since: float | None = None
        self._failures, self._open_until = 0, 0.0
        self._was_open = False

    async def publish(self, delivery: Delivery, span: "tracing.ServerSpan | None" = None) -> None:
        """Returns once the broker has confirmed the delivery. Raises PublishFailed if it has not by the deadline."""
        now, since = time.monotonic(), self._in_flight_since
        if now < self._open_until:
            raise PublishFailed("the broker did not confirm the last messages; next attempt within a second")
        if since is not None and now - since > self._deadline:
            raise PublishFailed("the broker has been blocking a publish for longer than the deadline")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append(_Pending(delivery, span, future))
        if self._task is None:  # starts after the requests that are ready in the loop now, which share its message
            self._task = loop.create_task(self._run())
        timer = loop.call_later(self._deadline, _abandon, future)  # asyncio.timeout costs 15 us more
        try:
            await future
        finally:
            timer.cancel()

    def publish_from_thread(self, delivery: Delivery, span: "tracing.ServerSpan | None" = None) -> None:
        """As `publish`, for the threads of a WSGI server, which share an event loop."""
        asyncio.run_coroutine_threadsafe(self.publish(delivery, span), _shared_loop()).result()

    async def _run(self) -> None:
        try:
            while self._waiting:
                if batch := self._next_batch():
                    await self._send(batch)
        finally:
            self._task = None

    def _next_batch(self) -> list[_Pending]:
        """The waiting deliveries, up to the maximum size of a message, without abandoned ones (their senders retry)."""
        batch: list[_Pending] = []
        size = 0
        while self._waiting and (not batch or len(batch) < self._max_deliveries):
            size += len(self._waiting[0].delivery.sealed)
            if batch and size > self._max_bytes:
                break
            pending = self._waiting.popleft()
            if not pending.future.done():
                batch.append(pending)
        return batch

    async def _send(self, batch: list[_Pending]) -> None:
        error: PublishFailed | None = PublishFailed("the message could not be published")
        self._in_flight_since = began = time.monotonic()
        try:
            with tracing.producer_span("live", (pending.span for pending in batch)):
                await self._publish([pending.delivery for pending in batch])
            error = None
        except PublishFailed as reason:
            error = reason
        except Exception as unexpected:  # noqa: BLE001 - the edge of the task, which must keep running
            log.error("unexpected %s while publishing", type(unexpected).__name__)  # noqa: TRY400 - may quote a body
        finally:
            self._in_flight_since = None
            self._failures = 0 if error is None else self._failures + 1
            if self._failures >= FAILURES_TO_OPEN:
                self._open_until = time.monotonic() + OPEN_SECONDS
            _complete(batch, error)
            self._count(batch, error, time.monotonic() - began)

    def _count(self, batch: Sequence[_Pending], error: PublishFailed | None, seconds: float) -> None:
        metrics.series(metrics.PUBLISH_SECONDS, "failed" if error else "taken").observe(seconds)
        is_open = self._failures >= FAILURES_TO_OPEN
        if is_open != self._was_open:
            metrics.CIRCUIT_OPEN.set(is_open)
            self._was_open = is_open
        if error is None:
            metrics.MESSAGE_DELIVERIES.observe(len(batch))
            for aggregator in {pending.delivery.aggregator for pending in batch}:
                metrics.series(metrics.LAST_PUBLISH, aggregator).set_to_current_time()


def _complete(batch: Sequence[_Pending], error: PublishFailed | None) -> None:
    """Wakes every request that has not been abandoned."""
    for pending in batch:
        if pending.future.done():
            continue
        if error is None:
            pending.future.set_result(None)
        else:
            pending.future.set_exception(error)


def _abandon(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_exception(PublishFailed("the broker has not confirmed within the deadline"))


@cache
def _shared_loop() -> asyncio.AbstractEventLoop:
    """The event loop, started by the first request and not on import, because threads do not survive a fork."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="batcher", daemon=True).start()
    return loop
