"""The courier: requests that arrive while a publish is in flight leave together, as one message (group commit)."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from app import metrics, tracing
from app.delivery import Delivery
from app.errors import NotTaken
from app.tracing import Received

log = logging.getLogger(__name__)
# After a message that several shared, the next one waits so long for company. Measured in turns on two cores with 32
# connections: 980 events committed a second without, 1,200 to 1,550 with, and the same median answer (18 ms): what the
# wait costs, fewer messages save, here and in the workers.
COMPANY_SECONDS = 0.004
# Two publishes in a row that failed open the circuit: for a second every request is refused at once, then one tries.
# A broker that is frozen costs a request 3 s, and what waits meanwhile takes memory.
FAILURES_THAT_OPEN, OPEN_SECONDS = 2, 1.0
Publish = Callable[[Sequence[Delivery]], None]


class _Parcel:
    """A delivery on its way, and the request that waits for it."""

    __slots__ = ("abandoned", "answered", "delivery", "error", "future", "span")

    def __init__(self, delivery: Delivery, span: Received | None, future: "asyncio.Future[None] | None" = None) -> None:
        self.delivery, self.span = delivery, span
        self.error: NotTaken | None = None
        self.abandoned = False
        self.future = future  # of a request on an event loop; otherwise its thread waits on the lock
        # A bare lock is the cheapest thing that waits with a limit: 2 us, a threading.Event 9 us.
        self.answered = threading.Lock()
        self.answered.acquire()


class Courier:
    """One thread that publishes for all requests of a process.

    With one request at a time a message holds one delivery and nothing waits; under load it holds what came together
    during the last publish and a few milliseconds more. Waiting has its own deadline: whatever a broken broker makes of
    the thread, every request is answered.
    """

    def __init__(self, publish: Publish, *, deadline: float, most: int, most_bytes: int) -> None:
        self._publish = publish
        self._deadline, self._most, self._most_bytes = deadline, most, most_bytes
        self._parcels: queue.SimpleQueue[_Parcel] = queue.SimpleQueue()
        self._next: _Parcel | None = None  # what did not fit into the last message
        self._start_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._in_flight_since: float | None = None
        self._failures, self._open_until = 0, 0.0
        self._was_open = False
        self._shared = False  # whether several requests shared the last message

    def take(self, delivery: Delivery, span: Received | None = None) -> None:
        """Returns once the delivery is durable. Raises NotTaken if that is not certain within the deadline."""
        parcel = self._hand_over(_Parcel(delivery, span))
        if not parcel.answered.acquire(timeout=self._deadline):
            parcel.abandoned = True
            raise NotTaken("the broker has not confirmed within the deadline")
        if parcel.error is not None:
            raise parcel.error

    async def taken(self, delivery: Delivery, span: Received | None = None) -> None:
        """As `take`, for a request that holds no thread."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        parcel = self._hand_over(_Parcel(delivery, span, future))
        timer = loop.call_later(self._deadline, _abandon, parcel, future)  # asyncio.timeout costs 15 us more
        try:
            await future
        finally:
            timer.cancel()

    def _hand_over(self, parcel: _Parcel) -> _Parcel:
        if time.monotonic() < self._open_until:
            raise NotTaken("the broker has not taken the last messages; it is asked again in a second")
        since = self._in_flight_since
        if since is not None and time.monotonic() - since > self._deadline:
            raise NotTaken("the broker has not answered for longer than the deadline")
        self._ensure_thread()
        self._parcels.put(parcel)
        return parcel

    def _ensure_thread(self) -> None:
        # Started by the first request and not by the constructor, because a thread does not survive a fork.
        if self._thread is None or not self._thread.is_alive():
            with self._start_lock:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while True:
            parcels = self._together()
            # Whoever waited too long has been told to send again, and does: it need not be published twice.
            parcels = [parcel for parcel in parcels if not parcel.abandoned]
            if parcels:
                self._send(parcels)

    def _together(self) -> list[_Parcel]:
        """Waits for one parcel and takes along what came meanwhile, up to the size of a message."""
        parcels, self._next = [self._next or self._parcels.get()], None
        if self._shared:
            time.sleep(COMPANY_SECONDS)
        size = len(parcels[0].delivery.sealed)
        while len(parcels) < self._most and size < self._most_bytes:
            try:
                parcel = self._parcels.get_nowait()
            except queue.Empty:
                break
            if size + len(parcel.delivery.sealed) > self._most_bytes:
                self._next = parcel
                break
            parcels.append(parcel)
            size += len(parcel.delivery.sealed)
        return parcels

    def _send(self, parcels: list[_Parcel]) -> None:
        self._shared = len(parcels) > 1
        error: NotTaken | None = NotTaken("the message could not be published")
        self._in_flight_since = began = time.monotonic()
        try:
            with tracing.sending("live", (parcel.span for parcel in parcels)):
                self._publish([parcel.delivery for parcel in parcels])
            error = None
        except NotTaken as reason:
            error = reason
        except Exception as unforeseen:  # noqa: BLE001 - the edge of the thread: it must live on, for those who wait
            log.error("unforeseen %s while publishing", type(unforeseen).__name__)  # noqa: TRY400 - its text may tell
        finally:
            self._in_flight_since = None
            self._failures = 0 if error is None else self._failures + 1
            if self._failures >= FAILURES_THAT_OPEN:
                self._open_until = time.monotonic() + OPEN_SECONDS
            _answer(parcels, error)
            self._count(parcels, error, time.monotonic() - began)

    def _count(self, parcels: Sequence[_Parcel], error: NotTaken | None, seconds: float) -> None:
        """After the answers, which nobody should wait for."""
        metrics.PUBLISH_SECONDS.labels("failed" if error else "taken").observe(seconds)
        is_open = self._failures >= FAILURES_THAT_OPEN
        if is_open != self._was_open:
            metrics.CIRCUIT_OPEN.set(is_open)
            self._was_open = is_open
        if error is None:
            metrics.MESSAGE_DELIVERIES.observe(len(parcels))
            for aggregator in {parcel.delivery.aggregator for parcel in parcels}:
                metrics.TAKEN.labels(aggregator).set_to_current_time()


def _answer(parcels: Sequence[_Parcel], error: NotTaken | None) -> None:
    """Tells every request. Those on an event loop are told together: waking the loop costs more than the rest."""
    futures = [parcel.future for parcel in parcels if parcel.future is not None]
    for parcel in parcels:
        parcel.error = error
        parcel.answered.release()
    if futures:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            futures[0].get_loop().call_soon_threadsafe(_resolve, futures, error)


def _abandon(parcel: _Parcel, future: "asyncio.Future[None]") -> None:
    parcel.abandoned = True
    if not future.done():
        future.set_exception(NotTaken("the broker has not confirmed within the deadline"))


def _resolve(futures: Sequence["asyncio.Future[None]"], error: NotTaken | None) -> None:
    for future in futures:
        if future.done():
            continue  # it has waited too long
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
