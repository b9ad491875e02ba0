"""The batcher: deliveries that arrive during a publish are published together, as one message (group commit)."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from app.delivery import Delivery
from app.errors import PublishFailed
from app.observability import metrics, tracing

log = logging.getLogger(__name__)
# After a shared batch, the next one lingers for more deliveries. Measured in turns on two cores with 32 connections:
# 980 events committed a second without, 1,200 to 1,550 with, at the same median response time (18 ms), because fewer
# messages save that time here and in the workers.
LINGER_SECONDS = 0.004
# Consecutive failed publishes open the circuit: for a second every request fails at once, then the next one tries.
# Without it, a frozen broker costs each request 3 s, and the waiting requests fill the memory.
FAILURES_TO_OPEN, OPEN_SECONDS = 2, 1.0
Publish = Callable[[Sequence[Delivery]], None]


class _Pending:
    """A delivery and the request that waits until it is published."""

    __slots__ = ("abandoned", "answered", "delivery", "error", "future", "span")

    def __init__(
        self, delivery: Delivery, span: "tracing.ServerSpan | None", future: "asyncio.Future[None] | None" = None
    ) -> None:
        self.delivery, self.span = delivery, span
        self.error: PublishFailed | None = None
        self.abandoned = False
        self.future = future  # of a request on an event loop; without one, a thread waits for the lock
        # A lock is the cheapest wait with a timeout: 2 us; a threading.Event costs 9 us.
        self.answered = threading.Lock()
        self.answered.acquire()


class Batcher:
    """One thread that publishes for all requests of a process.

    A single request is published at once, as a message of one delivery. Under load a message holds the deliveries that
    arrived during the last publish and the linger time. Requests wait with a deadline, so each is answered even if a
    broken broker blocks the thread.
    """

    def __init__(self, publish: Publish, *, deadline: float, max_deliveries: int, max_bytes: int) -> None:
        self._publish = publish
        self._deadline, self._max_deliveries, self._max_bytes = deadline, max_deliveries, max_bytes
        self._queue: queue.SimpleQueue[_Pending] = queue.SimpleQueue()
        self._next: _Pending | None = None  # did not fit into the last message
        self._start_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._in_flight_since: float | None = None
        self._failures, self._open_until = 0, 0.0
        self._was_open = False
        self._last_batch_was_shared = False

    def publish(self, delivery: Delivery, span: "tracing.ServerSpan | None" = None) -> None:
        """Returns once the broker has confirmed the delivery. Raises PublishFailed if it has not by the deadline."""
        pending = self._enqueue(_Pending(delivery, span))
        if not pending.answered.acquire(timeout=self._deadline):
            pending.abandoned = True
            raise PublishFailed("the broker has not confirmed within the deadline")
        if pending.error is not None:
            raise pending.error

    async def publish_async(self, delivery: Delivery, span: "tracing.ServerSpan | None" = None) -> None:
        """Like `publish`, without blocking a thread."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        pending = self._enqueue(_Pending(delivery, span, future))
        timer = loop.call_later(self._deadline, _abandon, pending, future)  # asyncio.timeout costs 15 us more
        try:
            await future
        finally:
            timer.cancel()

    def _enqueue(self, pending: _Pending) -> _Pending:
        if time.monotonic() < self._open_until:
            raise PublishFailed("the broker did not confirm the last messages; next attempt within a second")
        since = self._in_flight_since
        if since is not None and time.monotonic() - since > self._deadline:
            raise PublishFailed("the broker has been blocking a publish for longer than the deadline")
        self._ensure_thread()
        self._queue.put(pending)
        return pending

    def _ensure_thread(self) -> None:
        # Started by the first request and not by the constructor, because threads do not survive a fork.
        if self._thread is None or not self._thread.is_alive():
            with self._start_lock:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while True:
            # The sender of an abandoned delivery got a 503 and retries.
            if batch := [pending for pending in self._next_batch() if not pending.abandoned]:
                self._send(batch)

    def _next_batch(self) -> list[_Pending]:
        """Waits for a delivery and adds those that are queued behind it, up to the maximum size of a message."""
        batch, self._next = [self._next or self._queue.get()], None
        if self._last_batch_was_shared:
            time.sleep(LINGER_SECONDS)
        size = len(batch[0].delivery.sealed)
        while len(batch) < self._max_deliveries and size < self._max_bytes:
            try:
                pending = self._queue.get_nowait()
            except queue.Empty:
                break
            if size + len(pending.delivery.sealed) > self._max_bytes:
                self._next = pending
                break
            batch.append(pending)
            size += len(pending.delivery.sealed)
        return batch

    def _send(self, batch: list[_Pending]) -> None:
        self._last_batch_was_shared = len(batch) > 1
        error: PublishFailed | None = PublishFailed("the message could not be published")
        self._in_flight_since = began = time.monotonic()
        try:
            with tracing.producer_span("live", (pending.span for pending in batch)):
                self._publish([pending.delivery for pending in batch])
            error = None
        except PublishFailed as reason:
            error = reason
        except Exception as unexpected:  # noqa: BLE001 - the edge of the thread, which must keep running
            log.error("unexpected %s while publishing", type(unexpected).__name__)  # noqa: TRY400 - may quote a body
        finally:
            self._in_flight_since = None
            self._failures = 0 if error is None else self._failures + 1
            if self._failures >= FAILURES_TO_OPEN:
                self._open_until = time.monotonic() + OPEN_SECONDS
            _complete(batch, error)
            self._count(batch, error, time.monotonic() - began)

    def _count(self, batch: Sequence[_Pending], error: PublishFailed | None, seconds: float) -> None:
        """Updates the metrics, after the requests are answered."""
        metrics.PUBLISH_SECONDS.labels("failed" if error else "taken").observe(seconds)
        is_open = self._failures >= FAILURES_TO_OPEN
        if is_open != self._was_open:
            metrics.CIRCUIT_OPEN.set(is_open)
            self._was_open = is_open
        if error is None:
            metrics.MESSAGE_DELIVERIES.observe(len(batch))
            for aggregator in {pending.delivery.aggregator for pending in batch}:
                metrics.LAST_PUBLISH.labels(aggregator).set_to_current_time()


def _complete(batch: Sequence[_Pending], error: PublishFailed | None) -> None:
    """Wakes every request. Those on the event loop share one wake-up, which costs more than all the rest."""
    futures = [pending.future for pending in batch if pending.future is not None]
    for pending in batch:
        pending.error = error
        pending.answered.release()
    if futures:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its requests with it
            futures[0].get_loop().call_soon_threadsafe(_resolve, futures, error)


def _abandon(pending: _Pending, future: "asyncio.Future[None]") -> None:
    pending.abandoned = True
    if not future.done():
        future.set_exception(PublishFailed("the broker has not confirmed within the deadline"))


def _resolve(futures: Sequence["asyncio.Future[None]"], error: PublishFailed | None) -> None:
    for future in futures:
        if future.done():
            continue  # abandoned
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
