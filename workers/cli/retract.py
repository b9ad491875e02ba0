"""`headrace retract`: hides one record, for example a workout that a person deleted at the provider."""

from pathlib import Path

import click
from sqlalchemy import Connection, Engine

from app.catalogue import Resource, catalogue
from app.errors import NotFound, UserErased
from workers.cli import options, output
from workers.cli.options import ResourceName
from workers.cli.users import resolve_user
from workers.store import audit, retractions
from workers.store.engine import make_engine, transaction
from workers.store.users import is_read_only


@click.command()
@options.user_option("whose record")
@click.option("--resource", "name", required=True, type=ResourceName(), help="workouts, sleep, activity ...")
@click.option("--id", "identifier", required=True, help="the id of the record")
@click.option("--undo", is_flag=True, help="show a retracted record again")
@options.yes_option
@options.data_dir_option
@options.json_option
def retract(
    *, user: str, name: str, identifier: str, undo: bool, yes: bool, data_dir: Path | None, as_json: bool
) -> None:
    """Hide one record permanently. Its view leaves it out, even after it is delivered or fetched again.

    A retracted workout hides its stream as well. Every use is recorded in headrace.audit.
    """
    resource = catalogue()[name]
    if resource.is_series:
        raise click.UsageError(f"{name} is a timeseries, whose samples have no id; only records can be retracted")
    if not undo:
        output.require_answer(yes=yes)
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-retract")
    user_id = resolve_user(engine, user).user_id
    with transaction(engine) as connection:
        _check(connection, resource, user_id, identifier, undo=undo)
    if not undo:
        output.confirm(f"hide {name} {identifier} of {user_id}?", yes=yes)
    is_changed = _change(engine, resource, user_id, identifier, undo=undo)
    if as_json:
        state = {"is_retracted": not undo, "is_changed": is_changed}
        output.print_json({"user_id": user_id, "resource": name, "id": identifier} | state)
    elif undo:
        click.echo(f"{name} {identifier} of {user_id} is no longer retracted")
    else:
        already = "" if is_changed else " (it was retracted before)"
        click.echo(f"retracted {name} {identifier} of {user_id}: health.{name} leaves it out{already}")


def _check(connection: Connection, resource: Resource, user_id: str, identifier: str, *, undo: bool) -> None:
    """Raises NotFound if there is no such record to hide, or no such retraction to undo."""
    what = f"{resource.name} {identifier} of {user_id}"
    if undo:
        if resource.name not in retractions.find(connection, resource, user_id, identifier):
            raise NotFound(f"{what} is not retracted; headrace audit --since DAY --subject {user_id} lists retractions")
        return
    if not retractions.is_stored(connection, resource, user_id, identifier):
        near = options.did_you_mean(identifier, retractions.ids(connection, resource, user_id))
        raise NotFound(f"no {what} is stored{near or f'; look up the id in health.{resource.name}'}")


def _change(engine: Engine, resource: Resource, user_id: str, identifier: str, *, undo: bool) -> bool:
    """Hides or shows the record, and notes that in the audit log. False if nothing changed."""
    with transaction(engine, confirm=True) as connection:
        if is_read_only(connection, user_id):
            raise UserErased(f"{user_id} was erased or has reconnected under a new id; nothing was changed")
        change = retractions.restore if undo else retractions.retract
        is_changed = change(connection, resource, user_id, identifier)
        detail = {"resource": resource.name, "id": identifier, "is_changed": is_changed}
        audit.note(connection, "retract undo" if undo else "retract", user_id, detail)
    return is_changed
