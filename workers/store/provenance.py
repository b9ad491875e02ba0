"""Provenance of stored values: their rows, archived deliveries, dead letters, backfills and user."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, text

from app.catalogue import Resource
from app.delivery import Delivery
from workers.store.engine import execute
from workers.store.ledger import DELIVERY_COLUMNS, to_delivery
from workers.store.schema import SAMPLES as SAMPLE_TABLE
from workers.store.schema import record_table
from workers.store.sql import quoted

SAMPLES = text("""
SELECT n.provider, n.source_type, n.subtype, s.ts_end, s.value, s.unit, s.timezone_offset, s.extra,
       s.version, CAST(s.origin AS text) AS origin, s.stored_at
FROM headrace.series n JOIN headrace.samples s ON s.series_id = n.id
WHERE n.user_id = :user AND n.resource = :resource AND s.ts = :at ORDER BY 1, 2, 3""")
ENTRY = "entry.outcome, entry.applied_at, entry.attempts, entry.error"
ARCHIVED = text(f"""
SELECT archive.aggregator, archive.message_id, archive.event_type, archive.received_at, {ENTRY}
FROM headrace.archive LEFT JOIN headrace.deliveries entry USING (aggregator, message_id)
WHERE archive.user_id = ANY(:users) ORDER BY archive.received_at, archive.aggregator, archive.message_id""")
DEAD = text(f"""
SELECT dead_letter.aggregator, dead_letter.message_id, entry.event_type, dead_letter.received_at, {ENTRY}
FROM headrace.dead_letters dead_letter JOIN headrace.deliveries entry USING (aggregator, message_id)
WHERE dead_letter.item = '' AND (dead_letter.user_id = ANY(:users) OR entry.user_id = ANY(:users))
ORDER BY dead_letter.received_at""")
# One query per day, which reads only that day's partition.
OPEN_ARCHIVED = text(f"""
SELECT {DELIVERY_COLUMNS} FROM headrace.archive
WHERE user_id = ANY(:users) AND received_at >= :since AND received_at < :until AND message_id = ANY(:ids)""")
OPEN_DEAD = text(f"SELECT {DELIVERY_COLUMNS} FROM headrace.dead_letters WHERE item = '' AND message_id = ANY(:ids)")
# A row and the ledger entry of the delivery that wrote it have the same timestamp, their transaction's. The window on
# received_at, by which the ledger is indexed, avoids a scan of the whole ledger.
SAME_MOMENT = text(f"""
SELECT aggregator, message_id, event_type, received_at, {ENTRY} FROM headrace.deliveries entry
WHERE received_at BETWEEN :stored_at - interval '2 days' AND :stored_at + interval '1 hour'
  AND applied_at = :stored_at AND user_id = ANY(:users) ORDER BY received_at, message_id""")
OLDEST_ARCHIVED = text("SELECT min(received_at) FROM headrace.archive")
# Users are kept longer than the ledger, whose old entries HEADRACE_LEDGER_DAYS removes.
RECEIVED_BEFORE = text("""
SELECT EXISTS (SELECT 1 FROM headrace.deliveries WHERE received_at < :edge)
    OR EXISTS (SELECT 1 FROM headrace.users WHERE first_seen < :edge)""")
BACKFILLS = text("""
SELECT b.id, b.provider, b.requested_by, b.status, b.item, b.window_start, b.window_end, b.started_at, b.finished_at
FROM headrace.backfills b WHERE b.user_id = :user AND b.resource = :resource AND b.item IN ('', :item)
  AND (CAST(:day AS timestamptz) IS NULL OR b.item <> '' OR EXISTS (
       SELECT 1 FROM headrace.chunks c WHERE c.backfill_id = b.id
       AND c.window_start - interval '1 day' <= :day AND c.window_end + interval '1 day' >= :day))
ORDER BY b.id""")
DAY = timedelta(days=1)


@dataclass(frozen=True)
class StoredRow:
    """A stored row. `content` decides ties between equal versions; `columns` are the columns that are not NULL."""

    provider: str
    source_type: str
    subtype: str
    version: datetime
    origin: str
    stored_at: datetime
    is_deleted: bool
    content: dict[str, Any]
    columns: dict[str, Any]
    day: datetime | None  # the day of a record, or the time of a sample


class LedgerEntry(NamedTuple):
    """A delivery of the user, with its ledger entry if there is one."""

    aggregator: str
    message_id: str
    event_type: str | None
    received_at: datetime
    outcome: str | None
    applied_at: datetime | None
    attempts: int | None
    error: str | None


@dataclass(frozen=True)
class Fetch:
    """A backfill whose requests covered the value."""

    id: int
    provider: str
    requested_by: str
    status: str
    item: str
    window_start: datetime | None
    window_end: datetime | None
    started_at: datetime | None
    finished_at: datetime | None


def of_record(connection: Connection, resource: Resource, user_id: str, identifier: str) -> list[StoredRow]:
    """The row of a record, or no row."""
    day = f"CAST(r.{quoted(resource.day_field)} AS timestamptz)" if resource.day_field else "NULL"
    query = text(f"""
