"""Retractions: records that an operator has hidden. The views of schema `health` leave them out.

A retraction is a row that names a record, not a column of the record, so that it still applies after the record was
deleted by retention and delivered, replayed or fetched again.
"""

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import Connection, text

from app.catalogue import Resource, catalogue
from workers.store import feed
from workers.store.feed import Op
from workers.store.schema import record_table

RETRACT = text("""
INSERT INTO headrace.retractions (user_id, resource, id) VALUES (:user, :resource, :id)
ON CONFLICT DO NOTHING RETURNING retracted_at""")
RESTORE = text("""
DELETE FROM headrace.retractions WHERE user_id = :user AND resource = :resource AND id = :id RETURNING retracted_at""")
FIND = text("""
SELECT resource, retracted_at FROM headrace.retractions
WHERE user_id = :user AND resource = ANY(:resources) AND id = :id""")
MAX_IDS = 1000


def retract(connection: Connection, resource: Resource, user_id: str, identifier: str) -> bool:
    """Hides a record. False if it was hidden before."""
    announce_hidden(connection, resource, user_id, identifier)
    return connection.scalar(RETRACT, _key(resource, user_id, identifier)) is not None


def restore(connection: Connection, resource: Resource, user_id: str, identifier: str) -> bool:
    """Shows a record again. False if it was not hidden."""
    was_hidden = connection.scalar(RESTORE, _key(resource, user_id, identifier)) is not None
    if was_hidden:
        _announce(connection, "put", resource, user_id, identifier)
    return was_hidden


def announce_hidden(connection: Connection, resource: Resource, user_id: str, identifier: str) -> None:
    """Announces that a record, which is still shown, is hidden by this transaction.

    The lock orders this change after those of other transactions that have changed the record, and before later ones.
    """
    for one in _hidden_with(resource):
        lock = f"SELECT FROM {record_table(one)} WHERE user_id = :user AND id = :id FOR NO KEY UPDATE"
        connection.execute(text(lock), {"user": user_id, "id": identifier})
    _announce(connection, "remove", resource, user_id, identifier)


def _announce(connection: Connection, op: Op, resource: Resource, user_id: str, identifier: str) -> None:
    """Announces the record, and its stream, which is hidden with it, in the change feed."""
    for one in _hidden_with(resource):
        query = text(f"""
WITH found AS MATERIALIZED (
    SELECT user_id, provider, source_type, id, deleted FROM {record_table(one)} WHERE user_id = :user AND id = :id)
{feed.announced_records(op, "reconcile", one, "found")}""")
        connection.execute(query, {"user": user_id, "id": identifier})


def _hidden_with(resource: Resource) -> list[Resource]:
    return [one for one in catalogue().values() if one is resource or one.of == resource.name]


def find(connection: Connection, resource: Resource, user_id: str, identifier: str) -> Mapping[str, datetime]:
    """When the record was hidden, by resource: its own or, for a stream, that of its record, which has the same id."""
    names = [name for name in (resource.name, resource.of) if name]
    found = connection.execute(FIND, {"user": user_id, "resources": names, "id": identifier})
    return {row.resource: row.retracted_at for row in found}


def is_stored(connection: Connection, resource: Resource, user_id: str, identifier: str) -> bool:
    query = text(f"SELECT 1 FROM {record_table(resource)} WHERE user_id = :user AND id = :id")
    return connection.scalar(query, {"user": user_id, "id": identifier}) is not None


def ids(connection: Connection, resource: Resource, user_id: str) -> list[str]:
    """The ids of a user's records, the last written first; at most MAX_IDS."""
    query = text(f"""
SELECT id FROM {record_table(resource)} WHERE user_id = :user AND NOT deleted
ORDER BY stored_at DESC, id LIMIT :limit""")
    return list(connection.scalars(query, {"user": user_id, "limit": MAX_IDS}))


def _key(resource: Resource, user_id: str, identifier: str) -> dict[str, str]:
    return {"user": user_id, "resource": resource.name, "id": identifier}
