"""The load of a drill: live events of every type, and a sender that records every response."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random
from threading import Event as Flag
from typing import Any, cast

import msgspec

from app.catalogue import Resource, catalogue
from workers.simulator import World, first_events
from workers.simulator.events import Event, daily, every_type, supplied
from workers.simulator.people import Connection
from workers.simulator.sender import Sender

DISORDER: dict[str, Any] = {"duplicates": 0.1, "reordering": 0.1, "late": 0.02}
WAITS = (0.05, 0.5, 1.0, *[2.0] * 60)  # two minutes of retries: Svix retries for more than a day
CONNECTIONS = 16
UPDATED, BROKEN, UNKNOWN = 0.4, 0.005, 0.01  # shares of the live events
UNUSABLE: tuple[Any, ...] = ({}, {"event_type": "daily.data.workouts.created"}, msgspec.Raw(b'{"event_type": "daily.'))
UNKNOWN_TYPE: Event = {"event_type": "daily.data.mood_ring.created", "user_id": "nobody", "data": {"colour": "green"}}


def events(world: World, seed: int, seconds: float, rate: float) -> Iterator[Event]:
    """Live events for `seconds`. Among them are every connection, every notice of history and every type once.

    Each event is made when it is sent: one that was made before a revision must not be sent after it as if it were
    newer.
    """
    rng = Random(seed)  # noqa: S311 - repeatable on purpose
    count = sum(len(supplied(one)) + 1 for one in world.all_connections)
    share_once = (count + len(catalogue().event_names)) / (0.6 * seconds * rate)
    once = chain(UNUSABLE, [UNKNOWN_TYPE], first_events(world), every_type(world))
    until = time.monotonic() + seconds
    suppliers = suppliers_in(world)
    while time.monotonic() < until:
        if rng.random() < share_once and (special := next(once, None)) is not None:
            yield special
        else:
            yield live_event(world, rng, suppliers)
    yield from once


def suppliers_in(world: World) -> list[tuple[Connection, Resource]]:
    """The connections, each with a resource that it has data of."""
    return [
        (connection, resource)
        for connection in world.all_connections
        for resource in supplied(connection)
        if world.has(connection, resource)
    ]


def live_event(world: World, rng: Random, suppliers: Sequence[tuple[Connection, Resource]]) -> Event:
    """An event about a random day of one of the resources. Some are new versions, of an unknown type, or unusable."""
    connection, resource = rng.choice(suppliers)
    share = rng.random()
    if share < BROKEN:
        return cast("Event", rng.choice(UNUSABLE))
    if share < BROKEN + UNKNOWN:
        return UNKNOWN_TYPE
    at = world.start + rng.random() * (world.until - world.start)
    known = world.moment(world.latest(connection, resource, at)) >= world.start
    return daily(world, connection, resource, at=at if known else None, updated=rng.random() < UPDATED)


def is_usable(event: Event) -> bool:
    """Whether a delivery of the event must not become a dead letter."""
    return not any(event is one for one in UNUSABLE)


@dataclass(frozen=True)
class Response:
    """The response to one request: unix seconds, and status 0 for no response."""

    began: float
    ended: float
    status: int


class ObservingSender(Sender):
    """A sender that records the response to each request, and the events that were never accepted."""

    def __init__(self, url: str, secret: str, seed: int, stop: Flag) -> None:
        super().__init__(url, secret, CONNECTIONS, **DISORDER, seed=seed, waits=WAITS, stop=stop, remember=True)
        self.answers: list[Response] = []
        self.given_up: dict[str, Event] = {}

    def send(self, event: Event, message_id: str | None = None) -> int:
        status = super().send(event, message_id)
        if message_id and not 200 <= status < 300:
            self.given_up[message_id] = event
        return status

    def _attempt(self, name: str, event: Event, body: bytes) -> int:
        began = time.time()
        status = super()._attempt(name, event, body)
        self.answers.append(Response(began, time.time(), status))
        return status
