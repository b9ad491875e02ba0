"""`headrace explain`: the origin of a stored value, or of a value of a day."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date, datetime
from typing import Any

import click

from app.catalogue import catalogue
from app.errors import NotFound
from workers.cli import options, output
from workers.cli.deployment import Deployment, query_options
from workers.cli.options import did_you_mean
from workers.daily import explain as daily_origin
from workers.daily import metrics
from workers.operate import explain as origin
from workers.store import audit, provenance, retractions

ROW_FIELDS = ("provider", "source_type", "subtype", "version", "origin", "stored_at")
HEALTH_VALUES = ("value", "summary_value")
MAX_ROWS = 60  # of a list that is printed as text


@click.command()
@options.user_option("whose value")
@click.option("--resource", "name", type=options.resource, help="workouts, sleep, heartrate ...")
@click.option("--id", "identifier", help="the id of a record")
@click.option("--at", type=options.moment, help="the time of a sample, or the day of a record")
@click.option("--daily", is_flag=True, help="explain a value of health.daily, with --metric and --date")
@click.option("--metric", help="of health.daily: steps, heartrate_avg, sleep_total ...")
@click.option("--date", "day", type=options.moment, help="the local date of health.daily")
@click.option("--values", is_flag=True, help="also print the values, which are health data")
@query_options
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
    deployment: Deployment,
) -> None:
    """Show where a stored value came from. Lists its deliveries and fetches, and the version that won.

    With --daily: the samples and sources behind one value of a day. Every use is recorded in headrace.audit.
    """
    if daily:
        if metric is None or day is None or name or identifier or at:
            raise click.UsageError("--daily needs --metric and --date, and no --resource, --id or --at")
        _explain_daily(deployment, user, metric, day.date(), values=values)
        return
    if name is None or metric or day:
        raise click.UsageError("give --resource with --id or --at, or --daily with --metric and --date")
    if (identifier is None) == (at is None):
        raise click.UsageError("give either --id for a record or --at for a time")
    asked = _question(deployment, user, name, identifier, at)
    with output.progress("deliveries read") as update:
        known = origin.explain(deployment.engine, deployment.settings, asked, update, values=values)
    if known.is_unknown:
        raise _unknown(deployment, asked)
    if output.is_json():
        output.print_json(_plain(known, values=values))
    else:
        _print_explanation(known, values=values)


def _question(
    deployment: Deployment, user: str, name: str, identifier: str | None, at: datetime | None
) -> origin.Question:
    """Raises click.ClickException unless exactly one user and record, or moment of a series, match."""
    user_id, resource = deployment.user(user).user_id, catalogue()[name]
    if resource.is_series and at is None:
        raise click.ClickException(f"{name} is a timeseries, whose samples have no id; use --at")
    if resource.is_series or at is None:
        return origin.Question(user_id, resource, id=identifier, at=at)
    with deployment.transaction() as connection:
        ids = provenance.ids_on(connection, resource, user_id, at)
    if not ids:
        raise NotFound(f"no record of {name} is stored for {at:%Y-%m-%d}; use --id")
    if len(ids) > 1:
        raise click.ClickException(f"several records on {at:%Y-%m-%d}: {', '.join(ids)}; use --id")
    return origin.Question(user_id, resource, id=ids[0])


def _unknown(deployment: Deployment, asked: origin.Question) -> NotFound:
    """The error about a value that is neither stored nor in a delivery."""
    what = f"{asked.resource.name} {asked.id}" if asked.id else f"sample of {asked.resource.name} at {asked.at}"
    with deployment.transaction() as connection:
        ids = retractions.ids(connection, asked.resource, asked.user_id) if asked.id else ()
    near = did_you_mean(asked.id or "", ids, ", and no archived delivery contains it")
    return NotFound(f"no {what} of {asked.user_id} is stored{near}")


def _plain(known: origin.Explanation, *, values: bool) -> dict[str, Any]:
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


def _plain_row(row: provenance.StoredRow, *, values: bool) -> dict[str, Any]:
    plain = {name: getattr(row, name) for name in ROW_FIELDS}
    return plain | {"deleted": row.is_deleted, "columns": row.columns if values else list(row.columns)}


def _plain_holding(one: origin.Holding, *, values: bool) -> dict[str, Any]:
    left_out = {"entry", "applied_at"} | (set() if values else {"content"})
    plain = one.entry._asdict() | vars(one) | {"meaning": origin.SAYS[one.verdict]}
    return {name: value for name, value in plain.items() if name not in left_out}


def _print_explanation(known: origin.Explanation, *, values: bool) -> None:
    for sentence in known.why:
        click.echo(sentence[0].upper() + sentence[1:] + ".")
    for row in known.rows:
        click.echo(f"\nstored: {row.provider} {row.source_type} {row.subtype}".rstrip())
        for name in ("version", "origin", "stored_at"):
            click.echo(f"  {name:10} {getattr(row, name)}")
        shown = row.columns.items() if values else [(name, "") for name in row.columns]
        click.echo("  columns    " + (", ".join(f"{name} {value}".rstrip() for name, value in shown) or "none"))
    holdings = [_holding_row(one, values=values) for one in known.holdings]
    output.print_list(holdings, "deliveries that contain it, oldest version first:")
    output.print_list([_fetch_row(one) for one in known.fetches], "backfills that requested it:")
    _print_limits(known)


def _holding_row(one: origin.Holding, *, values: bool) -> dict[str, Any]:
    return {
        "delivery": one.entry.message_id,
        "event": one.entry.event_type,
        "version": f"{one.version:%Y-%m-%d %H:%M:%S.%f}",
        "received": f"{one.entry.received_at:%Y-%m-%d %H:%M:%S}",
        "outcome": one.entry.outcome,
        "verdict": one.verdict,
        "differs in": ", ".join(f"{name} {one.content.get(name)}" if values else name for name in one.differs),
    }


def _fetch_row(one: provenance.Fetch) -> dict[str, Any]:
    return {
        "id": one.id,
        "provider": one.provider or "any",
        "requested by": one.requested_by,
        "status": one.status,
        "from": f"{one.window_start:%Y-%m-%d}" if one.window_start else "",
        "to": f"{one.window_end:%Y-%m-%d}" if one.window_end else "",
        "ended": one.finished_at,
    }


def _print_limits(known: origin.Explanation) -> None:
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


def _explain_daily(deployment: Deployment, user: str, metric: str, day: date, *, values: bool) -> None:
    """Prints the samples and sources behind a value of a day. `values` includes health values."""
    if metrics.resource_of(metric) is None:
        every = [one for names in metrics.derived().values() for one in names]
        raise NotFound(f"unknown metric {metric}{did_you_mean(metric, every, '; see deploy/docs/daily.md')}")
    person = deployment.person(user)
    with deployment.transaction() as connection:
        known = daily_origin.explain_day(connection, person, metric, day)
        audit.note(connection, "explain", person, {"metric": metric, "date": day.isoformat(), "values": values})
    plain = _plain_day(known, values=values)
    if output.is_json():
        output.print_json(plain)
    else:
        _print_day(plain)


def _plain_day(known: daily_origin.DayExplanation, *, values: bool) -> dict[str, Any]:
    plain = asdict(known) | {"local_date": known.local_date.isoformat()}
    for row in (plain["stored"], *plain["sources"], *plain["samples"]) if not values else ():
        for name in HEALTH_VALUES if row else ():
            row.pop(name, None)
    return plain


def _print_day(known: dict[str, Any]) -> None:
    stored = known["stored"]
    click.echo(f"{known['metric']} of {known['person']} on {known['local_date']}")
    if stored is None:
        click.echo("no value is stored")
    else:
        for name, value in stored.items():
            click.echo(f"  {name:16} {'' if value is None else value}".rstrip())
    if known["zone"]:
        click.echo(f"zone: {known['zone']}")
    for entries in known["lists"]:
        click.echo(f"priorities: {', '.join(entries)}")
    output.print_list(known["sources"], "sources, the best first:")
    output.print_list([_stretch_row(one) for one in known["stretches"]], "what won (UTC):", MAX_ROWS)
    output.print_list([_sample_row(one) for one in known["samples"]], "samples (UTC):", MAX_ROWS)


def _period(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "from": f"{one['start']:%Y-%m-%d %H:%M:%S}",
        "to": f"{one['stop']:%Y-%m-%d %H:%M:%S}",
        "source": f"{one['provider']}/{one['source_type']}",
        "offset": one["offset"],
        "zone_source": one["zone_source"],
    }


def _sample_row(one: dict[str, Any]) -> dict[str, Any]:
    row = _period(one) | {"counted": "yes" if one["is_counted"] else "no"}
    return row | ({"value": one["value"]} if "value" in one else {})


def _stretch_row(one: dict[str, Any]) -> dict[str, Any]:
    row = _period(one) | {"samples": one["samples"]}
    return row | ({"id": one["id"], "also": ", ".join(one["also"])} if one["id"] else {})
