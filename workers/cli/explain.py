"""`headrace explain`: where a stored value came from."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import Connection, Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from workers.cli import options, output
from workers.cli.options import Moment, ResourceName
from workers.operate.explain import SAYS, Explanation, Holding, Question
from workers.operate.explain import explain as look_up
from workers.store import backfill_admin, provenance
from workers.store.engine import make_engine, transaction
from workers.store.provenance import Fetch, StoredRow


@click.command()
@click.option("--user", required=True, help="whose: a user_id or client_user_id")
@click.option("--resource", "name", required=True, type=ResourceName(), help="workouts, sleep, heartrate ...")
@click.option("--id", "identifier", help="which record")
@click.option("--at", type=Moment(), help="which moment of a timeseries, or the day of a record")
@click.option("--values", is_flag=True, help="also print what was measured, which is somebody's health data")
@options.data_dir_option
@options.json_option
def explain(
    *,
    user: str,
    name: str,
    identifier: str | None,
    at: datetime | None,
    values: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Say where a stored value came from: deliveries, fetches, versions, and which won.

    That somebody looked is written to headrace.audit.
    """
    if (identifier is None) == (at is None):
        raise click.UsageError("say which one: --id for a record, --at for a moment")
    settings = options.attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-explain")
    with transaction(engine) as connection:
        asked = _asked(connection, user, name, identifier, at)
    known = _with_progress(engine, settings, asked, values=values, quiet=as_json)
    if as_json:
        output.print_json(_plain(known, values=values))
    else:
        _print_explanation(known, values=values)


def _asked(connection: Connection, user: str, name: str, identifier: str | None, at: datetime | None) -> Question:
    """What is meant. Raises click.ClickException where that is nothing, or several."""
    people = [user_id for user_id, _ in backfill_admin.resolve_user(connection, user)]
    if not people:
        raise click.ClickException(f"nobody called {user} is known")
    if people[0] != user and len(people) > 1:
        raise click.ClickException(f"{user} is several: {', '.join(people)}")
    resource = catalogue()[name]
    if resource.is_series:
        if at is None:
            raise click.ClickException(f"{name} is a timeseries, whose samples have no id: say --at")
        return Question(people[0], resource, at=at)
    if at is not None:
        ids = provenance.ids_on(connection, resource, people[0], at)
        if len(ids) != 1:
            found = f"are {', '.join(ids)}" if ids else "is nothing stored"
            raise click.ClickException(f"of {at:%Y-%m-%d} there {found}; say which by --id")
        identifier = ids[0]
    return Question(people[0], resource, id=identifier)


def _with_progress(engine: Engine, settings: Settings, asked: Question, *, values: bool, quiet: bool) -> Explanation:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = output.console()
    with Progress(*columns, console=screen, transient=True, disable=quiet or not screen.is_terminal) as progress:
        task = progress.add_task("kept deliveries read", total=None)
        return look_up(
            engine,
            settings,
            asked,
            lambda done, total: progress.update(task, completed=done, total=total),
            values=values,
        )


def _plain(known: Explanation, *, values: bool) -> dict[str, Any]:
    asked = known.question
    about = {"user_id": asked.user_id, "resource": asked.resource.name, "id": asked.id, "at": asked.at}
    return {
        **about,
        "why": known.why,
        "stored": [_of_row(row, values=values) for row in known.rows],
        "deliveries": [_of_holding(one, values=values) for one in known.holdings],
        "applied_with_it_and_not_kept": [one._asdict() for one in known.unkept],
        "backfills": [asdict(one) for one in known.fetches],
        "erased_at": known.person.erased_at,
        "former_user_ids": list(known.person.former),
        "deliveries_looked_at": known.looked_at,
        "deliveries_that_cannot_be_read": known.unread,
        "kept_since": known.kept_since,
    }


def _of_row(row: StoredRow, *, values: bool) -> dict[str, Any]:
    about = {"provider": row.provider, "source_type": row.source_type, "subtype": row.subtype}
    how = {"version": row.version, "origin": row.origin, "stored_at": row.stored_at, "deleted": row.is_deleted}
    return {**about, **how, "columns": row.columns if values else list(row.columns)}


def _of_holding(one: Holding, *, values: bool) -> dict[str, Any]:
    given = {name: value for name, value in asdict(one).items() if name != "content"}
    content = {"content": one.content} if values else {}
    return given | {"series": list(one.series), "meaning": SAYS[one.verdict]} | content


def _print_explanation(known: Explanation, *, values: bool) -> None:
    for sentence in known.why:
        click.echo(sentence[0].upper() + sentence[1:] + ".")
    for row in known.rows:
        click.echo(f"\nstored: {row.provider} {row.source_type} {row.subtype}".rstrip())
        for name in ("version", "origin", "stored_at"):
            click.echo(f"  {name:10} {getattr(row, name)}")
        shown = row.columns.items() if values else [(name, "") for name in row.columns]
        click.echo("  columns    " + (", ".join(f"{name} {value}".rstrip() for name, value in shown) or "none"))
    if known.holdings:
        click.echo("\ndeliveries that hold it, in the order of their versions:")
        output.print_rows([_line(one, values=values) for one in known.holdings], as_json=False)
    if known.fetches:
        click.echo("\nbackfills that asked for it:")
        output.print_rows([_line_of_fetch(one) for one in known.fetches], as_json=False)
    _print_limits(known)


def _line(one: Holding, *, values: bool) -> dict[str, Any]:
    """A delivery for a terminal; what differs, or with --values what it says there."""
    differs = [f"{name} {one.content.get(name)}" if values else name for name in one.differs]
    when = {"version": f"{one.version:%Y-%m-%d %H:%M:%S.%f}", "received": f"{one.received_at:%Y-%m-%d %H:%M:%S}"}
    what = {"outcome": one.outcome, "here": one.verdict, "differs in": ", ".join(differs)}
    return {"delivery": one.message_id, "event": one.event_type, **when, **what}


def _line_of_fetch(one: Fetch) -> dict[str, Any]:
    window = {name: f"{moment:%Y-%m-%d}" if moment else "" for name, moment in _edges(one)}
    ended = f"{one.finished_at:%Y-%m-%d %H:%M}" if one.finished_at else ""
    return {"id": one.id, "provider": one.provider or "any", "asked by": one.requested_by, "status": one.status} | {
        **window,
        "ended": ended,
    }


def _edges(one: Fetch) -> list[tuple[str, datetime | None]]:
    return [("from", one.window_start), ("to", one.window_end)]


def _print_limits(known: Explanation) -> None:
    """What this cannot know."""
    if known.person.former:
        click.echo(f"known before as {', '.join(known.person.former)}, under which deliveries may have come")
    if known.unread:
        click.echo(f"{known.unread} deliveries that may hold it cannot be read: another key, or dead letters")
    since = f"what was received before {known.kept_since:%Y-%m-%d %H:%M} UTC" if known.kept_since else "everything"
    click.echo(f"\n{known.looked_at} kept deliveries looked at; {since} is no longer kept (HEADRACE_KEEP_DAYS)")
