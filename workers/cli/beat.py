"""`headrace beat`: the scheduler."""

import contextlib

import click

from app.config.settings import load
from app.errors import TryLater
from workers.broker_admin import need_durable
from workers.celery.app import run_beat


@click.command("beat")
def command() -> None:
    """Run the scheduler. One is enough."""
    settings = load()
    settings.need_broker()
    with contextlib.suppress(TryLater):
        need_durable(settings)
    run_beat(settings)
