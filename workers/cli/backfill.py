"""`headrace backfill`: starts, lists, pauses, resumes and cancels backfills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from app.config.settings import Settings
from workers.cli import options, output
from workers.cli.deployment import Deployment, deployment_option, query_options
from workers.operate import backfill_table, durations, health
from workers.store import audit, backfill_admin

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

STATES = ("pending", "running", "paused", "complete", "failed", "cancelled")


@click.group("backfill", cls=options.Group)
def backfill() -> None:
    """Fetch history from the aggregator. A backfill fetches one resource of one user."""


def _selection(command: options.Command) -> options.Command:
    """Adds the options that select backfills."""
    command = click.option("--resource", type=options.resource, help="only this resource")(command)
    command = click.option("--provider", help="only this provider (garmin, oura ...)")(command)
    command = options.all_option(options.user_option("only this user", required=False)(command))
    command = click.argument("ids", nargs=-1, type=int, metavar="[ID]...")(command)
    return deployment_option(command)


def _filter(
    deployment: Deployment,
    states: tuple[str, ...],
    *,
    ids: tuple[int, ...],
    user: str | None,
    all_users: bool,
    provider: str | None,
    resource: str | None,
) -> backfill_admin.Filter:
    """Raises NotFound for an id, a user or a provider that does not exist."""
    engine = deployment.engine
    _check_ids(engine, ids)
    user_ids = deployment.user_ids(user, all_users=all_users)
    if provider:
        with deployment.transaction() as connection:
            (provider,) = options.check_providers((provider,), backfill_admin.known_providers(connection, (provider,)))
    return backfill_admin.Filter(
        ids=ids or None, user_ids=user_ids, provider=provider, resource=resource, states=states or None
    )


def _check_ids(engine: Engine, ids: tuple[int, ...]) -> list[backfill_admin.Backfill]:
    """The backfills with these ids. Raises NotFound for an id that does not exist."""
    if not ids:
        return []
    found = backfill_admin.listed(engine, backfill_admin.Filter(ids=ids), len(ids))
    numbers = [one.id for one in found]
    options.check_ids(ids, numbers, "backfill", lambda: backfill_admin.newest_ids(engine))
    return found


@backfill.command()
@options.user_option("whose history")
@options.all_option
@click.option("--provider", "providers", multiple=True, help="only this provider, repeatable (default: all connected)")
@options.new_provider_option
@click.option("--resource", "resources", multiple=True, type=options.resource, help="only this resource, repeatable")
@options.since_option("start of the period, a day or a time")
@options.until_option("end of the period")
@click.option("--dry-run", is_flag=True, help="only estimate the cost")
@query_options
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
    deployment: Deployment,
) -> None:
    """Fetch a user's history, even if it was fetched before or never announced."""
    now = datetime.now(UTC)
    end = options.check_period(since, min(until or now, now))
    settings = deployment.settings
    found = deployment.users(user, all_users=all_users)
    if erased := [one.user_id for one in found if one.is_erased]:
        raise click.ClickException(f"{', '.join(erased)} was erased, and is not fetched again")
    with deployment.transaction(confirm=not dry_run) as connection:
        known = backfill_admin.known_providers(connection, providers)
        names = options.check_providers(providers, known, new=new_provider)
        wanted = backfill_admin.HistoryWanted(user_id="", since=since, until=end, providers=names, resources=resources)
        started = [one for user in found for one in _start(connection, settings, wanted, user.user_id, dry_run=dry_run)]
    if not started:
        raise click.ClickException("HEADRACE_RESOURCES and HEADRACE_PROVIDERS exclude everything that was requested")
    if output.is_json():
        output.print_json([{"id": number, **asdict(plan)} for plan, number in started])
        return
    plans = [plan for plan, _ in started]
    if dry_run:
        output.print_rows([_plan_row(plan) for plan in plans])
    click.echo(f"{'would start' if dry_run else 'started'} {len(plans)} backfills: {_cost(plans, settings)}")
    if not dry_run:
        which = f"{user} --all" if all_users else found[0].user_id
        click.echo(f"workers start within seconds; watch with: headrace backfill list --user {which} --watch")


