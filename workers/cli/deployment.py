"""The deployment that a command works on: its settings, its database, and the users that `--user` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app.config.settings import Settings, load
from app.errors import NotFound, UserErased
from workers.cli import options
from workers.local import attach
from workers.store import engine as opening
from workers.store import user_lookup

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

MAX_SHOWN = 10  # users of an ambiguous name
FORMS = "; --user accepts a user_id, a client_user_id or a former user_id"


class Deployment:
    """Settings and database are opened when they are first used, so that wrong usage is reported before."""

    def __init__(self, context: click.Context, data_dir: Path | None, *, needs_broker: bool) -> None:
        self._context, self._data_dir, self._needs_broker = context, data_dir, needs_broker
        self._name = context.command_path.replace(context.find_root().command_path, "headrace", 1).replace(" ", "-")

    @property
    def data_dir(self) -> Path:
        return self._data_dir or Path(load().data_dir)

    @cached_property
    def settings(self) -> Settings:
        """DATABASE_URL and BROKER_URL default to the stack that runs in the data directory. Raises Misconfigured."""
        return attach.attach(load(), self.data_dir, broker=self._needs_broker)

    def elsewhere(self, database_url: str) -> Deployment:
        """The deployment with another database."""
        other = Deployment(self._context, self._data_dir, needs_broker=self._needs_broker)
        other.settings = replace(self.settings, database_url=database_url)
        return other

    @cached_property
    def engine(self) -> Engine:
        """Connections to the database, for the duration of the command. Their application_name is the command."""
        settings = self.settings  # before SQLAlchemy is imported: raises Misconfigured
        engine = opening.make_engine(settings, self._name)
        self._context.call_on_close(engine.dispose)
        return engine

    def writer(self, session: Mapping[str, str] | None = None) -> Engine:
        """As `engine`, for commands that store samples. `session` overrides settings of the database session."""
        settings = self.settings
        engine = opening.make_writer(settings, self._name, session or {})
        self._context.call_on_close(engine.dispose)
        return engine

    def transaction(self, *, confirm: bool = False) -> AbstractContextManager[Connection]:
        """A transaction of `engine`, as `workers.store.engine.transaction`."""
        engine = self.engine
        return opening.transaction(engine, confirm=confirm)

    def user(self, name: str) -> user_lookup.FoundUser:
        """The user with this user_id, client_user_id or former user_id.

        Raises NotFound, and click.ClickException if several users match.
        """
        return self.users(name, all_users=False, hint="")[0]

    def users(
        self, name: str, *, all_users: bool, hint: str = ", or --all for all of them"
    ) -> list[user_lookup.FoundUser]:
        """The users that `--user` and `--all` (`all_users`) select. Raises as `user` does."""
        with self.transaction() as connection:
            found = _find(connection, name)
            if len(found) > 1 and not all_users:
                raise _ambiguous(connection, name, found, hint)
        return found

    def user_ids(self, name: str | None, *, all_users: bool) -> tuple[str, ...] | None:
        """The user_ids that the optional `--user` and `--all` select; None, for all users, without `--user`."""
        if name is None and all_users:
            raise click.UsageError("--all selects every user that --user matches, but --user is missing")
        return None if name is None else tuple(one.user_id for one in self.users(name, all_users=all_users))

    def person(self, name: str, may_be_new: Callable[[Connection], bool] = lambda _: False) -> str:
        """The person: a client_user_id, or the user_id of a user who has none.

        If `may_be_new` returns true, an unknown name is taken as a client_user_id: an application can then set
        something for a new person. Raises NotFound, UserErased, and click.ClickException if several people match.
        """
        with self.transaction() as connection:
            found = user_lookup.find(connection, name)
            if not found and may_be_new(connection):
                near = options.did_you_mean(name, user_lookup.candidates(connection, name))
                click.echo(f"no data of {name} is stored yet; the name is taken as a client_user_id{near}", err=True)
                return name
            present = [one for one in found or _find(connection, name) if not one.is_erased]
            if not present:
                raise UserErased(f"{name} was erased")
            persons = {one.client_user_id or one.user_id for one in present}
            if len(persons) > 1:
                raise _ambiguous(connection, name, present)
        return persons.pop()


def deployment_option(command: options.Command, *, needs_broker: bool = False) -> options.Command:
    """`--data-dir`, which the command gets as `deployment`. With `needs_broker`, the broker must be known as well."""

    def found(context: click.Context, _parameter: click.Parameter, value: Path | None) -> Deployment:
        return Deployment(context, value, needs_broker=needs_broker)

    return options.data_dir_option("deployment", callback=found)(command)


def query_options(command: options.Command) -> options.Command:
    """`--data-dir` and `--json`, for commands that use the database."""
    return deployment_option(options.json_option(command))


def stack_options(command: options.Command) -> options.Command:
    """`--data-dir` and `--json`, for commands that use the database and the broker."""
    return deployment_option(options.json_option(command), needs_broker=True)


def _find(connection: Connection, name: str) -> list[user_lookup.FoundUser]:
    found = user_lookup.find(connection, name)
    if not found:
        raise NotFound(
            f"unknown user {name}{options.did_you_mean(name, user_lookup.candidates(connection, name), FORMS)}"
        )
    return found


def _ambiguous(
    connection: Connection, name: str, found: Sequence[user_lookup.FoundUser], hint: str = ""
) -> click.ClickException:
    """The error about a name of several users. It describes each user_id."""
    details = user_lookup.details(connection, [one.user_id for one in found[:MAX_SHOWN]])
    users = "; ".join(_described(one, details[one.user_id], name) for one in found[:MAX_SHOWN])
    more = f"; and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
    return click.ClickException(f"several users match {name}: {users}{more}. Use one of these user_ids{hint}")


def _described(user: user_lookup.FoundUser, details: user_lookup.UserDetails, name: str) -> str:
    parts = [details.providers or "no connection"]
    if user.client_user_id not in {None, name}:
        parts.insert(0, f"client_user_id {user.client_user_id}")
    if details.last_delivery:
        parts.append(f"last delivery {details.last_delivery:%Y-%m-%d %H:%M}")
    return f"{user.user_id} ({', '.join(parts)})"
