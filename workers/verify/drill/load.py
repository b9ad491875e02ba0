"""The load: live events of every kind, and a sender that remembers how each was answered."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from random import Random
from threading import Event as Flag
from typing import Any, cast

import msgspec

from app.catalogue import catalogue
from workers.simulator import World, first_events
from workers.simulator.events import Event, daily, every_type, supplied
from workers.simulator.sender import Sender

DISORDER = {"duplicates": 0.1, "reordering": 0.1, "late": 0.02}
WAITS = (0.05, 0.5, 1.0, *[2.0] * 60)  # a sender that hardly gives up: Svix goes on for more than a day
CONNECTIONS = 16
UPDATED, BROKEN, NOT_OURS = 0.4, 0.005, 0.01  # shares of the live events
UNUSABLE: tuple[Any, ...] = ({}, {"event_type": "daily.data.workouts.created"}, msgspec.Raw(b'{"event_type": "daily.'))
UNKNOWN_TYPE: Event = {"event_type": "daily.data.mood_ring.created", "user_id": "nobody", "data": {"colour": "green"}}


def events(world: World, seed: int, seconds: float, rate: float) -> Iterator[Event]:
    """Live events for so many seconds; among them, once, connections, notices of history and one of every kind.

    Each is made when it is wanted: what was made before a revision must not be sent as if it came after it.
    """
    dice = Random(seed)  # noqa: S311 - repeatable on purpose
    count = sum(len(supplied(one)) + 1 for user in world.members for one in user.connections)
    announced = (count + len(catalogue().event_names)) / (0.6 * seconds * rate)
    once = chain(UNUSABLE, [UNKNOWN_TYPE], first_events(world), every_type(world))
    until = time.monotonic() + seconds
    sources = [
        (user, connection, resource)
        for user in world.members
        for connection in user.connections
        for resource in supplied(connection)
        if world.has(connection, resource)
    ]
    while time.monotonic() < until:
        special = next(once, None) if dice.random() < announced else None
        yield _live(world, dice, *dice.choice(sources)) if special is None else special
    yield from once


def _live(world: World, dice: Random, user: Any, connection: Any, resource: Any) -> Event:
    share = dice.random()
    if share < BROKEN:
        return cast("Event", dice.choice(UNUSABLE))
    if share < BROKEN + NOT_OURS:
        return UNKNOWN_TYPE
    at = world.start + dice.random() * (world.until - world.start)
    known = world.moment(world.latest(connection, resource, at)) >= world.start
    return daily(world, user, connection, resource, at=at if known else None, updated=dice.random() < UPDATED)


def is_usable(event: Event) -> bool:
    """Whether a delivery of it may not become a dead letter."""
    return not any(event is one for one in UNUSABLE)


@dataclass(frozen=True)
class Response:
    """How one request was answered: unix seconds, and 0 for no answer."""

    began: float
    ended: float
    status: int


class ObservingSender(Sender):
    """A sender that remembers how each of its requests was answered, and which events nobody took."""

    def __init__(self, url: str, secret: str, seed: int, stop: Flag) -> None:
        super().__init__(url, secret, CONNECTIONS, **DISORDER, seed=seed, waits=WAITS, stop=stop, remember=True)
        self.answers: list[Response] = []
        self.given_up: dict[str, Event] = {}

    def send(self, event: Event, created_at: datetime | None = None, message_id: str | None = None) -> int:
        """As any sender."""
        status = super().send(event, created_at, message_id)
        if message_id and not 200 <= status < 300:
            self.given_up[message_id] = event
        return status

    def _attempt(self, name: str, event: Event, body: bytes) -> int:
        began = time.time()
        status = super()._attempt(name, event, body)
        self.answers.append(Response(began, time.time(), status))
        return status
