"""What operators did, and to whom: written in the transaction of the deed, and only ever added to."""

import os
import pwd
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection, text

NOTE = text("""
INSERT INTO headrace.audit (operator, action, subject, detail)
VALUES (:operator, :action, :subject, CAST(:detail AS jsonb))""")


def note(connection: Connection, action: str, subject: str, detail: Mapping[str, Any]) -> None:
    """Writes down that whoever runs this process did something. The detail holds counts and ids, nothing measured."""
    given = {"action": action, "subject": subject, "detail": msgspec.json.encode(detail).decode()}
    connection.execute(NOTE, given | {"operator": _operator()})


def _operator() -> str:
    """The user of the operating system, which nobody can choose as they can a variable. It may have no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"
