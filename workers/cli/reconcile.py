"""`headrace reconcile` finds and fetches missing data; `headrace refresh` makes providers send new data."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import msgspec
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import Misconfigured, Unprocessable
from workers.cli import options, output
from workers.cli.options import Moment
from workers.cli.users import resolve_user, selected_ids
from workers.fetch.rate_limits import pauses
from workers.reconcile.comparisons import make_comparisons
from workers.reconcile.reconciler import CONNECTION
from workers.reconcile.refresh import NotRefreshed, refresh_user
from workers.reconcile.runs import EARLIEST_COMPARED, AlreadyRunning, Comparison, Step, leased_steps
from workers.store import audit, backfill_admin
from workers.store.backfill_admin import aggregator_of
from workers.store.coverage import Gap, Responsible
from workers.store.engine import make_engine, transaction

MAX_WAIT_SECONDS = 120.0  # longer pauses end the command


@click.command()
@options.user_option("only this user", required=False)
@options.all_option
@click.option("--since", type=Moment(), help="compare data that was sent by webhook from this time on (default: all)")
@click.option("--dry-run", is_flag=True, help="only list the gaps")
@options.data_dir_option
@options.json_option
def reconcile(
    *, user: str | None, all_users: bool, since: datetime | None, dry_run: bool, data_dir: Path | None, as_json: bool
) -> None:
    """Find and fetch missing data. Compares the data that Junction and Terra have with the stored data.

    Workers also do this every HEADRACE_RECONCILE_HOURS. Terra is compared if TERRA_ADMIN_TOKEN is set.
    """
    settings = options.attached(data_dir)
    engine = make_engine(settings, "headrace-reconcile")
    comparisons = make_comparisons(engine, settings, dry_run=dry_run)
    if not (settings.fetch_history or dry_run):
        raise Misconfigured("false, so no worker would fetch the gaps; use --dry-run", setting="HEADRACE_FETCH_HISTORY")
    users = selected_ids(engine, user, all_users=all_users)
    by_aggregator = None if users is None else _by_aggregator(engine, settings, users)
    found = Found()
    title = f"comparing with {' and '.join(one.name for one in comparisons)}"
    try:
        with output.progress(title, quiet=as_json) as update:
            for one in comparisons:
                selected = [None] if by_aggregator is None else by_aggregator[one.aggregator]
                for step in found.of(one, _steps(one, engine, settings, since or EARLIEST_COMPARED, selected)):
                    waits = f"; waiting {step.seconds:.0f} s: {step.reason}" if step.seconds else ""
                    update(found.people, detail=f"{found.people} users, {len(found.gaps)} gaps{waits}")
    finally:  # also after Ctrl-C: backfills may be open
        for subject in () if dry_run else users or ("everybody",):
            audit.record(engine, "reconcile", subject, {"gaps": len(found.gaps), "opened": found.opened})
    if found.failure and not found.gaps:
        raise found.failure
    rows = _rows(engine, found.gaps)
    if as_json:
        output.print_json(rows)
    else:
        output.print_rows(rows)
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
    failure: Unprocessable | AlreadyRunning | click.ClickException | None = None

    def of(self, comparison: Comparison[Any], steps: Iterator[Step[Any]]) -> Iterator[Step[Any]]:
        """The steps of a comparison, once their results are added."""
        try:
            for step in steps:
                self.gaps += [(comparison.aggregator, gap) for gap in step.found]
                self.people += step.people
                self.opened += len(step.opened)
                self.unread[comparison.listing] += step.unread
                self.notes += step.notes
                yield step
        except (Unprocessable, AlreadyRunning, click.ClickException) as failure:
            self.failure = self.failure or failure

    def lines(self) -> list[str]:
        """What was not compared, or cannot be fetched."""
        unread = [f"{count} entries of {name} could not be read" for name, count in self.unread.items() if count]
        return unread + self.notes


def _by_aggregator(engine: Engine, settings: Settings, users: Sequence[str]) -> Mapping[str, list[str]]:
    """The users of each aggregator. Raises click.ClickException if a user's aggregator cannot be compared."""
    found = defaultdict[str, list[str]](list)
    with transaction(engine) as connection:
        for user in users:
            found[aggregator_of(connection, settings, user)].append(user)
    if "terra" in found and "terra" not in settings.reconcilable:
        raise click.ClickException(f"{found['terra'][0]} is a user of Terra, which needs TERRA_ADMIN_TOKEN")
    return found


def _steps(
    comparison: Comparison[Any], engine: Engine, settings: Settings, since: datetime, users: Sequence[str | None]
) -> Iterator[Step[Any]]:
    """Every step. Raises AlreadyRunning, and click.ClickException if the aggregator asks for too long a pause."""
    with closing(leased_steps(engine, comparison, settings.reconcile_hours * 3600.0, since, users)) as steps:
        for step in steps:
            yield step
            if step.seconds > MAX_WAIT_SECONDS:
                listed = [one for one in pauses(settings) if one.account == comparison.account]
                reasons = [one.reason for one in listed if one.is_own is not False] or [step.reason]
                raise click.ClickException(f"{comparison.name} is paused for {step.seconds:.0f} s: {reasons[0]}")


def _rows(engine: Engine, gaps: Sequence[tuple[str, Gap]]) -> list[dict[str, Any]]:
    with transaction(engine) as connection:
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
    settings.need_junction_api_key()
    found = resolve_user(make_engine(settings, "headrace-refresh"), user)
    if found.is_erased:
        raise click.ClickException(f"{found.user_id} was erased, and is not refreshed")
    try:
        refresh = refresh_user(settings, found.user_id)
    except NotRefreshed as reason:
        raise click.ClickException(str(reason)) from None
    if as_json:
        output.print_json(msgspec.structs.asdict(refresh))
    elif not refresh.error:
        labels = {"done": refresh.done, "in progress": refresh.under_way, "failed": refresh.failed}
        for label, names in labels.items():
            click.echo(f"{label:11} {', '.join(names) or '-'}")
    if refresh.error:
        raise click.ClickException(f"Junction reports: {refresh.error}")
