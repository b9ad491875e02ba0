"""`headrace dead` and `headrace replay`: dead letters, and applying deliveries again."""

from __future__ import annotations

import fnmatch
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from app.catalogue import catalogue
from app.config.settings import load
from app.errors import NotFound
from app.sealing import Sealer
from workers.cli import options, output
from workers.cli.deployment import Deployment, deployment_option, query_options
from workers.ingest import apply
from workers.ingest import replay as replays
from workers.store import archive, audit, dead_letters, migrate, schema

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from workers.store.ledger import Outcome

ORDERS = ("oldest", "newest", "random")
ALL = 1_000_000


@click.group("dead", cls=options.Group)
def dead() -> None:
    """Show, replay and drop dead letters. A dead letter is a delivery, or an item of one, that could not be applied."""


def _selection(command: options.Command) -> options.Command:
    """Adds the options that select dead letters."""
    command = click.option("--reason", help="only those whose reason contains this text")(command)
    return deployment_option(click.argument("ids", nargs=-1, type=int, metavar="[ID]...")(command))


def _selected(
    deployment: Deployment, ids: Sequence[int], reason: str | None = None, limit: int = ALL
) -> list[dead_letters.DeadLetter]:
    """Raises NotFound for an id that does not exist."""
    engine = deployment.engine
    if ids:

        def numbers(ids: Sequence[int], limit: int) -> list[int]:
            return [entry.id for entry in dead_letters.listed(engine, ids, limit=limit)]

        options.check_ids(ids, numbers(ids, len(ids)), "dead letter", lambda: numbers((), 1000))
    return dead_letters.listed(engine, ids, reason, limit)


@dead.command("list")
@_selection
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="maximum number of rows")
@options.json_option
def list_command(*, ids: tuple[int, ...], reason: str | None, limit: int, deployment: Deployment) -> None:
    """List dead letters, the newest first, without their bodies.

    A row without a number of items is a whole delivery. With a number, it stands for refused items of a delivery or of
    fetched history, whose other items are stored.
    """
    found = _selected(deployment, ids, reason, limit)
    output.print_rows([_row(entry) for entry in found], found, empty="no dead letters")


def _row(entry: dead_letters.DeadLetter) -> dict[str, Any]:
    return {
        "id": entry.id,
        "died": entry.died_at,
        "event": entry.event_type,
        "user": entry.user_id,
        "items": entry.items if entry.item else "",
        "message": entry.message_id,
        "attempts": entry.attempts,
        "reason": entry.reason,
    }


@dead.command()
@click.argument("number", type=int, metavar="ID")
@click.option("--body", is_flag=True, help="decrypt and print the body, which contains health data")
@query_options
def show(*, number: int, body: bool, deployment: Deployment) -> None:
    """Show one dead letter."""
    (found,) = _selected(deployment, [number])
    if body:
        audit.record(deployment.engine, "dead show", found.user_id or "unknown", {"dead_letter": number})
        delivery = dead_letters.delivery(deployment.engine, found)
        sys.stdout.buffer.write(delivery.open(Sealer(deployment.settings.encryption_keys)) + b"\n")
    else:
        output.print_fields(asdict(found))


@dead.command("replay")
@_selection
@click.option("--timeout", type=options.duration, help="time limit of each database statement, e.g. 10m (default: 45s)")
@options.json_option
def replay_dead(*, ids: tuple[int, ...], reason: str | None, timeout: int | None, deployment: Deployment) -> None:
    """Apply dead letters again: all, or those selected by ID or reason.

    Applied dead letters leave the list. If a request to Junction was rejected, its backfill is resumed. If items were
    only counted, the whole delivery is applied from the archive, or the history is fetched again.
    """
    found = _selected(deployment, ids, reason)
    writer = deployment.writer({"statement_timeout": f"{timeout}s"} if timeout else {})
    detail: dict[str, Any] = {"dead_letters": len(found)}
    with audit.recorded(writer, "dead replay", "dead letters", detail):
        outcomes = replays.replay_dead_letters(writer, apply.Applier(writer, deployment.settings), found)
        detail["outcomes"] = dict(outcomes)
    _print_outcomes(outcomes)
    if outcomes["dead"]:
        click.echo(f"{outcomes['dead']} failed again; headrace dead list shows why", err=True)
        raise click.exceptions.Exit(1)


