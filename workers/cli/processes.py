"""`headrace up`, `web`, `flower`, `console` and `etl`. The fork server imports the module of `worker` and `beat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import click

from app import accounts
from app.broker import celery as broker
from app.commands import become, own
from app.config.settings import load, process_environment
from app.observability import logs, metrics
from app.web import __main__ as server
from app.web import limits
from workers import broker_admin
from workers.backfill import fetcher
from workers.celery import context as contexts
from workers.cli import options
from workers.ingest import apply, outcomes, rabbitmq_pipeline
from workers.local import ports, stack
from workers.local.secrets import WITHHELD
from workers.store import engine


@click.command()
@options.data_dir_option()
@click.option("--port", type=click.IntRange(1, 65535), help="port of the endpoint (default: 8000, or a free one)")
@click.option("--workers", type=click.IntRange(1), help="worker processes per lane (default: one per core)")
@click.option("--parent", type=int, hidden=True, help="also stop when this process (a demo or drill) has ended")
def up(data_dir: Path | None, port: int | None, workers: int | None, parent: int | None) -> None:
    """Run everything on this machine, until Ctrl-C."""
    settings = load()
    logs.configure(settings)
    folder = data_dir or Path(settings.data_dir)
    stack.up(settings, process_environment(), folder, port=port, workers=workers, parent=parent)


@click.command()
def web() -> None:
    """Run the endpoint."""
    settings = load()
    settings.need_broker()
    settings.need_webhook_secret()
    limits.connections_per_process(settings)  # raises Misconfigured
    broker_admin.need_durable(settings)
    # The endpoint's processes share their metrics through files in this folder.
    folder = {} if process_environment().get(metrics.METRICS_FOLDER) else {metrics.METRICS_FOLDER: server.make_folder()}
    become(own("app.web", "headrace", "web"), folder, without=WITHHELD["web"])  # the arguments only show up in `ps`


@click.command()
def flower() -> None:
    """Run Flower, Celery's dashboard. HEADRACE_FLOWER_AUTH is its login."""
    settings = load()
    settings.need_broker()
    login = {"FLOWER_BASIC_AUTH": settings.need_flower_auth()}
    ports.need_port(settings.flower_host, settings.flower_port, "HEADRACE_FLOWER_PORT")
    # In the environment, because every local user can read a command line.
    become(own("workers.celery.flower"), login, without=WITHHELD["flower"])


@click.group("console", cls=options.Group, invoke_without_command=True)
@click.option("--web", help="URL of the endpoint's operations port, e.g. http://web:8001, to show its state too")
@click.pass_context
def console(context: click.Context, web: str | None) -> None:
    """Run the console, a web page for operators. Its accounts are in HEADRACE_CONSOLE_USERS."""
    if context.invoked_subcommand:
        return
    settings = load()
    settings.need_database()
    settings.need_broker()
    settings.need_console_users()
    become(own("workers.console", *([web] if web else [])), {}, without=WITHHELD["console"])


@console.command()
@click.argument("name")
@click.option(
    "--role",
    required=True,
    type=click.Choice(get_args(accounts.Role)),
    help="viewer sees states, counts and ids; operator may also act; privacy may also see values and erase users",
)
def passwd(*, name: str, role: accounts.Role) -> None:
    """Ask for a password, and print an account for HEADRACE_CONSOLE_USERS.

    Without a terminal, the password is read from standard input.
    """
    if not accounts.NAME.fullmatch(name):
        raise click.BadParameter(f"{name!r} is not a name: use letters, digits, and . _ @ - (63)")
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if len(password) < accounts.MIN_PASSWORD or len(password.encode()) > accounts.MAX_PASSWORD:
        raise click.ClickException(f"the password must have {accounts.MIN_PASSWORD} or more characters")
    click.echo(accounts.Account(name, accounts.hash_password(password), role).line)


@click.command()
@click.option("--optional", is_flag=True, help="wait instead of failing if HEADRACE_ETL_URL is not set")
def etl(*, optional: bool) -> None:
    """Consume the queue of Junction's ETL pipeline. One process per queue works; further ones stand by."""
    settings = load()
    if optional and not settings.etl_url:
        rabbitmq_pipeline.idle()
        return
    settings.need_etl()
    settings.need_database()
    logs.configure(settings)
    name = "headrace-etl"
    if settings.broker_url or settings.redis_url:
        work = contexts.WorkerContext(broker.make_celery(settings, "publisher"), settings, name)

        def hand_over(applied: outcomes.Applied) -> None:
            work.hand_over(applied)
            work.enqueue(fetcher.FollowUp(one, 0) for one in applied.backfills)

        rabbitmq_pipeline.run(settings, work.applier, hand_over)
    else:  # without a broker, the sweep starts announced backfills
        writer = engine.make_writer(settings, name, engine.WORKER_SESSION)
        rabbitmq_pipeline.run(settings, apply.Applier(writer, settings))
