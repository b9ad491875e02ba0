"""`headrace migrate`: upgrades the schema."""

from pathlib import Path

import click

from workers.cli.options import attached, data_dir_option
from workers.store.archive import maintain_partitions
from workers.store.engine import make_engine
from workers.store.migrate import migrate


@click.command("migrate")
@data_dir_option
def command(data_dir: Path | None) -> None:
    """Upgrade the database to the newest schema. Safe to run twice, and concurrently."""
    settings = attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-migrate")
    click.echo(f"the schema is at version {migrate(engine)}")
    maintain_partitions(engine, None)  # None: drops none, because HEADRACE_KEEP_DAYS may not be set here
