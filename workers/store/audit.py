"""What operators did, and to whom: written in the transaction of the deed, and only ever added to."""

import os
import pwd
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, text

from workers.store.engine import transaction

NOTE = text("""
INSERT INTO headrace.audit (operator, action, subject, detail)
VALUES (:operator, :action, :subject, CAST(:detail AS jsonb))""")

LIST = text("""
SELECT at, operator, action, subject, detail FROM headrace.audit
WHERE at >= :since AND (CAST(:subject AS text) IS NULL OR subject = :subject) ORDER BY id""")


def note(connection: Connection, action: str, subject: str, detail: Mapping[str, Any]) -> None:
    """Writes down that whoever runs this process did something. The detail holds counts and ids, nothing measured."""
    given = {"action": action, "subject": subject, "detail": msgspec.json.encode(detail).decode()}
    connection.execute(NOTE, given | {"operator": _operator()})


def record(engine: Engine, action: str, subject: str, detail: Mapping[str, Any]) -> None:
    """As `note`, of what is no single transaction."""
    with transaction(engine) as connection:
        note(connection, action, subject, detail)


def listed(connection: Connection, since: datetime, subject: str | None = None) -> list[dict[str, Any]]:
    """What was done since then, the oldest first."""
    rows = connection.execute(LIST, {"since": since, "subject": subject})
    return [dict(row) for row in rows.mappings()]


def _operator() -> str:
    """The user of the operating system, which nobody can choose as they can a variable. It may have no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"
