"""`headrace check`, `headrace status` and `headrace report`: the configuration, the present state, the stored data."""

from __future__ import annotations

import logging
import sys
from datetime import datetime
from typing import Any

import click

from app.config.settings import load
from app.errors import Misconfigured
from workers import broker_admin
from workers.cli import options, output
from workers.cli.deployment import Deployment, stack_options
from workers.local import attach
from workers.operate import check as checks
from workers.operate import completeness as completion
from workers.operate import status_view, watch_view

MAX_SHOWN = 20  # rows per list; --json has all
COUNTED = (
    "accepted: distinct delivery ids of the ledger, by the day of receipt; pending: messages in the "
    "broker, each with one or more deliveries. The endpoint's counters restart with its processes and are not compared."
)


@click.command()
@stack_options
@click.option("--explain", is_flag=True, help="list every setting with its default")
def check(*, deployment: Deployment, explain: bool) -> None:
    """Check the settings and every service. Each fault is printed with its fix."""
    if explain:
        output.print_rows(checks.explain())
        return
    settings = load()
    try:
        settings = deployment.settings
    except Misconfigured:
        logging.getLogger(__name__).debug("no stack runs in the data directory; checks report missing settings")
    found = []
    for one in checks.findings(settings):
        found.append(one)
        if not output.is_json():
            label = "WARN " if one.is_warning else "ok   " if one.fine else "FAULT"
            click.echo(f"{label} {one.what}: {one.text}", err=not one.fine)
    if output.is_json():
        output.print_json(found)
    sys.exit(0 if all(one.fine for one in found) else 1)


@click.command()
@stack_options
@click.option("--watch", is_flag=True, help="refresh until Ctrl-C")
@click.option(
    "--interval",
    "--every",
    type=click.FloatRange(0.2),
    default=2.0,
    show_default=True,
    help="minimum seconds between refreshes",
)
@click.option("--web", help="URL of the operations port, e.g. http://web:8001 (default: of the stack in --data-dir)")
def status(*, deployment: Deployment, watch: bool, interval: float, web: str | None) -> None:
    """Show problems, queue depths, outcomes and backfills."""
    settings = deployment.settings
    web = web or attach.operations_of(load(), deployment.data_dir)
    watcher = watch_view.Watcher(deployment.engine, settings, web)
    if output.is_json():
        output.print_json(watcher.poll().plain())
    elif watch:
        output.live_view(watcher.page, interval)
    else:
        output.console().print(status_view.render(watcher.poll()))


@click.group("report", cls=options.Group)
def report() -> None:
    """Report on the stored data."""


@report.command()
@options.since_option("received at or after this day or time")
@options.until_option("received before this day or time")
@click.option("--coverage/--no-coverage", default=True, help="search each user's data for missing days")
@stack_options
def completeness(*, since: datetime, until: datetime | None, coverage: bool, deployment: Deployment) -> None:
    """Count deliveries by outcome, and list missing data. Exit status 1 if anything is missing or dead."""
    end = options.check_period(since, until)
    lanes = broker_admin.lanes(deployment.settings)
    with output.progress("users checked") as update:
        found = completion.read_report(deployment.engine, lanes, since, end, update if coverage else None)
    if output.is_json():
        output.print_json(_plain(found))
    else:
        _print_report(found)
    if found.faults:
        raise click.exceptions.Exit(1)


def _plain(found: completion.Completeness) -> dict[str, Any]:
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


def _row(one: completion.DayOutcomes) -> dict[str, Any]:
    return {
        "provider": one.provider,
        "day": one.day.isoformat(),
        "accepted": one.accepted,
        **{name: one.counts.get(name, 0) for name in completion.OUTCOMES},
        "attempts": one.attempts,
        "dead letters": one.dead_letters,
    }


def _print_report(found: completion.Completeness) -> None:
    output.print_rows([_row(one) for one in found.days])
    totals = {name: sum(one.counts.get(name, 0) for one in found.days) for name in completion.OUTCOMES}
    parts = " + ".join(f"{count} {name}" for name, count in totals.items())
    click.echo(f"{sum(totals.values())} accepted = {parts}; {sum(found.pending.values())} messages pending now")
    click.echo(COUNTED)
    stuck = [one for one in found.unfinished if one.status in completion.STUCK]
    lists = {
        "open gaps of the last reconciliation": [vars(one) for one in found.listed_gaps],
        "backfills that failed or are paused": [vars(one) for one in stuck],
        "backfills in progress": [vars(one) for one in found.unfinished if one not in stuck],
        "refused items, by user and resource": [vars(one) for one in found.listed_refused],
        "days without data between days with data": [_hole_row(one) for one in found.holes],
    }
    for title, rows in lists.items():
        output.print_list(rows, f"{title}: {len(rows)}", MAX_SHOWN)
    click.echo("\n" + ("missing or dead: " + ", ".join(found.faults) if found.faults else "nothing is missing or dead"))


def _hole_row(one: completion.MissingDays) -> dict[str, Any]:
    days = ", ".join(day.isoformat() for day in one.days[:4]) + (" ..." if len(one.days) > 4 else "")
    return one.key._asdict() | {"count": len(one.days), "days": days}
