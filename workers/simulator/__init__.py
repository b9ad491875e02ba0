"""The simulated aggregators: Junction's and Terra's APIs and webhooks with generated users, for tests and the demo."""

import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
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
    """Serves the APIs until Ctrl-C, SIGTERM or `stop`, and sends events to the endpoints that are given.

    `to` is the endpoint for Junction's events, `terra_to` for Terra's; each needs the secret with which it checks
    signatures, otherwise ValueError is raised. The events of all connections are sent first, as fast as the endpoint
    accepts them, then live events at `rate` a second. `duplicates`, `reordering` and `late` are shares of the events
    (see Sender), `pinged` is the share of Terra's events that have only a URL.
    """
    if (to and secret is None) or (terra_to and terra_secret is None):
        raise ValueError("sending needs the secret with which the endpoint checks signatures")
    stop = stop or Flag()
    _stop_at_signals(stop)
    disorder: dict[str, Any] = {"duplicates": duplicates, "reordering": reordering, "late": late, "seed": seed}
    with (
        Simulator(users, days, seed, port=port, api_key=api_key) as simulator,
        ExitStack() as senders,
        ThreadPoolExecutor() as pool,
    ):
        _print_help(simulator)
        sending = []
        if to and secret:
            sender: Sender = senders.enter_context(Sender(to, secret, **disorder, stop=stop))
            first: Iterable[Any] = first_events(simulator.world)
            live: Iterable[Any] = live_events(simulator.world)
            sending.append(pool.submit(_send, "Junction", sender, first, live, rate=rate, stop=stop))
        if terra_to and terra_secret:
            sender = senders.enter_context(
                TerraSender(terra_to, terra_secret, **disorder, stop=stop, ended=simulator.terra_admin.record)
            )
            first = terra.first_events(simulator.terra)
            live = terra.live_events(simulator.terra, pinged=pinged, base_url=simulator.url)
            sending.append(pool.submit(_send, "Terra", sender, first, live, rate=rate, stop=stop))
        for one in sending:
            one.result()
        stop.wait()


def first_events(world: World) -> Iterator[Event]:
    """The events of all connections: each connection's own event, then one per resource that has history."""
    for user in world.members:
        for connection in user.connections:
            yield from _arrival(world, user, connection)


def live_events(world: World, seed: int = 0) -> Iterator[Event]:
    """Endless events about the newest data of random users and resources; some correct earlier events.

    Each event moves the world's end to the present. Events about new connections and about revisions by the fault
    `changing` come first. The events end when no user has a connection.
    """
    rng = Random(seed)  # noqa: S311 - repeatable on purpose
    while True:
        world.until = max(world.until, datetime.now(UTC))
        for user, connection in world.arrived():
            yield from _arrival(world, user, connection)
        yield from changes(world)
        connected_users = [member for member in world.members if member.connections]
        if not connected_users:
            return
        user = rng.choice(connected_users)
        connection = rng.choice(user.connections)
        resource = rng.choice([each for each in supplied(connection) if world.has(connection, each)])
        yield daily(world, user, connection, resource, updated=rng.random() < SHARE_OF_UPDATES)


def _arrival(world: World, user: User, connection: Connection) -> Iterator[Event]:
    yield connected(world, user, connection)
    yield from (historical(world, user, connection, resource) for resource in supplied(connection))


def _send(label: str, sender: Sender, first: Iterable[Any], live: Iterable[Any], *, rate: float, stop: Flag) -> None:
    started = time.monotonic()
    sent = sender.send_all(first)
    click.echo(f"{label}: sent {sent.total()} first events in {time.monotonic() - started:.1f} s: {_summary(sent)}")
    if not stop.is_set():
        click.echo(f"{label}: sending live events, {rate:g} a second, until Ctrl-C.")
        click.echo(f"{label}: sent live events: {_summary(sender.send_all(live, rate))}")


def _summary(counts: dict[int, int]) -> str:
    parts = (f"{number} x {status or 'no answer'}" for status, number in sorted(counts.items()))
    return ", ".join(parts) or "none"


def _print_help(simulator: Simulator) -> None:
    world, url = simulator.world, simulator.url
    click.echo(f"Simulated provider at {url}: {len(world.members)} users, {world.days} days of history.")
    click.echo("To fetch from it, set")
    for name, value in simulator.environment.items():
        click.echo(f"    {name}={value}")
    click.echo(f"Requests so far: {url}/simulate/requests")
    click.echo(f"To simulate errors, POST to {url}/simulate/faults, /simulate/pulls, /simulate/connections")
    click.echo("or /simulate/terra")


def _stop_at_signals(stop: Flag) -> None:
    # Python allows it in the main thread only; in another thread the caller uses `stop`.
    if current_thread() is main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _frame: _stop(number, stop))


def _stop(number: int, stop: Flag) -> None:
    """Makes a second signal end the process, because its handler could wait for a lock that the first one holds."""
    signal.signal(number, signal.SIG_DFL)
    stop.set()
