"""`headrace migrate`: the schema."""

from pathlib import Path

import click

from workers.cli.options import attached, data_dir_option
from workers.store.archive import maintain_partitions
from workers.store.engine import make_engine
from workers.store.migrate import migrate


@click.command("migrate")
@data_dir_option
def command(data_dir: Path | None) -> None:
    """Bring the database to the newest schema. May run twice, and at the same time."""
    settings = attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-migrate")
    click.echo(f"the schema is at version {migrate(engine)}")
    maintain_partitions(engine, None)  # it may be run by hand, where nobody has said how long they are kept
