"""`headrace report`: completeness of the stored data, for operators and cron."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from workers import broker_admin
from workers.cli import options, output
from workers.cli.options import Moment
from workers.operate.completeness import OUTCOMES, STUCK, Completeness, DayOutcomes, MissingDays, read_report
from workers.store.engine import make_engine

MAX_SHOWN = 20  # rows per list; --json has all
COUNTED = (
    "accepted: distinct delivery ids of the ledger, by the day of receipt; pending: messages in the "
    "broker, each with one or more deliveries. The endpoint's counters restart with its processes and are not compared."
)


@click.group("report", cls=options.Group)
def report() -> None:
    """Report on the stored data."""


@report.command()
@click.option("--since", required=True, type=Moment(), help="received at or after this day or time")
@click.option("--until", type=Moment(), help="received before this day or time (default: now)")
@click.option("--coverage/--no-coverage", default=True, help="search each user's data for missing days")
@options.data_dir_option
@options.json_option
def completeness(
    *, since: datetime, until: datetime | None, coverage: bool, data_dir: Path | None, as_json: bool
) -> None:
    """Count deliveries by outcome, and list missing data. Exit status 1 if anything is missing or dead."""
    end = until or datetime.now(UTC)
    if since >= end:
        raise click.ClickException(f"--since {since.isoformat()} is not before --until {end.isoformat()}")
    settings = options.attached(data_dir)
    lanes = broker_admin.lanes(settings)
    engine = make_engine(settings, "headrace-report")
    with output.progress("users checked", quiet=as_json) as update:
        found = read_report(engine, lanes, since, end, update if coverage else None)
    if as_json:
        output.print_json(_plain(found))
    else:
        _print_report(found)
    if found.faults:
        raise click.exceptions.Exit(1)


def _plain(found: Completeness) -> dict[str, Any]:
    return {
        "since": found.since,
        "until": found.until,
        "counted": COUNTED,
        "days": [_row(one) for one in found.days],
        "pending_messages": dict(found.pending),
        "gaps": dict(found.gaps),
        "open_gaps": found.listed_gaps,
        "unfinished_backfills": found.unfinished,
        "refused_items": found.listed_refused,
        "holes": [one.key._asdict() | {"days": [day.isoformat() for day in one.days]} for one in found.holes],
        "faults": found.faults,
    }


def _row(one: DayOutcomes) -> dict[str, Any]:
    return {
        "provider": one.provider,
        "day": one.day.isoformat(),
        "accepted": one.accepted,
        **{name: one.counts.get(name, 0) for name in OUTCOMES},
        "attempts": one.attempts,
        "dead letters": one.dead_letters,
    }


def _print_report(found: Completeness) -> None:
    output.print_rows([_row(one) for one in found.days])
    totals = {name: sum(one.counts.get(name, 0) for one in found.days) for name in OUTCOMES}
    parts = " + ".join(f"{count} {name}" for name, count in totals.items())
    click.echo(f"{sum(totals.values())} accepted = {parts}; {sum(found.pending.values())} messages pending now")
    click.echo(COUNTED)
    _list("open gaps of the last reconciliation", [vars(one) for one in found.listed_gaps])
    _list("backfills that failed or are paused", [vars(one) for one in found.unfinished if one.status in STUCK])
    _list("backfills in progress", [vars(one) for one in found.unfinished if one.status not in STUCK])
    _list("refused items, by user and resource", [vars(one) for one in found.listed_refused])
    _list("days without data between days with data", [_hole_row(one) for one in found.holes])
    click.echo("\n" + ("missing or dead: " + ", ".join(found.faults) if found.faults else "nothing is missing or dead"))


def _list(title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        click.echo(f"\n{title}: {len(rows)}")
        output.print_rows(rows[:MAX_SHOWN])
        if len(rows) > MAX_SHOWN:
            click.echo(f"and {len(rows) - MAX_SHOWN} more; --json lists all")


def _hole_row(one: MissingDays) -> dict[str, Any]:
    days = ", ".join(day.isoformat() for day in one.days[:4]) + (" ..." if len(one.days) > 4 else "")
    return one.key._asdict() | {"count": len(one.days), "days": days}
