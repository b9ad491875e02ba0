"""The simulated aggregators: Junction's and Terra's APIs and webhooks with generated users, for tests and the demo."""

import signal
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event as Flag
from threading import current_thread, main_thread
from typing import Any

import click

from workers.simulator import terra
from workers.simulator.data import World
from workers.simulator.events import first_events, live_events
from workers.simulator.sender import Sender
from workers.simulator.server import Simulator
from workers.simulator.terra.sender import TerraSender

__all__ = ["Simulator", "World", "first_events", "live_events", "run"]


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
    rate: float = 5.0,
    stop: Flag | None = None,
    **disorder: Any,
) -> None:
    """Serves the APIs until Ctrl-C, SIGTERM or `stop`, and sends events to the endpoints that are given.

    `to` is the endpoint for Junction's events, `terra_to` for Terra's; each needs the secret with which it checks
    signatures, otherwise ValueError is raised. The events of all connections are sent first, as fast as the endpoint
    accepts them, then live events at `rate` a second. `pinged` is the share of Terra's events that have only a URL.
    `disorder` are the shares `duplicates`, `reordering` and `late` of the events, see Sender.
    """
    if (to and secret is None) or (terra_to and terra_secret is None):
        raise ValueError("sending needs the secret with which the endpoint checks signatures")
    stop = stop or Flag()
    _stop_at_signals(stop)
    with (
        Simulator(users, days, seed, port=port) as simulator,
        ExitStack() as senders,
        ThreadPoolExecutor() as pool,
    ):
        _print_help(simulator)
        world, twin, ended = simulator.world, simulator.terra, simulator.terra_admin.record
        disorder |= {"seed": seed, "stop": stop}
        sending = []
        if to and secret:
            sender = senders.enter_context(Sender(to, secret, **disorder))
            sending.append(pool.submit(_send, sender, first_events(world), live_events(world), rate))
        if terra_to and terra_secret:
            sender = senders.enter_context(TerraSender(terra_to, terra_secret, ended=ended, **disorder))
            live = terra.live_events(twin, pinged=pinged, base_url=simulator.url)
            sending.append(pool.submit(_send, sender, terra.first_events(twin), live, rate))
        for one in sending:
            one.result()
        stop.wait()


def _send(sender: Sender, first: Iterable[Any], live: Iterable[Any], rate: float) -> None:
    label, started = sender.aggregator, time.monotonic()
    sent = sender.send_all(first)
    click.echo(f"{label}: sent {sent.total()} first events in {time.monotonic() - started:.1f} s: {_summary(sent)}")
    if not sender.stop.is_set():
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
