"""Writes actions through the guarded upsert: one statement per table and batch, in a fixed order of tables."""

import operator
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import msgspec
import psycopg
from sqlalchemy import Connection, Row, text

from app.catalogue import Resource, catalogue
from workers import actions
from workers.actions import Action, Origin, Record, Samples, SeriesKey
from workers.aggregators.common import CLOCK_SKEW
from workers.store import replaced
from workers.store.merge import Target, changed_rows_by_delivery_sql, comparison_sql, upsert_sql
from workers.store.replaced import ReplacedRange
from workers.store.schema import CONNECTIONS, GRANTS, SAMPLES, record_source, record_target

CONNECTION_SOURCE = """jsonb_to_recordset(CAST(:rows AS jsonb)) AS incoming(n int, user_id text, provider text,
    status text, error text, version timestamptz, origin headrace.origin)"""
GRANT_SOURCE = """jsonb_to_recordset(CAST(:rows AS jsonb)) AS incoming(n int, user_id text, provider text,
    resource text, granted boolean, version timestamptz, origin headrace.origin)"""
STAGED = "staged_samples AS incoming"
COPIED = "series_id, ts, ts_end, value, unit, timezone_offset, extra, version, origin"
STAGE = f"COPY staged_samples (n, {COPIED}) FROM STDIN (FORMAT BINARY)"
DIRECT_COPY = f"COPY headrace.samples (stored_at, {COPIED}) FROM STDIN (FORMAT BINARY)"
# `extra` is copied in jsonb's wire format, a version byte and the text. With the type declared as jsonb, psycopg would
# require the parsed object and encode it again.
JSONB_VERSION = b"\x01"
BY_TIME = operator.itemgetter(0)
COPIED_TYPES = ["int4", "timestamptz", "timestamptz", "float8", "text", "int4", "bytea", "timestamptz", "text"]
# Where no samples are stored yet, new ones are copied directly into their table: 3 times as fast as staging and merging
# them. For fewer rows than this, the query for stored samples costs more than it saves.
DIRECT_COPY_MIN_ROWS = 200
OCCUPIED = text("""
SELECT now(), array(
    SELECT place FROM unnest(CAST(:series AS int[]), CAST(:firsts AS timestamptz[]), CAST(:lasts AS timestamptz[]))
        WITH ORDINALITY AS given(series_id, first, last, place)
    WHERE EXISTS (SELECT 1 FROM headrace.samples stored
                  WHERE stored.series_id = given.series_id AND stored.ts BETWEEN given.first AND given.last))""")
# One row per series and version instead of one per sample: the version identifies the delivery.
MERGE_SAMPLES = text(f"""
WITH merged AS ({upsert_sql(SAMPLES, STAGED)})
SELECT series_id, version, count(*) AS rows FROM merged WHERE changed GROUP BY series_id, version""")
COMPARE_SAMPLES = text(comparison_sql(SAMPLES, STAGED))
CHANGED_SAMPLES = text(changed_rows_by_delivery_sql(SAMPLES, STAGED))


class RecordRow(msgspec.Struct, omit_defaults=True):
    """A record to merge; `n` is the index of its delivery in the batch."""

    n: int
    user_id: str
    id: str
    provider: str
    source_type: str
    payload: msgspec.Raw
    version: datetime
    origin: str
    columns: msgspec.Raw | None = None
    deleted: bool = False
    event_at: datetime | None = None  # None: the version


class ConnectionRow(msgspec.Struct):
    """A connection to merge; `n` as in RecordRow."""

    n: int
    user_id: str
    provider: str
    status: str
    error: str | None
    version: datetime
    origin: str


class GrantRow(msgspec.Struct):
    """A grant to merge; `n` as in RecordRow."""

    n: int
    user_id: str
    provider: str
    resource: str
    granted: bool
    version: datetime
    origin: str


@dataclass
class Written:
    """The result of a batch: rows changed by each delivery, and stale deliveries (older than a stored row)."""

    changed: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    stale: set[int] = field(default_factory=set)
    rows: Counter[str] = field(default_factory=Counter)  # changed rows, by kind


class BatchItem(NamedTuple):
    """An action and the index of its delivery in the batch."""

    n: int
    action: Action


