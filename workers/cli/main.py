"""The command line: each command is a few lines around a plain function elsewhere."""

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import click

from app.broker.celery import make_celery
from app.broker.lanes import LANES
from app.config.settings import load, process_environment
from app.errors import Misconfigured, TryLater
from app.observability import logs
from workers import broker_admin, simulator
from workers.backfill.fetcher import FollowUp
from workers.celery.context import WorkerContext
from workers.cli.backfill import backfill
from workers.cli.dead import dead, replay
from workers.cli.drill import command as drill
from workers.cli.erase import erase
from workers.cli.explain import explain
from workers.cli.link import link
from workers.cli.options import Group, attached, data_dir_option, json_option
from workers.cli.output import console, live_view, print_json, print_rows
from workers.cli.privacy import audit, retention, roles
from workers.cli.reconcile import reconcile, refresh
from workers.cli.report import report
from workers.ingest import rabbitmq_pipeline
from workers.ingest.apply import Applier
from workers.local import attach, processes, stack
from workers.operate import check, status_view
from workers.operate.watch_view import Watcher
from workers.store.archive import maintain_partitions
from workers.store.engine import make_engine, make_writer
from workers.store.migrate import migrate


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
    settings = load()
    logs.configure(settings)
    stack.up(settings, process_environment(), data_dir or Path(settings.data_dir), port, workers)


@main.command()
def web() -> None:
    """Run the endpoint."""
    settings = load()
    broker_admin.need_durable(settings)
    processes.web(settings)


@main.command()
@click.option("--lane", type=click.Choice(LANES), required=True, help="which queue to work on")
def worker(lane: str) -> None:
    """Run one worker process. Start more, here or on other machines, to go faster."""
    settings = load()
    if lane == "backfill" and settings.readable and settings.fetch_history:
        settings.need_redis()
    with contextlib.suppress(TryLater):  # Celery waits for a broker that is away
        broker_admin.need_durable(settings)
    processes.worker(settings, lane)


@main.command("etl")
@click.option("--optional", is_flag=True, help="without HEADRACE_ETL_URL wait to be ended, instead of failing")
def etl_command(*, optional: bool) -> None:
    """Take events out of the queue that Junction's ETL pipeline feeds. One for each queue; a second one stands by."""
    settings = load()
    if optional and not settings.etl_url:
        rabbitmq_pipeline.idle()
        return
    settings.need_etl()
    settings.need_database()
    logs.configure(settings)
    name = "headrace-etl"
    if settings.broker_url or settings.redis_url:
        work = WorkerContext(make_celery(settings, "publisher"), settings, name)
        rabbitmq_pipeline.run(
            settings, work.applier, lambda announced: work.enqueue(FollowUp(one, 0) for one in announced)
        )
    else:  # what history it announces, beat's sweep finds
        rabbitmq_pipeline.run(settings, Applier(make_writer(settings, name), settings))


@main.command()
def beat() -> None:
    """Run the clock. One is enough."""
    settings = load()
    with contextlib.suppress(TryLater):
        broker_admin.need_durable(settings)
    processes.beat(settings)


@main.command()
def flower() -> None:
    """Run Flower, behind its password."""
    processes.flower(load())


@main.command("migrate")
@data_dir_option
def migrate_command(data_dir: Path | None) -> None:
    """Bring the database to the newest schema. May run twice, and at the same time."""
    settings = attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-migrate")
    click.echo(f"the schema is at version {migrate(engine)}")
    maintain_partitions(engine, None)  # it may be run by hand, where nobody has said how long they are kept


@main.command("check")
@data_dir_option
@json_option
@click.option("--explain", is_flag=True, help="list every setting with its default")
def check_command(*, data_dir: Path | None, as_json: bool, explain: bool) -> None:
    """Say what is wrong with the configuration, and how to mend it."""
    if explain:
        print_rows(check.explain(), as_json=as_json)
        return
    settings = load()
    try:
        settings = attached(data_dir)
    except Misconfigured:
        logging.getLogger(__name__).debug("no stack to attach to; each finding says what it misses")
    found = list(check.findings(settings))
    if as_json:
        print_json(found)
    else:
        for one in found:
            click.echo(f"{'ok   ' if one.fine else 'FAULT'} {one.what}: {one.text}", err=not one.fine)
    sys.exit(0 if all(one.fine for one in found) else 1)


@main.command("status")
@data_dir_option
@json_option
@click.option("--watch", is_flag=True, help="keep it fresh, until Ctrl-C")
@click.option(
    "--interval",
    "--every",
    type=click.FloatRange(0.2),
    default=2.0,
    show_default=True,
    help="seconds between two looks, at least",
)
@click.option("--web", help="the endpoint to ask too, e.g. http://web:8000 (default: the one of --data-dir)")
def status_command(*, data_dir: Path | None, as_json: bool, watch: bool, interval: float, web: str | None) -> None:
    """Show whether it is healthy, what waits, what became of what came, and what needs a hand."""
    settings = attached(data_dir)
    engine, celery = make_engine(settings, "headrace-status"), make_celery(settings, "publisher")
    watcher = Watcher(engine, celery, settings, web or attach.endpoint_of(load(), data_dir or Path(settings.data_dir)))
    if as_json:
        print_json(watcher.poll().plain())
    elif watch:
        live_view(watcher.page, interval)
    else:
        console().print(status_view.render(watcher.poll()))


@main.command("simulate")
@click.option("--port", type=int, default=0, help="the port of the simulated API (default: a free one)")
@click.option("--users", type=click.IntRange(1), default=3, show_default=True, help="how many people")
@click.option("--days", type=click.IntRange(1), default=30, show_default=True, help="how much history each has")
@click.option("--seed", type=int, default=1, show_default=True, help="the same seed makes the same people and data")
@click.option("--to", help="also send signed webhooks to this endpoint, e.g. http://127.0.0.1:8000/webhooks/junction")
@click.option("--terra-to", help="the same as Terra would, e.g. to http://127.0.0.1:8000/webhooks/terra")
@click.option("--rate", type=click.FloatRange(0.01), default=5.0, show_default=True, help="live events per second")
@click.option("--duplicates", type=click.FloatRange(0, 1), default=0.0, help="the share of events that is sent twice")
@click.option("--reordering", type=click.FloatRange(0, 1), default=0.0, help="the share that comes a little late")
@click.option("--late", type=click.FloatRange(0, 1), default=0.0, help="the share that comes very late")
@click.option(
    "--pinged", type=click.FloatRange(0, 1), default=0.0, help="the share of Terra's that waits at an address"
)
@data_dir_option
def simulate(*, to: str | None, terra_to: str | None, data_dir: Path | None, **options: Any) -> None:
    """Run the simulated provider alone, for your own tests, until Ctrl-C.

    With --to and --terra-to, events are signed with JUNCTION_WEBHOOK_SECRET and TERRA_SIGNING_SECRET, or the secrets
    of the stack in --data-dir.
    """
    settings = load()
    secrets, terra_secrets = settings.junction_webhook_secrets, settings.terra_signing_secrets
    if (to and not secrets) or (terra_to and not terra_secrets):
        stack = attached(data_dir)
        secrets, terra_secrets = stack.junction_webhook_secrets, stack.terra_signing_secrets
    secret, terra_secret = next(iter(secrets), None), next(iter(terra_secrets), None)
    simulator.run(to=to, secret=secret, terra_to=terra_to, terra_secret=terra_secret, **options)


for command in (
    link,
    backfill,
    reconcile,
    refresh,
    dead,
    replay,
    erase,
    explain,
    report,
    retention,
    roles,
    audit,
    drill,
):
    main.add_command(command)
