"""`headrace explain`: the origin of a stored value."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from sqlalchemy import Engine

from app.catalogue import catalogue
from workers.cli import options, output
from workers.cli.explain_daily import explain_daily
from workers.cli.options import Moment, ResourceName
from workers.cli.users import resolve_user
from workers.operate.explain import SAYS, Explanation, Holding, Question
from workers.operate.explain import explain as look_up
from workers.store import provenance
from workers.store.engine import make_engine, transaction
from workers.store.provenance import Fetch, StoredRow


@click.command()
@options.user_option("whose value")
@click.option("--resource", "name", type=ResourceName(), help="workouts, sleep, heartrate ...")
@click.option("--id", "identifier", help="the id of a record")
@click.option("--at", type=Moment(), help="the time of a sample, or the day of a record")
@click.option("--daily", is_flag=True, help="explain a value of health.daily, with --metric and --date")
@click.option("--metric", help="of health.daily: steps, heartrate_avg, sleep_total ...")
@click.option("--date", "day", type=Moment(), help="the local date of health.daily")
@click.option("--values", is_flag=True, help="also print the values, which are health data")
@options.data_dir_option
@options.json_option
def explain(
    *,
    user: str,
    name: str | None,
    identifier: str | None,
    at: datetime | None,
    daily: bool,
    metric: str | None,
    day: datetime | None,
    values: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Show where a stored value came from. Lists its deliveries and fetches, and the version that won.

    With --daily: the samples and sources behind one value of a day. Every use is recorded in headrace.audit.
    """
    if daily:
        if metric is None or day is None or name or identifier or at:
            raise click.UsageError("--daily needs --metric and --date, and no --resource, --id or --at")
        explain_daily(user, metric, day.date(), data_dir, values=values, as_json=as_json)
        return
    if name is None or metric or day:
        raise click.UsageError("give --resource with --id or --at, or --daily with --metric and --date")
    if (identifier is None) == (at is None):
        raise click.UsageError("give either --id for a record or --at for a time")
    settings = options.attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-explain")
    asked = _question(engine, user, name, identifier, at)
    with output.progress("deliveries read", quiet=as_json) as update:
        known = look_up(engine, settings, asked, update, values=values)
    if as_json:
        output.print_json(_plain(known, values=values))
    else:
        _print_explanation(known, values=values)


def _question(engine: Engine, user: str, name: str, identifier: str | None, at: datetime | None) -> Question:
    """Raises click.ClickException unless exactly one user and record, or moment of a series, match."""
    found = resolve_user(engine, user)
    resource = catalogue()[name]
    if resource.is_series:
        if at is None:
            raise click.ClickException(f"{name} is a timeseries, whose samples have no id; use --at")
        return Question(found.user_id, resource, at=at)
    if at is not None:
        with transaction(engine) as connection:
            ids = provenance.ids_on(connection, resource, found.user_id, at)
        if not ids:
            raise click.ClickException(f"no record of {name} is stored for {at:%Y-%m-%d}; use --id")
        if len(ids) > 1:
            raise click.ClickException(f"several records on {at:%Y-%m-%d}: {', '.join(ids)}; use --id")
        identifier = ids[0]
    return Question(found.user_id, resource, id=identifier)


def _plain(known: Explanation, *, values: bool) -> dict[str, Any]:
    asked = known.question
    return {
        "user_id": asked.user_id,
        "resource": asked.resource.name,
        "id": asked.id,
        "at": asked.at,
        "why": known.why,
        "stored": [_plain_row(row, values=values) for row in known.rows],
        "deliveries": [_plain_holding(one, values=values) for one in known.holdings],
        "applied_with_it_and_not_kept": [
            {name: getattr(one, name) for name in ("aggregator", "message_id", "event_type", "received_at")}
            for one in known.unkept
        ],
        "backfills": [asdict(one) for one in known.fetches],
        "erased_at": known.person.erased_at,
        "former_user_ids": list(known.person.former),
        "deliveries_looked_at": known.looked_at,
        "deliveries_that_cannot_be_read": known.unread,
        "kept_since": known.kept_since,
        "retracted_at": min(known.retracted.values(), default=None),
    }


def _plain_row(row: StoredRow, *, values: bool) -> dict[str, Any]:
    return {
        "provider": row.provider,
        "source_type": row.source_type,
        "subtype": row.subtype,
        "version": row.version,
        "origin": row.origin,
        "stored_at": row.stored_at,
        "deleted": row.is_deleted,
        "columns": row.columns if values else list(row.columns),
    }


def _plain_holding(one: Holding, *, values: bool) -> dict[str, Any]:
    left_out = {"entry", "applied_at"} | (set() if values else {"content"})
    plain = one.entry._asdict() | vars(one) | {"meaning": SAYS[one.verdict]}
    return {name: value for name, value in plain.items() if name not in left_out}


def _print_explanation(known: Explanation, *, values: bool) -> None:
    for sentence in known.why:
        click.echo(sentence[0].upper() + sentence[1:] + ".")
    for row in known.rows:
        click.echo(f"\nstored: {row.provider} {row.source_type} {row.subtype}".rstrip())
        for name in ("version", "origin", "stored_at"):
            click.echo(f"  {name:10} {getattr(row, name)}")
        shown = row.columns.items() if values else [(name, "") for name in row.columns]
        click.echo("  columns    " + (", ".join(f"{name} {value}".rstrip() for name, value in shown) or "none"))
    if known.holdings:
        click.echo("\ndeliveries that contain it, oldest version first:")
        output.print_rows([_holding_row(one, values=values) for one in known.holdings])
    if known.fetches:
        click.echo("\nbackfills that requested it:")
        output.print_rows([_fetch_row(one) for one in known.fetches])
    _print_limits(known)


def _holding_row(one: Holding, *, values: bool) -> dict[str, Any]:
    return {
        "delivery": one.entry.message_id,
        "event": one.entry.event_type,
        "version": f"{one.version:%Y-%m-%d %H:%M:%S.%f}",
        "received": f"{one.entry.received_at:%Y-%m-%d %H:%M:%S}",
        "outcome": one.entry.outcome,
        "verdict": one.verdict,
        "differs in": ", ".join(f"{name} {one.content.get(name)}" if values else name for name in one.differs),
    }


def _fetch_row(one: Fetch) -> dict[str, Any]:
    return {
        "id": one.id,
        "provider": one.provider or "any",
        "requested by": one.requested_by,
        "status": one.status,
        "from": f"{one.window_start:%Y-%m-%d}" if one.window_start else "",
        "to": f"{one.window_end:%Y-%m-%d}" if one.window_end else "",
        "ended": one.finished_at,
    }


def _print_limits(known: Explanation) -> None:
    """Prints why the evidence may be incomplete."""
    if known.person.former:
        click.echo(f"former user_ids, whose deliveries were read as well: {', '.join(known.person.former)}")
    if known.unread:
        click.echo(
            f"{known.unread} deliveries that may contain it cannot be read: dead letters, or sealed with another key"
        )
    since = known.kept_since
    removed = (
        f"; deliveries before {since:%Y-%m-%d %H:%M} UTC are no longer archived (HEADRACE_KEEP_DAYS)" if since else ""
    )
    click.echo(f"\n{known.looked_at} archived deliveries read{removed}")
