"""`headrace report`: what is complete, for people and for cron."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.broker.celery import make_celery
from workers import broker_admin
from workers.cli import options, output
from workers.cli.options import Moment
from workers.operate.completeness import OUTCOMES, Completeness, DayOutcomes, MissingDays, read_report
from workers.store.engine import make_engine

MAX_SHOWN = 20  # of a kind on a terminal; --json has them all
COUNTED = (
    "accepted counts delivery ids by the day they came, each once, in the ledger; pending is what the broker has now, "
    "in messages of one delivery or more. Counters of the endpoint begin anew with each start, and are not compared."
)


@click.group("report", cls=options.Group)
def report() -> None:
    """Report on what was stored."""


@report.command()
@click.option("--since", required=True, type=Moment(), help="from this day or moment on")
@click.option("--until", type=Moment(), help="and before this (default: now)")
@click.option("--coverage/--no-coverage", default=True, help="look for days without data, person by person")
@options.data_dir_option
@options.json_option
def completeness(
    *, since: datetime, until: datetime | None, coverage: bool, data_dir: Path | None, as_json: bool
) -> None:
    """Account for what came, and name what is missing. Exit status 1 if anything is missing or dead."""
    end = until or datetime.now(UTC)
    if since >= end:
        raise click.ClickException(f"--since {since.isoformat()} is not before --until {end.isoformat()}")
    settings = options.attached(data_dir)
    lanes = broker_admin.lanes(make_celery(settings, "publisher"), settings)
    engine = make_engine(settings, "headrace-report")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = output.console()
    with Progress(*columns, console=screen, transient=True, disable=as_json or not screen.is_terminal) as progress:
        task = progress.add_task("people", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = read_report(engine, lanes, since, end, on_progress if coverage else None)
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
        "holes": [one.key._asdict() | {"days": [day.isoformat() for day in one.days]} for one in found.holes],
        "faults": found.faults,
    }


def _row(one: DayOutcomes) -> dict[str, Any]:
    counts = {name: one.counts.get(name, 0) for name in OUTCOMES}
    about = {"provider": one.provider, "day": one.day.isoformat(), "accepted": one.accepted}
    return {**about, **counts, "attempts": one.attempts, "dead letters": one.dead_letters}


def _print_report(found: Completeness) -> None:
    output.print_rows([_row(one) for one in found.days], as_json=False)
    totals = {name: sum(one.counts.get(name, 0) for one in found.days) for name in OUTCOMES}
    waiting = sum(found.pending.values())
    parts = " + ".join(f"{count} {name}" for name, count in totals.items())
    click.echo(f"{sum(totals.values())} accepted = {parts}; {waiting} messages pending now")
    click.echo(COUNTED)
    _list("open gaps, of the last reconciliation", [_short(vars(one)) for one in found.listed_gaps])
    _list("backfills that have not ended well", [_short(vars(one)) for one in found.unfinished])
    _list("days without data between days with data", [_of_hole(one) for one in found.holes])
    click.echo("\n" + ("missing or dead: " + ", ".join(found.faults) if found.faults else "nothing is missing or dead"))


def _list(title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        click.echo(f"\n{title}: {len(rows)}")
        output.print_rows(rows[:MAX_SHOWN], as_json=False)
        if len(rows) > MAX_SHOWN:
            click.echo(f"and {len(rows) - MAX_SHOWN} more; --json has them")


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{value:%Y-%m-%d %H:%M}" if isinstance(value, datetime) else value for name, value in row.items()}


def _of_hole(one: MissingDays) -> dict[str, Any]:
    days = ", ".join(day.isoformat() for day in one.days[:4]) + (" ..." if len(one.days) > 4 else "")
    return one.key._asdict() | {"count": len(one.days), "days": days}
