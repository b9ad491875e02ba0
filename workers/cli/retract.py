"""`headrace retract`: hides one record, for example a workout that a person deleted at the provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from app.catalogue import Resource, catalogue
from app.errors import NotFound, UserErased
from workers.cli import options, output
from workers.cli.deployment import Deployment, query_options
from workers.store import audit, retractions
from workers.store import users as stored_users

if TYPE_CHECKING:
    from sqlalchemy import Connection


@click.command()
@options.user_option("whose record")
@click.option("--resource", "name", required=True, type=options.resource, help="workouts, sleep, activity ...")
@click.option("--id", "identifier", required=True, help="the id of the record")
@click.option("--undo", is_flag=True, help="show a retracted record again")
@options.yes_option
@query_options
def retract(*, user: str, name: str, identifier: str, undo: bool, yes: bool, deployment: Deployment) -> None:
    """Hide one record permanently. Its view leaves it out, even after it is delivered or fetched again.

    A retracted workout hides its stream as well. Every use is recorded in headrace.audit.
    """
    resource = catalogue()[name]
    if resource.is_series:
        raise click.UsageError(f"{name} is a timeseries, whose samples have no id; only records can be retracted")
    if not undo:
        output.require_answer(yes=yes)
    user_id = deployment.user(user).user_id
    with deployment.transaction() as connection:
        _check(connection, resource, user_id, identifier, undo=undo)
    if not undo:
        output.confirm(f"hide {name} {identifier} of {user_id}?", yes=yes)
    is_changed = _change(deployment, resource, user_id, identifier, undo=undo)
    what = f"{name} {identifier} of {user_id}"
    already = "" if is_changed else " (it was retracted before)"
    hidden = f"retracted {what}: health.{name} leaves it out{already}"
    plain = {"user_id": user_id, "resource": name, "id": identifier, "is_retracted": not undo, "is_changed": is_changed}
    output.show(plain, f"{what} is no longer retracted" if undo else hidden)


def _check(connection: Connection, resource: Resource, user_id: str, identifier: str, *, undo: bool) -> None:
    """Raises NotFound if there is no such record to hide, or no such retraction to undo."""
    what = f"{resource.name} {identifier} of {user_id}"
    if undo:
        if resource.name not in retractions.find(connection, resource, user_id, identifier):
            raise NotFound(f"{what} is not retracted; headrace audit --since DAY --subject {user_id} lists retractions")
        return
    if not retractions.is_stored(connection, resource, user_id, identifier):
        known, hint = retractions.ids(connection, resource, user_id), f"; look up the id in health.{resource.name}"
        raise NotFound(f"no {what} is stored{options.did_you_mean(identifier, known, hint)}")


def _change(deployment: Deployment, resource: Resource, user_id: str, identifier: str, *, undo: bool) -> bool:
    """Hides or shows the record, and notes that in the audit log. False if nothing changed."""
    with deployment.transaction(confirm=True) as connection:
        if stored_users.is_read_only(connection, user_id):
            raise UserErased(f"{user_id} was erased or has reconnected under a new id; nothing was changed")
        change = retractions.restore if undo else retractions.retract
        is_changed = change(connection, resource, user_id, identifier)
        detail = {"resource": resource.name, "id": identifier, "is_changed": is_changed}
        audit.note(connection, "retract undo" if undo else "retract", user_id, detail)
    return is_changed
