"""User merges: a user reconnected under a new id, to which all data of the old id moves."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Row, text

from app.catalogue import Resource, catalogue
from workers.actions import Origin
from workers.store import feed, replaced, retractions
from workers.store.feed import Change, ChangedSamples, Op
from workers.store.merge import upsert_sql
from workers.store.schema import SAMPLES, record_target

ORIGIN: Origin = "webhook"  # of the changes: aggregators announce a reconnection by a webhook
PAIR = text("""
SELECT user_id, erased_at, merged_into FROM headrace.users
WHERE user_id = ANY(CAST(:ids AS text[])) ORDER BY user_id FOR UPDATE""")
INSERT_USERS = text("""
INSERT INTO headrace.users (user_id) SELECT unnest(CAST(:ids AS text[])) AS user_id ORDER BY 1
ON CONFLICT DO NOTHING""")
# Also users merged into the old id, so that no chain of pointers arises.
SET_MERGED_INTO = text("""
UPDATE headrace.users SET merged_into = :new WHERE user_id = :old OR merged_into = :old""")
NAME = text("""
UPDATE headrace.users n SET first_seen = least(n.first_seen, o.first_seen),
       client_user_id = CASE WHEN n.named_at < o.named_at THEN o.client_user_id ELSE n.client_user_id END,
       named_at = greatest(n.named_at, o.named_at)
