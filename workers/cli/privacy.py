"""`headrace roles`, `headrace retention` and `headrace audit`."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import click
from sqlalchemy import Connection

from workers.cli import options, output
from workers.cli.options import Moment
from workers.store import audit as notes
from workers.store import retention as store
from workers.store import user_lookup
from workers.store.engine import make_engine, transaction
from workers.store.roles import script


@click.command()
@click.option("--writer", required=True, help="the database role of the workers")
@click.option("--reader", required=True, help="a role that may only read schema health")
def roles(*, writer: str, reader: str) -> None:
    """Print SQL that grants two roles their privileges. Run it as the owner: headrace roles ... | psql "$OWNER_URL"."""
    click.echo(script(writer, reader))


@click.command()
@click.option("--dry-run", is_flag=True, help="only count the rows")
@options.yes_option
@options.data_dir_option
@options.json_option
def retention(*, dry_run: bool, yes: bool, data_dir: Path | None, as_json: bool) -> None:
    """Delete expired rows. Their age limits are HEADRACE_RETENTION and HEADRACE_LEDGER_DAYS.

    Workers also do this several times a day.
    """
    if not dry_run:
        output.require_answer(yes=yes)
    settings = options.attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-retention")
    edges = store.limits(settings, datetime.now(UTC))
    found = store.count(engine, edges)
    if not dry_run and found:
        output.confirm(f"delete {sum(found.values())} rows permanently?", yes=yes)
        found = dict(sum((Counter({name: gone}) for name, gone in store.remove(engine, edges)), Counter[str]()))
        notes.record(engine, "retention", "everybody", found)
    if as_json:
        output.print_json({name: {"before": edges[name], "rows": rows} for name, rows in found.items()})
        return
    done = "would be removed" if dry_run else "removed"
    rows = [{"what": name, "before": f"{edges[name]:%Y-%m-%d}", done: number} for name, number in found.items()]
    output.print_rows(rows)
    if not rows:
        click.echo("no row is older than its limit" if edges else "HEADRACE_RETENTION is not set: no row expires")


@click.command()
@click.option("--since", required=True, type=Moment(), help="at or after this day or time")
@click.option("--subject", help="only actions on this subject: a user by any id, or another name, e.g. 'dead letters'")
@options.data_dir_option
@options.json_option
def audit(*, since: datetime, subject: str | None, data_dir: Path | None, as_json: bool) -> None:
    """List the actions of operators."""
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-audit")
    with transaction(engine) as connection:
        found = notes.listed(connection, since, _names(connection, subject) if subject else None)
    if as_json:
        output.print_json(found)
    elif not found:
        click.echo("no actions")
    else:
        output.print_rows([{**row, "at": f"{row['at']:%Y-%m-%d %H:%M:%S}"} for row in found])


def _names(connection: Connection, subject: str) -> list[str]:
    """The subject, and the ids of the users and people with this name."""
    users = user_lookup.find(connection, subject)
    ids = {name for one in users for name in (one.user_id, one.client_user_id) if name}
    return sorted({subject, *ids})
