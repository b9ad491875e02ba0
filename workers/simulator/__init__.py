"""The simulated provider: generated people whose data it serves and sends, for tests, the demo and a first look."""

import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from random import Random
from threading import Event as Flag
from threading import current_thread, main_thread
from typing import Any

import click

from workers.simulator import terra
from workers.simulator.data import World
from workers.simulator.events import Event, changes, connected, daily, historical, supplied
from workers.simulator.people import Connection, User
from workers.simulator.sender import Sender
from workers.simulator.server import API_KEY, Simulator
from workers.simulator.terra.sender import TerraSender

__all__ = ["Simulator", "World", "first_events", "live_events", "run"]

SHARE_OF_UPDATES = 0.3


@dataclass(frozen=True)
class Stream:
    """Events on their way to an endpoint: those that come first, then those without end."""

    label: str
    sender: Sender
    first: Iterable[Any]
    live: Iterable[Any]


def run(
    *,
    port: int = 0,
    users: int = 3,
    days: int = 30,
    seed: int = 1,
    to: str | None = None,
    secret: str | None = None,
    terra_to: str | None = None,
    terra_secret: str | None = None,
    pinged: float = 0.0,
    api_key: str = API_KEY,
    rate: float = 5.0,
    duplicates: float = 0.0,
    reordering: float = 0.0,
    late: float = 0.0,
    stop: Flag | None = None,
) -> None:
    """Serves the read APIs until Ctrl-C, SIGTERM or `stop`, and sends events to the endpoints if there are any.

    `to` is given what Junction would send, `terra_to` what Terra would. First come all connections, as fast as they
    are taken, then live events at `rate` a second. Each secret is the one that its endpoint checks signatures with.
    Raises ValueError without it. `duplicates`, `reordering` and `late` are the parts of the events that the Sender
    disturbs so, `pinged` that of Terra's that only say where the event is.
    """
    if (to and secret is None) or (terra_to and terra_secret is None):
        raise ValueError("sending needs the secret that the endpoint checks signatures with")
    stop = stop or Flag()
    _stop_at_signals(stop)
    disturbed: dict[str, Any] = {
        "duplicates": duplicates,
        "reordering": reordering,
        "late": late,
        "seed": seed,
        "stop": stop,
    }
    with Simulator(users, days, seed, port=port, api_key=api_key) as simulator, ExitStack() as senders:
        world, twin = simulator.world, simulator.terra
        _explain(simulator)
        streams = []
        if to and secret:
            sender: Sender = senders.enter_context(Sender(to, secret, **disturbed))
            streams.append(Stream("Junction", sender, first_events(world), live_events(world)))
        if terra_to and terra_secret:
            sender = senders.enter_context(TerraSender(terra_to, terra_secret, **disturbed))
            live = terra.live_events(twin, pinged=pinged, base_url=simulator.url)
            streams.append(Stream("Terra", sender, terra.first_events(twin), live))
        with ThreadPoolExecutor() as pool:
            for sending in [pool.submit(_send, stream, rate, stop) for stream in streams]:
                sending.result()
        stop.wait()


def first_events(world: World) -> Iterator[Event]:
    """What comes when people connect: for each connection the event itself, then one notice for each resource."""
    for user in world.members:
        for connection in user.connections:
            yield from _arrival(world, user, connection)


def live_events(world: World, seed: int = 0) -> Iterator[Event]:
    """Events without end about what is newest, of anybody and any resource; some of them correct what was sent.

    The world's end moves on to the present with each. Who has connected since is told first, and what was revised
    while it was read.
    """
    dice = Random(seed)  # noqa: S311 - repeatable on purpose
    for _ in count():
        world.until = max(world.until, datetime.now(UTC))
        for arrived in world.arrived():
            yield from _arrival(world, *arrived)
        yield from changes(world)
        user = dice.choice([member for member in world.members if member.connections])
        connection = dice.choice(user.connections)
        resource = dice.choice([each for each in supplied(connection) if world.has(connection, each)])
        yield daily(world, user, connection, resource, updated=dice.random() < SHARE_OF_UPDATES)


def _arrival(world: World, user: User, connection: Connection) -> Iterator[Event]:
    yield connected(world, user, connection)
    yield from (historical(world, user, connection, resource) for resource in supplied(connection))


def _send(stream: Stream, rate: float, stop: Flag) -> None:
    label, started = stream.label, time.monotonic()
    ended = stream.sender.send_all(stream.first)
    click.echo(f"{label}: sent {ended.total()} first events in {time.monotonic() - started:.1f} s: {_summary(ended)}")
    if not stop.is_set():
        click.echo(f"{label}: sending live events, {rate:g} a second, until Ctrl-C.")
        click.echo(f"{label}: sent live events: {_summary(stream.sender.send_all(stream.live, rate))}")


def _summary(counts: dict[int, int]) -> str:
    told = (f"{number} x {status or 'no answer'}" for status, number in sorted(counts.items()))
    return ", ".join(told) or "none"


def _explain(simulator: Simulator) -> None:
    world = simulator.world
    click.echo(f"Simulated provider at {simulator.url}: {len(world.members)} users, {world.days} days of history.")
    click.echo("To fetch from it, set")
    for name, value in simulator.environment.items():
        click.echo(f"    {name}={value}")
    click.echo(f"What was asked of it: {simulator.url}/simulate/requests")
    knobs = "/simulate/faults, /simulate/pulls, /simulate/connections or /simulate/terra"
    click.echo(f"To make trouble, POST to {simulator.url}{knobs}")


def _stop_at_signals(stop: Flag) -> None:
    # Only the main thread may; elsewhere whoever runs this has the flag.
    if current_thread() is main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda _number, _frame: stop.set())
