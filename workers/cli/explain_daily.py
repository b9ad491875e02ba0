"""`headrace explain --daily`: the samples and sources behind one value of a day."""

from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import click

from app.errors import NotFound
from workers.cli import options, output
from workers.cli.options import did_you_mean
from workers.cli.persons import person_of
from workers.daily.explain import DayExplanation, explain_day
from workers.daily.metrics import derived, resource_of
from workers.store import audit
from workers.store.engine import make_engine, transaction

HEALTH_VALUES = ("value", "summary_value")
MAX_ROWS = 60  # of a list that is printed as text


def explain_daily(user: str, metric: str, day: date, data_dir: Path | None, *, values: bool, as_json: bool) -> None:
    """Prints an explanation. `values` includes health values."""
    if resource_of(metric) is None:
        every = [one for metrics in derived().values() for one in metrics]
        raise NotFound(f"unknown metric {metric}{did_you_mean(metric, every) or '; see deploy/docs/daily.md'}")
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-explain")
    person = person_of(engine, user)
    with transaction(engine) as connection:
        known = explain_day(connection, person, metric, day)
        audit.note(connection, "explain", person, {"metric": metric, "date": day.isoformat(), "values": values})
    plain = _plain(known, values=values)
    if as_json:
        output.print_json(plain)
    else:
        _print(plain)


def _plain(known: DayExplanation, *, values: bool) -> dict[str, Any]:
    plain = asdict(known) | {"local_date": known.local_date.isoformat()}
    for row in (plain["stored"], *plain["sources"], *plain["samples"]) if not values else ():
        for name in HEALTH_VALUES if row else ():
            row.pop(name, None)
    return plain


def _print(known: dict[str, Any]) -> None:
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
    if known["sources"]:
        click.echo("\nsources, the best first:")
        output.print_rows(known["sources"])
    _print_list("what won (UTC):", [_row(one) for one in known["stretches"]])
    _print_list("samples (UTC):", [_sample_row(one) for one in known["samples"]])


def _print_list(title: str, found: list[dict[str, Any]]) -> None:
    if found:
        click.echo(f"\n{title}")
        output.print_rows(found[:MAX_ROWS])
        if len(found) > MAX_ROWS:
            click.echo(f"and {len(found) - MAX_ROWS} more; --json lists all")


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


def _row(one: dict[str, Any]) -> dict[str, Any]:
    row = _period(one) | {"samples": one["samples"]}
    return row | ({"id": one["id"], "also": ", ".join(one["also"])} if one["id"] else {})
