"""People: search, and what the page of one person shows. States, counts and ids; values only from `values`."""

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from workers.store import user_lookup

PAGE_ROWS = 50
NEWEST = text("""
SELECT user_id, client_user_id, first_seen, erased_at FROM headrace.users
WHERE merged_into IS NULL AND (CAST(:after AS text) IS NULL OR user_id > :after) ORDER BY user_id LIMIT :limit""")
# Without an index, as `user_lookup`: with a million users it takes 0.3 s.
CONTAINING = text("""
SELECT user_id, client_user_id, first_seen, erased_at FROM headrace.users
WHERE merged_into IS NULL AND (CAST(:after AS text) IS NULL OR user_id > :after)
  AND (position(lower(:name) IN lower(user_id)) > 0 OR position(lower(:name) IN lower(client_user_id)) > 0)
ORDER BY user_id LIMIT :limit""")
BY_IDS = text("""
SELECT user_id, client_user_id, first_seen, erased_at FROM headrace.users
WHERE user_id = ANY(:users) AND (CAST(:after AS text) IS NULL OR user_id > :after) ORDER BY user_id LIMIT :limit""")
ONE = text("""
SELECT user_id, client_user_id, first_seen, erased_at, aggregator, merged_into FROM headrace.users
WHERE user_id = :user_id""")
FORMER = text("SELECT user_id FROM headrace.users WHERE merged_into = ANY(:users) ORDER BY user_id")
SAME_PERSON = text("""
SELECT user_id FROM headrace.users
WHERE coalesce(client_user_id, user_id) = coalesce(CAST(:client_user_id AS text), :user_id) AND user_id <> :user_id
  AND merged_into IS NULL ORDER BY user_id LIMIT 50""")
CONNECTIONS = text("""
SELECT provider, status, stored_at AS since, error FROM headrace.connections WHERE user_id = :user_id
ORDER BY provider""")
GRANTS = text("""
SELECT provider, resource, granted FROM headrace.grants WHERE user_id = :user_id ORDER BY provider, resource""")
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


class Someone(NamedTuple):
    """A user of the page."""

    user_id: str
    client_user_id: str | None
    first_seen: datetime
    erased_at: datetime | None
    aggregator: str | None
    merged_into: str | None


class DailyValue(NamedTuple):
    """A row of health.daily."""

    local_date: date
    metric: str
    value: float
    unit: str
    provider: str
    source_type: str
    method: str


def search(connection: Connection, name: str, after: str) -> list[dict[str, Any]]:
    """Users by name, or else by a part of it, in pages after a user_id; all of them without a name."""
    values = {"name": name, "after": after or None, "limit": PAGE_ROWS + 1}
    if not name:
        return _rows(connection.execute(NEWEST, values))
    if found := user_lookup.find(connection, name):
        return _rows(connection.execute(BY_IDS, values | {"users": [one.user_id for one in found]}))
    return _rows(connection.execute(CONTAINING, values))


def person(connection: Connection, user_id: str) -> Someone | None:
    row = connection.execute(ONE, {"user_id": user_id}).first()
    return Someone(*row) if row else None


def is_explained(connection: Connection, user_id: str) -> bool:
    """Whether the user has few enough deliveries to open them all for a page."""
    count: int = connection.scalar(ARCHIVED, {"user_id": user_id}) or 0
    return count <= MAX_EXPLAINED


def names(connection: Connection, one: Someone) -> dict[str, Sequence[str]]:
    """Former ids of the user, and other users of the same person."""
    values = {"user_id": one.user_id, "client_user_id": one.client_user_id}
    return {
        "former": with_former(connection, (one.user_id,))[1:],
        "others": connection.scalars(SAME_PERSON, values).all(),
    }


def with_former(connection: Connection, users: tuple[str, ...]) -> tuple[str, ...]:
    """These users, then the ids that they had before."""
    return users + tuple(connection.scalars(FORMER, {"users": list(users)}))


def connections(connection: Connection, user_id: str) -> list[dict[str, Any]]:
    """The connections, each with the resources that were and were not granted."""
    found = {row["provider"]: row for row in _rows(connection.execute(CONNECTIONS, {"user_id": user_id}))}
    for row in found.values():
        row |= {"granted": [], "refused": []}
    for grant in connection.execute(GRANTS, {"user_id": user_id}):
        if grant.provider in found:
            found[grant.provider]["granted" if grant.granted else "refused"].append(grant.resource)
    return list(found.values())


def gaps(connection: Connection, user_id: str) -> list[dict[str, Any]]:
    return _rows(connection.execute(GAPS, {"user_id": user_id}))


def values(connection: Connection, one: Someone, first: date, last: date) -> list[DailyValue]:
    """The person's values of these days, newest first. Health data."""
    given = {"user_id": one.user_id, "client_user_id": one.client_user_id, "first": first, "last": last}
    return [DailyValue(*row) for row in connection.execute(VALUES, given)]


def _rows(result: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in result.mappings()]
