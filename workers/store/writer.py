"""Writes actions: one statement per table and batch, all through the guarded upsert, in one order of tables."""

import operator
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

import msgspec
import psycopg
from sqlalchemy import Connection, Row, text

from app.catalogue import Resource, catalogue
from workers import actions
from workers.actions import Action, Origin, Record, Samples
from workers.store.merge import Target, changed_rows_by_delivery_sql, comparison_sql, upsert_sql
from workers.store.schema import CONNECTIONS, SAMPLES, record_source, record_target
from workers.store.series import SeriesKey

CONNECTION_SOURCE = """jsonb_to_recordset(CAST(:rows AS jsonb)) AS incoming(n int, user_id text, provider text,
    status text, error text, version timestamptz, origin headrace.origin)"""
STAGED = "staged_samples AS incoming"
COPIED = "series_id, ts, ts_end, value, unit, timezone_offset, extra, version, origin"
STAGE = f"COPY staged_samples (n, {COPIED}) FROM STDIN (FORMAT BINARY)"
DIRECT_COPY = f"COPY headrace.samples (stored_at, {COPIED}) FROM STDIN (FORMAT BINARY)"
# `extra` is copied as what jsonb looks like on the wire: a version byte and the text. Declared as jsonb, psycopg would
# want the object and encode it once more.
JSONB_VERSION = b"\x01"
MOMENT = operator.itemgetter(0)
COPIED_TYPES = ["int4", "timestamptz", "timestamptz", "float8", "text", "int4", "bytea", "timestamptz", "text"]
# Where there is nothing yet, samples are copied straight into their table: 3 times as fast as through the staging table
# and the merge. For fewer than this the question whether there is something costs more than it saves.
DIRECT_COPY_MIN_ROWS = 200
OCCUPIED = text("""
SELECT now(), array(
    SELECT place FROM unnest(CAST(:series AS int[]), CAST(:firsts AS timestamptz[]), CAST(:lasts AS timestamptz[]))
        WITH ORDINALITY AS given(series_id, first, last, place)
    WHERE EXISTS (SELECT 1 FROM headrace.samples stored
                  WHERE stored.series_id = given.series_id AND stored.ts BETWEEN given.first AND given.last))""")
# A row for each series and version, not for each sample: the version tells the deliveries of one series apart.
MERGE_SAMPLES = text(f"""
WITH merged AS ({upsert_sql(SAMPLES, STAGED)})
SELECT series_id, version, count(*) AS rows FROM merged WHERE changed GROUP BY series_id, version""")
COMPARE_SAMPLES = text(comparison_sql(SAMPLES, STAGED))
CHANGED_SAMPLES = text(changed_rows_by_delivery_sql(SAMPLES, STAGED))


class RecordRow(msgspec.Struct, omit_defaults=True):
    """A record on its way into its table; `n` says which delivery it came with."""

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


class ConnectionRow(msgspec.Struct):
    """A connection on its way into its table."""

    n: int
    user_id: str
    provider: str
    status: str
    error: str | None
    version: datetime
    origin: str


@dataclass
class Written:
    """What came of a batch: how many rows each delivery changed, and which deliveries came too late for one."""

    changed: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    stale: set[int] = field(default_factory=set)
    rows: Counter[str] = field(default_factory=Counter)  # that were changed, by kind


@dataclass(frozen=True)
class BatchItem:
    """An action, and which delivery of the batch it belongs to."""

    n: int
    action: Action


def write(
    connection: Connection,
    batch: Sequence[BatchItem],
    origin: Origin,
    numbers: Mapping[SeriesKey, int],
    seen: Collection[int] = (),
) -> Written:
    """Merges every record, sample and connection of a batch. Tables are taken in the order of the catalogue.

    `numbers` has the number of every series of the batch; it is asked for before the transaction, because a new one
    is committed by itself. Of deliveries that were `seen` before, it is looked first whether anything is to be merged.
    """
    written = Written()
    records: dict[str, list[RecordRow]] = {}
    for one in batch:
        if isinstance(one.action, Record):
            records.setdefault(one.action.resource, []).append(_record_row(one.n, one.action, origin))
    for name, resource in catalogue().items():
        if name in records:
            _write_records(connection, resource, records[name], seen, written)
    _count_kind(written, "record")
    samples = [(one.n, one.action) for one in batch if isinstance(one.action, Samples)]
    if samples:
        _write_samples(connection, _runs(samples, numbers), origin, seen, written)
        _count_kind(written, "sample")
    connections = [
        ConnectionRow(one.n, a.user_id, a.provider, a.status, a.error, a.version, origin)
        for one in batch
        if isinstance(a := one.action, actions.Connection)
    ]
    if connections:
        _write_connections(connection, connections, written)
        _count_kind(written, "connection")
    return written


def _count_kind(written: Written, kind: str) -> None:
    """What was changed since the last kind is of this one."""
    written.rows[kind] = sum(written.changed.values()) - written.rows.total()


def _record_row(n: int, record: Record, origin: Origin) -> RecordRow:
    names = (n, record.user_id, record.id, record.provider, record.source_type)
    columns = msgspec.Raw(record.columns) if record.columns is not None else None
    return RecordRow(*names, msgspec.Raw(record.payload), record.version, origin, columns, record.is_deleted)


