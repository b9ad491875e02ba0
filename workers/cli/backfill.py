"""`headrace backfill`: the operator's hand on history."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import limits
from sqlalchemy import Connection, Engine

from app.config.settings import Settings
from workers.cli import options, output
from workers.cli.options import Moment, ResourceName
from workers.operate.durations import format_duration
from workers.operate.health import plain
from workers.operate.status_view import progress
from workers.store import audit, backfill_admin
from workers.store.backfill_admin import Backfill, BackfillPlan, Chunk, Filter, HistoryWanted
from workers.store.engine import make_engine, transaction

STATES = ("pending", "running", "paused", "complete", "failed", "cancelled")


@click.group("backfill", cls=options.Group)
def backfill() -> None:
    """Start, watch, pause, resume and cancel the fetching of history."""


def _which(command: options.Command) -> options.Command:
    """Which backfills are meant: by number, or by what they are about."""
    parameters = (
        click.argument("ids", nargs=-1, type=int, metavar="[ID]..."),
        click.option("--user", help="of this person (user_id)"),
        click.option("--provider", help="of this provider (garmin, oura ...)"),
        click.option("--resource", type=ResourceName(), help="of this resource"),
    )
    for parameter in reversed(parameters):
        command = parameter(command)
    return options.data_dir_option(command)


@backfill.command()
@click.option("--user", required=True, help="whose history: a user_id or client_user_id")
@click.option("--provider", "providers", multiple=True, help="from this provider only (default: all of the person's)")
@click.option("--resource", "resources", multiple=True, type=ResourceName(), help="only this (may be repeated)")
@click.option("--since", required=True, type=Moment(), help="from this day or moment on")
@click.option("--until", type=Moment(), help="to this day or moment (default: now)")
@click.option("--dry-run", is_flag=True, help="only say what it would cost")
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
    """Fetch a person's history again, or history that was never announced."""
    end = min(until or datetime.now(UTC), datetime.now(UTC))
    if since >= end:
        raise click.ClickException(f"--since {since.isoformat()} is not before --until {end.isoformat()}")
    settings = options.attached(data_dir, broker=False)
    names = tuple(name.lower() for name in providers)
    with transaction(make_engine(settings, "headrace-backfill")) as connection:
        user_id = _resolve(connection, user)
        aggregator = backfill_admin.aggregator_of(connection, settings, user_id)
        wanted = HistoryWanted(user_id, since, end, names, resources, aggregator)
        plans = backfill_admin.plan(connection, settings, wanted)
        numbers = [None if dry_run else backfill_admin.start(connection, plan) for plan in plans]
        if plans and not dry_run:
            audit.note(
                connection, "backfill start", wanted.user_id, {"backfills": numbers, "since": since, "until": end}
            )
    if not plans:
        raise click.ClickException("HEADRACE_RESOURCES and HEADRACE_PROVIDERS leave out all of that")
    if as_json:
        output.print_json([{"id": number, **asdict(plan)} for number, plan in zip(numbers, plans, strict=True)])
        return
    if dry_run:
        output.print_rows([_row_of_plan(plan) for plan in plans], as_json=False)
    click.echo(f"{'would start' if dry_run else 'started'} {len(plans)} backfills: {_cost(plans, settings)}")
    if not dry_run:
        click.echo(f"workers take them up within seconds; headrace backfill list --user {plans[0].user_id} --watch")


def _resolve(connection: Connection, name: str) -> str:
    """The user_id of a person. Raises click.ClickException if that is not one person."""
    found = backfill_admin.resolve_user(connection, name)
    if not found:
        click.echo(f"nobody called {name} is known yet; taken as a user_id", err=True)
        return name
    if found[0][0] != name and len(found) > 1:
        raise click.ClickException(f"{name} is several: {', '.join(user_id for user_id, _ in found)}")
    user_id, is_erased = found[0]
    if is_erased:
        raise click.ClickException(f"{user_id} was erased, and is not fetched again")
    return user_id


def _cost(plans: Sequence[BackfillPlan], settings: Settings) -> str:
    requests = sum(plan.requests for plan in plans)
    rate = limits.parse(settings.request_rate)
    least = timedelta(seconds=requests * rate.get_expiry() / rate.amount)
    about = "about" if all(plan.is_measured for plan in plans) else "at least"
    return f"{about} {requests} requests, {format_duration(least)} at {settings.request_rate} (HEADRACE_REQUEST_RATE)"


