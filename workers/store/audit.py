"""The audit log: the operators' actions. Append-only.

`operator` is the login of the database session: a default of the column, which the writer cannot override. `os_user` is
the user of the operating system as the command reports it, or `console:NAME` for an account of the console. Another
program with the writer's login can insert any value.
"""

import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, text

from workers.store.engine import transaction

NOTE = text("""
INSERT INTO headrace.audit (os_user, action, subject, detail)
VALUES (:os_user, :action, :subject, CAST(:detail AS jsonb))""")
LIST = text("""
SELECT at, operator, os_user, action, subject, detail FROM headrace.audit
WHERE at >= :since AND (CAST(:subjects AS text[]) IS NULL OR subject = ANY(:subjects)
                        OR detail -> 'users' ?| CAST(:subjects AS text[])) ORDER BY id""")
SUBJECTS = text("SELECT DISTINCT subject FROM headrace.audit")

_account: ContextVar[str] = ContextVar("account", default="")


@contextmanager
def acting_as(account: str) -> Iterator[None]:
    """Records the actions of the block under an account of the console instead of the operating system's user."""
    token = _account.set(account)
    try:
        yield
    finally:
        _account.reset(token)


def note(connection: Connection, action: str, subject: str, detail: Mapping[str, Any]) -> None:
    """Records an action in the transaction that performs it. `detail` holds counts and ids, never health values."""
    values = {"action": action, "subject": subject, "detail": msgspec.json.encode(detail).decode()}
    connection.execute(NOTE, values | {"os_user": _actor()})


def record(engine: Engine, action: str, subject: str, detail: Mapping[str, Any]) -> None:
    """Records an action that spans several transactions, in a transaction of its own."""
    with transaction(engine, confirm=True) as connection:
        note(connection, action, subject, detail)


@contextmanager
def recorded(engine: Engine, action: str, subject: str, detail: Mapping[str, Any]) -> Iterator[None]:
    """Records the action of the block when it ends, also if it fails after some of its transactions.

    `detail` may change during the block.
    """
    try:
        yield
    finally:
        record(engine, action, subject, detail)


def listed(connection: Connection, since: datetime, subjects: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The actions since a moment, oldest first; with subjects, also those whose `users` contain one of them."""
    values = {"since": since, "subjects": subjects and list(subjects)}
    return [dict(row) for row in connection.execute(LIST, values).mappings()]


def subjects(connection: Connection) -> list[str]:
    """The subjects of all actions."""
    return list(connection.scalars(SUBJECTS))


def _actor() -> str:
    """The account of the console, or the name or number of the process's user. The environment cannot change it."""
    if account := _account.get():
        return f"console:{account}"
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"
