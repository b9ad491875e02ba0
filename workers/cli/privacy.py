"""`headrace roles`, `headrace retention` and `headrace audit`."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from app.errors import NotFound
from workers.cli import options, output
from workers.cli.deployment import Deployment, query_options
from workers.cli.options import did_you_mean
from workers.store import audit as notes
from workers.store import retention as store
from workers.store import roles as grants
from workers.store import user_lookup

if TYPE_CHECKING:
    from sqlalchemy import Connection


@click.command()
@click.option("--writer", required=True, help="the database role of the workers")
@click.option("--reader", required=True, help="a role that may only read schema health")
def roles(*, writer: str, reader: str) -> None:
    """Print SQL that grants two roles their privileges. Run it as the owner: headrace roles ... | psql "$OWNER_URL"."""
    click.echo(grants.script(writer, reader))


@click.command()
@click.option("--dry-run", is_flag=True, help="only count the rows")
@options.yes_option
@query_options
def retention(*, dry_run: bool, yes: bool, deployment: Deployment) -> None:
    """Delete expired rows. Their age limits are HEADRACE_RETENTION and HEADRACE_LEDGER_DAYS.

    Workers also do this several times a day.
    """
    if not dry_run:
        output.require_answer(yes=yes)
    engine = deployment.engine
    edges = store.limits(deployment.settings, datetime.now(UTC))
    found = store.count(engine, edges)
    if not dry_run and found:
        output.confirm(f"delete {sum(found.values())} rows permanently?", yes=yes)
        found = dict(sum((Counter({name: gone}) for name, gone in store.remove(engine, edges)), Counter[str]()))
        notes.record(engine, "retention", "everybody", found)
    if output.is_json():
        output.print_json({name: {"before": edges[name], "rows": rows} for name, rows in found.items()})
        return
    done = "would be removed" if dry_run else "removed"
    rows = [{"what": name, "before": f"{edges[name]:%Y-%m-%d}", done: number} for name, number in found.items()]
    output.print_rows(
        rows, empty="no row is older than its limit" if edges else "HEADRACE_RETENTION is not set: no row expires"
    )


@click.command()
@options.since_option("at or after this day or time")
@click.option("--subject", help="only actions on this subject: a user by any id, or another name, e.g. 'dead letters'")
@query_options
def audit(*, since: datetime, subject: str | None, deployment: Deployment) -> None:
    """List the actions of operators."""
    with deployment.transaction() as connection:
        found = notes.listed(connection, since, _names(connection, subject) if subject else None)
    output.print_rows([{**row, "at": f"{row['at']:%Y-%m-%d %H:%M:%S}"} for row in found], found, empty="no actions")


def _names(connection: Connection, subject: str) -> list[str]:
    """The subject, and the ids of the users and people with this name. Raises NotFound for an unknown subject."""
    users = user_lookup.find(connection, subject)
    if not users and subject not in (known := notes.subjects(connection)):
        near = did_you_mean(subject, [*known, *user_lookup.candidates(connection, subject)])
        raise NotFound(f"{subject} is neither a user nor the subject of an action{near}")
    ids = {name for one in users for name in (one.user_id, one.client_user_id) if name}
    return sorted({subject, *ids})
