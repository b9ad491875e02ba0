"""`headrace roles`, `headrace retention` and `headrace audit`: who may what, how long, and who did what."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import click

from workers.cli import options, output
from workers.cli.options import Moment
from workers.store import audit as notes
from workers.store import retention as store
from workers.store.engine import make_engine, transaction
from workers.store.roles import script


@click.command()
@click.option("--writer", required=True, help="the role that workers log in as")
@click.option("--reader", required=True, help="the role that may only read schema health")
def roles(*, writer: str, reader: str) -> None:
    """Print the SQL that gives two roles what they need. The owner runs it: headrace roles ... | psql "$OWNER_URL"."""
    click.echo(script(writer, reader))


@click.command()
@click.option("--dry-run", is_flag=True, help="only say what would go")
@click.option("--yes", is_flag=True, help="do not ask")
@options.data_dir_option
@options.json_option
def retention(*, dry_run: bool, yes: bool, data_dir: Path | None, as_json: bool) -> None:
    """Remove now what is older than HEADRACE_RETENTION and HEADRACE_LEDGER_DAYS; workers do it a few times a day."""
    settings = options.attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-retention")
    edges = store.limits(settings, datetime.now(UTC))
    found = store.count(engine, edges)
    if not dry_run and found:
        if not yes and output.can_answer():
            click.confirm(f"remove {sum(found.values())} rows for good?", abort=True)
        found = dict(sum((Counter({name: gone}) for name, gone in store.remove(engine, edges)), Counter[str]()))
        notes.record(engine, "retention", "everybody", found)
    if as_json:
        output.print_json({name: {"before": edges[name], "rows": rows} for name, rows in found.items()})
        return
    done = "would go" if dry_run else "removed"
    rows = [{"what": name, "before": f"{edges[name]:%Y-%m-%d}", done: number} for name, number in found.items()]
    output.print_rows(rows, as_json=False)
    if not rows:
        click.echo(
            "nothing is older than it may be" if edges else "HEADRACE_RETENTION is not set: all is kept for ever"
        )


@click.command()
@click.option("--since", required=True, type=Moment(), help="from this day or moment on")
@click.option("--subject", help="only what was done to this (a user_id, a number)")
@options.data_dir_option
@options.json_option
def audit(*, since: datetime, subject: str | None, data_dir: Path | None, as_json: bool) -> None:
    """List what operators did, and to whom."""
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-audit")
    with transaction(engine) as connection:
        found = notes.listed(connection, since, subject)
    if as_json:
        output.print_json(found)
    elif not found:
        click.echo("nothing")
    else:
        output.print_rows([{**row, "at": f"{row['at']:%Y-%m-%d %H:%M:%S}"} for row in found], as_json=False)
