"""`headrace web`, `worker`, `beat` and `flower`: one process each, as in the Procfile."""

import contextlib

import click

from app.broker.lanes import LANES
from app.config.settings import load
from app.errors import TryLater
from workers import broker_admin
from workers.local import processes


@click.command()
def web() -> None:
    """Run the endpoint."""
    settings = load()
    broker_admin.need_durable(settings)
    processes.web(settings)


@click.command()
@click.option("--lane", type=click.Choice(LANES), required=True, help="which queue to work on")
def worker(lane: str) -> None:
    """Run one worker process. Start more, here or on other machines, to go faster."""
    settings = load()
    if lane == "backfill" and settings.readable and settings.fetch_history:
        settings.need_redis()
    with contextlib.suppress(TryLater):  # Celery waits for a broker that is away
        broker_admin.need_durable(settings)
    processes.worker(settings, lane)


@click.command()
def beat() -> None:
    """Run the clock. One is enough."""
    settings = load()
    with contextlib.suppress(TryLater):
        broker_admin.need_durable(settings)
    processes.beat(settings)


@click.command()
def flower() -> None:
    """Run Flower, behind its password."""
    processes.flower(load())