FROM headrace.users o WHERE n.user_id = :new AND o.user_id = :old""")
# Open backfills end: the aggregator no longer knows the old id. History is requested under the new one.
END = text("""
UPDATE headrace.backfills SET status = 'cancelled', finished_at = now(), error = 'the user reconnected under a new id'
WHERE user_id = :old AND status IN ('pending', 'running', 'paused')""")
# Not the ledger: it has no index by user, and records the id under which a delivery arrived.
HAND_OVER = tuple(
    text(f"UPDATE headrace.{table} SET user_id = :new WHERE user_id = :old")
    for table in ("backfills", "archive", "large_requests", "dead_letters", "lost_deliveries")
)
RETRACTIONS = text("SELECT resource, id FROM headrace.retractions WHERE user_id = :old ORDER BY resource, id")
COPY_RETRACTIONS = text("""
INSERT INTO headrace.retractions (user_id, resource, id, retracted_at)
SELECT :new, resource, id, retracted_at FROM headrace.retractions WHERE user_id = :old ON CONFLICT DO NOTHING""")
SERIES_OF = text("SELECT id FROM headrace.series WHERE user_id = :old")
RENAME_SERIES = text("""
UPDATE headrace.series o SET user_id = :new WHERE user_id = :old AND NOT EXISTS (
    SELECT 1 FROM headrace.series n WHERE n.user_id = :new AND (n.resource, n.provider, n.source_type, n.subtype)
                                          = (o.resource, o.provider, o.source_type, o.subtype)) RETURNING o.id""")
SERIES_OF_BOTH = text("""
SELECT o.id AS old, n.id AS new
FROM headrace.series o JOIN headrace.series n USING (resource, provider, source_type, subtype)
WHERE o.user_id = :old AND n.user_id = :new ORDER BY n.id""")
# The time of the last sample of a part. Moved samples leave the old series, so that the next part begins after it.
END_OF_PART = text("""
SELECT max(ts) FROM (SELECT ts FROM headrace.samples WHERE series_id = :old ORDER BY ts LIMIT :rows) AS part""")
PART = """(
    SELECT :new AS series_id, ts, ts_end, value, unit, timezone_offset, extra, version, origin
    FROM headrace.samples WHERE series_id = :old AND ts <= :last) AS incoming"""
MERGE_PART = text(upsert_sql(SAMPLES, PART))
DROP_PART = text("DELETE FROM headrace.samples WHERE series_id = :old AND ts <= :last")
# Also the old connection and its grants: they do not concern the new connection, which is stored by now.
DROP_REST = tuple(
    text(f"DELETE FROM headrace.{table} WHERE user_id = :old") for table in ("series", "gaps", "grants", "retractions")
)
DROP_CONNECTIONS = text(f"""
WITH gone AS (DELETE FROM headrace.connections WHERE user_id = :old RETURNING user_id, provider)
INSERT INTO headrace.outbox ({feed.COLUMNS})
SELECT 'remove', user_id, 'connections', provider, NULL, NULL, NULL, NULL, 1, 'webhook' FROM gone""")


def merge_user(connection: Connection, old: str, new: str) -> bool:
    """Moves all data of the old id to the new one, by the guarded upsert where both have a row.

    Both ids must belong to one aggregator, which `upsert_users` has checked in this transaction. Later deliveries for
    the old id are written under the new one. False if the users were merged before, or one of them was erased. One
    transaction moves all rows, so that readers see the user either before or after the merge; it may be long, but
    reconnections are rare. The change feed announces the removal of all rows of the old id, and the rows of the new one
    that have changed.
    """
    if old == new:
        return False
    connection.execute(INSERT_USERS, {"ids": [old, new]})
    found = {row.user_id: row for row in connection.execute(PAIR, {"ids": [old, new]})}
    last = found[new].merged_into or new  # the user may have reconnected again since
    if found[old].merged_into == last or last == old or any(row.erased_at for row in found.values()):
        return False
    ids = {"old": old, "new": last}
    connection.execute(SET_MERGED_INTO, ids)
    connection.execute(END, ids)
    _copy_retractions(connection, ids)
    for resource in catalogue().values():
        if not resource.is_series:
            _move(connection, resource, ids)
    of_old = feed.stored_samples(connection, list(connection.scalars(SERIES_OF, ids)))
    feed.announce_samples(connection, "remove", of_old, ORIGIN)
    put = feed.stored_samples(connection, list(connection.scalars(RENAME_SERIES, ids)))
    for pair in connection.execute(SERIES_OF_BOTH, ids).all():
        put += _move_samples(connection, pair.old, pair.new)
    feed.announce_samples(connection, "put", put, ORIGIN)
    replaced.merge_ranges(connection, ids)
    for statement in (*HAND_OVER, DROP_CONNECTIONS, *DROP_REST, NAME):
        connection.execute(statement, ids)
    return True


def _copy_retractions(connection: Connection, ids: dict[str, str]) -> None:
    """Hides records of the new id that were hidden under the old one. Those of the old id stay until its records go."""
    for row in connection.execute(RETRACTIONS, ids).all():
        if resource := catalogue().get(row.resource):
            retractions.announce_hidden(connection, resource, ids["new"], row.id)
    connection.execute(COPY_RETRACTIONS, ids)


def _move_samples(connection: Connection, old: int, new: int) -> Iterator[ChangedSamples]:
    """Merges the samples of one series into another, in parts that no statement timeout can reach."""
    while last := connection.scalar(END_OF_PART, {"old": old, "rows": replaced.MAX_ROWS}):
        part = {"old": old, "new": new, "last": last}
        times = [row.ts for row in connection.execute(MERGE_PART, part) if row.changed]
        if times:
            yield ChangedSamples(new, min(times), max(times), len(times))
        connection.execute(DROP_PART, part)


def _move(connection: Connection, resource: Resource, ids: dict[str, str]) -> None:
    target = record_target(resource)
    columns = ", ".join(f":new AS {name}" if name == "user_id" else name for name in target.columns)
    source = f"(SELECT {columns}, origin FROM {target.table} WHERE user_id = :old) AS incoming"
    both = f"""
SELECT id FROM {target.table} o JOIN {target.table} n USING (id)
WHERE o.user_id = :old AND n.user_id = :new AND NOT n.deleted"""
    shown = set(connection.scalars(text(both), ids))
    merged = connection.execute(text(upsert_sql(target, source)), ids)
    put = {row.id for row in merged if row.changed}
    query = f"DELETE FROM {target.table} WHERE user_id = :old RETURNING provider, source_type, id, deleted"
    gone = connection.execute(text(query), ids).all()
    changes = [_change("remove", ids["old"], resource, row) for row in gone if not row.deleted]
    changes += [
        _change("remove" if row.deleted else "put", ids["new"], resource, row)
        for row in gone
        if row.id in put and (not row.deleted or row.id in shown)
    ]
    feed.announce(connection, changes)


def _change(op: Op, user_id: str, resource: Resource, row: Row[Any]) -> Change:
    return Change(op, user_id, resource.name, row.provider, row.source_type, row.id, None, None, 1, ORIGIN)
