"""`headrace status`: problems, queue depths, delivery outcomes, backfills."""

from pathlib import Path

import click

from app.config.settings import load
from workers.cli.options import attached, data_dir_option, json_option
from workers.cli.output import console, live_view, print_json
from workers.local import attach
from workers.operate import status_view
from workers.operate.watch_view import Watcher
from workers.store.engine import make_engine


@click.command("status")
@data_dir_option
@json_option
@click.option("--watch", is_flag=True, help="refresh until Ctrl-C")
@click.option(
    "--interval",
    "--every",
    type=click.FloatRange(0.2),
    default=2.0,
    show_default=True,
    help="minimum seconds between refreshes",
)
@click.option("--web", help="URL of the operations port, e.g. http://web:8001 (default: of the stack in --data-dir)")
def command(*, data_dir: Path | None, as_json: bool, watch: bool, interval: float, web: str | None) -> None:
    """Show problems, queue depths, outcomes and backfills."""
    settings = attached(data_dir)
    engine = make_engine(settings, "headrace-status")
    watcher = Watcher(engine, settings, web or attach.operations_of(load(), data_dir or Path(settings.data_dir)))
    if as_json:
        print_json(watcher.poll().plain())
    elif watch:
        live_view(watcher.page, interval)
    else:
        console().print(status_view.render(watcher.poll()))
