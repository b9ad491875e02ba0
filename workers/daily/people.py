"""Which person each user is, and what happens to days when that changes: a user is named, renamed or reconnected."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, text

from workers.daily import queue
from workers.daily.priorities import ORIGIN

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
# Days of which samples have expired cannot be computed again, so the rows themselves move.
MOVE = [
    text("""
UPDATE headrace.days d SET person = :person, user_id = :present WHERE user_id = :user AND NOT EXISTS (
    SELECT 1 FROM headrace.days o WHERE d.person <> :person
       AND (o.person, o.metric, o.local_date) = (:person, d.metric, d.local_date))"""),
    text("DELETE FROM headrace.days WHERE user_id = :user AND (person <> :person OR :user <> :present)"),
    text("""
UPDATE headrace.kept_sessions k SET person = :person, user_id = :present WHERE user_id = :user AND NOT EXISTS (
    SELECT 1 FROM headrace.kept_sessions o WHERE :user <> :present
       AND (o.user_id, o.resource, o.id) = (:present, k.resource, k.id))"""),
    text("DELETE FROM headrace.kept_sessions WHERE user_id = :user AND :user <> :present"),
    text("DELETE FROM headrace.daily_records WHERE user_id = :user AND :user <> :present"),
    text("DELETE FROM headrace.daily_people WHERE user_id = :user AND :user <> :present"),
]
# What an operator set for a user who had no name yet.
RENAME = [
    text(f"""
UPDATE headrace.{table} p SET person = :person WHERE person = :user AND :user <> :person AND NOT EXISTS (
    SELECT 1 FROM headrace.{table} o WHERE o.person = :person {same})""")
    for table, same in (("daily_zones", ""), ("daily_priorities", "AND o.resource = p.resource"))
]


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
    for row in rows:
        if row.former is None:
            continue
        values = {"user": row.user_id, "present": row.present_id, "person": row.person}
        for statement in (*MOVE, *RENAME):
            connection.execute(statement, values)
        touched |= {row.former, row.person}
    if touched:
        queue.add_all(connection, sorted(touched), ORIGIN)


def _remember(connection: Connection, rows: Sequence[Row[Any]]) -> None:
    present = [row for row in rows if row.present_id == row.user_id]
    users, persons = [row.user_id for row in present], [row.person for row in present]
    connection.execute(REMEMBER, {"users": users, "persons": persons})