def _row_of_plan(plan: BackfillPlan) -> dict[str, Any]:
    requests = f"{'about' if plan.is_measured else 'at least'} {plan.requests}"
    window = {"from": f"{plan.since:%Y-%m-%d %H:%M}", "to": f"{plan.until:%Y-%m-%d %H:%M}"}
    return {"provider": plan.provider or "any", "resource": plan.resource, **window, "requests": requests}


@backfill.command("list")
@_which
@click.option("--status", "states", multiple=True, type=click.Choice(STATES), help="only these (may be repeated)")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="list at most this many")
@click.option("--watch", is_flag=True, help="keep it fresh, until Ctrl-C")
@click.option("--every", type=click.FloatRange(0.2), default=1.0, show_default=True, help="seconds between two looks")
@options.json_option
def list_command(
    *,
    ids: tuple[int, ...],
    user: str | None,
    provider: str | None,
    resource: str | None,
    states: tuple[str, ...],
    limit: int,
    watch: bool,
    every: float,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Show backfills with their progress: the open ones, then those that ended last."""
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-backfill")
    which = Filter(ids or None, user, provider, resource, states or None)

    def look() -> list[Backfill]:
        return backfill_admin.listed(engine, which, limit)

    if as_json:
        output.print_json([plain(one) for one in look()])
    elif watch:
        output.live_view(lambda: progress(look()), every)
    else:
        output.console().print(progress(look()))


@backfill.command()
@click.argument("number", type=int, metavar="ID")
@options.data_dir_option
@options.json_option
def show(*, number: int, data_dir: Path | None, as_json: bool) -> None:
    """Show one backfill with its chunks."""
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-backfill")
    found = backfill_admin.listed(engine, Filter(ids=(number,)))
    if not found:
        raise click.ClickException(f"there is no backfill {number}; headrace backfill list shows what there is")
    chunks = backfill_admin.chunks_of(engine, number)
    if as_json:
        output.print_json(plain(found[0]) | {"chunks": [one._asdict() for one in chunks]})
        return
    output.console().print(progress(found))
    output.print_rows([_row_of_chunk(one) for one in chunks], as_json=False)


def _row_of_chunk(chunk: Chunk) -> dict[str, Any]:
    """A chunk for a terminal: its window is walked from its newest end."""
    moments = {"from": chunk.window_start, "to": chunk.window_end, "fetched back to": chunk.slice_end}
    times = {name: f"{moment:%Y-%m-%d %H:%M}" for name, moment in moments.items()}
    if chunk.status == "done":
        times["fetched back to"] = times["from"]
    marks = {
        "final": "yes" if chunk.is_final else "",
        "restarts": chunk.restarts or "",
        "asked for by": chunk.message_id,
    }
    return {"status": chunk.status, **times, "page": chunk.pages + 1 if chunk.amid else "", **marks}


def _command(
    name: str, do: Callable[[Engine, Sequence[int]], list[int]], done: str, states: tuple[str, ...], meaning: str
) -> None:
    """The commands that do one thing to many backfills."""

    @backfill.command(name, help=meaning)
    @_which
    def command(
        *, ids: tuple[int, ...], user: str | None, provider: str | None, resource: str | None, data_dir: Path | None
    ) -> None:
        if not (ids or user or provider or resource):
            raise click.UsageError("say which: by ID, or by --user, --provider or --resource")
        engine = make_engine(options.attached(data_dir, broker=False), "headrace-backfill")
        which = Filter(ids or None, user, provider, resource, None if ids else states)
        found = tuple(one.id for one in backfill_admin.listed(engine, which, 1_000_000))
        for missing in sorted(set(ids) - set(found)):
            click.echo(f"there is no such backfill {missing}; headrace backfill list shows what there is", err=True)
        changed = do(engine, found)
        audit.record(engine, f"backfill {name}", user or "backfills", {"backfills": changed})
        click.echo(f"{done} {len(changed)} of {len(found)}")
        for left in backfill_admin.listed(engine, Filter(tuple(set(found) - set(changed)) or (0,))):
            click.echo(f"backfill {left.id} is {left.status}, and stays so", err=True)
        if ids and not changed:
            raise click.exceptions.Exit(1)


PAUSE = "Stop backfills after the page they are at."
RESUME = "Go on with what was paused, cancelled or failed, where it ended."
CANCEL = "End backfills after the page they are at; what was fetched stays."
_command("pause", backfill_admin.pause, "paused", ("pending", "running"), PAUSE)
_command("resume", backfill_admin.resume, "resumed", ("paused", "failed"), RESUME)
_command("cancel", backfill_admin.cancel, "cancelled", ("pending", "running", "paused"), CANCEL)
