"""`headrace derive`: computes days again."""

from pathlib import Path

import click

from workers.cli import options, output
from workers.cli.persons import person_of
from workers.daily.derive import Deriver
from workers.store import audit
from workers.store.engine import make_engine


@click.group()
def derive() -> None:
    """Compute the values of days again.

    They are in health.daily. Workers of the lane `derive` keep them up to date, so this is only needed if stored rows
    were changed by hand.
    """


@derive.command()
@click.option("--user", help="only the days of this user: user_id, client_user_id or former user_id")
@options.data_dir_option
@options.json_option
def rebuild(*, user: str | None, data_dir: Path | None, as_json: bool) -> None:
    """Compute all days from the stored rows. Values that are already correct do not change.

    Days whose samples have expired (HEADRACE_RETENTION) stay as they are. Every use is recorded in headrace.audit.
    """
    settings = options.attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-derive")
    person = person_of(engine, user) if user else None
    with output.progress("rebuilding days", quiet=as_json) as update:
        written = Deriver(engine, settings).rebuild([person] if person else None, update)
    audit.record(engine, "derive rebuild", person or "*", {"changed": written})
    if as_json:
        output.print_json({"user": person, "changed": written})
    else:
        click.echo(f"rebuilt the days of {person or 'everyone'}: {written:,} values changed")