def _start(
    connection: Connection, settings: Settings, wanted: backfill_admin.HistoryWanted, user_id: str, *, dry_run: bool
) -> list[tuple[backfill_admin.BackfillPlan, int | None]]:
    """Plans the backfills of a user, and starts them unless this is a dry run."""
    aggregator = backfill_admin.aggregator_of(connection, settings, user_id)
    plans = backfill_admin.plan(connection, settings, replace(wanted, user_id=user_id, aggregator=aggregator))
    if dry_run or not plans:
        return [(plan, None) for plan in plans]
    numbers = [backfill_admin.start(connection, plan) for plan in plans]
    detail = {"backfills": numbers, "since": wanted.since, "until": wanted.until}
    audit.note(connection, "backfill start", user_id, detail)
    return list(zip(plans, numbers, strict=True))


def _cost(plans: Sequence[backfill_admin.BackfillPlan], settings: Settings) -> str:
    from limits import parse  # noqa: PLC0415 - 0.05 s of CPU, which only `start` needs

    rate, requests = parse(settings.request_rate), sum(plan.requests for plan in plans)
    least = durations.format_duration(timedelta(seconds=requests * rate.get_expiry() / rate.amount))
    about = "about" if all(plan.is_measured for plan in plans) else "at least"
    return f"{about} {requests} requests, {least} at {settings.request_rate} (HEADRACE_REQUEST_RATE)"


def _plan_row(plan: backfill_admin.BackfillPlan) -> dict[str, Any]:
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
    deployment: Deployment,
    **selection: Any,
) -> None:
    """List backfills with their progress. Open ones come first, then those that ended last."""
    which = _filter(deployment, states, **selection)

    def read() -> list[backfill_admin.Backfill]:
        return backfill_admin.listed(deployment.engine, which, limit)

    if output.is_json():
        output.print_json([health.plain(one) for one in read()])
    elif watch:
        output.live_view(lambda: backfill_table.progress(read()), every)
    else:
        output.console().print(backfill_table.progress(read()))


@backfill.command()
@click.argument("number", type=int, metavar="ID")
@query_options
def show(*, number: int, deployment: Deployment) -> None:
    """Show one backfill with its chunks."""
    engine = deployment.engine
    found, chunks = _check_ids(engine, (number,)), backfill_admin.chunks_of(engine, number)
    if output.is_json():
        output.print_json(health.plain(found[0]) | {"chunks": [one._asdict() for one in chunks]})
        return
    output.console().print(backfill_table.progress(found))
    output.print_rows([_chunk_row(one) for one in chunks])


def _chunk_row(chunk: backfill_admin.Chunk) -> dict[str, Any]:
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


@backfill.command()
@_selection
def pause(*, deployment: Deployment, **selection: Any) -> None:
    """Stop backfills after their current page."""
    _change(deployment, "pause", "paused", ("pending", "running"), **selection)


@backfill.command()
@_selection
def resume(*, deployment: Deployment, **selection: Any) -> None:
    """Continue paused, cancelled or failed backfills where they stopped."""
    _change(deployment, "resume", "resumed", ("paused", "failed"), **selection)


@backfill.command()
@_selection
@options.yes_option
def cancel(*, deployment: Deployment, yes: bool, **selection: Any) -> None:
    """End backfills after their current page; fetched data stays stored."""
    _change(deployment, "cancel", "cancelled", ("pending", "running", "paused"), yes=yes, **selection)


def _change(
    deployment: Deployment, name: str, done: str, states: tuple[str, ...], *, yes: bool = True, **selection: Any
) -> None:
    """Changes the status of the selected backfills; without ids, of those in one of the states. Asks without `yes`."""
    if not any(selection.values()):
        raise click.UsageError("select backfills by ID, --user, --provider or --resource")
    output.require_answer(yes=yes)
    ids, engine = selection["ids"], deployment.engine
    which = _filter(deployment, () if ids else states, **selection)
    found = tuple(one.id for one in backfill_admin.listed(engine, which, 1_000_000))
    for unmatched in sorted(set(ids) - set(found)):
        click.echo(f"backfill {unmatched} does not match the other options; unchanged", err=True)
    if found:
        output.confirm(f"{name} {len(found)} backfills?", yes=yes)
    changed: list[int] = getattr(backfill_admin, name)(engine, found)
    for subject in which.user_ids or ("backfills",):
        audit.record(engine, f"backfill {name}", subject, {"backfills": changed})
    click.echo(f"{done} {len(changed)} of {len(found)}")
    for left in backfill_admin.listed(engine, backfill_admin.Filter(tuple(set(found) - set(changed)) or (0,))):
        click.echo(f"backfill {left.id} is {left.status}; unchanged", err=True)
    if ids and not changed:
        raise click.exceptions.Exit(1)
