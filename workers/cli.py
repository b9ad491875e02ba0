"""The command line: each command is a few lines around a plain function elsewhere."""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from app.config import Settings, inherited, load
from app.errors import HeadraceError, Misconfigured
from app.queue import LANES, make_celery
from workers import broker, check, processes, simulator, status, up
from workers.store.engine import make_engine, migrate

Command = Callable[..., Any]


class Group(click.Group):
    """Prints an error of ours as one line, and its traceback only with --debug."""

    def invoke(self, context: click.Context) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(context)
        except HeadraceError as error:
            if "--debug" in sys.argv:
                raise
            click.echo(f"headrace: {error}", err=True)
            context.exit(1)


def data_dir_option(command: Command) -> Command:
    """The stack that a command works against where DATABASE_URL and BROKER_URL are not set."""
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="the folder of the stack to work with (default: HEADRACE_DATA_DIR, then .headrace)",
    )(command)


def json_option(command: Command) -> Command:
    """For programs that read."""
    return click.option("--json", "as_json", is_flag=True, help="print JSON")(command)


def attached(data_dir: Path | None, *, broker: bool = True) -> Settings:
    """The settings, completed by the stack that runs in the data directory, where the command needs more."""
    settings = load()
    return up.attach(settings, data_dir or Path(settings.data_dir), broker=broker)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="headrace")
@click.option("--debug", is_flag=True, help="show the traceback of an error")
def main(*, debug: bool) -> None:
    """Headrace takes wearable-health webhooks and keeps them in your PostgreSQL: once, in the newest version."""
    logging.basicConfig(level="DEBUG" if debug else "WARNING", format="%(levelname)s %(name)s %(message)s")


@main.command("up")
@data_dir_option
@click.option("--port", type=int, help="the port of the endpoint (default: 8000, or a free one)")
@click.option("--workers", type=click.IntRange(1), help="worker processes per lane (default: one per core)")
def up_command(data_dir: Path | None, port: int | None, workers: int | None) -> None:
    """Run everything on this machine, until Ctrl-C."""
    logging.getLogger().setLevel(logging.INFO)
    settings = load()
    up.up(settings, inherited(), data_dir or Path(settings.data_dir), port, workers)


@main.command()
def web() -> None:
    """Run the endpoint."""
    settings = load()
    broker.need_durable(settings)
    processes.web(settings)


@main.command()
@click.option("--lane", type=click.Choice(LANES), required=True, help="which queue to work on")
def worker(lane: str) -> None:
    """Run one worker process. Start more, here or on other machines, to go faster."""
    processes.worker(load(), lane)


@main.command()
def beat() -> None:
    """Run the clock. One is enough."""
    processes.beat(load())


@main.command()
def flower() -> None:
    """Run Flower, behind its password."""
    processes.flower(load())


@main.command("migrate")
@data_dir_option
def migrate_command(data_dir: Path | None) -> None:
    """Bring the database to the newest schema. May run twice, and at the same time."""
    engine = make_engine(attached(data_dir, broker=False), "headrace-migrate")
    click.echo(f"the schema is at version {migrate(engine)}")


@main.command("check")
@data_dir_option
@json_option
@click.option("--explain", is_flag=True, help="list every setting with its default")
def check_command(*, data_dir: Path | None, as_json: bool, explain: bool) -> None:
    """Say what is wrong with the configuration, and how to mend it."""
    if explain:
        _print_rows(check.explain(), as_json=as_json)
        return
    settings = load()
    try:
        settings = attached(data_dir)
    except Misconfigured:
        logging.getLogger(__name__).debug("no stack to attach to; each finding says what it misses")
    found = list(check.findings(settings))
    if as_json:
        click.echo(json.dumps([{"what": one.what, "fine": one.fine, "text": one.text} for one in found], indent=2))
    else:
        for one in found:
            click.echo(f"{'ok   ' if one.fine else 'FAULT'} {one.what}: {one.text}", err=not one.fine)
    sys.exit(0 if all(one.fine for one in found) else 1)


@main.command("status")
@data_dir_option
@json_option
@click.option("--watch", is_flag=True, help="keep it fresh, until Ctrl-C")
@click.option("--every", type=click.FloatRange(0.2), default=2.0, show_default=True, help="seconds between two looks")
def status_command(*, data_dir: Path | None, as_json: bool, watch: bool, every: float) -> None:
    """Show what waits, what became of what came, and what needs a hand."""
    settings = attached(data_dir)
    engine, celery = make_engine(settings, "headrace-status"), make_celery(settings, "publisher")

    def look() -> status.Status:
        return status.read(engine, broker.lanes(celery, settings))

    if as_json:
        click.echo(json.dumps(look().plain(), indent=2))
    elif not watch:
        status.show(look(), Console())
    else:
        with Live(status.picture(look()), console=Console(), screen=True) as live:
            while True:
                time.sleep(every)
                live.update(status.picture(look()))


@main.command("simulate")
@click.option("--port", type=int, default=0, help="the port of the simulated API (default: a free one)")
@click.option("--users", type=click.IntRange(1), default=3, show_default=True, help="how many people")
@click.option("--days", type=click.IntRange(1), default=30, show_default=True, help="how much history each has")
@click.option("--seed", type=int, default=1, show_default=True, help="the same seed makes the same people and data")
@click.option("--to", help="also send signed webhooks to this endpoint, e.g. http://127.0.0.1:8000/webhooks/junction")
@click.option("--rate", type=click.FloatRange(0.01), default=5.0, show_default=True, help="live events per second")
@data_dir_option
def simulate(
    *, port: int, users: int, days: int, seed: int, to: str | None, rate: float, data_dir: Path | None
) -> None:
    """Run the simulated provider alone, for your own tests, until Ctrl-C.

    With --to, events are signed with JUNCTION_WEBHOOK_SECRET, or the secret of the stack in --data-dir.
    """
    secret = None
    if to:
        settings = load()
        secrets = settings.junction_webhook_secrets or attached(data_dir).junction_webhook_secrets
        secret = secrets[0]
    simulator.run(port=port, users=users, days=days, seed=seed, to=to, secret=secret, rate=rate)


def _print_rows(rows: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


if __name__ == "__main__":
    main()
