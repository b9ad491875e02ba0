"""`headrace dead` and `headrace replay`: dead letters, and applying deliveries again."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sqlalchemy import Engine, make_url

from app.config.settings import Settings, load
from app.errors import NotFound
from app.sealing import Sealer
from workers.cli import options, output
from workers.cli.options import Moment, Seconds
from workers.store import archive, audit, dead_letters, schema
from workers.store.archive import ArchiveWindow
from workers.store.dead_letters import DeadLetter
from workers.store.engine import make_engine, make_writer
from workers.store.ledger import Outcome
from workers.store.migrate import migrate

if TYPE_CHECKING:
    from workers.ingest.replay import Order

ORDERS = ("oldest", "newest", "random")
ALL = 1_000_000


@click.group("dead", cls=options.Group)
def dead() -> None:
    """Show, replay and drop dead letters. A dead letter is a delivery, or an item of one, that could not be applied."""


def _selection(command: options.Command) -> options.Command:
    """Adds the options that select dead letters."""
    command = click.option("--reason", help="only those whose reason contains this text")(command)
    return options.data_dir_option(click.argument("ids", nargs=-1, type=int, metavar="[ID]...")(command))


@dead.command("list")
@_selection
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="maximum number of rows")
@options.json_option
def list_command(*, ids: tuple[int, ...], reason: str | None, limit: int, data_dir: Path | None, as_json: bool) -> None:
    """List dead letters, the newest first, without their bodies.

    A row without a number of items is a whole delivery. With a number, it stands for refused items of a delivery or of
    fetched history, whose other items are stored.
    """
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-dead")
    _check_ids(engine, ids)
    found = dead_letters.listed(engine, ids, reason, limit)
    if as_json:
        output.print_json(found)
    elif not found:
        click.echo("no dead letters")
    else:
        output.print_rows([_row(entry) for entry in found])


def _check_ids(engine: Engine, ids: Sequence[int]) -> None:
    """Raises NotFound for an id that does not exist."""
    found = {entry.id for entry in dead_letters.listed(engine, ids, limit=len(ids))} if ids else set()
    if missing := [number for number in ids if number not in found]:
        near = options.did_you_mean(
            str(missing[0]), (str(entry.id) for entry in dead_letters.listed(engine, limit=1000))
        )
        raise NotFound(f"no dead letter {missing[0]}{near or '; headrace dead list shows all'}")


def _row(entry: DeadLetter) -> dict[str, Any]:
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
@options.data_dir_option
@options.json_option
def show(*, number: int, body: bool, data_dir: Path | None, as_json: bool) -> None:
    """Show one dead letter."""
    settings = options.attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-dead")
    _check_ids(engine, [number])
    found = dead_letters.listed(engine, [number])
    if body:
        audit.record(engine, "dead show", found[0].user_id or "unknown", {"dead_letter": number})
        delivery = dead_letters.delivery(engine, found[0])
        sys.stdout.buffer.write(delivery.open(Sealer(settings.encryption_keys)) + b"\n")
    elif as_json:
        output.print_json(found[0])
    else:
        for name, value in asdict(found[0]).items():
            click.echo(f"{name.replace('_', ' '):13} {value}")


@dead.command("replay")
@_selection
@click.option("--timeout", type=Seconds(), help="time limit of each database statement, e.g. 10m (default: 45s)")
@options.json_option
def replay_dead(
    *, ids: tuple[int, ...], reason: str | None, timeout: int | None, data_dir: Path | None, as_json: bool
) -> None:
    """Apply dead letters again: all, or those selected by ID or reason.

    Applied dead letters leave the list. If a request to Junction was rejected, its backfill is resumed. If items were
    only counted, the whole delivery is applied from the archive, or the history is fetched again.
    """
    settings = options.attached(data_dir, broker=False)
    session = {"statement_timeout": f"{timeout}s"} if timeout else {}
    engine = make_writer(settings, "headrace-dead", session)
    _check_ids(engine, ids)
    found = dead_letters.listed(engine, ids, reason, ALL)
    from workers.ingest.apply import Applier  # noqa: PLC0415 - 0.1 s of CPU that `dead list` does not need
    from workers.ingest.replay import replay_dead_letters  # noqa: PLC0415

    detail: dict[str, Any] = {"dead_letters": len(found)}
    with audit.recorded(engine, "dead replay", "dead letters", detail):
        outcomes = replay_dead_letters(engine, Applier(engine, settings), found)
        detail["outcomes"] = dict(outcomes)
    _print_outcomes(outcomes, as_json=as_json)
    if outcomes["dead"]:
        click.echo(f"{outcomes['dead']} failed again; headrace dead list shows why", err=True)
        raise click.exceptions.Exit(1)


@dead.command()
@_selection
@click.option("--all", "every", is_flag=True, help="all dead letters")
@options.yes_option
def drop(*, ids: tuple[int, ...], reason: str | None, every: bool, yes: bool, data_dir: Path | None) -> None:
    """Delete dead letters permanently. Their outcome in the ledger stays `dead`."""
    if not (ids or reason or every):
        raise click.UsageError("select dead letters by ID, by --reason, or with --all")
    output.require_answer(yes=yes)
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-dead")
    _check_ids(engine, ids)
    found = dead_letters.listed(engine, ids, reason, ALL)
    if reason and not found:
        raise click.ClickException("no dead letter has this text in its reason; headrace dead list shows the reasons")
    if found:
        output.confirm(f"delete {len(found)} dead letters permanently?", yes=yes)
    with audit.recorded(engine, "dead drop", "dead letters", {"dead_letters": [entry.id for entry in found]}):
        dropped = dead_letters.drop(engine, found)
    click.echo(f"dropped {dropped}")


@click.command()
@click.option("--since", required=True, type=Moment(), help="received at or after this day or time")
@click.option("--until", type=Moment(), help="received before this day or time (default: now)")
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
@options.data_dir_option
@options.json_option
def replay(
    *,
    since: datetime,
    until: datetime | None,
    event_type: str | None,
    order: "Order",
    other: str | None,
    dry_run: bool,
    digest: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Apply archived deliveries again. Rows that are already correct do not change."""
    settings = options.attached(data_dir, broker=False)
    into = _with_database(settings, other) if other else settings
    source = make_engine(settings, "headrace-replay")
    window = ArchiveWindow(since, until or datetime.now(UTC), event_type)
    total = archive.count(source, window)
    if dry_run or not total:
        if as_json:
            output.print_json({"kept": total})
        else:
            click.echo(f"{total} archived deliveries match")
        return
    if other:
        migrate(make_engine(into, "headrace-replay"))
    target = make_writer(into, "headrace-replay")
    from workers.ingest.apply import Applier  # noqa: PLC0415 - as above
    from workers.ingest.replay import replay as replay_archived  # noqa: PLC0415

    before = schema.digests(target) if digest else {}
    what: dict[str, Any] = {"since": window.since, "until": window.until, "event_type": event_type}
    with (
        output.progress("applied again", total, quiet=as_json) as update,
        audit.recorded(target, "replay", "deliveries", what),
    ):
        outcomes = replay_archived(source, Applier(target, into), window, order, update)
        what["outcomes"] = dict(outcomes)
    after = schema.digests(target) if digest else {}
    changed = sorted(name for name, value in after.items() if before[name] != value) if digest else None
    _print_outcomes(outcomes, changed, as_json=as_json)


def _with_database(settings: Settings, url: str) -> Settings:
    """The settings with another database. Its password is read by libpq from PGPASSWORD or the password file."""
    other = replace(settings, database_url=load({"DATABASE_URL": url}).database_url)
    parsed = make_url(other.need_database())
    if parsed.password is not None or "password" in parsed.query:
        raise click.ClickException(
            "--into must not contain a password, because every user of this machine can read a command line; "
            "set PGPASSWORD, or add the password to ~/.pgpass"
        )
    return other


def _print_outcomes(outcomes: Counter[Outcome], changed: Sequence[str] | None = None, *, as_json: bool) -> None:
    if as_json:
        output.print_json({**outcomes, **({} if changed is None else {"changed": list(changed)})})
        return
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    click.echo(f"{outcomes.total()} applied again: {counts or 'nothing to do'}")
    if changed is not None:
        click.echo(f"changed: {', '.join(changed)}" if changed else "no table has changed")
