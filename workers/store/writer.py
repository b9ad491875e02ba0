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

from app import actions
from app.actions import Action, Origin, Record, Samples
from app.catalogue import Resource, catalogue
from workers.store.merge import Target, credited, standing, upsert
from workers.store.schema import CONNECTIONS, SAMPLES, record_source, record_target
from workers.store.series import Key

CONNECTION_SOURCE = """jsonb_to_recordset(CAST(:rows AS jsonb)) AS incoming(n int, user_id text, provider text,
    status text, error text, version timestamptz, origin headrace.origin)"""
STAGED = "staged_samples AS incoming"
COPIED = "series_id, ts, ts_end, value, unit, timezone_offset, extra, version, origin"
STAGE = f"COPY staged_samples (n, {COPIED}) FROM STDIN (FORMAT BINARY)"
FILL = f"COPY headrace.samples (stored_at, {COPIED}) FROM STDIN (FORMAT BINARY)"
# `extra` is copied as what jsonb looks like on the wire: a version byte and the text. Declared as jsonb, psycopg would
# want the object and encode it once more.
JSONB_VERSION = b"\x01"
MOMENT = operator.itemgetter(0)
COPIED_TYPES = ["int4", "timestamptz", "timestamptz", "float8", "text", "int4", "bytea", "timestamptz", "text"]
# Where there is nothing yet, samples are copied straight into their table: 3 times as fast as through the staging table
# and the merge. For fewer than this the question whether there is something costs more than it saves.
FILL_FROM = 200
OCCUPIED = text("""
SELECT now(), array(
    SELECT place FROM unnest(CAST(:series AS int[]), CAST(:firsts AS timestamptz[]), CAST(:lasts AS timestamptz[]))
        WITH ORDINALITY AS given(series_id, first, last, place)
    WHERE EXISTS (SELECT 1 FROM headrace.samples stored
                  WHERE stored.series_id = given.series_id AND stored.ts BETWEEN given.first AND given.last))""")
# A row for each series and version, not for each sample: the version tells the deliveries of one series apart.
MERGE_SAMPLES = text(f"""
WITH merged AS ({upsert(SAMPLES, STAGED)})
SELECT series_id, version, count(*) AS rows FROM merged WHERE changed GROUP BY series_id, version""")
STANDING_OF_SAMPLES = text(standing(SAMPLES, STAGED))
CREDITED_SAMPLES = text(credited(SAMPLES, STAGED))


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
class Numbered:
    """An action, and which delivery of the batch it belongs to."""

    n: int
    action: Action


