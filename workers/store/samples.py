"""Writes samples: new ones are copied into their table, others staged and merged, in parts of bounded size."""

import operator
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby
from typing import Any

import psycopg
from sqlalchemy import Connection, CursorResult, text

from workers import actions
from workers.actions import Origin, Samples, SeriesKey
from workers.store.feed import Change, ChangedSamples
from workers.store.merge import changed_rows_by_delivery_sql, comparison_sql, staged_sql, upsert_sql
from workers.store.schema import SAMPLES
from workers.store.sql import RowParameters

STAGED = staged_sql(SAMPLES, "staged_samples", "stored.ts BETWEEN :first AND :last")
COPIED = "series_id, ts, ts_end, value, unit, timezone_offset, extra, version, origin"
STAGE = f"COPY staged_samples (n, {COPIED}) FROM STDIN (FORMAT BINARY)"
DIRECT_COPY = f"COPY headrace.samples (stored_at, {COPIED}) FROM STDIN (FORMAT BINARY)"
CLEAR_STAGE = text("TRUNCATE staged_samples")
# `extra` is copied in jsonb's wire format, a version byte and the text. With the type declared as jsonb, psycopg would
# require the parsed object and encode it again.
JSONB_VERSION = b"\x01"
Numbers = Mapping[SeriesKey, int]  # of series
SampleBatch = Sequence[tuple[int, Samples]]  # with the index of their delivery in the batch
BY_TIME = operator.itemgetter(0)
COPIED_TYPES = ["int4", "timestamptz", "timestamptz", "float8", "text", "int4", "bytea", "timestamptz", "text"]
# Where no samples are stored yet, new ones are copied directly into their table: 3 times as fast as staging and merging
# them. For fewer rows than this, the query for stored samples costs more than it saves.
DIRECT_COPY_MIN_ROWS = 200
# Of one statement. One statement for 700,000 revised samples reached the statement timeout of 45 s.
MAX_ROWS = 50_000
# A join, because Citus rejects an EXISTS for each range (see staged_sql). It reads all stored keys of the ranges: 15 ms
# instead of 2 for 50,000 keys, before a merge that takes a second.
RANGES = RowParameters("place int, series_id int, first timestamptz, last timestamptz")
OCCUPIED = text(f"""
WITH given AS MATERIALIZED (SELECT *, now() AS now FROM {RANGES}),
occupied AS MATERIALIZED (
    SELECT DISTINCT place FROM headrace.samples AS stored JOIN given USING (series_id)
    WHERE stored.ts BETWEEN given.first AND given.last AND stored.ts BETWEEN :first AND :last)
SELECT min(now) AS now, array_agg(occupied.place) FILTER (WHERE occupied.place IS NOT NULL) AS places
FROM given LEFT JOIN occupied USING (place)""")
# One row per series and version instead of one per sample: the version identifies the delivery.
MERGE_SAMPLES = text(f"""{STAGED},
merged AS ({upsert_sql(SAMPLES, "incoming", staged=True)})
SELECT series_id, version, count(*) AS rows, min(ts) AS first, max(ts) AS last FROM merged
WHERE stored_at = (SELECT min(stored_at) FROM incoming)
GROUP BY series_id, version""")
COMPARE_SAMPLES = text(STAGED + comparison_sql(SAMPLES, "incoming", staged=True))
CHANGED_SAMPLES = text(STAGED + changed_rows_by_delivery_sql(SAMPLES, "incoming", staged=True))


@dataclass
class Written:
    """The result of a batch: rows changed by each delivery, and stale deliveries (older than a stored row)."""

    changed: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    stale: set[int] = field(default_factory=set)
    rows: Counter[str] = field(default_factory=Counter)  # changed rows, by kind
    changes: dict[tuple[str, ...], Change] = field(default_factory=dict)  # of records and connections, for the feed
    samples: list[ChangedSamples] = field(default_factory=list)  # inserted or updated, for the feed
    series: dict[int, SeriesKey] = field(default_factory=dict)  # of these samples

    def newer(self, compared: CursorResult[Any], given: Sequence[Any]) -> Sequence[Any]:
        """The rows of `given` whose deliveries are newer than the stored rows. Records stale deliveries."""
        found = compared.all()
        self.stale.update(row.n for row in found if row.is_stale)
        newer = {row.n for row in found if row.is_newer}
        return [row for row in given if row.n in newer]

    def sample_changes(self, origin: Origin) -> list[Change]:
        """The changes of inserted and updated samples: one per user, resource and source."""
        ranges: dict[tuple[str, str, str, str], tuple[datetime, datetime, int]] = {}
        for one in self.samples:
            key = self.series[one.series_id][:4]
            first, last, rows = ranges.get(key, (one.first, one.last, 0))
            ranges[key] = min(first, one.first), max(last, one.last), rows + one.rows
        return [
            Change("put", user_id, resource, provider, source_type, None, first, last, rows, origin)
            for (user_id, resource, provider, source_type), (first, last, rows) in ranges.items()
        ]


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


