"""Load for the machines: signed events at a fixed rate, each repeated at the next endpoint until it is accepted."""

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from random import Random
from threading import Event as Flag
from threading import Thread
from typing import Self

import httpx

from workers.simulator import World
from workers.simulator.events import Event, connected, historical, supplied
from workers.simulator.sender import NO_ANSWER, Sender
from workers.verify.drill.load import is_usable, live_event, suppliers_in

WAITS = (0.05, 0.5, 1.0, *[2.0] * 120)  # four minutes of retries
# Threads, and so requests in flight. More than the rate needs if a third of all requests is never answered.
CONNECTIONS = 400
NOT_CONNECTED = -1
TIMEOUT = httpx.Timeout(8.0, connect=1.5)  # longer than the 5 s in which an endpoint has to answer


@dataclass(frozen=True)
class Answer:
    """The answer to one request, in unix seconds. NO_ANSWER and NOT_CONNECTED are statuses too."""

    machine: int
    began: float
    ended: float
    status: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class BalancedSender(Sender):
    """Sends each attempt to the next endpoint, and at once to another one if no connection is possible.

    `urls` are the endpoints by machine.
    """

    def __init__(self, urls: dict[int, str], secret: str) -> None:
        super().__init__("", secret, CONNECTIONS, waits=WAITS, remember=True)
        self._urls = urls
        self._number = count()
        self._turns: dict[str, Iterator[int]] = {}
        self.answers: list[Answer] = []
        self.first_sent: dict[str, float] = {}
        self.accepted: dict[str, float] = {}  # by message id: the time of the first 202

    def _attempt(self, name: str, event: Event, body: bytes) -> int:
        turns = self._turns.setdefault(name, count(next(self._number)))
        machines = [*self._urls]
        self.first_sent.setdefault(name, time.time())
        for _ in machines:
            machine = machines[next(turns) % len(machines)]
            status = self._post(machine, name, event, body)
            if status != NOT_CONNECTED:
                return status
        return NO_ANSWER

    def _post(self, machine: int, name: str, event: Event, body: bytes) -> int:
        """The status; NO_ANSWER after a lost or silent connection."""
        began = time.time()
        headers = {"connection": "close", "content-type": "application/json"}
        headers |= self.sign(name, event, body, datetime.now().astimezone())
        try:
            status = self._client.post(self._urls[machine], content=body, headers=headers, timeout=TIMEOUT).status_code
        except (httpx.ConnectError, httpx.ConnectTimeout):
            status = NOT_CONNECTED
        except httpx.TransportError:
            status = NO_ANSWER
        ended = time.time()
        self.answers.append(Answer(machine, began, ended, status))
        if status == 202:
            self.accepted.setdefault(name, ended)
        return status


class Traffic:
    """Sends live events of all users in a thread, and the history of a user when it is announced."""

    def __init__(self, world: World, urls: dict[int, str], secret: str, rate: float) -> None:
        self.sender = BalancedSender(urls, secret)
        self._world, self._rate, self._rng = world, rate, Random(world.seed)
        self._users, self._announced = deque(world.members), deque[Event]()
        self._over = Flag()
        self._statuses: Counter[int] = Counter()
        self._thread = Thread(target=self._run, name="traffic", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.sender.close()
        self._thread.join(60)

    def announce_history(self) -> None:
        """Connects the next user, whose history Headrace then fetches."""
        user = self._users.popleft()
        for connection in user.connections:
            events = (historical(self._world, connection, resource) for resource in supplied(connection))
            self._announced.extend((connected(self._world, connection), *events))

    def finish(self) -> Counter[int]:
        """Ends the load. Returns the number of events by last status, after all were accepted or given up."""
        while self._users:
            self.announce_history()
        self._over.set()
        self._thread.join()
        return self._statuses

    def _run(self) -> None:
        self._statuses = self.sender.send_all(self._events(), self._rate)

    def _events(self) -> Iterator[Event]:
        suppliers = suppliers_in(self._world)
        while not self._over.is_set() or self._announced:
            if self._announced:
                yield self._announced.popleft()
            elif is_usable(event := live_event(self._world, self._rng, suppliers)):
                yield event
