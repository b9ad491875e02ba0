"""`headrace up`: everything on one machine."""

from pathlib import Path

import click

from app.config.settings import load, process_environment
from app.observability import logs
from workers.cli.options import data_dir_option
from workers.local import stack


@click.command("up")
@data_dir_option
@click.option("--port", type=click.IntRange(1, 65535), help="port of the endpoint (default: 8000, or a free one)")
@click.option("--workers", type=click.IntRange(1), help="worker processes per lane (default: one per core)")
@click.option("--parent", type=int, hidden=True, help="also stop when this process (a demo or drill) has ended")
def command(data_dir: Path | None, port: int | None, workers: int | None, parent: int | None) -> None:
    """Run everything on this machine, until Ctrl-C."""
    settings = load()
    logs.configure(settings)
    folder = data_dir or Path(settings.data_dir)
    stack.up(settings, process_environment(), folder, port=port, workers=workers, parent=parent)
