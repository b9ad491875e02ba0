"""`headrace flower`: the dashboard of Celery."""

import click

from app.config.settings import load
from workers.local.commands import become, own


@click.command("flower")
def command() -> None:
    """Run Flower, behind its password."""
    settings = load()
    settings.need_broker()
    # By the environment, because anybody can read a command line.
    become(own("workers.celery.flower"), {"FLOWER_BASIC_AUTH": settings.need_flower_auth()})
