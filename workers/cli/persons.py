"""Resolves `--user` to a person: a client_user_id, or the user_id of a user who has none."""

import click
from sqlalchemy import Engine

from app.errors import NotFound, UserErased
from workers.cli.options import did_you_mean
from workers.cli.users import FORMS, ambiguous
from workers.store import user_lookup
from workers.store.engine import transaction


def person_of(engine: Engine, name: str, *, may_be_new: bool = False) -> str:
    """The person of a user_id, client_user_id or former user_id.

    With `may_be_new`, an unknown name is taken as a client_user_id: an application can then set something for a new
    person. Raises NotFound, UserErased, and click.ClickException if users of several people match.
    """
    with transaction(engine) as connection:
        found = user_lookup.find(connection, name)
        near = "" if found else did_you_mean(name, user_lookup.candidates(connection, name))
    if not found and not may_be_new:
        raise NotFound(f"unknown user {name}{near or FORMS}")
    if not found:
        click.echo(f"no data of {name} is stored yet; the name is taken as a client_user_id{near}", err=True)
        return name
    present = [one for one in found if not one.is_erased]
    if not present:
        raise UserErased(f"{name} was erased")
    persons = {one.client_user_id or one.user_id for one in present}
    if len(persons) > 1:
        raise click.ClickException(ambiguous(engine, name, present))
    return persons.pop()
