"""`headrace backfill`: starts, lists, pauses, resumes and cancels backfills."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
from sqlalchemy import Connection, Engine

from app.config.settings import Settings
from app.errors import NotFound
from workers.cli import options, output
from workers.cli.options import Moment, ResourceName
from workers.cli.users import resolve_users, selected_ids
from workers.operate.backfill_table import progress
from workers.operate.durations import format_duration
from workers.operate.health import plain
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
    command = options.all_option(options.user_option("only this user", required=False)(command))
    command = click.argument("ids", nargs=-1, type=int, metavar="[ID]...")(command)
    return options.data_dir_option(command)


def _filter(
    engine: Engine,
    states: tuple[str, ...],
    *,
    ids: tuple[int, ...],
    user: str | None,
    all_users: bool,
    provider: str | None,
    resource: str | None,
) -> Filter:
    """Raises NotFound for an id, a user or a provider that does not exist."""
    _check_ids(engine, ids)
    user_ids = selected_ids(engine, user, all_users=all_users)
    if provider:
        with transaction(engine) as connection:
            (provider,) = options.check_providers((provider,), backfill_admin.known_providers(connection, (provider,)))
    return Filter(ids=ids or None, user_ids=user_ids, provider=provider, resource=resource, states=states or None)


def _check_ids(engine: Engine, ids: tuple[int, ...]) -> None:
    if not ids:
        return
    found = {one.id for one in backfill_admin.listed(engine, Filter(ids=ids), len(ids))}
    if missing := [number for number in ids if number not in found]:
        near = options.did_you_mean(str(missing[0]), map(str, backfill_admin.newest_ids(engine)))
        raise NotFound(f"no backfill {missing[0]}{near or '; headrace backfill list shows all'}")


@backfill.command()
@options.user_option("whose history")
@options.all_option
@click.option("--provider", "providers", multiple=True, help="only this provider, repeatable (default: all connected)")
@options.new_provider_option
@click.option("--resource", "resources", multiple=True, type=ResourceName(), help="only this resource, repeatable")
@click.option("--since", required=True, type=Moment(), help="start of the period, a day or a time")
@click.option("--until", type=Moment(), help="end of the period (default: now)")
@click.option("--dry-run", is_flag=True, help="only estimate the cost")
@options.data_dir_option
@options.json_option
def start(
    *,
    user: str,
    all_users: bool,
    providers: tuple[str, ...],
    new_provider: bool,
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
    users = resolve_users(engine, user, all_users=all_users)
    if erased := [one.user_id for one in users if one.is_erased]:
        raise click.ClickException(f"{', '.join(erased)} was erased, and is not fetched again")
    with transaction(engine, confirm=not dry_run) as connection:
        names = options.check_providers(
            providers, backfill_admin.known_providers(connection, providers), new=new_provider
        )
        wanted = HistoryWanted(user_id="", since=since, until=end, providers=names, resources=resources)
        started = [one for user in users for one in _start(connection, settings, wanted, user.user_id, dry_run=dry_run)]
    if not started:
        raise click.ClickException("HEADRACE_RESOURCES and HEADRACE_PROVIDERS exclude everything that was requested")
    if as_json:
        output.print_json([{"id": number, **asdict(plan)} for plan, number in started])
        return
    plans = [plan for plan, _ in started]
    if dry_run:
        output.print_rows([_plan_row(plan) for plan in plans])
    click.echo(f"{'would start' if dry_run else 'started'} {len(plans)} backfills: {_cost(plans, settings)}")
    if not dry_run:
        which = f"{user} --all" if all_users else users[0].user_id
        click.echo(f"workers start within seconds; watch with: headrace backfill list --user {which} --watch")


def _start(
    connection: Connection, settings: Settings, wanted: HistoryWanted, user_id: str, *, dry_run: bool
) -> list[tuple[BackfillPlan, int | None]]:
    """Plans the backfills of a user, and starts them unless this is a dry run."""
    aggregator = backfill_admin.aggregator_of(connection, settings, user_id)
    plans = backfill_admin.plan(connection, settings, replace(wanted, user_id=user_id, aggregator=aggregator))
    if dry_run or not plans:
        return [(plan, None) for plan in plans]
    numbers = [backfill_admin.start(connection, plan) for plan in plans]
    detail = {"backfills": numbers, "since": wanted.since, "until": wanted.until}
    audit.note(connection, "backfill start", user_id, detail)
    return list(zip(plans, numbers, strict=True))


def _cost(plans: Sequence[BackfillPlan], settings: Settings) -> str:
    requests = sum(plan.requests for plan in plans)
    from limits import parse  # noqa: PLC0415 - 0.05 s of CPU, which only `start` needs

    rate = parse(settings.request_rate)
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
    _check_ids(engine, (number,))
    found = backfill_admin.listed(engine, Filter(ids=(number,)))
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


Change = Callable[[Engine, Sequence[int]], list[int]]


def _command(
    name: str, do: Change, done: str, states: tuple[str, ...], meaning: str, *, must_confirm: bool = False
) -> None:
    """Adds a command that changes the status of the selected backfills."""

    def command(*, data_dir: Path | None, yes: bool = False, **selection: Any) -> None:
        if not any(selection.values()):
            raise click.UsageError("select backfills by ID, --user, --provider or --resource")
        if must_confirm:
            output.require_answer(yes=yes)
        engine = make_engine(options.attached(data_dir, broker=False), "headrace-backfill")
        ids = selection["ids"]
        which = _filter(engine, () if ids else states, **selection)
        found = tuple(one.id for one in backfill_admin.listed(engine, which, 1_000_000))
        for unmatched in sorted(set(ids) - set(found)):
            click.echo(f"backfill {unmatched} does not match the other options; unchanged", err=True)
        if must_confirm and found:
            output.confirm(f"{name} {len(found)} backfills?", yes=yes)
        changed = do(engine, found)
        for subject in which.user_ids or ("backfills",):
            audit.record(engine, f"backfill {name}", subject, {"backfills": changed})
        click.echo(f"{done} {len(changed)} of {len(found)}")
        for left in backfill_admin.listed(engine, Filter(tuple(set(found) - set(changed)) or (0,))):
            click.echo(f"backfill {left.id} is {left.status}; unchanged", err=True)
        if ids and not changed:
            raise click.exceptions.Exit(1)

    selectable = options.yes_option(_selection(command)) if must_confirm else _selection(command)
    backfill.command(name, help=meaning)(selectable)


PAUSE = "Stop backfills after their current page."
RESUME = "Continue paused, cancelled or failed backfills where they stopped."
CANCEL = "End backfills after their current page; fetched data stays stored."
_command("pause", backfill_admin.pause, "paused", ("pending", "running"), PAUSE)
_command("resume", backfill_admin.resume, "resumed", ("paused", "failed"), RESUME)
_command("cancel", backfill_admin.cancel, "cancelled", ("pending", "running", "paused"), CANCEL, must_confirm=True)
