"""People: search, and what the page of one person shows. States, counts and ids; values only from `values`."""

from collections.abc import Sequence
from datetime import date
from typing import Any

from sqlalchemy import Connection, Row, text

from app.errors import NotFound
from workers.store import user_lookup

PAGE_ROWS = 50
PAGE = """
SELECT user_id, client_user_id, first_seen, erased_at FROM headrace.users
WHERE {which} AND (CAST(:after AS text) IS NULL OR user_id > :after) ORDER BY user_id LIMIT :limit"""
ALL = text(PAGE.format(which="merged_into IS NULL"))
# Without an index, as `user_lookup`: with a million users it takes 0.3 s.
PART = "(position(lower(:name) IN lower(user_id)) > 0 OR position(lower(:name) IN lower(client_user_id)) > 0)"
CONTAINING = text(PAGE.format(which=f"merged_into IS NULL AND {PART}"))
BY_IDS = text(PAGE.format(which="user_id = ANY(:users)"))
ONE = text("""
SELECT user_id, client_user_id, first_seen, erased_at, aggregator, merged_into FROM headrace.users
WHERE user_id = :user_id""")
FORMER = text("SELECT user_id FROM headrace.users WHERE merged_into = ANY(:users) ORDER BY user_id")
SAME_PERSON = text("""
SELECT user_id FROM headrace.users
WHERE coalesce(client_user_id, user_id) = coalesce(CAST(:client_user_id AS text), :user_id) AND user_id <> :user_id
  AND merged_into IS NULL ORDER BY user_id LIMIT 50""")
# With the resources that were and were not granted.
GRANTS = "SELECT resource FROM headrace.grants g WHERE (g.user_id, g.provider) = (c.user_id, c.provider)"
CONNECTIONS = text(f"""
SELECT provider, status, stored_at AS since, error, ARRAY({GRANTS} AND granted ORDER BY resource) AS granted,
       ARRAY({GRANTS} AND NOT granted ORDER BY resource) AS refused
FROM headrace.connections c WHERE user_id = :user_id ORDER BY provider""")
GAPS = text("""
SELECT provider, resource, whose, reason, since, window_start, window_end FROM headrace.gaps
WHERE user_id = :user_id ORDER BY since DESC LIMIT 200""")
# The rows of health.daily, by the key of their table: the view would read the days of everybody.
VALUES = text("""
SELECT local_date, metric, value, unit, provider, source_type, method FROM headrace.days
WHERE person = coalesce(CAST(:client_user_id AS text), :user_id)
  AND local_date BETWEEN :first AND :last ORDER BY local_date DESC, metric""")
MAX_EXPLAINED = 2000  # archived deliveries, which an explanation opens: about 2 s
ARCHIVED = text(f"""
SELECT count(*) FROM (SELECT FROM headrace.archive WHERE user_id = :user_id LIMIT {MAX_EXPLAINED + 1}) AS theirs""")


def search(connection: Connection, name: str, after: str) -> Sequence[Row[Any]]:
    """Users by name, or else by a part of it, in pages after a user_id; all of them without a name."""
    values = {"name": name, "after": after or None, "limit": PAGE_ROWS + 1}
    if not name:
        return connection.execute(ALL, values).all()
    if found := user_lookup.find(connection, name):
        return connection.execute(BY_IDS, values | {"users": [one.user_id for one in found]}).all()
    return connection.execute(CONTAINING, values).all()


def person(connection: Connection, user_id: str) -> Row[Any]:
    """The user. Raises NotFound."""
    if (row := connection.execute(ONE, {"user_id": user_id}).first()) is None:
        raise NotFound(f"unknown user {user_id}")
    return row


def is_explained(connection: Connection, user_id: str) -> bool:
    """Whether the user has few enough deliveries to open them all for a page."""
    count: int = connection.scalar(ARCHIVED, {"user_id": user_id}) or 0
    return count <= MAX_EXPLAINED


def names(connection: Connection, one: Row[Any]) -> dict[str, Sequence[str]]:
    """Former ids of the user, and other users of the same person."""
    values = {"user_id": one.user_id, "client_user_id": one.client_user_id}
    return {
        "former": with_former(connection, (one.user_id,))[1:],
        "others": connection.scalars(SAME_PERSON, values).all(),
    }


def with_former(connection: Connection, users: tuple[str, ...]) -> tuple[str, ...]:
    """These users, then the ids that they had before."""
    return users + tuple(connection.scalars(FORMER, {"users": list(users)}))


def connections(connection: Connection, user_id: str) -> Sequence[Row[Any]]:
    return connection.execute(CONNECTIONS, {"user_id": user_id}).all()


def gaps(connection: Connection, user_id: str) -> Sequence[Row[Any]]:
    return connection.execute(GAPS, {"user_id": user_id}).all()


def values(connection: Connection, one: Row[Any], first: date, last: date) -> Sequence[Row[Any]]:
    """The person's values of these days, newest first. Health data."""
    given = {"user_id": one.user_id, "client_user_id": one.client_user_id, "first": first, "last": last}
    return connection.execute(VALUES, given).all()