SELECT to_jsonb(r) AS columns, version, CAST(origin AS text) AS origin, stored_at, {day} AS day
FROM {record_table(resource)} r WHERE user_id = :user AND id = :id""")
    found = []
    for row in connection.execute(query, {"user": user_id, "id": identifier}):
        columns = {name: value for name, value in row.columns.items() if value is not None}
        found.append(
            StoredRow(
                provider=columns["provider"],
                source_type=columns["source_type"],
                subtype="",
                version=row.version,
                origin=row.origin,
                stored_at=row.stored_at,
                is_deleted=columns["deleted"],
                content=content_of_record(columns["payload"], is_deleted=columns["deleted"]),
                columns={field.name: columns[field.name] for field in resource.fields if field.name in columns},
                day=row.day,
            )
        )
    return found


def content_of_record(payload: dict[str, Any], *, is_deleted: bool) -> dict[str, Any]:
    """The content of a record that decides ties."""
    return payload | {"(deleted)": is_deleted}


def ids_on(connection: Connection, resource: Resource, user_id: str, at: datetime) -> list[str]:
    """The ids of the records of a day. Empty for a resource without days."""
    if resource.day_field is None:
        return []
    query = text(f"""
SELECT id FROM {record_table(resource)}
WHERE user_id = :user AND CAST({quoted(resource.day_field)} AS date) = :day ORDER BY id""")
    return list(connection.scalars(query, {"user": user_id, "day": at.date()}))


def of_sample(connection: Connection, resource: Resource, user_id: str, at: datetime) -> list[StoredRow]:
    """The samples of a moment, one per series."""
    found = []
    for row in connection.execute(SAMPLES, {"user": user_id, "resource": resource.name, "at": at}).mappings():
        content = {name: row[name] for name in SAMPLE_TABLE.content}
        columns = {name: value for name, value in content.items() if value is not None}
        about = {name: row[name] for name in row if name not in content}
        found.append(StoredRow(**about, is_deleted=False, content=content, columns=columns, day=at))
    return found


def entries(connection: Connection, users: Sequence[str]) -> list[LedgerEntry]:
    """The archived deliveries of these user ids, and their dead letters that are whole deliveries, without contents.

    A refused item is left out: its delivery is archived.
    """
    values = {"users": list(users)}
    return [LedgerEntry(**row) for query in (ARCHIVED, DEAD) for row in connection.execute(query, values).mappings()]


def archived_since(connection: Connection, edge: datetime) -> datetime | None:
    """When the oldest archived delivery was received; None unless deliveries are as old as the age limit `edge`.

    If no delivery is that old, none was removed yet, and the archive begins with the first one ever received.
    """
    if not connection.scalar(RECEIVED_BEFORE, {"edge": edge}):
        return None
    oldest: datetime | None = connection.scalar(OLDEST_ARCHIVED)
    return oldest or edge


def opened(
    engine: Engine, users: Sequence[str], entries: Sequence[LedgerEntry]
) -> Iterator[tuple[LedgerEntry, Delivery]]:
    """These entries with their sealed deliveries. Reads one partition per transaction."""
    by_day: dict[datetime, dict[tuple[str, str], LedgerEntry]] = {}
    for entry in entries:
        day = entry.received_at.replace(hour=0, minute=0, second=0, microsecond=0)
        by_day.setdefault(day, {})[entry.aggregator, entry.message_id] = entry
    for day, wanted in by_day.items():
        ids = [message_id for _, message_id in wanted]
        values = {"ids": ids, "users": list(users), "since": day, "until": day + DAY}
        for query in (OPEN_ARCHIVED, OPEN_DEAD):
            for delivery in map(to_delivery, execute(engine, query, values)):
                if known := wanted.get((delivery.aggregator, delivery.message_id)):
                    yield known, delivery


def same_moment(connection: Connection, stored_at: datetime, users: Sequence[str]) -> list[LedgerEntry]:
    """The deliveries of these user ids that were applied in the transaction that wrote a row."""
    values = {"stored_at": stored_at, "users": list(users)}
    return [LedgerEntry(**row) for row in connection.execute(SAME_MOMENT, values).mappings()]


def fetches(connection: Connection, resource: str, user_id: str, item: str, day: datetime | None) -> list[Fetch]:
    """The backfills that requested a day of a resource, or any part of it if the day is unknown."""
    values = {"user": user_id, "resource": resource, "item": item, "day": day}
    return [Fetch(**row) for row in connection.execute(BACKFILLS, values).mappings()]
