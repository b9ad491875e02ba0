"""`headrace dead` and `headrace replay`: what could not be applied, and applying again."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.config.settings import Settings, load
from app.sealing import Sealer
from workers.cli import options, output
from workers.cli.options import Moment
from workers.ingest.apply import Applier
from workers.ingest.replay import Order, replay_dead_letters
from workers.ingest.replay import replay as replay_archived
from workers.store import archive, audit, dead_letters, digests
from workers.store.archive import ArchiveWindow
from workers.store.dead_letters import DeadLetter
from workers.store.engine import make_engine, make_writer
from workers.store.ledger import Outcome
from workers.store.migrate import migrate

ORDERS = ("oldest", "newest", "random")
ALL = 1_000_000


@click.group("dead", cls=options.Group)
def dead() -> None:
    """Look at what could not be applied, apply it again, or drop it."""


def _which(command: options.Command) -> options.Command:
    """Adds the options that select dead letters."""
    command = click.option("--reason", help="whose reason has this text")(command)
    return options.data_dir_option(click.argument("ids", nargs=-1, type=int, metavar="[ID]...")(command))


@dead.command("list")
@_which
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="list at most this many")
@options.json_option
def list_command(*, ids: tuple[int, ...], reason: str | None, limit: int, data_dir: Path | None, as_json: bool) -> None:
    """Show dead letters, the newest first, without what they hold."""
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-dead")
    found = dead_letters.listed(engine, ids, reason, limit)
    if as_json:
        output.print_json(found)
    elif not found:
        click.echo("no dead letters")
    else:
        output.print_rows([_row(entry) for entry in found], as_json=False)


def _row(entry: DeadLetter) -> dict[str, Any]:
    died = f"{entry.died_at:%Y-%m-%d %H:%M}"
    about = {"id": entry.id, "died": died, "event": entry.event_type, "message": entry.message_id}
    return {**about, "attempts": entry.attempts, "reason": entry.reason}


@dead.command()
@click.argument("number", type=int, metavar="ID")
@click.option("--body", is_flag=True, help="open it and print what it holds, which is somebody's health data")
@options.data_dir_option
@options.json_option
def show(*, number: int, body: bool, data_dir: Path | None, as_json: bool) -> None:
    """Show one dead letter."""
    settings = options.attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-dead")
    found = dead_letters.listed(engine, [number])
    if not found:
        raise click.ClickException(f"there is no dead letter {number}; headrace dead list shows what there is")
    if body:
        audit.record(engine, "dead show", found[0].user_id or "unknown", {"letter": number})
        delivery = dead_letters.delivery(engine, found[0])
        sys.stdout.buffer.write(Sealer(settings.encryption_keys).open(delivery.sealed, delivery.key) + b"\n")
    elif as_json:
        output.print_json(found[0])
    else:
        for name, value in asdict(found[0]).items():
            click.echo(f"{name.replace('_', ' '):13} {value}")


@dead.command("replay")
@_which
@options.json_option
def replay_dead(*, ids: tuple[int, ...], reason: str | None, data_dir: Path | None, as_json: bool) -> None:
    """Apply dead letters again: all of them, or those with these numbers or this reason.

    What can be applied now leaves the list. A refused request to Junction has its backfill resumed.
    """
    settings = options.attached(data_dir, broker=False)
    engine = make_writer(settings, "headrace-dead")
    found = dead_letters.listed(engine, ids, reason, ALL)
    outcomes = replay_dead_letters(engine, Applier(engine, settings), found)
    audit.record(engine, "dead replay", "dead letters", {"letters": len(found), "outcomes": dict(outcomes)})
    _print_outcomes(outcomes, as_json=as_json)
    if outcomes["dead"]:
        click.echo(f"{outcomes['dead']} are dead still; headrace dead list says why", err=True)
        raise click.exceptions.Exit(1)


@dead.command()
@_which
@click.option("--all", "every", is_flag=True, help="all of them")
@click.option("--yes", is_flag=True, help="do not ask")
def drop(*, ids: tuple[int, ...], reason: str | None, every: bool, yes: bool, data_dir: Path | None) -> None:
    """Throw dead letters away for good. The ledger remembers that they were dead."""
    if not (ids or reason or every):
        raise click.UsageError("say which: by ID, by --reason, or --all")
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-dead")
    found = dead_letters.listed(engine, ids, reason, ALL)
    if reason and not found:
        raise click.ClickException("no dead letter has that in its reason; `headrace dead list` shows what they say")
    if found and not yes:
        click.confirm(f"throw away {len(found)} dead letters for good?", abort=True)
    dropped = dead_letters.drop(engine, found)
    audit.record(engine, "dead drop", "dead letters", {"letters": [entry.id for entry in found]})
    click.echo(f"dropped {dropped}")


@click.command()
@click.option("--since", required=True, type=Moment(), help="what was received from here on")
@click.option("--until", type=Moment(), help="and before this (default: now)")
@click.option("--event-type", help="only these, with * and ?, e.g. 'daily.data.sleep.*'")
@click.option("--order", type=click.Choice(ORDERS), default="oldest", show_default=True, help="within each hour")
@click.option("--into", "other", metavar="DATABASE_URL", help="into another database, e.g. an empty one, as a drill")
@click.option("--dry-run", is_flag=True, help="only say how many there are")
@click.option("--digest", is_flag=True, help="compare the tables before and after")
@options.data_dir_option
@options.json_option
def replay(
    *,
    since: datetime,
    until: datetime | None,
    event_type: str | None,
    order: Order,
    other: str | None,
    dry_run: bool,
    digest: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Apply kept deliveries again. Changes nothing if nothing was wrong."""
    settings = options.attached(data_dir, broker=False)
    source, window = (
        make_engine(settings, "headrace-replay"),
        ArchiveWindow(since, until or datetime.now(UTC), event_type),
    )
    total = archive.count(source, window)
    if dry_run or not total:
        if as_json:
            output.print_json({"kept": total})
            return
        click.echo(f"{total} deliveries are kept of that")
        return
    into = _other(settings, other) if other else settings
    target = make_writer(into, "headrace-replay")
    before = digests.digests(target) if digest else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = output.console()
    with Progress(*columns, console=screen, disable=as_json or not screen.is_terminal) as progress:
        task = progress.add_task("applied again", total=total)
        outcomes = replay_archived(
            source, Applier(target, into), window, order, lambda done: progress.update(task, completed=done)
        )
    what = {"since": window.since, "until": window.until, "event_type": event_type, "outcomes": dict(outcomes)}
    audit.record(target, "replay", "deliveries", what)
    changed = (
        sorted(name for name, value in digests.digests(target).items() if before[name] != value) if digest else None
    )
    _print_outcomes(outcomes, changed, as_json=as_json)


def _other(settings: Settings, url: str) -> Settings:
    """The settings with another database, which is migrated."""
    other = replace(settings, database_url=load({"DATABASE_URL": url}).database_url)
    migrate(make_engine(other, "headrace-replay"))
    return other


def _print_outcomes(outcomes: Counter[Outcome], changed: Sequence[str] | None = None, *, as_json: bool) -> None:
    if as_json:
        output.print_json({**outcomes, **({} if changed is None else {"changed": list(changed)})})
        return
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    click.echo(f"{outcomes.total()} applied again: {told or 'nothing to do'}")
    if changed is not None:
        click.echo(f"changed: {', '.join(changed)}" if changed else "no table has changed")