def write(
    connection: Connection,
    batch: Sequence[BatchItem],
    origin: Origin,
    numbers: Mapping[SeriesKey, int],
    seen: Collection[int] = (),
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
    replaced_ranges: list[ReplacedRange] = []
    for name, resource in catalogue().items():
        if name in records:
            _write_records(connection, resource, records[name], seen, written)
        if name in whole:
            replaced_ranges += replaced.add_ranges(connection, resource, whole[name], numbers)
    _count_kind(written, "record")
    samples = [(one.n, one.action) for one in batch if isinstance(one.action, Samples)]
    if samples:
        left = replaced.current(connection, samples, numbers)
        pairs = zip(samples, left, strict=True)
        written.stale.update(n for (n, one), (_, kept) in pairs if len(kept.rows) < len(one.rows))
        _write_samples(connection, _runs(left, numbers), origin, seen, written)
        _count_kind(written, "sample")
    connections = [
        ConnectionRow(one.n, a.user_id, a.provider, a.status, a.error, a.version, origin)
        for one in batch
        if isinstance(a := one.action, actions.Connection)
    ]
    if connections:
        _write_connections(connection, connections, written)
        _count_kind(written, "connection")
    if grants := [one for one in batch if isinstance(one.action, actions.Grants)]:
        _write_grants(connection, grants, origin, written)
        _count_kind(written, "grant")
    # Last, because samples that the newer version has too are only updated.
    written.rows["sample"] += sum(replaced.remove(connection, one) for one in replaced_ranges)
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
        return _newer(connection.execute(self._compare, {"rows": _json(rows)}), rows, written)

    def count(self, connection: Connection, rows: Sequence[Any], merged: Sequence[Row[Any]], written: Written) -> None:
        """Attributes each merged row to its delivery. Records stale deliveries."""
        owners = {self._identity(row): row.n for row in rows}
        if len(owners) == len(rows):
            for row in merged:
                if row.changed:
                    written.changed[owners[self._identity(row)]] += 1
        else:
            for n, changed in connection.execute(self._changed, {"rows": _json(rows)}):
                written.changed[n] += changed
        if any(row.n not in written.changed for row in rows):
            self.newer(connection, rows, written)


def _newer(found: Iterable[Row[Any]], given: Sequence[Any], written: Written) -> Sequence[Any]:
    """The rows of `given` whose deliveries are newer than the stored rows. Records stale deliveries."""
    compared = list(found)
    written.stale.update(row.n for row in compared if row.is_stale)
    newer = {row.n for row in compared if row.is_newer}
    return [row for row in given if row.n in newer]


CONNECTION = Statements(CONNECTIONS, CONNECTION_SOURCE, CONNECTION_SOURCE)
GRANT = Statements(GRANTS, GRANT_SOURCE, GRANT_SOURCE)


@cache
def _of_records(resource: Resource) -> Statements:
    source, bare = record_source(resource, ":rows"), record_source(resource, ":rows", scalars=False)
    return Statements(record_target(resource), source, bare)


def _write_records(
    connection: Connection, resource: Resource, given: list[RecordRow], seen: Collection[int], written: Written
) -> None:
    statements, rows = _of_records(resource), [row for row in given if row.n not in seen]
    if again := [row for row in given if row.n in seen]:
        rows += statements.newer(connection, again, written)
    # A clamped version is compared by the time of its event: rows with one are merged one after the other.
    clamped = [row for row in rows if row.event_at and row.version == row.event_at + CLOCK_SKEW]
    parts = [[row for row in rows if row not in clamped], *([row] for row in clamped)] if clamped else [rows]
    for part in filter(None, parts):
        merged = connection.execute(statements.merge, {"rows": _json(part)}).all()
        statements.count(connection, part, merged, written)


def _write_connections(connection: Connection, rows: list[ConnectionRow], written: Written) -> None:
    """An inferred connection is inserted only if none is stored, and never affects the delivery's outcome."""
    merged = connection.execute(CONNECTION.merge, {"rows": _json(rows)}).all()
    explicit = [row for row in rows if row.version > actions.INFERRED]
    CONNECTION.count(connection, explicit, [row for row in merged if row.version > actions.INFERRED], written)


def _write_grants(connection: Connection, batch: Sequence[BatchItem], origin: Origin, written: Written) -> None:
    rows = [
        GrantRow(one.n, a.user_id, a.provider, resource, granted, a.version, origin)
        for one in batch
        if isinstance(a := one.action, actions.Grants)
        for resource, granted in a.granted
    ]
    if rows:
        GRANT.count(connection, rows, connection.execute(GRANT.merge, {"rows": _json(rows)}).all(), written)


@dataclass(frozen=True, eq=False)
class SampleRun:
    """Samples of one series in order of time; `n` is the index of their delivery in the batch."""

    n: int
    series_id: int
    rows: list[actions.Sample]
    version: datetime

    @property
    def place(self) -> tuple[int, datetime]:
        """The key of the first sample in the table."""
        return self.series_id, self.rows[0].ts


def _runs(samples: Sequence[tuple[int, Samples]], numbers: Mapping[SeriesKey, int]) -> list[SampleRun]:
    """Runs in the order of the table's key, which avoids deadlocks between transactions."""
    found = (SampleRun(n, numbers[a.key], sorted(a.rows, key=BY_TIME), a.version) for n, a in samples if a.rows)
    return sorted(found, key=operator.attrgetter("place"))


def _write_samples(
    connection: Connection, runs: Sequence[SampleRun], origin: Origin, seen: Collection[int], written: Written
) -> None:
    copied = set(_copy_directly(connection, runs, origin))
    for run in copied:
        written.changed[run.n] += len(run.rows)
    if rest := [run for run in runs if run not in copied]:
        _merge_samples(connection, rest, origin, seen, written)


def _copy_directly(connection: Connection, runs: Sequence[SampleRun], origin: Origin) -> list[SampleRun]:
    """Copies the runs that overlap neither stored samples nor each other into the table. Returns these runs.

    If a concurrent transaction writes one of the same keys, no run is copied and all are left for the merge.
    """
    if sum(len(run.rows) for run in runs) < DIRECT_COPY_MIN_ROWS:
        return []
    apart = _non_overlapping(runs)
    firsts, lasts = [run.rows[0].ts for run in apart], [run.rows[-1].ts for run in apart]
    places = {"series": [run.series_id for run in apart], "firsts": firsts, "lasts": lasts}
    now, occupied = connection.execute(OCCUPIED, places).one()
    free = [run for place, run in enumerate(apart, start=1) if place not in occupied]
    if not free:
        return []
    try:
        with connection.begin_nested():
            _copy(connection, DIRECT_COPY, "timestamptz", ((now, run) for run in free), origin)
    except psycopg.errors.UniqueViolation:
        return []
    return free


def _non_overlapping(runs: Sequence[SampleRun]) -> list[SampleRun]:
    """The runs that overlap no other run of their series. `runs` are in the order of the key."""
    overlapping, last = set[SampleRun](), None  # `last`: the run of the series that ends last
    for run in runs:
        if last is None or last.series_id != run.series_id:
            last = run
            continue
        if last.rows[-1].ts >= run.rows[0].ts:
            overlapping |= {last, run}
        if run.rows[-1].ts > last.rows[-1].ts:
            last = run
    return [run for run in runs if run not in overlapping]


def _copy(
    connection: Connection, statement: str, kind: str, parts: Iterable[tuple[Any, SampleRun]], origin: Origin
) -> None:
    """Copies the rows of runs. The first column has the type `kind`, and one value per run."""
    driver = connection.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise TypeError("the engine does not use psycopg")
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types([kind, *COPIED_TYPES])
        for first, run in parts:
            series_id, version = run.series_id, run.version
            for ts, ts_end, value, unit, offset, extra in run.rows:
                object_ = JSONB_VERSION + extra if extra else None
                copy.write_row((first, series_id, ts, ts_end, value, unit, offset, object_, version, origin))


def _merge_samples(
    connection: Connection, runs: Sequence[SampleRun], origin: Origin, seen: Collection[int], written: Written
) -> None:
    _copy(connection, STAGE, "int4", ((run.n, run) for run in runs), origin)
    if all(run.n in seen for run in runs) and not _newer(connection.execute(COMPARE_SAMPLES), runs, written):
        return
    owners = {(run.series_id, run.version): run.n for run in runs}
    merged = connection.execute(MERGE_SAMPLES).all()
    if len(owners) == len(runs):
        changed = [(owners[series_id, version], rows) for series_id, version, rows in merged]
    else:
        changed = [(n, rows) for n, rows in connection.execute(CHANGED_SAMPLES)]
    for n, rows in changed:
        written.changed[n] += rows
    if any(run.n not in written.changed for run in runs):
        _newer(connection.execute(COMPARE_SAMPLES), runs, written)
