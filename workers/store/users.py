"""People: who is known, by which name, who goes by another id now, and who was erased and must not come back."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, text

GIVEN = """unnest(CAST(:users AS text[]), CAST(:clients AS text[]), CAST(:times AS timestamptz[]))
     AS given(user_id, client_user_id, named_at)"""
# The lock keeps an erasure from removing what there is while more is being written (workers/store/erase.py). It is the
# weakest there is: workers that write for one person, or name them anew, do not wait for each other. With FOR SHARE two
# that name the same person deadlock.
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
ClientId = tuple[str, datetime] | None  # a client_user_id, and when that was said


@dataclass(frozen=True, slots=True)
class User:
    """How somebody stands, as far as it matters to whoever is about to write of them."""

    is_erased: bool = False
    merged_into: str | None = None  # the id that they go by since they reconnected

    @property
    def is_read_only(self) -> bool:
        """Whether nothing more is to be written under this id."""
        return self.is_erased or self.merged_into is not None


ERASED = User(is_erased=True)


def upsert_users(connection: Connection, users: Mapping[str, ClientId]) -> dict[str, User]:
    """Makes users known, and the client_user_id that was told last, and says how each stands.

    Goes before whatever else a transaction writes of people: of whoever is not erased now, nothing is removed before
    it ends. One query where nothing is new; whoever is not among the living even after they were made known was erased.
    """
    known = _known_users(connection, users)
    if news := {name: client for name, client in users.items() if name not in known or known[name].is_changed}:
        connection.execute(INSERT_USERS, _columns(news))
        known |= _known_users(connection, news)
    return {name: User(merged_into=known[name].merged_into) if name in known else ERASED for name in users}


def is_read_only(connection: Connection, user_id: str) -> bool:
    """Whether nothing is to be written under this id.

    If something is, an erasure or a reconnection waits for the transaction, and takes what it writes along.
    """
    return upsert_users(connection, {user_id: None})[user_id].is_read_only


def _known_users(connection: Connection, users: Mapping[str, ClientId]) -> dict[str, Row[Any]]:
    """Who of these is known and not erased, what they are called now, and whether a newer name was told."""
    return {row.user_id: row for row in connection.execute(KNOWN_USERS, _columns(users))} if users else {}


def _columns(users: Mapping[str, ClientId]) -> dict[str, list[str | datetime | None]]:
    clients, times = ([client and client[n] for client in users.values()] for n in (0, 1))
    return {"users": list(users), "clients": clients, "times": times}
