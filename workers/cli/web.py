"""`headrace web`: the endpoint."""

import click

from app.config.settings import load, process_environment
from app.observability.metrics import METRICS_FOLDER
from app.web.__main__ import make_folder
from workers.broker_admin import need_durable
from workers.local.commands import become, own


@click.command("web")
def command() -> None:
    """Run the endpoint."""
    settings = load()
    settings.need_broker()
    settings.need_webhook_secret()
    need_durable(settings)
    # Its processes count together through files; without a folder given they get one of their own.
    folder = {} if process_environment().get(METRICS_FOLDER) else {METRICS_FOLDER: make_folder()}
    become(own("app.web", "headrace", "web"), folder)  # it reads its settings itself; the words are for `ps`