def _json(rows: Iterable[msgspec.Struct]) -> str:
    return msgspec.json.encode(list(rows)).decode()


class Statements:
    """What is asked of a table whose rows are given as one JSON array, `:rows`."""

    def __init__(self, target: Target, source: str, bare: str) -> None:
        """Of `bare`, if it is less to read, no more than the key, the version and what is ranked is asked."""
        self.merge = text(upsert_sql(target, source))
        self._identity = operator.attrgetter(*target.key, "version")
        self._compare, self._changed = (
            text(comparison_sql(target, bare)),
            text(changed_rows_by_delivery_sql(target, bare)),
        )

    def newer(self, connection: Connection, rows: Sequence[Any], written: Written) -> Sequence[Any]:
        """The rows of those deliveries that would change something; notes those that came too late."""
        return _newer(connection.execute(self._compare, {"rows": _json(rows)}), rows, written)

    def count(self, connection: Connection, rows: Sequence[Any], merged: Iterable[Row[Any]], written: Written) -> None:
        """Gives each merged row to the delivery that brought it, and finds those that came too late for one."""
        owners = {self._identity(row): row.n for row in rows}
        if len(owners) == len(rows):
            for row in merged:
                if row.changed:
                    written.changed[owners[self._identity(row)]] += 1
        else:
            for n, brought in connection.execute(self._changed, {"rows": _json(rows)}):
                written.changed[n] += brought
        if any(row.n not in written.changed for row in rows):
            self.newer(connection, rows, written)


def _newer(found: Iterable[Row[Any]], given: Sequence[Any], written: Written) -> Sequence[Any]:
    """What of the given comes with a delivery that is newer of what is stored; notes those that came too late."""
    numbers = set()
    for row in found:
        if row.is_newer:
            numbers.add(row.n)
        if row.is_stale:
            written.stale.add(row.n)
    return [one for one in given if one.n in numbers]


CONNECTION = Statements(CONNECTIONS, CONNECTION_SOURCE, CONNECTION_SOURCE)


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
    if not rows:
        return
    statements.count(connection, rows, connection.execute(statements.merge, {"rows": _json(rows)}), written)


def _write_connections(connection: Connection, rows: list[ConnectionRow], written: Written) -> None:
    """What is only supposed is written where nothing is known, and is neither news nor late: the data with it is."""
    merged = connection.execute(CONNECTION.merge, {"rows": _json(rows)}).all()
    told = [row for row in rows if row.version > actions.INFERRED]
    CONNECTION.count(connection, told, (row for row in merged if row.version > actions.INFERRED), written)


@dataclass(frozen=True, eq=False)
class SampleRun:
    """Samples of one series in the order of their time, and which delivery of the batch they came with."""

    n: int
    series_id: int
    rows: list[actions.Sample]
    version: datetime

    @property
    def place(self) -> tuple[int, datetime]:
        """Where it begins, in the order of the table's key."""
        return self.series_id, self.rows[0].ts


def _runs(samples: Sequence[tuple[int, Samples]], numbers: Mapping[SeriesKey, int]) -> list[SampleRun]:
    """In the order of the table's key, so that two transactions never wait for each other in a circle."""
    found = (SampleRun(n, numbers[a.series], sorted(a.rows, key=MOMENT), a.version) for n, a in samples if a.rows)
    return sorted(found, key=operator.attrgetter("place"))


def _write_samples(
    connection: Connection, runs: Sequence[SampleRun], origin: Origin, seen: Collection[int], written: Written
) -> None:
    filled = set(_copy_directly(connection, runs, origin))
    for run in filled:
        written.changed[run.n] += len(run.rows)
    if rest := [run for run in runs if run not in filled]:
        _merge_samples(connection, rest, origin, seen, written)


def _copy_directly(connection: Connection, runs: Sequence[SampleRun], origin: Origin) -> list[SampleRun]:
    """Copies those that touch nothing, stored or in this batch, into the table; returns which these were.

    Somebody else may write the same at the same moment. Then all of them are left for the merge.
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
    """Those that do not reach into another one of their series. They come in the order of the key."""
    together, furthest = set[SampleRun](), None
    for run in runs:
        is_same = furthest is not None and furthest.series_id == run.series_id
        if furthest and is_same and furthest.rows[-1].ts >= run.rows[0].ts:
            together |= {furthest, run}
        if not furthest or not is_same or run.rows[-1].ts > furthest.rows[-1].ts:
            furthest = run
    return [run for run in runs if run not in together]


def _copy(
    connection: Connection, statement: str, kind: str, parts: Iterable[tuple[Any, SampleRun]], origin: Origin
) -> None:
    """Copies the rows of runs, each with a first column of its own, of this type."""
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
    is_again = all(run.n in seen for run in runs)
    if is_again and not _newer(connection.execute(COMPARE_SAMPLES), runs, written):
        return
    owners = {(run.series_id, run.version): run.n for run in runs}
    merged = connection.execute(MERGE_SAMPLES).all()
    if len(owners) == len(runs):
        brought = [(owners[series_id, version], rows) for series_id, version, rows in merged]
    else:
        brought = [(n, rows) for n, rows in connection.execute(CHANGED_SAMPLES)]
    for n, rows in brought:
        written.changed[n] += rows
    if any(run.n not in written.changed for run in runs):
        _newer(connection.execute(COMPARE_SAMPLES), runs, written)
