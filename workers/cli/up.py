"""`headrace up`: everything on one machine."""

from pathlib import Path

import click

from app.config.settings import load, process_environment
from app.observability import logs
from workers.cli.options import data_dir_option
from workers.local import stack


@click.command("up")
@data_dir_option
@click.option("--port", type=int, help="port of the endpoint (default: 8000, or a free one)")
@click.option("--workers", type=click.IntRange(1), help="worker processes per lane (default: one per core)")
def command(data_dir: Path | None, port: int | None, workers: int | None) -> None:
    """Run everything on this machine, until Ctrl-C."""
    settings = load()
    logs.configure(settings)
    stack.up(settings, process_environment(), data_dir or Path(settings.data_dir), port, workers)
