"""People: who is known, by which name, and who was erased and must not come back."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

GIVEN = """unnest(CAST(:users AS text[]), CAST(:clients AS text[]), CAST(:times AS timestamptz[]))
     AS given(user_id, client_user_id, named_at)"""
# The lock keeps an erasure from removing what there is while more is being written (workers/store/erase.py). It is the
# weakest there is: workers that write for one person, or name them anew, do not wait for each other. With FOR SHARE two
# that name the same person deadlock.
LIVING = text(f"""
SELECT user_id,
       given.client_user_id <> coalesce(known.client_user_id, '') AND given.named_at > known.named_at AS is_news
FROM {GIVEN} JOIN headrace.users AS known USING (user_id)
WHERE known.erased_at IS NULL ORDER BY user_id FOR KEY SHARE OF known""")
MAKE_KNOWN = text(f"""
INSERT INTO headrace.users AS stored (user_id, client_user_id, named_at)
SELECT user_id, given.client_user_id, coalesce(given.named_at, '-infinity')
FROM {GIVEN} LEFT JOIN headrace.users AS known USING (user_id)
WHERE known.erased_at IS NULL
ORDER BY user_id
ON CONFLICT (user_id) DO UPDATE SET client_user_id = excluded.client_user_id, named_at = excluded.named_at
WHERE excluded.client_user_id IS NOT NULL AND excluded.named_at > stored.named_at AND stored.erased_at IS NULL""")
Told = tuple[str, datetime] | None  # a client_user_id, and when that was said


@dataclass(frozen=True, slots=True)
class User:
    """How somebody stands, as far as it matters to whoever is about to write of them."""

    is_erased: bool = False


def touch_users(connection: Connection, users: Mapping[str, Told]) -> dict[str, User]:
    """Makes users known, and the client_user_id that was told last, and says how each stands.

    Goes before whatever else a transaction writes of people: of whoever is not erased now, nothing is removed before
    it ends. One query where nothing is new; whoever is not among the living even after they were made known was erased.
    """
    living = _living(connection, users)
    if news := {name: told for name, told in users.items() if living.get(name, True)}:
        connection.execute(MAKE_KNOWN, _columns(news))
        living |= _living(connection, news)
    return {name: User(is_erased=name not in living) for name in users}


def is_erased(connection: Connection, user_id: str) -> bool:
    """Whether this one was erased; if not, an erasure waits for the transaction, and removes what it writes."""
    return touch_users(connection, {user_id: None})[user_id].is_erased


def _living(connection: Connection, users: Mapping[str, Told]) -> dict[str, bool]:
    """Who of these is known and not erased, and of whom a newer name was told than is known."""
    return {row.user_id: bool(row.is_news) for row in connection.execute(LIVING, _columns(users))} if users else {}


def _columns(users: Mapping[str, Told]) -> dict[str, list[str | datetime | None]]:
    clients, times = ([told and told[n] for told in users.values()] for n in (0, 1))
    return {"users": list(users), "clients": clients, "times": times}
