"""Users: their client_user_id, the user that each was merged into, and tombstones of erased users."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, text

GIVEN = """unnest(CAST(:users AS text[]), CAST(:clients AS text[]), CAST(:times AS timestamptz[]))
     AS given(user_id, client_user_id, named_at)"""
# The lock makes an erasure wait for transactions that write data of the user (workers/store/erase.py). FOR KEY SHARE is
# the weakest lock: workers that write for one user, or update the client_user_id, do not wait for each other. With FOR
# SHARE, two workers that update the same user's client_user_id deadlock.
KNOWN_USERS = text(f"""
SELECT user_id, known.merged_into,
       given.client_user_id <> coalesce(known.client_user_id, '') AND given.named_at > known.named_at AS is_changed
FROM {GIVEN} JOIN headrace.users AS known USING (user_id)
WHERE known.erased_at IS NULL ORDER BY user_id FOR KEY SHARE OF known""")
INSERT_USERS = text(f"""
INSERT INTO headrace.users AS stored (user_id, client_user_id, named_at)
SELECT user_id, given.client_user_id, coalesce(given.named_at, '-infinity')
FROM {GIVEN} LEFT JOIN headrace.users AS known USING (user_id)
WHERE known.erased_at IS NULL
ORDER BY user_id
ON CONFLICT (user_id) DO UPDATE SET client_user_id = excluded.client_user_id, named_at = excluded.named_at
WHERE excluded.client_user_id IS NOT NULL AND excluded.named_at > stored.named_at AND stored.erased_at IS NULL""")
ClientId = tuple[str, datetime] | None  # a client_user_id, and the time of the event that named it


@dataclass(frozen=True, slots=True)
class User:
    """A user's state, as a writer needs it."""

    is_erased: bool = False
    merged_into: str | None = None  # the user_id since the last reconnection

    @property
    def is_read_only(self) -> bool:
        """Whether no more data may be written under this id."""
        return self.is_erased or self.merged_into is not None


ERASED = User(is_erased=True)


def upsert_users(connection: Connection, users: Mapping[str, ClientId]) -> dict[str, User]:
    """Inserts unknown users, updates each client_user_id to the newest, and returns every user's state.

    Must be the first write of a transaction that writes data of users: an erasure of one of them then waits for the
    transaction's end. One query if nothing is new. A user that is still missing after the insert was erased.
    """
    known = _known_users(connection, users)
    if news := {name: client for name, client in users.items() if name not in known or known[name].is_changed}:
        connection.execute(INSERT_USERS, _columns(news))
        known |= _known_users(connection, news)
    return {name: User(merged_into=known[name].merged_into) if name in known else ERASED for name in users}


def is_read_only(connection: Connection, user_id: str) -> bool:
    """Whether no data may be written under this id.

    If False, an erasure or a merge of the user waits for the transaction's end, and includes the rows it writes.
    """
    return upsert_users(connection, {user_id: None})[user_id].is_read_only


def _known_users(connection: Connection, users: Mapping[str, ClientId]) -> dict[str, Row[Any]]:
    """The rows of users that exist and are not erased. `is_changed`: the given client_user_id is newer."""
    return {row.user_id: row for row in connection.execute(KNOWN_USERS, _columns(users))} if users else {}


def _columns(users: Mapping[str, ClientId]) -> dict[str, list[str | datetime | None]]:
    given = [client or (None, None) for client in users.values()]
    return {"users": list(users), "clients": [name for name, _ in given], "times": [at for _, at in given]}
