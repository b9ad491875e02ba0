"""Resolves `--user`. Not in options.py, which every process imports: SQLAlchemy would add 0.4 s of CPU and 37 MB."""

from collections.abc import Sequence

import click
from sqlalchemy import Engine

from app.config.settings import Settings
from app.errors import NotFound
from workers.cli.options import did_you_mean
from workers.store import user_lookup
from workers.store.engine import make_engine, transaction
from workers.store.user_lookup import FoundUser, UserDetails

MAX_SHOWN = 10  # users of an ambiguous name
FORMS = "; --user accepts a user_id, a client_user_id or a former user_id"


def resolve_user(engine: Engine, name: str) -> FoundUser:
    """The user with this user_id, client_user_id or former user_id.

    Raises NotFound, and click.ClickException if several users match.
    """
    found = _find(engine, name)
    if len(found) > 1:
        raise click.ClickException(ambiguous(engine, name, found))
    return found[0]


def resolve_users(engine: Engine, name: str, *, all_users: bool) -> list[FoundUser]:
    """The users that `--user` and `--all` (`all_users`) select. Raises as `resolve_user` does."""
    found = _find(engine, name)
    if len(found) > 1 and not all_users:
        raise click.ClickException(f"{ambiguous(engine, name, found)}, or --all for all of them")
    return found


def matching_users(settings: Settings, name: str) -> list[FoundUser]:
    """The users with this name; none for an unknown one."""
    engine = make_engine(settings, "headrace-users")
    try:
        with transaction(engine) as connection:
            return user_lookup.find(connection, name)
    finally:
        engine.dispose()


def selected_ids(engine: Engine, name: str | None, *, all_users: bool) -> tuple[str, ...] | None:
    """The user_ids that the optional `--user` and `--all` select; None, for all users, without `--user`."""
    if name is None:
        if all_users:
            raise click.UsageError("--all selects every user that --user matches, but --user is missing")
        return None
    return tuple(one.user_id for one in resolve_users(engine, name, all_users=all_users))


def _find(engine: Engine, name: str) -> list[FoundUser]:
    with transaction(engine) as connection:
        found = user_lookup.find(connection, name)
        if not found:
            near = did_you_mean(name, user_lookup.candidates(connection, name))
            raise NotFound(f"unknown user {name}{near or FORMS}")
    return found


def ambiguous(engine: Engine, name: str, found: Sequence[FoundUser]) -> str:
    """The error about a name of several users. It describes each user_id."""
    shown = found[:MAX_SHOWN]
    with transaction(engine) as connection:
        details = user_lookup.details(connection, [one.user_id for one in shown])
    users = "; ".join(_described(one, details[one.user_id], name) for one in shown)
    more = f"; and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
    return f"several users match {name}: {users}{more}. Use one of these user_ids"


def _described(user: FoundUser, details: UserDetails, name: str) -> str:
    parts = [details.providers or "no connection"]
    if user.client_user_id not in {None, name}:
        parts.insert(0, f"client_user_id {user.client_user_id}")
    if details.last_delivery:
        parts.append(f"last delivery {details.last_delivery:%Y-%m-%d %H:%M}")
    return f"{user.user_id} ({', '.join(parts)})"
