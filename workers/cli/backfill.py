"""`headrace backfill`: starts, lists, pauses, resumes and cancels backfills."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import limits
from sqlalchemy import Engine

from app.config.settings import Settings
from workers.cli import options, output
from workers.cli.options import Moment, ResourceName
from workers.cli.users import resolve_user
from workers.operate.durations import format_duration
from workers.operate.health import plain
from workers.operate.status_view import progress
from workers.store import audit, backfill_admin
from workers.store.backfill_admin import Backfill, BackfillPlan, Chunk, Filter, HistoryWanted
from workers.store.engine import make_engine, transaction

STATES = ("pending", "running", "paused", "complete", "failed", "cancelled")


@click.group("backfill", cls=options.Group)
def backfill() -> None:
    """Fetch history from the aggregator. A backfill fetches one resource of one user."""


def _selection(command: options.Command) -> options.Command:
    """Adds the options that select backfills."""
    command = click.option("--resource", type=ResourceName(), help="only this resource")(command)
    command = click.option("--provider", help="only this provider (garmin, oura ...)")(command)
    command = options.user_option("only this user", required=False)(command)
    command = click.argument("ids", nargs=-1, type=int, metavar="[ID]...")(command)
    return options.data_dir_option(command)


def _filter(
    engine: Engine,
    states: tuple[str, ...],
    *,
    ids: tuple[int, ...],
    user: str | None,
    provider: str | None,
    resource: str | None,
) -> Filter:
    user_id = resolve_user(engine, user).user_id if user else None
    return Filter(ids=ids or None, user_id=user_id, provider=provider, resource=resource, states=states or None)


@backfill.command()
@options.user_option("whose history")
@click.option("--provider", "providers", multiple=True, help="only this provider, repeatable (default: all connected)")
@click.option("--resource", "resources", multiple=True, type=ResourceName(), help="only this resource, repeatable")
@click.option("--since", required=True, type=Moment(), help="start of the period, a day or a time")
@click.option("--until", type=Moment(), help="end of the period (default: now)")
@click.option("--dry-run", is_flag=True, help="only estimate the cost")
@options.data_dir_option
@options.json_option
def start(
    *,
    user: str,
    providers: tuple[str, ...],
    resources: tuple[str, ...],
    since: datetime,
    until: datetime | None,
    dry_run: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Fetch a user's history, even if it was fetched before or never announced."""
    end = min(until or datetime.now(UTC), datetime.now(UTC))
    if since >= end:
        raise click.ClickException(f"--since {since.isoformat()} is not before --until {end.isoformat()}")
    settings = options.attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-backfill")
    found = resolve_user(engine, user)
    if found.is_erased:
        raise click.ClickException(f"{found.user_id} was erased, and is not fetched again")
    if not found.is_known:
        click.echo(f"unknown user {user}; treating it as a user_id", err=True)
    with transaction(engine) as connection:
        wanted = HistoryWanted(
            user_id=found.user_id,
            since=since,
            until=end,
            providers=tuple(name.lower() for name in providers),
            resources=resources,
            aggregator=backfill_admin.aggregator_of(connection, settings, found.user_id),
        )
        plans = backfill_admin.plan(connection, settings, wanted)
        numbers = [None if dry_run else backfill_admin.start(connection, plan) for plan in plans]
        if plans and not dry_run:
            detail = {"backfills": numbers, "since": since, "until": end}
            audit.note(connection, "backfill start", found.user_id, detail)
    if not plans:
        raise click.ClickException("HEADRACE_RESOURCES and HEADRACE_PROVIDERS exclude everything that was requested")
    if as_json:
        output.print_json([{"id": number, **asdict(plan)} for number, plan in zip(numbers, plans, strict=True)])
        return
    if dry_run:
        output.print_rows([_plan_row(plan) for plan in plans])
    click.echo(f"{'would start' if dry_run else 'started'} {len(plans)} backfills: {_cost(plans, settings)}")
    if not dry_run:
        click.echo(f"workers start within seconds; watch with: headrace backfill list --user {found.user_id} --watch")


def _cost(plans: Sequence[BackfillPlan], settings: Settings) -> str:
    requests = sum(plan.requests for plan in plans)
    rate = limits.parse(settings.request_rate)
    least = timedelta(seconds=requests * rate.get_expiry() / rate.amount)
    about = "about" if all(plan.is_measured for plan in plans) else "at least"
    return f"{about} {requests} requests, {format_duration(least)} at {settings.request_rate} (HEADRACE_REQUEST_RATE)"


