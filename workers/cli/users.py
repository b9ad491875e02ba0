"""Resolves `--user`. Not in options.py, which every process imports: SQLAlchemy would add 0.4 s of CPU and 37 MB."""

from typing import NamedTuple

import click
from sqlalchemy import Engine

from workers.store import backfill_admin
from workers.store.engine import transaction


class ResolvedUser(NamedTuple):
    user_id: str
    is_known: bool
    is_erased: bool


def resolve_user(engine: Engine, name: str) -> ResolvedUser:
    """Accepts a user_id, a client_user_id or a former user_id; an unknown name is returned as a user_id.

    Raises click.ClickException if several users match.
    """
    with transaction(engine) as connection:
        found = backfill_admin.resolve_user(connection, name)
    if not found:
        return ResolvedUser(name, is_known=False, is_erased=False)
    user_id, is_erased = found[0]
    if user_id != name and len(found) > 1:
        names = ", ".join(user_id for user_id, _ in found)
        raise click.ClickException(f"several users have the client_user_id {name}: {names}; use one of these user_ids")
    return ResolvedUser(user_id, is_known=True, is_erased=is_erased)