def write(
    connection: Connection,
    batch: Sequence[Numbered],
    origin: Origin,
    numbers: Mapping[Key, int],
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
    _tell(written, "record")
    samples = [(one.n, one.action) for one in batch if isinstance(one.action, Samples)]
    if samples:
        _write_samples(connection, _stretches(samples, numbers), origin, seen, written)
        _tell(written, "sample")
    connections = [
        ConnectionRow(one.n, a.user_id, a.provider, a.status, a.error, a.version, origin)
        for one in batch
        if isinstance(a := one.action, actions.Connection)
    ]
    if connections:
        _write_connections(connection, connections, written)
        _tell(written, "connection")
    return written


def _tell(written: Written, kind: str) -> None:
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
        self.merge = text(upsert(target, source))
        self._identity = operator.attrgetter(*target.key, "version")
        self._standing, self._credited = text(standing(target, bare)), text(credited(target, bare))

    def ahead(self, connection: Connection, rows: Sequence[Any], written: Written) -> Sequence[Any]:
        """The rows of those deliveries that would change something; notes those that came too late."""
        return _ahead(connection.execute(self._standing, {"rows": _json(rows)}), rows, written)

    def count(self, connection: Connection, rows: Sequence[Any], merged: Iterable[Row[Any]], written: Written) -> None:
        """Gives each merged row to the delivery that brought it, and finds those that came too late for one."""
        owners = {self._identity(row): row.n for row in rows}
        if len(owners) == len(rows):
            for row in merged:
                if row.changed:
                    written.changed[owners[self._identity(row)]] += 1
        else:
            for n, brought in connection.execute(self._credited, {"rows": _json(rows)}):
                written.changed[n] += brought
        if any(row.n not in written.changed for row in rows):
            self.ahead(connection, rows, written)


def _ahead(found: Iterable[Row[Any]], given: Sequence[Any], written: Written) -> Sequence[Any]:
    """What of the given comes with a delivery that is ahead of what is stored; notes those that came too late."""
    numbers = set()
    for row in found:
        if row.is_ahead:
            numbers.add(row.n)
        if row.is_late:
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
        rows += statements.ahead(connection, again, written)
    if not rows:
        return
    statements.count(connection, rows, connection.execute(statements.merge, {"rows": _json(rows)}), written)


def _write_connections(connection: Connection, rows: list[ConnectionRow], written: Written) -> None:
    """What is only supposed is written where nothing is known, and is neither news nor late: the data with it is."""
    merged = connection.execute(CONNECTION.merge, {"rows": _json(rows)}).all()
    told = [row for row in rows if row.version > actions.SUPPOSED]
    CONNECTION.count(connection, told, (row for row in merged if row.version > actions.SUPPOSED), written)


@dataclass(frozen=True, eq=False)
class Stretch:
    """Samples of one series in the order of their time, and which delivery of the batch they came with."""

    n: int
    series_id: int
    rows: list[actions.Sample]
    version: datetime

    @property
    def place(self) -> tuple[int, datetime]:
        """Where it begins, in the order of the table's key."""
        return self.series_id, self.rows[0].ts


def _stretches(samples: Sequence[tuple[int, Samples]], numbers: Mapping[Key, int]) -> list[Stretch]:
    """In the order of the table's key, so that two transactions never wait for each other in a circle."""
    found = (Stretch(n, numbers[a.series], sorted(a.rows, key=MOMENT), a.version) for n, a in samples if a.rows)
    return sorted(found, key=operator.attrgetter("place"))


def _write_samples(
    connection: Connection, stretches: Sequence[Stretch], origin: Origin, seen: Collection[int], written: Written
) -> None:
    filled = set(_fill(connection, stretches, origin))
    for stretch in filled:
        written.changed[stretch.n] += len(stretch.rows)
    if rest := [stretch for stretch in stretches if stretch not in filled]:
        _merge_samples(connection, rest, origin, seen, written)


def _fill(connection: Connection, stretches: Sequence[Stretch], origin: Origin) -> list[Stretch]:
    """Copies those that touch nothing, stored or in this batch, into the table; returns which these were.

    Somebody else may write the same at the same moment. Then all of them are left for the merge.
    """
    if sum(len(stretch.rows) for stretch in stretches) < FILL_FROM:
        return []
    apart = _apart(stretches)
    firsts, lasts = [stretch.rows[0].ts for stretch in apart], [stretch.rows[-1].ts for stretch in apart]
    places = {"series": [stretch.series_id for stretch in apart], "firsts": firsts, "lasts": lasts}
    now, occupied = connection.execute(OCCUPIED, places).one()
    free = [stretch for place, stretch in enumerate(apart, start=1) if place not in occupied]
    if not free:
        return []
    try:
        with connection.begin_nested():
            _copy(connection, FILL, "timestamptz", ((now, stretch) for stretch in free), origin)
    except psycopg.errors.UniqueViolation:
        return []
    return free


def _apart(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Those that do not reach into another one of their series. They come in the order of the key."""
    together, furthest = set[Stretch](), None
    for stretch in stretches:
        is_same = furthest is not None and furthest.series_id == stretch.series_id
        if furthest and is_same and furthest.rows[-1].ts >= stretch.rows[0].ts:
            together |= {furthest, stretch}
        if not furthest or not is_same or stretch.rows[-1].ts > furthest.rows[-1].ts:
            furthest = stretch
    return [stretch for stretch in stretches if stretch not in together]


def _copy(
    connection: Connection, statement: str, kind: str, parts: Iterable[tuple[Any, Stretch]], origin: Origin
) -> None:
    """Copies the rows of stretches, each with a first column of its own, of this type."""
    driver = connection.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise TypeError("the engine does not use psycopg")
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types([kind, *COPIED_TYPES])
        for first, stretch in parts:
            series_id, version = stretch.series_id, stretch.version
            for ts, ts_end, value, unit, offset, extra in stretch.rows:
                object_ = JSONB_VERSION + extra if extra else None
                copy.write_row((first, series_id, ts, ts_end, value, unit, offset, object_, version, origin))


def _merge_samples(
    connection: Connection, stretches: Sequence[Stretch], origin: Origin, seen: Collection[int], written: Written
) -> None:
    _copy(connection, STAGE, "int4", ((stretch.n, stretch) for stretch in stretches), origin)
    is_again = all(stretch.n in seen for stretch in stretches)
    if is_again and not _ahead(connection.execute(STANDING_OF_SAMPLES), stretches, written):
        return
    owners = {(stretch.series_id, stretch.version): stretch.n for stretch in stretches}
    merged = connection.execute(MERGE_SAMPLES).all()
    if len(owners) == len(stretches):
        brought = [(owners[series_id, version], rows) for series_id, version, rows in merged]
    else:
        brought = [(n, rows) for n, rows in connection.execute(CREDITED_SAMPLES)]
    for n, rows in brought:
        written.changed[n] += rows
    if any(stretch.n not in written.changed for stretch in stretches):
        _ahead(connection.execute(STANDING_OF_SAMPLES), stretches, written)
