"""Resolves `--user` to a person: a client_user_id, or the user_id of a user who has none."""

import click
from sqlalchemy import Connection, Engine

from workers.cli.options import did_you_mean
from workers.store import user_lookup
from workers.store.engine import transaction


def person_of(engine: Engine, name: str) -> str:
    """The person of a user_id, client_user_id or former user_id. An unknown name is taken as a client_user_id.

    Raises click.ClickException if users of several people match.
    """
    with transaction(engine) as connection:
        found = _persons(connection, name)
        if not found:
            near = did_you_mean(name, user_lookup.candidates(connection, name))
            click.echo(f"no data of {name} is stored yet; the name is taken as a client_user_id{near}", err=True)
            return name
    if len(found) > 1:
        raise click.ClickException(f"several people match {name}: {', '.join(found)}. Use one of these names")
    return found[0]


def _persons(connection: Connection, name: str) -> list[str]:
    users = [one for one in user_lookup.find(connection, name) if not one.is_erased]
    return sorted({one.client_user_id or one.user_id for one in users})
