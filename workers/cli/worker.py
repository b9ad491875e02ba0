"""`headrace worker`: one worker process."""

import contextlib
import sys

import click

from app.broker.lanes import LANES
from app.config.settings import load
from app.errors import TryLater
from workers.broker_admin import need_durable
from workers.celery.app import run_worker
from workers.local.niceness import lower_priority


@click.command("worker")
@click.option("--lane", type=click.Choice(LANES), required=True, help="which queue to work on")
def command(lane: str) -> None:
    """Run one worker process. Start more, here or on other machines, to go faster."""
    settings = load()
    settings.need_broker()
    settings.need_database()
    if lane == "backfill" and settings.readable and settings.fetch_history:
        settings.need_redis()
    with contextlib.suppress(TryLater):  # Celery waits for a broker that is away
        need_durable(settings)
    lower_priority(lane)
    sys.exit(run_worker(settings, lane))