@dead.command()
@_selection
@click.option("--all", "every", is_flag=True, help="all dead letters")
@options.yes_option
def drop(*, ids: tuple[int, ...], reason: str | None, every: bool, yes: bool, deployment: Deployment) -> None:
    """Delete dead letters permanently. Their outcome in the ledger stays `dead`."""
    if not (ids or reason or every):
        raise click.UsageError("select dead letters by ID, by --reason, or with --all")
    output.require_answer(yes=yes)
    found = _selected(deployment, ids, reason)
    if reason and not found:
        raise click.ClickException("no dead letter has this text in its reason; headrace dead list shows the reasons")
    if found:
        output.confirm(f"delete {len(found)} dead letters permanently?", yes=yes)
    detail = {"dead_letters": [entry.id for entry in found]}
    with audit.recorded(deployment.engine, "dead drop", "dead letters", detail):
        dropped = dead_letters.drop(deployment.engine, found)
    click.echo(f"dropped {dropped}")


@click.command()
@options.since_option("received at or after this day or time")
@options.until_option("received before this day or time")
@click.option("--event-type", help="only event types that match this pattern, e.g. 'daily.data.sleep.*'")
@click.option("--order", type=click.Choice(ORDERS), default="oldest", show_default=True, help="order within each hour")
@click.option(
    "--into",
    "other",
    metavar="DATABASE_URL",
    help="apply to another database, e.g. an empty one for a test; its password is in PGPASSWORD or ~/.pgpass",
)
@click.option("--dry-run", is_flag=True, help="only count the deliveries")
@click.option("--digest", is_flag=True, help="compare the tables before and after, and list those that changed")
@query_options
def replay(
    *,
    since: datetime,
    until: datetime | None,
    event_type: str | None,
    order: replays.Order,
    other: str | None,
    dry_run: bool,
    digest: bool,
    deployment: Deployment,
) -> None:
    """Apply archived deliveries again. Rows that are already correct do not change."""
    end = options.check_period(since, until)
    source = deployment.engine
    into = _with_database(deployment, other) if other else deployment
    window = archive.ArchiveWindow(since, end, event_type)
    total = archive.count(source, window)
    if event_type and not total:
        _check_event_type(source, event_type)
    if dry_run or not total:
        output.show({"kept": total}, f"{total} archived deliveries match")
        return
    if other:
        migrate.migrate(into.engine)
    target = into.writer()
    before = schema.digests(target) if digest else {}
    what: dict[str, Any] = {"since": since, "until": end, "event_type": event_type}
    with (
        output.progress("applied again", total) as update,
        audit.recorded(target, "replay", "deliveries", what),
    ):
        outcomes = replays.replay(source, apply.Applier(target, into.settings), window, order, update)
        what["outcomes"] = dict(outcomes)
    after = schema.digests(target) if digest else {}
    changed = sorted(name for name, value in after.items() if before[name] != value) if digest else None
    _print_outcomes(outcomes, changed)


def _check_event_type(engine: Engine, pattern: str) -> None:
    """Raises NotFound for a pattern that matches neither an archived nor a documented event type."""
    known = {*archive.event_types(engine), *catalogue().event_names}
    if not fnmatch.filter(known, pattern):
        raise NotFound(f"unknown event type {pattern}{options.did_you_mean(pattern, known)}")


def _with_database(deployment: Deployment, url: str) -> Deployment:
    """The deployment with another database. Its password is read by libpq from PGPASSWORD or the password file."""
    from sqlalchemy import make_url  # noqa: PLC0415 - 0.2 s of CPU

    other = deployment.elsewhere(load({"DATABASE_URL": url}).need_database())
    parsed = make_url(other.settings.need_database())
    if parsed.password is not None or "password" in parsed.query:
        raise click.ClickException(
            "--into must not contain a password, because every user of this machine can read a command line; "
            "set PGPASSWORD, or add the password to ~/.pgpass"
        )
    return other


def _print_outcomes(outcomes: Counter[Outcome], changed: Sequence[str] | None = None) -> None:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    lines = [f"{outcomes.total()} applied again: {counts or 'nothing to do'}"]
    plain: dict[Any, Any] = dict(outcomes)
    if changed is not None:
        plain["changed"] = changed
        lines.append(f"changed: {', '.join(changed)}" if changed else "no table has changed")
    output.show(plain, lines)
