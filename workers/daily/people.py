"""Which person each user is, and what happens to days when that changes: a user is named, renamed or reconnected."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, text

from workers.daily import queue
from workers.daily.queue import ORIGIN
from workers.daily.write import day_change
from workers.store.feed import announce
from workers.store.sql import RowParameters

PRESENT = """
SELECT u.user_id, t.user_id AS present_id, coalesce(t.client_user_id, t.user_id) AS person, known.person AS former
FROM headrace.users u JOIN headrace.users t ON t.user_id = coalesce(u.merged_into, u.user_id)
LEFT JOIN headrace.daily_people known ON known.user_id = u.user_id
WHERE u.erased_at IS NULL AND t.erased_at IS NULL"""
PEOPLE = text(f"{PRESENT} AND u.user_id = ANY(:users) ORDER BY u.user_id")
CHANGED = text(f"""{PRESENT} AND known.person IS NOT NULL
AND (known.person <> coalesce(t.client_user_id, t.user_id) OR u.merged_into IS NOT NULL) ORDER BY u.user_id""")
REMEMBERED = RowParameters("user_id text, person text")
REMEMBER = text(f"""
INSERT INTO headrace.daily_people AS known (user_id, person) SELECT * FROM {REMEMBERED} ORDER BY user_id
ON CONFLICT (user_id) DO UPDATE SET person = excluded.person WHERE known.person <> excluded.person""")
# Waits for computations of these users' days, which hold FOR KEY SHARE: their rows have to move too.
LOCK_USERS = text("SELECT FROM headrace.users WHERE user_id = ANY(:users) ORDER BY user_id FOR UPDATE")
OF_USER = "user_id = :user AND (person <> :person OR :user <> :present)"
OF_NAME = """person = :former AND :former <> :person AND NOT EXISTS (
    SELECT FROM headrace.users u WHERE coalesce(u.client_user_id, u.user_id) = :former
    AND u.erased_at IS NULL AND u.merged_into IS NULL)"""  # of a name that no user has any longer


def _moving(table: str, rows: str, change: str, taken: str, more: str = "true") -> tuple[str, str]:
    """Moves rows to the new name or user_id, and removes those of which that has its own, `o`."""
    free = f"NOT EXISTS (SELECT FROM headrace.{table} o WHERE {taken})"
    update = f"UPDATE headrace.{table} p SET {change} WHERE {rows} AND {more} AND {free}"
    return update, f"DELETE FROM headrace.{table} WHERE {rows}"


# Days of which samples have expired cannot be computed again, so the rows themselves move. Those of several users do so
# with the last of them. Where the person has a day of its own, it is computed again.
MOVE_DAYS, REMOVE_DAYS = (
    text(f"""
WITH changed AS ({statement} RETURNING local_date)
SELECT count(*) AS rows, min(local_date) AS first, max(local_date) AS last FROM changed""")
    for statement in _moving(
        "days",
        f"({OF_USER} OR user_id IS NULL AND {OF_NAME})",
        "person = :person, user_id = CASE WHEN user_id IS NOT NULL THEN :present END",
        "p.person <> :person AND (o.person, o.metric, o.local_date) = (:person, p.metric, p.local_date)",
        "person = :former",
    )
)
# Of priorities and zones, what an operator set for a name moves with the last user who has it.
MOVE_OTHERS = [
    text(statement)
    for statement in (
        *_moving(
            "kept_sessions",
            OF_USER,
            "person = :person, user_id = :present",
            ":user <> :present AND (o.user_id, o.resource, o.id) = (:present, p.resource, p.id)",
        ),
        "DELETE FROM headrace.daily_records WHERE user_id = :user AND :user <> :present",
        "DELETE FROM headrace.daily_people WHERE user_id = :user AND :user <> :present",
        *_moving("daily_zones", OF_NAME, "person = :person", "o.person = :person"),
        *_moving("daily_priorities", OF_NAME, "person = :person", "(o.person, o.resource) = (:person, p.resource)"),
    )
]


def people_of(connection: Connection, users: Iterable[str]) -> dict[str, str]:
    """The person of each user who was not erased. Moves the days of users whose person has changed."""
    rows = connection.execute(PEOPLE, {"users": sorted(users)}).all()
    _move_changed(connection, rows)
    return {row.user_id: row.person for row in rows}


def check_all(connection: Connection) -> None:
    """Moves the days of users who were named or renamed without a change of their data."""
    _move_changed(connection, connection.execute(CHANGED).all())


def _move_changed(connection: Connection, rows: Sequence[Row[Any]]) -> None:
    """Moves what is stored for users whose person or user_id has changed, and remembers the present persons."""
    touched = set()
    moved = [row for row in rows if row.former and (row.former != row.person or row.present_id != row.user_id)]
    if moved:
        connection.execute(LOCK_USERS, {"users": [row.user_id for row in moved]})
    for row in moved:
        values = {"user": row.user_id, "present": row.present_id, "person": row.person, "former": row.former}
        _move_days(connection, values)
        for statement in MOVE_OTHERS:
            connection.execute(statement, values)
        touched |= {row.former, row.person}
    if touched:
        queue.add_all(connection, sorted(touched))
    present = ((row.user_id, row.person) for row in rows if row.present_id == row.user_id)
    connection.execute(REMEMBER, REMEMBERED.values(present))


def _move_days(connection: Connection, values: dict[str, str]) -> None:
    """Announces all days of the user as removed, and those that moved as written."""
    moved = connection.execute(MOVE_DAYS, values).one()
    removed = connection.execute(REMOVE_DAYS, values).one()
    dates = [edge for one in (moved, removed) if one.rows for edge in (one.first, one.last)]
    if dates:
        changes = [day_change("remove", values["user"], dates, moved.rows + removed.rows, ORIGIN)]
        if moved.rows:
            changes.append(day_change("put", values["present"], (moved.first, moved.last), moved.rows, ORIGIN))
        announce(connection, changes)
