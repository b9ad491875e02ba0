"""`headrace web` and `headrace flower`: check the settings, then replace this process by the server."""

import click

from app.commands import become, own
from app.config.settings import load, process_environment
from app.observability.metrics import METRICS_FOLDER
from app.web.__main__ import make_folder
from app.web.limits import connections_per_process
from workers.broker_admin import need_durable
from workers.local.ports import need_port
from workers.local.secrets import WITHHELD


@click.command()
def web() -> None:
    """Run the endpoint."""
    settings = load()
    settings.need_broker()
    settings.need_webhook_secret()
    connections_per_process(settings)  # raises Misconfigured
    need_durable(settings)
    # The endpoint's processes share their metrics through files in this folder.
    folder = {} if process_environment().get(METRICS_FOLDER) else {METRICS_FOLDER: make_folder()}
    become(own("app.web", "headrace", "web"), folder, without=WITHHELD["web"])  # the arguments only show up in `ps`


@click.command()
def flower() -> None:
    """Run Flower, Celery's dashboard. HEADRACE_FLOWER_AUTH is its login."""
    settings = load()
    settings.need_broker()
    login = {"FLOWER_BASIC_AUTH": settings.need_flower_auth()}
    need_port(settings.flower_host, settings.flower_port, "HEADRACE_FLOWER_PORT")
    # In the environment, because every local user can read a command line.
    become(own("workers.celery.flower"), login, without=WITHHELD["flower"])