def _plan_row(plan: BackfillPlan) -> dict[str, Any]:
    return {
        "provider": plan.provider or "any",
        "resource": plan.resource,
        "from": plan.since,
        "to": plan.until,
        "requests": f"{'about' if plan.is_measured else 'at least'} {plan.requests}",
    }


@backfill.command("list")
@_selection
@click.option("--status", "states", multiple=True, type=click.Choice(STATES), help="only this status, repeatable")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="maximum number of rows")
@click.option("--watch", is_flag=True, help="refresh until Ctrl-C")
@click.option("--every", type=click.FloatRange(0.2), default=1.0, show_default=True, help="seconds between refreshes")
@options.json_option
def list_command(
    *,
    states: tuple[str, ...],
    limit: int,
    watch: bool,
    every: float,
    data_dir: Path | None,
    as_json: bool,
    **selection: Any,
) -> None:
    """List backfills with their progress. Open ones come first, then those that ended last."""
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-backfill")
    which = _filter(engine, states, **selection)

    def read() -> list[Backfill]:
        return backfill_admin.listed(engine, which, limit)

    if as_json:
        output.print_json([plain(one) for one in read()])
    elif watch:
        output.live_view(lambda: progress(read()), every)
    else:
        output.console().print(progress(read()))


@backfill.command()
@click.argument("number", type=int, metavar="ID")
@options.data_dir_option
@options.json_option
def show(*, number: int, data_dir: Path | None, as_json: bool) -> None:
    """Show one backfill with its chunks."""
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-backfill")
    found = backfill_admin.listed(engine, Filter(ids=(number,)))
    if not found:
        raise click.ClickException(f"no backfill {number}; headrace backfill list shows all")
    chunks = backfill_admin.chunks_of(engine, number)
    if as_json:
        output.print_json(plain(found[0]) | {"chunks": [one._asdict() for one in chunks]})
        return
    output.console().print(progress(found))
    output.print_rows([_chunk_row(one) for one in chunks])


def _chunk_row(chunk: Chunk) -> dict[str, Any]:
    """A chunk is fetched from the newest day of its window to the oldest."""
    return {
        "status": chunk.status,
        "from": chunk.window_start,
        "to": chunk.window_end,
        "fetched back to": chunk.window_start if chunk.status == "done" else chunk.slice_end,
        "page": chunk.pages + 1 if chunk.amid else "",
        "final": "yes" if chunk.is_final else "",
        "restarts": chunk.restarts or "",
        "requested by": chunk.message_id,
    }


def _command(
    name: str, do: Callable[[Engine, Sequence[int]], list[int]], done: str, states: tuple[str, ...], meaning: str
) -> None:
    """Adds a command that changes the status of the selected backfills."""

    @backfill.command(name, help=meaning)
    @_selection
    def command(*, data_dir: Path | None, **selection: Any) -> None:
        if not any(selection.values()):
            raise click.UsageError("select backfills by ID, --user, --provider or --resource")
        engine = make_engine(options.attached(data_dir, broker=False), "headrace-backfill")
        ids = selection["ids"]
        which = _filter(engine, () if ids else states, **selection)
        found = tuple(one.id for one in backfill_admin.listed(engine, which, 1_000_000))
        for missing in sorted(set(ids) - set(found)):
            click.echo(f"no backfill {missing} matches; headrace backfill list shows all", err=True)
        changed = do(engine, found)
        audit.record(engine, f"backfill {name}", which.user_id or "backfills", {"backfills": changed})
        click.echo(f"{done} {len(changed)} of {len(found)}")
        for left in backfill_admin.listed(engine, Filter(tuple(set(found) - set(changed)) or (0,))):
            click.echo(f"backfill {left.id} is {left.status}; unchanged", err=True)
        if ids and not changed:
            raise click.exceptions.Exit(1)


PAUSE = "Stop backfills after their current page."
RESUME = "Continue paused, cancelled or failed backfills where they stopped."
CANCEL = "End backfills after their current page; fetched data stays stored."
_command("pause", backfill_admin.pause, "paused", ("pending", "running"), PAUSE)
_command("resume", backfill_admin.resume, "resumed", ("paused", "failed"), RESUME)
_command("cancel", backfill_admin.cancel, "cancelled", ("pending", "running", "paused"), CANCEL)
