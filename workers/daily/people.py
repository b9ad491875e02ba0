"""Which person each user is, and what happens to days when that changes: a user is named, renamed or reconnected."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, TextClause, text

from workers.daily import queue
from workers.daily.priorities import ORIGIN
from workers.daily.write import day_change
from workers.store.feed import announce

PRESENT = """
SELECT u.user_id, t.user_id AS present_id, coalesce(t.client_user_id, t.user_id) AS person, known.person AS former
FROM headrace.users u JOIN headrace.users t ON t.user_id = coalesce(u.merged_into, u.user_id)
LEFT JOIN headrace.daily_people known ON known.user_id = u.user_id
WHERE u.erased_at IS NULL AND t.erased_at IS NULL"""
PEOPLE = text(f"{PRESENT} AND u.user_id = ANY(:users) ORDER BY u.user_id")
CHANGED = text(f"""{PRESENT} AND known.person IS NOT NULL
AND (known.person <> coalesce(t.client_user_id, t.user_id) OR u.merged_into IS NOT NULL) ORDER BY u.user_id""")
REMEMBER = text("""
INSERT INTO headrace.daily_people AS known (user_id, person)
SELECT * FROM unnest(CAST(:users AS text[]), CAST(:persons AS text[])) AS given(user_id, person) ORDER BY user_id
ON CONFLICT (user_id) DO UPDATE SET person = excluded.person WHERE known.person <> excluded.person""")
IS_LEFT = """NOT EXISTS (SELECT FROM headrace.users u WHERE coalesce(u.client_user_id, u.user_id) = :former
    AND u.erased_at IS NULL AND u.merged_into IS NULL)"""
# Days of which samples have expired cannot be computed again, so the rows themselves move. Those of several users do so
# with the last of them.
OF_SEVERAL = f"user_id IS NULL AND person = :former AND :former <> :person AND {IS_LEFT}"
SUMMED = "SELECT count(*) AS rows, min(local_date) AS first, max(local_date) AS last FROM changed"
MOVE_DAYS = text(f"""
WITH changed AS (
    UPDATE headrace.days d SET person = :person, user_id = CASE WHEN user_id IS NOT NULL THEN :present END
    WHERE (user_id = :user AND person = :former OR {OF_SEVERAL}) AND (person <> :person OR :user <> :present)
      AND NOT EXISTS (
        SELECT FROM headrace.days o WHERE d.person <> :person
           AND (o.person, o.metric, o.local_date) = (:person, d.metric, d.local_date))
    RETURNING local_date)
{SUMMED}""")
# Where the person has a day of its own. It is computed again.
REMOVE_DAYS = text(f"""
WITH changed AS (
    DELETE FROM headrace.days WHERE (user_id = :user OR {OF_SEVERAL}) AND (person <> :person OR :user <> :present)
    RETURNING local_date)
{SUMMED}""")
# Waits for computations of these users' days, which hold FOR KEY SHARE: their rows have to move too.
LOCK_USERS = text("SELECT FROM headrace.users WHERE user_id = ANY(:users) ORDER BY user_id FOR UPDATE")
MOVE_SESSIONS = [
    text("""
UPDATE headrace.kept_sessions k SET person = :person, user_id = :present WHERE user_id = :user AND NOT EXISTS (
    SELECT 1 FROM headrace.kept_sessions o WHERE :user <> :present
       AND (o.user_id, o.resource, o.id) = (:present, k.resource, k.id))"""),
    text("DELETE FROM headrace.kept_sessions WHERE user_id = :user AND :user <> :present"),
    text("DELETE FROM headrace.daily_records WHERE user_id = :user AND :user <> :present"),
    text("DELETE FROM headrace.daily_people WHERE user_id = :user AND :user <> :present"),
]


def _renames(table: str, same: str) -> list[TextClause]:
    """What an operator set for a name that no user has any longer goes to the new name, unless that has its own."""
    former = f"WHERE person = :former AND :former <> :person AND {IS_LEFT}"
    return [
        text(f"""
UPDATE headrace.{table} p SET person = :person {former}
    AND NOT EXISTS (SELECT FROM headrace.{table} o WHERE o.person = :person {same})"""),
        text(f"DELETE FROM headrace.{table} {former}"),
    ]


RENAME = [*_renames("daily_zones", ""), *_renames("daily_priorities", "AND o.resource = p.resource")]


def people_of(connection: Connection, users: Iterable[str]) -> dict[str, str]:
    """The person of each user who was not erased. Moves the days of users whose person has changed."""
    rows = connection.execute(PEOPLE, {"users": sorted(users)}).all()
    _move(connection, [row for row in rows if row.former not in (None, row.person) or row.present_id != row.user_id])
    _remember(connection, rows)
    return {row.user_id: row.person for row in rows}


def check_all(connection: Connection) -> None:
    """Moves the days of users who were named or renamed without a change of their data."""
    rows = connection.execute(CHANGED).all()
    _move(connection, rows)
    _remember(connection, rows)


def _move(connection: Connection, rows: Sequence[Row[Any]]) -> None:
    touched = set()
    rows = [row for row in rows if row.former is not None]
    if rows:
        connection.execute(LOCK_USERS, {"users": [row.user_id for row in rows]})
    for row in rows:
        values = {"user": row.user_id, "present": row.present_id, "person": row.person, "former": row.former}
        _move_days(connection, values)
        for statement in (*MOVE_SESSIONS, *RENAME):
            connection.execute(statement, values)
        touched |= {row.former, row.person}
    if touched:
        queue.add_all(connection, sorted(touched), ORIGIN)


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


def _remember(connection: Connection, rows: Sequence[Row[Any]]) -> None:
    present = [row for row in rows if row.present_id == row.user_id]
    users, persons = [row.user_id for row in present], [row.person for row in present]
    connection.execute(REMEMBER, {"users": users, "persons": persons})
