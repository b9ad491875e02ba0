"""Signs events as Svix does and sends them to a webhook endpoint, again and again until they are taken.

Another aggregator's sender is one that names, writes and signs its events otherwise: the methods for that.
"""

import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from heapq import heappop, heappush
from random import Random
from threading import Event as Flag
from threading import Lock, Semaphore
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
from standardwebhooks.webhooks import Webhook

Event = Any  # as the aggregator has it

# Svix waits 5 s, 5 min, 30 min, 2 h, 5 h, 10 h and 10 h; this keeps the growth and leaves out the days.
WAITS = (0.05, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0)
TIMEOUT = 15
KSUID_EPOCH = 1_400_000_000
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KSUID_LENGTH = 27
# How many events later one that is held back arrives.
HELD_BACK = 5
# And one whose first attempts are lost: what Svix sends again after hours has many newer ones before it.
LATE = (50, 200)
NO_ANSWER = 0


def new_message_id(at: datetime) -> str:
    """A message id as Svix makes them: `msg_` and a KSUID, which begins with the moment and so sorts by it."""
    seconds = int(at.timestamp()) - KSUID_EPOCH
    # From the microseconds, because a fraction of a float timestamp can fall just below the step it means.
    steps = at.microsecond // 4000
    number = int.from_bytes(seconds.to_bytes(4) + steps.to_bytes(1) + secrets.token_bytes(15))
    digits = []
    for _ in range(KSUID_LENGTH):
        number, digit = divmod(number, len(BASE62))
        digits.append(BASE62[digit])
    return "msg_" + "".join(reversed(digits))


def sign(secret: str, message_id: str, timestamp: datetime, body: bytes) -> dict[str, str]:
    """The headers that prove where a body comes from. `timestamp` is that of the attempt, not of the event."""
    # The library takes any timestamp for UTC, so one of another zone has to be converted first.
    moment = timestamp.astimezone(UTC)
    signature = Webhook(secret).sign(message_id, moment, body.decode())
    return {
        "svix-id": message_id,
        "svix-timestamp": str(int(moment.timestamp())),
        "svix-signature": signature,
    }


class Sender:
    """Sends events to one endpoint. Safe to use from several threads; close it, or use it in a `with`.

    duplicates   the part of the events, from 0 to 1, that `send_all` sends twice under one message id
    reordering   the part that it sends a few events later than it was given them
    late         the part whose first attempts are lost: they come 50 to 200 events later, or at the end of `send_all`,
                 under the id that they got at first, which still says when they were made
    waits        the seconds between attempts; there is one attempt more than there are waits
    stop         once set, nothing more is sent and no further attempt made
    remember     whether to keep what was taken, for whoever wants to compare it with what is stored
    counts       how often each status was the last one of a message; 0 stands for no answer
    taken        the events that were answered 2xx, by message id, if they are to be remembered
    """

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
    ) -> None:
        self.counts: Counter[int] = Counter()
        self.taken: dict[str, Event] = {}
        self._remember = remember
        self._url = url
        self._secret = secret
        self._connections = connections
        self._duplicates = duplicates
        self._reordering = reordering
        self._late = late
        self._dice = Random(seed)  # noqa: S311 - repeatable on purpose
        self._waits = waits
        self._lock = Lock()
        self._stop = stop or Flag()
        self._client = httpx.Client(timeout=TIMEOUT, limits=httpx.Limits(max_connections=connections))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives up what is waiting for another attempt, and closes the connections."""
        self._stop.set()
        self._client.close()

    def send(self, event: Event, created_at: datetime | None = None, message_id: str | None = None) -> int:
        """Sends one event until it is taken or the attempts are used up. Returns the last status; 0 is no answer.

        `created_at` is the moment that the message's id carries, by default now. Whoever sends something a second time
        gives the `message_id` of the first.
        """
        name = message_id or self.name(event, created_at or datetime.now(UTC))
        body = self.body(event)
        status = self._attempt(name, event, body)
        for wait in self._waits:
            if 200 <= status < 300 or self._stop.wait(wait):
                break
            status = self._attempt(name, event, body)
        with self._lock:
            self.counts[status] += 1
            if self._remember and 200 <= status < 300:
                self.taken[name] = event
        return status

    def send_all(self, events: Iterable[Event], rate: float | None = None) -> Counter[int]:
        """Sends many events side by side, at most `rate` a second if one is given. Returns how each ended.

        Events are taken as they are sent, so they may be endless.
        """
        with self._lock:
            before = self.counts.copy()
        # Without it, an endless series of events would be read into the pool's own queue.
        room = Semaphore(2 * self._connections)
        with ThreadPoolExecutor(self._connections) as pool:
            for event, message_id in self._disturbed(self._paced(events, rate)):
                room.acquire()
                future = pool.submit(self.send, event, message_id=message_id)
                future.add_done_callback(lambda _done: room.release())
        return self.counts - before

    def name(self, event: Event, at: datetime) -> str:  # noqa: ARG002 - an event of another's may bring its own
        """What names a message over all its attempts."""
        return new_message_id(at)

    def body(self, event: Event) -> bytes:
        """What is posted."""
        return msgspec.json.encode(event)

    def sign(self, name: str, event: Event, body: bytes, at: datetime) -> Mapping[str, str]:  # noqa: ARG002
        """The headers of an attempt."""
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
            if self._stop.wait(max(wait, 0)):
                return
            yield event

    def _disturbed(self, events: Iterable[Event]) -> Iterator[tuple[Event, str]]:
        held: list[tuple[int, int, tuple[Event, str]]] = []
        for number, event in enumerate(events):
            message = event, self.name(event, datetime.now(UTC))
            if wait := self._delay():
                heappush(held, (number + wait, number, message))
            else:
                yield from self._once_or_twice(message)
            while held and held[0][0] <= number:
                yield from self._once_or_twice(heappop(held)[2])
        while held and not self._stop.is_set():
            yield from self._once_or_twice(heappop(held)[2])

    def _delay(self) -> int:
        """How many events later the next one is to be sent."""
        share = self._dice.random()
        if share < self._late:
            return self._dice.randint(*LATE)
        return self._dice.randint(1, HELD_BACK) if share < self._late + self._reordering else 0

    def _once_or_twice(self, message: tuple[Event, str]) -> Iterator[tuple[Event, str]]:
        yield message
        if self._dice.random() < self._duplicates:
            yield message
