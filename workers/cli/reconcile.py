"""`headrace reconcile` and `headrace refresh`: what is missing, and asking the providers for what is new."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import Misconfigured
from workers.aggregators import junction
from workers.cli import options, output
from workers.cli.options import Moment
from workers.fetch import client
from workers.fetch.rate_limits import pauses
from workers.reconcile.reconciler import AGGREGATOR, CONNECTION, ReconcilePosition, Reconciler, Step
from workers.store import audit, estimates
from workers.store.coverage import erased
from workers.store.engine import make_engine, transaction
from workers.store.gaps import Gap, Responsible

REFRESHES = "8/hour"  # of one person (Junction: POST /v2/user/refresh)
MAX_WAIT_SECONDS = 120.0  # for which an operator's terminal waits
EARLIEST_COMPARED = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass
class Summary:
    """What a reconciliation brought so far."""

    gaps: list[Gap]
    people: int = 0
    opened: int = 0
    requests: int = 0

    def add(self, step: Step) -> None:
        """Takes in a step."""
        self.gaps += step.found
        self.people += step.people
        self.opened += len(step.opened)
        self.requests += 1


@click.command()
@click.option("--user", help="compare this person only (user_id)")
@click.option("--since", type=Moment(), help="of what came by webhook, compare only from here on (default: all)")
@click.option("--dry-run", is_flag=True, help="only say what is missing")
@options.data_dir_option
@options.json_option
def reconcile(*, user: str | None, since: datetime | None, dry_run: bool, data_dir: Path | None, as_json: bool) -> None:
    """Compare what Junction says it has with what is stored, and fetch what is missing.

    It also does so by itself, every HEADRACE_RECONCILE_HOURS.
    """
    settings = options.attached(data_dir)
    account = client.make_client(AGGREGATOR, settings)
    engine = make_engine(settings, "headrace-reconcile")
    if not (settings.fetch_history or dry_run):
        raise Misconfigured(
            "false, so nobody would fetch what is missing; use --dry-run", setting="HEADRACE_FETCH_HISTORY"
        )
    reconciler = Reconciler(engine, settings, account, dry_run=dry_run)
    found = Summary([])
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    screen = output.console()
    with Progress(*columns, console=screen, transient=True, disable=as_json or not screen.is_terminal) as progress:
        task = progress.add_task("asking Junction what it has", total=None)
        for step in _steps(reconciler, settings, since or EARLIEST_COMPARED, user):
            found.add(step)
            waits = f"; waits {step.seconds:.0f} s: {step.reason}" if step.seconds else ""
            progress.update(task, description=f"{found.people} people, {len(found.gaps)} gaps{waits}")
    if not dry_run:
        audit.record(engine, "reconcile", user or "everybody", {"gaps": len(found.gaps), "opened": found.opened})
    rows = _rows(engine, found.gaps)
    if as_json:
        output.print_json(rows)
        return
    output.print_rows([{name: _short(value) for name, value in row.items()} for row in rows], as_json=False)
    click.echo(_summary(found, rows, dry_run=dry_run))


def _steps(reconciler: Reconciler, settings: Settings, since: datetime, user: str | None) -> Iterator[Step]:
    """Every step to the end, waiting where Junction wants it. Raises click.ClickException where that is too long."""
    at: ReconcilePosition | None = ReconcilePosition()
    while at is not None:
        step = reconciler.step(at, since, user)
        at = step.to
        yield step
        if step.seconds > MAX_WAIT_SECONDS:
            reasons = [one.reason for one in pauses(settings) if one.account == AGGREGATOR] or [step.reason]
            raise click.ClickException(f"Junction cannot be asked for {step.seconds:.0f} s: {reasons[0]}")
        time.sleep(step.seconds)


def _rows(engine: Engine, gaps: list[Gap]) -> list[dict[str, Any]]:
    with transaction(engine) as connection:
        costs = estimates.measured_costs(connection)
    rows = []
    for gap in gaps:
        resource = catalogue().get(gap.key.resource)
        requests = sum(costs.requests(gap.key.provider, resource, *w)[0] for w in gap.windows) if resource else 0
        edges = {"from": gap.windows[0][0], "to": gap.windows[-1][1]} if gap.windows else {"from": None, "to": None}
        rows.append({**gap.key._asdict(), "whose": gap.whose, "why": gap.reason, **edges, "requests": requests})
    return rows


def _summary(found: Summary, rows: list[dict[str, Any]], *, dry_run: bool) -> str:
    if not rows:
        return f"{found.people} people compared: nothing is missing"
    turns = Counter(gap.whose for gap in found.gaps)
    mended = sum(gap.key.resource == CONNECTION for gap in found.gaps)
    parts = [f"{turns[whose]} {label}" for whose, label in RESPONSIBLE.items() if turns[whose]]
    told = f"{len(rows)} gaps: {', '.join(parts)}."
    if requests := sum(row["requests"] for row in rows):
        told += f" {'To be' if dry_run else 'Being'} fetched, with about {requests} requests."
    return told + (f" {mended} connections {'to be' if dry_run else 'were'} corrected." if mended else "")


RESPONSIBLE: dict[Responsible, str] = {"ours": "ours", "aggregator": "Junction's", "provider": "the provider's"}


def _short(value: Any) -> Any:
    return f"{value:%Y-%m-%d %H:%M}" if isinstance(value, datetime) else value


@click.command()
@click.option("--user", required=True, help="whose data (user_id)")
@options.data_dir_option
@options.json_option
def refresh(*, user: str, data_dir: Path | None, as_json: bool) -> None:
    """Ask a person's providers for what is new, now. What they have comes by webhook. Eight times an hour at most."""
    settings = options.attached(data_dir)
    account = client.make_client(AGGREGATOR, settings)
    with transaction(make_engine(settings, "headrace-refresh")) as connection:
        if erased(connection, [user]):
            raise click.ClickException(f"{user} was erased, and is not asked about")
    if (seconds := account.throttle.wait(AGGREGATOR)) > 0:
        raise click.ClickException(f"Junction cannot be asked for {seconds:.0f} s; `headrace status` says why")
    if (seconds := account.throttle.take(REFRESHES, "refresh", AGGREGATOR, user)) > 0:
        raise click.ClickException(f"{user} was refreshed {REFRESHES.replace('/', ' times this ')}; in {seconds:.0f} s")
    answer = account.client.fetch(junction.refresh_request(user))
    if answer.status not in (200, 202, 400):
        raise click.ClickException(f"Junction answers with status {answer.status or 'none: it cannot be reached'}")
    said = junction.read_refresh(answer.body)
    if as_json:
        output.print_json(said)
    elif not said.error:
        for label, names in (("done", said.done), ("under way", said.under_way), ("failed", said.failed)):
            click.echo(f"{label:10} {', '.join(names) or '-'}")
    if said.error:
        raise click.ClickException(f"Junction says: {said.error}")
