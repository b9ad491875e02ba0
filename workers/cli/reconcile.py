"""`headrace reconcile` finds and fetches missing data; `headrace refresh` makes providers send new data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
import msgspec

from app.catalogue import catalogue
from app.errors import Misconfigured, Unprocessable
from workers.cli import options, output
from workers.cli.deployment import Deployment, stack_options
from workers.fetch import rate_limits
from workers.reconcile import comparisons, reconciler, runs
from workers.reconcile import refresh as refreshing
from workers.store import audit, backfill_admin

if TYPE_CHECKING:
    from workers.store.coverage import Gap, Responsible

MAX_WAIT_SECONDS = 120.0  # longer pauses end the command


@click.command()
@options.user_option("only this user", required=False)
@options.all_option
@options.since_option("compare data that was sent by webhook from this time on (default: all)", required=False)
@click.option("--dry-run", is_flag=True, help="only list the gaps")
@stack_options
def reconcile(
    *, user: str | None, all_users: bool, since: datetime | None, dry_run: bool, deployment: Deployment
) -> None:
    """Find and fetch missing data. Compares the data that Junction and Terra have with the stored data.

    Workers also do this every HEADRACE_RECONCILE_HOURS. Terra is compared if TERRA_ADMIN_TOKEN is set.
    """
    settings, engine = deployment.settings, deployment.engine
    compared = comparisons.make_comparisons(engine, settings, dry_run=dry_run)
    if not (settings.fetch_history or dry_run):
        raise Misconfigured("false, so no worker would fetch the gaps; use --dry-run", setting="HEADRACE_FETCH_HISTORY")
    user_ids = deployment.user_ids(user, all_users=all_users)
    by_aggregator = None if user_ids is None else _by_aggregator(deployment, user_ids)
    found = Found()
    title = f"comparing with {' and '.join(one.name for one in compared)}"
    try:
        with output.progress(title) as update:
            for one in compared:
                selected = [None] if by_aggregator is None else by_aggregator[one.aggregator]
                for step in found.of(one, _steps(one, deployment, since or runs.EARLIEST_COMPARED, selected)):
                    waits = f"; waiting {step.seconds:.0f} s: {step.reason}" if step.seconds else ""
                    update(found.people, detail=f"{found.people} users, {len(found.gaps)} gaps{waits}")
    finally:  # also after Ctrl-C: backfills may be open
        for subject in () if dry_run else user_ids or ("everybody",):
            audit.record(engine, "reconcile", subject, {"gaps": len(found.gaps), "opened": found.opened})
    if found.failure and not found.gaps:
        raise found.failure
    rows = _rows(deployment, found.gaps)
    output.print_rows(rows)
    if not output.is_json():
        click.echo(_summary(found.people, rows, dry_run=dry_run))
    for line in found.lines():
        click.echo(line, err=True)
    if found.failure:
        raise found.failure


@dataclass
class Found:
    """The results of all steps. A failed comparison does not prevent the following one."""

    gaps: list[tuple[str, Gap]] = field(default_factory=list)  # aggregator and gap
    people: int = 0
    opened: int = 0
    unread: Counter[str] = field(default_factory=Counter)  # by listing
    notes: list[str] = field(default_factory=list)
    failure: Unprocessable | runs.AlreadyRunning | click.ClickException | None = None

    def of(self, comparison: runs.Comparison[Any], steps: Iterator[runs.Step[Any]]) -> Iterator[runs.Step[Any]]:
        """Yields the steps of a comparison, each after its results were added."""
        try:
            for step in steps:
                self.gaps += [(comparison.aggregator, gap) for gap in step.found]
                self.people += step.people
                self.opened += len(step.opened)
                self.unread[comparison.listing] += step.unread
                self.notes += step.notes
                yield step
        except (Unprocessable, runs.AlreadyRunning, click.ClickException) as failure:
            self.failure = self.failure or failure

    def lines(self) -> list[str]:
        """What was not compared, or cannot be fetched."""
        unread = [f"{count} entries of {name} could not be read" for name, count in self.unread.items() if count]
        return unread + self.notes


def _by_aggregator(deployment: Deployment, user_ids: Sequence[str]) -> Mapping[str, list[str]]:
    """The users of each aggregator. Raises click.ClickException if a user's aggregator cannot be compared."""
    found = defaultdict[str, list[str]](list)
    with deployment.transaction() as connection:
        for user in user_ids:
            found[backfill_admin.aggregator_of(connection, deployment.settings, user)].append(user)
    if "terra" in found and "terra" not in deployment.settings.reconcilable:
        raise click.ClickException(f"{found['terra'][0]} is a user of Terra, which needs TERRA_ADMIN_TOKEN")
    return found


def _steps(
    comparison: runs.Comparison[Any], deployment: Deployment, since: datetime, user_ids: Sequence[str | None]
) -> Iterator[runs.Step[Any]]:
    """Every step. Raises AlreadyRunning, and click.ClickException if the aggregator asks for too long a pause."""
    period = deployment.settings.reconcile_hours * 3600.0
    with closing(runs.leased_steps(deployment.engine, comparison, period, since, user_ids)) as steps:
        for step in steps:
            yield step
            if step.seconds > MAX_WAIT_SECONDS:
                listed = [one for one in rate_limits.pauses(deployment.settings) if one.account == comparison.account]
                reasons = [one.reason for one in listed if one.is_own is not False] or [step.reason]
                raise click.ClickException(f"{comparison.name} is paused for {step.seconds:.0f} s: {reasons[0]}")


def _rows(deployment: Deployment, gaps: Sequence[tuple[str, Gap]]) -> list[dict[str, Any]]:
    with deployment.transaction() as connection:
        costs = backfill_admin.measured_costs(connection)
    rows = []
    for aggregator, gap in gaps:
        resource, windows = catalogue().get(gap.key.resource), gap.windows
        costs_of_windows = (costs.requests(gap.key.provider, resource, *w, aggregator)[0] for w in windows if resource)
        about = {"whose": gap.whose, "why": gap.reason}
        edges = {"from": gap.windows[0][0], "to": gap.windows[-1][1]} if gap.windows else {"from": None, "to": None}
        rows.append(gap.key._asdict() | about | edges | {"requests": sum(costs_of_windows)})
    return rows


def _summary(people: int, rows: list[dict[str, Any]], *, dry_run: bool) -> str:
    if not rows:
        return f"{people} users compared: nothing is missing"
    counts = Counter(row["whose"] for row in rows)
    connections = sum(row["resource"] == reconciler.CONNECTION for row in rows)
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
@stack_options
def refresh(*, user: str, deployment: Deployment) -> None:
    """Make a user's providers send new data now. It arrives by webhook. At most eight times an hour per user."""
    deployment.settings.need_junction_api_key()
    found = deployment.user(user)
    if found.is_erased:
        raise click.ClickException(f"{found.user_id} was erased, and is not refreshed")
    try:
        refreshed = refreshing.refresh_user(deployment.settings, found.user_id)
    except refreshing.NotRefreshed as reason:
        raise click.ClickException(str(reason)) from None
    labels = {"done": refreshed.done, "in progress": refreshed.under_way, "failed": refreshed.failed}
    lines = [f"{label:11} {', '.join(names) or '-'}" for label, names in labels.items()]
    if output.is_json() or not refreshed.error:
        output.show(msgspec.structs.asdict(refreshed), lines)
    if refreshed.error:
        raise click.ClickException(f"Junction reports: {refreshed.error}")
