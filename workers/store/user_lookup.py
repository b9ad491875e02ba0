"""Finds the users that an operator names by a user_id, a client_user_id or a former user_id."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from workers.aggregators.common import canonical_id

MAX_CANDIDATES = 2000
# Without an index: with a million users each takes 0.15 s, and operators rarely look up a user.
PRESENT = """
SELECT DISTINCT present.user_id, present.client_user_id, present.erased_at, present.user_id = :name AS is_exact
FROM headrace.users named JOIN headrace.users present ON present.user_id = coalesce(named.merged_into, named.user_id)
WHERE {where} ORDER BY is_exact DESC, present.user_id"""
BY_NAME = text(PRESENT.format(where="named.user_id = ANY(:names) OR named.client_user_id = :name"))
BY_USER_ID_IN_ANY_CASE = text(PRESENT.format(where="lower(named.user_id) = lower(:name)"))
# Names of about the same length with the same first or last three characters; those with both come first. The query
# takes 2 s if a million names begin alike; it only runs after a typing error.
CANDIDATES = text("""
SELECT name FROM (
    SELECT user_id AS name FROM headrace.users WHERE erased_at IS NULL
    UNION ALL SELECT client_user_id FROM headrace.users WHERE erased_at IS NULL AND client_user_id IS NOT NULL) AS known
WHERE length(name) BETWEEN length(:name) - 3 AND length(:name) + 3
  AND (lower(left(name, 3)) = lower(left(:name, 3)) OR lower(right(name, 3)) = lower(right(:name, 3)))
ORDER BY (lower(left(name, 3)) = lower(left(:name, 3)) AND lower(right(name, 3)) = lower(right(:name, 3))) DESC,
         abs(length(name) - length(:name)), name LIMIT :limit""")
# A connection is not stored where only its samples arrived.
CONNECTIONS = text("""
SELECT user_id, string_agg(concat_ws(' ', provider, status), ', ' ORDER BY provider) AS providers FROM (
    SELECT user_id, provider, nullif(status, 'connected') AS status FROM headrace.connections
    UNION SELECT user_id, provider, NULL FROM headrace.series series WHERE NOT EXISTS (
        SELECT 1 FROM headrace.connections known
        WHERE (known.user_id, known.provider) = (series.user_id, series.provider))) AS source
WHERE user_id = ANY(:users) GROUP BY user_id""")
LAST_DELIVERIES = text("""
SELECT user_id, max(received_at) AS received_at FROM headrace.archive WHERE user_id = ANY(:users) GROUP BY user_id""")


@dataclass(frozen=True)
class FoundUser:
    user_id: str
    client_user_id: str | None
    is_erased: bool


@dataclass(frozen=True)
class UserDetails:
    """What distinguishes the users of one client_user_id."""

    providers: str = ""  # with the status, unless connected
    last_delivery: datetime | None = None  # of the archived ones


def find(connection: Connection, name: str) -> list[FoundUser]:
    """The users with this name, under their present user_id. A user_id wins over a client_user_id.

    A user_id is found in any case of letters; a client_user_id only as it is spelled.
    """
    values = {"name": name, "names": [name, canonical_id(name)]}
    found = connection.execute(BY_NAME, values).all() or connection.execute(BY_USER_ID_IN_ANY_CASE, values).all()
    if found and found[0].is_exact:
        found = found[:1]
    return [FoundUser(row.user_id, row.client_user_id, row.erased_at is not None) for row in found]


def candidates(connection: Connection, name: str) -> list[str]:
    """User ids and client user ids that may be similar to an unknown name, at most MAX_CANDIDATES."""
    return list(dict.fromkeys(connection.scalars(CANDIDATES, {"name": name, "limit": MAX_CANDIDATES})))


def details(connection: Connection, users: Sequence[str]) -> dict[str, UserDetails]:
    """The details of each user id."""
    values = {"users": list(users)}
    providers = {row.user_id: row.providers for row in connection.execute(CONNECTIONS, values)}
    received = {row.user_id: row.received_at for row in connection.execute(LAST_DELIVERIES, values)}
    return {one: UserDetails(providers.get(one, ""), received.get(one)) for one in users}
