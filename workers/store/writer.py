"""Writes actions through the guarded upsert, table by table in a fixed order, in statements of bounded size."""

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, Row, text

from app.catalogue import Resource, catalogue
from workers import actions
from workers.actions import Action, Origin, Record, Samples
from workers.aggregators.common import CLOCK_SKEW
from workers.store import feed, replaced
from workers.store.feed import Change, Op
from workers.store.merge import Target, changed_rows_by_delivery_sql, comparison_sql, upsert_sql
from workers.store.replaced import ReplacedRange
from workers.store.samples import Numbers, Written, write_samples
from workers.store.schema import CONNECTIONS, GRANTS, record_source, record_target

CONNECTION_SOURCE = """jsonb_to_recordset(CAST(:rows AS jsonb)) AS incoming(n int, user_id text, provider text,
    status text, error text, version timestamptz, origin headrace.origin)"""
GRANT_SOURCE = """jsonb_to_recordset(CAST(:rows AS jsonb)) AS incoming(n int, user_id text, provider text,
    resource text, granted boolean, version timestamptz, origin headrace.origin)"""
# Of one statement. jsonb holds an array of at most 256 MB, and a statement has to end before its timeout.
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024


class _Row(msgspec.Struct):
    """A row to merge; `n` is the index of its delivery in the batch."""

    n: int
    user_id: str
    provider: str
    version: datetime
    origin: str


class RecordRow(_Row, omit_defaults=True):
    id: str
    source_type: str
    payload: msgspec.Raw
    columns: msgspec.Raw | None = None
    deleted: bool = False
    event_at: datetime | None = None  # None: the version


class ConnectionRow(_Row):
    status: str
    error: str | None


class GrantRow(_Row):
    resource: str
    granted: bool


class BatchItem(NamedTuple):
    """An action and the index of its delivery in the batch."""

    n: int
    action: Action


def write(
    connection: Connection, batch: Sequence[BatchItem], origin: Origin, numbers: Numbers, seen: Collection[int] = ()
) -> Written:
    """Merges the records, samples, connections and grants of a batch. Tables are written in the order of the catalogue.

    `numbers` has the number of every series of the batch; look it up before the transaction, because new numbers are
    committed separately. Deliveries in `seen` were applied before: they are merged only if a comparison finds a change.
    """
    written = Written()
    records: dict[str, list[RecordRow]] = {}
    whole: dict[str, list[Record]] = {}  # records that replace the samples of their older versions
    for one in batch:
        if isinstance(one.action, Record):
            records.setdefault(one.action.resource, []).append(_record_row(one.n, one.action, origin))
            if one.action.sample_ranges or one.action.is_deleted:
                whole.setdefault(one.action.resource, []).append(one.action)
    ranges: list[ReplacedRange] = []
    for name, resource in catalogue().items():
        if name in records:
            _write_records(connection, resource, records[name], seen, written)
        if name in whole:
            ranges += replaced.add_ranges(connection, resource, whole[name], numbers)
    _count_kind(written, "record")
    if samples := [(one.n, one.action) for one in batch if isinstance(one.action, Samples)]:
        current = replaced.current(connection, samples, numbers, written)
        write_samples(connection, current, numbers, origin, seen=seen, written=written)
        _count_kind(written, "sample")
    connections = [
        ConnectionRow(one.n, a.user_id, a.provider, a.version, origin, a.status, a.error)
        for one in batch
        if isinstance(a := one.action, actions.Connection)
    ]
    if connections:
        _write_connections(connection, connections, written)
        _count_kind(written, "connection")
    grants = [
        GrantRow(one.n, a.user_id, a.provider, a.version, origin, resource, granted)
        for one in batch
        if isinstance(a := one.action, actions.Grants)
        for resource, granted in a.granted
    ]
    if grants:
        merged = connection.execute(GRANT.merge, {"rows": _json(grants)}).all()
        GRANT.count(connection, grants, merged, written)
        _count_kind(written, "grant")
    # Last, because samples that the newer version has too are only updated.
    removed, restored = replaced.remove(connection, ranges, origin)
    written.samples += restored.samples
    written.series |= restored.series
    written.rows["sample"] += removed + sum(restored.changed.values())
    feed.announce(connection, [*written.changes.values(), *written.sample_changes(origin)])
    return written


def _count_kind(written: Written, kind: str) -> None:
    """Counts the rows changed since the last call as rows of this kind."""
    written.rows[kind] = sum(written.changed.values()) - written.rows.total()


def _record_row(n: int, record: Record, origin: Origin) -> RecordRow:
    return RecordRow(
        n=n,
        user_id=record.user_id,
        id=record.id,
        provider=record.provider,
        source_type=record.source_type,
        payload=msgspec.Raw(record.payload),
        version=record.version,
        origin=origin,
        columns=msgspec.Raw(record.columns) if record.columns is not None else None,
        deleted=record.is_deleted,
        event_at=record.event_at if record.event_at != record.version else None,
    )


