"""`headrace reconcile` finds and fetches missing data; `headrace refresh` makes providers send new data."""

import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import Misconfigured
from workers.aggregators import junction
from workers.cli import options, output
from workers.cli.options import Moment
from workers.cli.users import resolve_user
from workers.fetch import client
from workers.fetch.rate_limits import pauses
from workers.reconcile.reconciler import AGGREGATOR, CONNECTION, ReconcilePosition, Reconciler, Step
from workers.store import audit, estimates
from workers.store.engine import make_engine, transaction
from workers.store.gaps import Gap, Responsible

REFRESHES = "8/hour"  # per user (Junction: POST /v2/user/refresh)
MAX_WAIT_SECONDS = 120.0  # longer pauses end the command
EARLIEST_COMPARED = datetime(2000, 1, 1, tzinfo=UTC)


@click.command()
@options.user_option("only this user", required=False)
@click.option("--since", type=Moment(), help="for data sent by webhook, compare from here on (default: all)")
@click.option("--dry-run", is_flag=True, help="only list the gaps")
@options.data_dir_option
@options.json_option
def reconcile(*, user: str | None, since: datetime | None, dry_run: bool, data_dir: Path | None, as_json: bool) -> None:
    """Find and fetch missing data. Compares the data that Junction has with the stored data.

    Workers also do this every HEADRACE_RECONCILE_HOURS.
    """
    settings = options.attached(data_dir)
    account = client.make_client(AGGREGATOR, settings)
    engine = make_engine(settings, "headrace-reconcile")
    if not (settings.fetch_history or dry_run):
        raise Misconfigured("false, so no worker would fetch the gaps; use --dry-run", setting="HEADRACE_FETCH_HISTORY")
    user_id = resolve_user(engine, user).user_id if user else None
    reconciler = Reconciler(engine, settings, account, dry_run=dry_run)
    gaps, people, opened = list[Gap](), 0, 0
    with output.progress("comparing with Junction", quiet=as_json) as update:
        for step in _steps(reconciler, settings, since or EARLIEST_COMPARED, user_id):
            gaps += step.found
            people += step.people
            opened += len(step.opened)
            waits = f"; waiting {step.seconds:.0f} s: {step.reason}" if step.seconds else ""
            update(people, detail=f"{people} users, {len(gaps)} gaps{waits}")
    if not dry_run:
        audit.record(engine, "reconcile", user_id or "everybody", {"gaps": len(gaps), "opened": opened})
    rows = _rows(engine, gaps)
    if as_json:
        output.print_json(rows)
    else:
        output.print_rows(rows)
        click.echo(_summary(people, rows, dry_run=dry_run))


def _steps(reconciler: Reconciler, settings: Settings, since: datetime, user: str | None) -> Iterator[Step]:
    """Every step, with the pauses that Junction asks for. Raises click.ClickException for one that is too long."""
    at: ReconcilePosition | None = ReconcilePosition()
    while at is not None:
        step = reconciler.step(at, since, user)
        at = step.to
        yield step
        if step.seconds > MAX_WAIT_SECONDS:
            reasons = [one.reason for one in pauses(settings) if one.account == AGGREGATOR] or [step.reason]
            raise click.ClickException(f"Junction is paused for {step.seconds:.0f} s: {reasons[0]}")
        time.sleep(step.seconds)


def _rows(engine: Engine, gaps: list[Gap]) -> list[dict[str, Any]]:
    with transaction(engine) as connection:
        costs = estimates.measured_costs(connection)
    rows = []
    for gap in gaps:
        resource = catalogue().get(gap.key.resource)
        costs_of_windows = (costs.requests(gap.key.provider, resource, *w)[0] for w in gap.windows if resource)
        about = {"whose": gap.whose, "why": gap.reason}
        edges = {"from": gap.windows[0][0], "to": gap.windows[-1][1]} if gap.windows else {"from": None, "to": None}
        rows.append(gap.key._asdict() | about | edges | {"requests": sum(costs_of_windows)})
    return rows


def _summary(people: int, rows: list[dict[str, Any]], *, dry_run: bool) -> str:
    if not rows:
        return f"{people} users compared: nothing is missing"
    counts = Counter(row["whose"] for row in rows)
    connections = sum(row["resource"] == CONNECTION for row in rows)
    parts = [f"{counts[whose]} {label}" for whose, label in RESPONSIBLE.items() if counts[whose]]
    text = f"{len(rows)} gaps: {', '.join(parts)}."
    if requests := sum(row["requests"] for row in rows):
        text += f" {'Would fetch' if dry_run else 'Fetching'} them with about {requests} requests."
    if connections:
        text += f" {'Would correct' if dry_run else 'Corrected'} {connections} connections."
    return text


RESPONSIBLE: dict[Responsible, str] = {"ours": "ours", "aggregator": "Junction's", "provider": "the provider's"}


@click.command()
@options.user_option("whose data")
@options.data_dir_option
@options.json_option
def refresh(*, user: str, data_dir: Path | None, as_json: bool) -> None:
    """Make a user's providers send new data now. It arrives by webhook. At most eight times an hour per user."""
    settings = options.attached(data_dir)
    account = client.make_client(AGGREGATOR, settings)
    found = resolve_user(make_engine(settings, "headrace-refresh"), user)
    if found.is_erased:
        raise click.ClickException(f"{found.user_id} was erased, and is not refreshed")
    if (seconds := account.throttle.wait(AGGREGATOR)) > 0:
        raise click.ClickException(f"Junction is paused for {seconds:.0f} s; headrace status shows why")
    if (seconds := account.throttle.take(REFRESHES, "refresh", AGGREGATOR, found.user_id)) > 0:
        times = REFRESHES.replace("/", " times this ")
        raise click.ClickException(f"{found.user_id} was refreshed {times}; try again in {seconds:.0f} s")
    answer = account.client.fetch(junction.refresh_request(found.user_id))
    if not answer.status:
        raise click.ClickException("Junction cannot be reached; check the network and JUNCTION_BASE_URL")
    if answer.status not in (200, 202, 400):
        raise click.ClickException(f"Junction answers with status {answer.status}")
    refresh = junction.read_refresh(answer.body)
    if as_json:
        output.print_json(msgspec.structs.asdict(refresh))
    elif not refresh.error:
        labels = {"done": refresh.done, "in progress": refresh.under_way, "failed": refresh.failed}
        for label, names in labels.items():
            click.echo(f"{label:11} {', '.join(names) or '-'}")
    if refresh.error:
        raise click.ClickException(f"Junction reports: {refresh.error}")