def write_samples(
    connection: Connection,
    batch: SampleBatch,
    numbers: Numbers,
    origin: Origin,
    *,
    seen: Collection[int],
    written: Written,
) -> None:
    """Writes samples. `numbers` and `seen` as in `workers.store.writer.write`."""
    written.series |= {numbers[one.key]: one.key for _, one in batch}
    runs = _runs(batch, numbers)
    copied = set(_copy_directly(connection, runs, origin))
    for run in copied:
        written.changed[run.n] += len(run.rows)
        written.samples.append(ChangedSamples(run.series_id, run.rows[0].ts, run.rows[-1].ts, len(run.rows)))
    for place, part in enumerate(_parts([run for run in runs if run not in copied])):
        if place > 0:
            connection.execute(CLEAR_STAGE)
        _merge(connection, part, origin, seen, written)


def _runs(batch: SampleBatch, numbers: Numbers) -> list[SampleRun]:
    """Runs in the order of the table's key, which avoids deadlocks between transactions."""
    found = (SampleRun(n, numbers[a.key], sorted(a.rows, key=BY_TIME), a.version) for n, a in batch if a.rows)
    return sorted(found, key=operator.attrgetter("place"))


def _parts(runs: Iterable[SampleRun]) -> Iterator[list[SampleRun]]:
    """The rows of runs in parts of MAX_ROWS rows, in the order of the table's key. `runs` are in that order.

    All rows of one key are in one part, because a merge writes only the newest of them.
    """
    part: list[SampleRun] = []
    size = 0
    for _, of_series in groupby(runs, operator.attrgetter("series_id")):
        for piece in _by_time(list(of_series)):
            count = sum(len(run.rows) for run in piece)
            if part and size + count > MAX_ROWS:
                yield part
                part, size = [], 0
            part += piece
            size += count
    if part:
        yield part


def _by_time(runs: list[SampleRun]) -> Iterator[list[SampleRun]]:
    """The runs of one series, cut at the same times."""
    if sum(len(run.rows) for run in runs) <= MAX_ROWS:
        yield runs
        return
    times = sorted(row.ts for run in runs for row in run.rows)
    starts = [0] * len(runs)
    for edge in (*times[MAX_ROWS::MAX_ROWS], None):
        ends = [bisect_left(run.rows, edge, key=BY_TIME) if edge else len(run.rows) for run in runs]
        cut = zip(runs, starts, ends, strict=True)
        if piece := [replace(run, rows=run.rows[start:end]) for run, start, end in cut if start < end]:
            yield piece
        starts = ends


def _copy_directly(connection: Connection, runs: Sequence[SampleRun], origin: Origin) -> list[SampleRun]:
    """Copies the runs that overlap neither stored samples nor each other into the table. Returns these runs.

    If a concurrent transaction writes one of the same keys, no run is copied and all are left for the merge.
    """
    apart = _non_overlapping(runs)
    if sum(len(run.rows) for run in apart) < DIRECT_COPY_MIN_ROWS:
        return []
    ranges = RANGES.values((n, run.series_id, run.rows[0].ts, run.rows[-1].ts) for n, run in enumerate(apart))
    now, occupied = connection.execute(OCCUPIED, ranges | _period(apart)).one()
    free = [run for place, run in enumerate(apart) if place not in (occupied or ())]
    if not free:
        return []
    try:
        with connection.begin_nested():
            for part in _parts(free):
                _copy(connection, DIRECT_COPY, "timestamptz", ((now, run) for run in part), origin)
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


def _merge(
    connection: Connection, runs: Sequence[SampleRun], origin: Origin, seen: Collection[int], written: Written
) -> None:
    _copy(connection, STAGE, "int4", ((run.n, run) for run in runs), origin)
    period = _period(runs)
    if all(run.n in seen for run in runs) and not written.newer(connection.execute(COMPARE_SAMPLES, period), runs):
        return
    owners = {(run.series_id, run.version): run.n for run in runs}
    versions = {(run.series_id, run.version, run.n) for run in runs}
    merged = connection.execute(MERGE_SAMPLES, period).all()
    written.samples += [ChangedSamples(row.series_id, row.first, row.last, row.rows) for row in merged]
    if len(owners) == len(versions):
        changed = [(owners[row.series_id, row.version], row.rows) for row in merged]
    else:
        changed = [(n, rows) for n, rows in connection.execute(CHANGED_SAMPLES, period)]
    for n, rows in changed:
        written.changed[n] += rows
    if any(run.n not in written.changed for run in runs):
        written.newer(connection.execute(COMPARE_SAMPLES, period), runs)


def _period(runs: Sequence[SampleRun]) -> dict[str, datetime]:
    """The times of the first and the last sample."""
    return {"first": min(run.rows[0].ts for run in runs), "last": max(run.rows[-1].ts for run in runs)}