def _json(rows: Iterable[msgspec.Struct]) -> str:
    return msgspec.json.encode(list(rows)).decode()


class Statements:
    """The statements of a table whose rows are passed as one JSON array, `:rows`."""

    def __init__(self, target: Target, source: str, bare: str) -> None:
        """`bare` is a cheaper source for comparisons: at least the key, the version and the ranked columns."""
        self.merge = text(upsert_sql(target, source))
        self._identity = operator.attrgetter(*target.key, "version")
        self._compare = text(comparison_sql(target, bare))
        self._changed = text(changed_rows_by_delivery_sql(target, bare))

    def newer(self, connection: Connection, rows: Sequence[Any], written: Written) -> Sequence[Any]:
        """The rows of deliveries that would change a stored row. Records stale deliveries."""
        return written.newer(connection.execute(self._compare, {"rows": _json(rows)}), rows)

    def count(self, connection: Connection, rows: Sequence[Any], merged: Sequence[Row[Any]], written: Written) -> None:
        """Attributes each merged row to its delivery. Records stale deliveries."""
        if len({self._identity(row) for row in rows}) == len(rows):
            for row in self.changed(rows, merged):
                written.changed[row.n] += 1
        else:
            for n, changed in connection.execute(self._changed, {"rows": _json(rows)}).all():
                written.changed[n] += changed
        if any(row.n not in written.changed for row in rows):
            self.newer(connection, rows, written)

    def changed(self, rows: Sequence[Any], merged: Sequence[Row[Any]]) -> list[Any]:
        """The given row of each merged row whose content has changed."""
        given = {self._identity(row): row for row in rows}
        return [given[self._identity(row)] for row in merged if row.changed]


CONNECTION = Statements(CONNECTIONS, CONNECTION_SOURCE, CONNECTION_SOURCE)
GRANT = Statements(GRANTS, GRANT_SOURCE, GRANT_SOURCE)


@cache
def _of_records(resource: Resource) -> Statements:
    source, bare = record_source(resource, ":rows"), record_source(resource, ":rows", scalars=False)
    return Statements(record_target(resource), source, bare)


def _write_records(
    connection: Connection, resource: Resource, given: list[RecordRow], seen: Collection[int], written: Written
) -> None:
    statements = _of_records(resource)
    # A clamped version is compared by the time of its event: rows with one are merged one after the other.
    clamped = [row for row in given if row.event_at and row.version == row.event_at + CLOCK_SKEW]
    for part in [
        *_by_size([row for row in given if row not in clamped] if clamped else given),
        *([row] for row in clamped),
    ]:
        rows = [row for row in part if row.n not in seen]
        if again := [row for row in part if row.n in seen]:
            rows += statements.newer(connection, again, written)
        if rows:
            merged = connection.execute(statements.merge, {"rows": _json(rows)}).all()
            statements.count(connection, rows, merged, written)
            for row in statements.changed(rows, merged):
                written.changes[resource.name, row.user_id, row.id] = _change_of(resource, row)


def _change_of(resource: Resource, row: RecordRow) -> Change:
    op: Op = "remove" if row.deleted else "put"
    return Change(op, row.user_id, resource.name, row.provider, row.source_type, row.id, None, None, 1, row.origin)


def _by_size(rows: list[RecordRow]) -> Iterator[list[RecordRow]]:
    """The rows in parts of MAX_PAYLOAD_BYTES, in the order of the table's key, which avoids deadlocks."""
    if sum(len(row.payload) for row in rows) <= MAX_PAYLOAD_BYTES:
        yield rows
        return
    part: list[RecordRow] = []
    size = 0
    for row in sorted(rows, key=operator.attrgetter("user_id", "id")):
        if part and size + len(row.payload) > MAX_PAYLOAD_BYTES:
            yield part
            part, size = [], 0
        part.append(row)
        size += len(row.payload)
    yield part


def _write_connections(connection: Connection, rows: list[ConnectionRow], written: Written) -> None:
    """An inferred connection is inserted only if none is stored, and never affects the delivery's outcome."""
    merged = connection.execute(CONNECTION.merge, {"rows": _json(rows)}).all()
    explicit = [row for row in rows if row.version > actions.INFERRED]
    CONNECTION.count(connection, explicit, [row for row in merged if row.version > actions.INFERRED], written)
    for row in CONNECTION.changed(rows, merged):
        key = ("connections", row.user_id, row.provider)
        written.changes[key] = Change("put", row.user_id, key[0], row.provider, None, None, None, None, 1, row.origin)
