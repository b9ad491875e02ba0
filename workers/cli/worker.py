"""`headrace worker` and `headrace beat`: the processes that run Celery."""

import contextlib
import sys

import click

from app.broker.lanes import LANES
from app.config.settings import load
from app.errors import TryLater
from workers.broker_admin import need_durable
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
        need_durable(settings)
    lower_priority(lane)
    from workers.celery.app import run_worker  # noqa: PLC0415 - 0.4 s of CPU, too long for --help and for an error

    sys.exit(run_worker(settings, lane))


@click.command()
def beat() -> None:
    """Run the scheduler. One per deployment is enough."""
    settings = load()
    settings.need_broker()
    with contextlib.suppress(TryLater):
        need_durable(settings)
    from workers.celery.app import run_beat  # noqa: PLC0415 - as above

    run_beat(settings)
