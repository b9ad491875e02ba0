"""`headrace worker` and `headrace beat`: the processes that run Celery."""

import contextlib
import sys

import click

from app.broker.lanes import LANES
from app.config.settings import load
from app.errors import TryLater
from workers import broker_admin
from workers.celery import app
from workers.local.niceness import lower_priority


@click.command()
@click.option("--lane", type=click.Choice(LANES), required=True, help="the queue to consume")
def worker(lane: str) -> None:
    """Run one worker process. Start more, here or on other machines, for more throughput."""
    settings = load()
    settings.need_broker()
    settings.need_database()
    if lane == "backfill" and settings.readable and settings.fetch_history:
        settings.need_redis()
    with contextlib.suppress(TryLater):  # Celery waits until the broker can be reached
        broker_admin.need_durable(settings)
    lower_priority(lane)
    sys.exit(app.run_worker(settings, lane))


@click.command()
def beat() -> None:
    """Run the scheduler. One per deployment is enough."""
    settings = load()
    settings.need_broker()
    with contextlib.suppress(TryLater):
        broker_admin.need_durable(settings)
    app.run_beat(settings)
