"""Sends events to a webhook endpoint, signed as Svix does, with retries until a 2xx response.

The sender of another aggregator overrides `name`, `body` and `sign`.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from heapq import heappop, heappush
from random import Random
from threading import Event as Flag
from threading import Lock, Semaphore
from typing import Any, Self

import httpx
import msgspec
from standardwebhooks.webhooks import Webhook

Event = Any  # of the aggregator's type

# Svix waits 5 s, 5 min, 30 min, 2 h, 5 h, 10 h and 10 h; these waits grow in the same way within seconds.
WAITS = (0.05, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0)
TIMEOUT = 15
KSUID_EPOCH = 1_400_000_000
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KSUID_LENGTH = 27
# The most events by which a reordered event is delayed.
MAX_REORDERED = 5
# The same for a late event: after hours of retries at Svix, many newer events have been delivered.
LATE = (50, 200)
NO_ANSWER = 0


def new_message_id(at: datetime) -> str:
    """A message id in Svix's form: `msg_` and a KSUID, which starts with the time and therefore sorts by it."""
    seconds = int(at.timestamp()) - KSUID_EPOCH
    # From the microseconds: a float timestamp can be slightly below its step of 4 ms.
    steps = at.microsecond // 4000
    number = int.from_bytes(seconds.to_bytes(4) + steps.to_bytes(1) + secrets.token_bytes(15))
    digits = ""
    for _ in range(KSUID_LENGTH):
        number, digit = divmod(number, len(BASE62))
        digits = BASE62[digit] + digits
    return f"msg_{digits}"


def sign(secret: str, message_id: str, timestamp: datetime, body: bytes) -> dict[str, str]:
    """Svix's signature headers. `timestamp` is the time of the attempt, not of the event."""
    # The library ignores the time zone and assumes UTC.
    moment = timestamp.astimezone(UTC)
    signature = Webhook(secret).sign(message_id, moment, body.decode())
    return {"svix-id": message_id, "svix-timestamp": str(int(moment.timestamp())), "svix-signature": signature}


class Sender:
    """Sends events to one endpoint. Safe to use from several threads; close it, or use it in a `with`.

    duplicates   the share of events, from 0 to 1, that `send_all` sends twice under one message id
    reordering   the share that it sends up to 5 events later
    late         the share that it sends 50 to 200 events later, or at its end, as if their first attempts had failed:
                 the message id still has the time at which they were made
    waits        seconds between attempts; there is one attempt more than waits
    stop         once set, no event is sent or retried
    remember     whether to keep accepted events, to compare them with the stored rows
    ended        called after the last attempt of each event, with the event and the status of that attempt
    counts       how many messages ended with each status; 0 stands for no response
    taken        the events with a 2xx response by message id, if `remember` is set
    """

    aggregator = "Junction"

    def __init__(
        self,
        url: str,
        secret: str,
        connections: int = 8,
        *,
        duplicates: float = 0.0,
        reordering: float = 0.0,
        late: float = 0.0,
        seed: int = 0,
        waits: tuple[float, ...] = WAITS,
        stop: Flag | None = None,
        remember: bool = False,
        ended: Callable[[Event, int], None] | None = None,
    ) -> None:
        self.counts: Counter[int] = Counter()
        self.taken: dict[str, Event] = {}
        self._url, self._secret, self._remember = url, secret, remember
        self._duplicates, self._reordering, self._late = duplicates, reordering, late
        self._rng = Random(seed)  # noqa: S311 - repeatable on purpose
        self._waits, self._ended = waits, ended
        self._lock = Lock()
        self.stop = stop or Flag()
        self._connections = connections
        self._client = httpx.Client(timeout=TIMEOUT, limits=httpx.Limits(max_connections=connections))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops retries, and closes the connections."""
        self.stop.set()
        self._client.close()

    def send(self, event: Event, message_id: str | None = None) -> int:
        """Sends one event until a 2xx response or the last attempt. Returns the last status, 0 without a response.

        To send an event again, pass the first `message_id`.
        """
        name = message_id or self.name(event)
        body = self.body(event)
        status = self._attempt(name, event, body)
        for wait in self._waits:
            if 200 <= status < 300 or self.stop.wait(wait):
                break
            status = self._attempt(name, event, body)
        with self._lock:
            self.counts[status] += 1
            if self._remember and 200 <= status < 300:
                self.taken[name] = event
        if self._ended:
            self._ended(event, status)
        return status

    def send_all(self, events: Iterable[Event], rate: float | None = None) -> Counter[int]:
        """Sends many events in parallel, at most `rate` a second. Returns the number of messages by last status.

        `events` may be endless: they are read only as they are sent.
        """
        with self._lock:
            before = self.counts.copy()
        # Without the semaphore, the pool's own queue would read an endless series of events.
        room = Semaphore(2 * self._connections)
        with ThreadPoolExecutor(self._connections) as pool:
            for event, message_id in self._disturbed(self._paced(events, rate)):
                room.acquire()
                future = pool.submit(self.send, event, message_id=message_id)
                future.add_done_callback(lambda _done: room.release())
        return self.counts - before

    def name(self, event: Event) -> str:  # noqa: ARG002 - events of other aggregators have an id
        """The id that all attempts of a message share."""
        return new_message_id(datetime.now(UTC))

    def body(self, event: Event) -> bytes:
        return msgspec.json.encode(event)

    def sign(self, name: str, event: Event, body: bytes, at: datetime) -> Mapping[str, str]:  # noqa: ARG002
        return sign(self._secret, name, at, body)

    def _attempt(self, name: str, event: Event, body: bytes) -> int:
        headers = {"content-type": "application/json", **self.sign(name, event, body, datetime.now(UTC))}
        try:
            return self._client.post(self._url, content=body, headers=headers).status_code
        except httpx.TransportError:
            return NO_ANSWER

    def _paced(self, events: Iterable[Event], rate: float | None) -> Iterator[Event]:
        started = time.monotonic()
        for number, event in enumerate(events):
            wait = started + number / rate - time.monotonic() if rate else 0
            if self.stop.wait(max(wait, 0)):
                return
            yield event

    def _disturbed(self, events: Iterable[Event]) -> Iterator[tuple[Event, str]]:
        """The events with their message ids, some of them delayed or twice."""
        held: list[tuple[int, int, tuple[Event, str]]] = []
        for number, event in enumerate(events):
            message = event, self.name(event)
            if delay := self._delay():
                heappush(held, (number + delay, number, message))
            else:
                yield from self._once_or_twice(message)
            while held and held[0][0] <= number:
                yield from self._once_or_twice(heappop(held)[2])
        while held and not self.stop.is_set():
            yield from self._once_or_twice(heappop(held)[2])

    def _delay(self) -> int:
        """The number of events by which the next event is delayed."""
        share = self._rng.random()
        if share < self._late:
            return self._rng.randint(*LATE)
        return self._rng.randint(1, MAX_REORDERED) if share < self._late + self._reordering else 0

    def _once_or_twice(self, message: tuple[Event, str]) -> Iterator[tuple[Event, str]]:
        yield message
        if self._rng.random() < self._duplicates:
            yield message
