"""Replacement of samples: a newer version of a record replaces the samples of its older versions.

Only Terra's objects replace samples. The table `sample_ranges` has, for each series and record, the range of the
present samples, and the range in which samples of older versions are replaced.
- A newer version with samples in a series replaces all samples of the older versions in that series.
- A deletion replaces the samples of the older versions in every series.
- Samples of other records in a replaced range stay. Where a replaced sample has overwritten one of them, it is
  restored from the stored payload of its record.
So a series has the samples of the present versions of its records, in every order of arrival. If several have a sample
of the same time, the newest version wins.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, TextClause, text

from app.catalogue import Resource, catalogue
from workers.actions import Origin, Record, Samples, SeriesKey
from workers.aggregators.terra.shapes import Owner, samples_of
from workers.store import feed
from workers.store.feed import ChangedSamples
from workers.store.samples import Numbers, SampleBatch, Written, write_samples
from workers.store.schema import record_table
from workers.store.sql import RowParameters


def _edge(name: str, pick: str) -> str:
    """The new edges of the range of the newest version, and of the range of the older ones."""
    return f"""
    {name} = CASE WHEN excluded.version > stored.version THEN excluded.{name}
        WHEN excluded.version = stored.version THEN {pick}(stored.{name}, excluded.{name}) ELSE stored.{name} END,
    replaced_{name} = {pick}(stored.replaced_{name}, excluded.replaced_{name},
        CASE WHEN excluded.version > stored.version THEN stored.{name}
             WHEN excluded.version < stored.version THEN excluded.{name} END)"""


COLUMNS = "series_id, id, version, first, last, replaced_first, replaced_last"
ON_CONFLICT = f"""
ON CONFLICT (series_id, id) DO UPDATE SET version = greatest(stored.version, excluded.version),
    {_edge("first", "least")}, {_edge("last", "greatest")}"""
REPLACED = "series_id, id, version, replaced_first AS first, replaced_last AS last"
# One range per series and record: the present one, and with REPLACED that of the versions before.
PRESENT = RowParameters(
    "series_id int, user_id text, id text, version timestamptz, first timestamptz, last timestamptz"
)
RANGES = RowParameters("series_id int, id text, version timestamptz, first timestamptz, last timestamptz")
DELETE = text(f"""
UPDATE headrace.sample_ranges SET version = :version, first = NULL, last = NULL,
    replaced_first = least(replaced_first, first), replaced_last = greatest(replaced_last, last)
WHERE id = :id AND version < :version AND series_id IN (SELECT id FROM headrace.series
    WHERE (user_id, provider, source_type) = (:user_id, :provider, :source_type))
RETURNING {REPLACED}""")
GIVEN = RowParameters("series_id int, id text, version timestamptz")
LATE = text(f"""
SELECT series_id, id, given.version FROM {GIVEN} JOIN headrace.sample_ranges stored USING (series_id, id)
WHERE stored.version > given.version""")
# Other records that overlap with ranges in which samples are replaced. Samples of newer ones are not replaced there.
# OFFSET 0: otherwise PostgreSQL reads all ranges of a series, and not only those from `first` on.
OTHERS = text(f"""
SELECT DISTINCT stored.*, user_id, resource, provider, source_type, subtype FROM {RANGES},
LATERAL (SELECT * FROM headrace.sample_ranges one WHERE one.series_id = given.series_id AND one.id <> given.id
         AND one.version < given.version AND one.last >= given.first AND one.first <= given.last OFFSET 0) AS stored
JOIN headrace.series ON series.id = stored.series_id
ORDER BY stored.series_id, stored.id""")
LOCK = text("""
SELECT pg_advisory_xact_lock(hashtext('headrace.sample_ranges'), key)
FROM (SELECT DISTINCT hashtext(name) AS key FROM unnest(CAST(:names AS text[])) AS name ORDER BY key) AS keys""")
KEPT = RowParameters("ts timestamptz, ts_end timestamptz, value float8, version timestamptz", "kept")
SPARED = RowParameters("first timestamptz, last timestamptz, version timestamptz", "spared")
# NOT EXISTS and not NOT IN, which PostgreSQL compares row by row once the samples to keep exceed work_mem.
REMOVE = text(f"""
WITH gone AS (
    DELETE FROM headrace.samples WHERE series_id = :series_id AND ts BETWEEN :first AND :last AND version < :version
      AND NOT EXISTS (
          SELECT FROM {KEPT}
          WHERE (kept.ts, coalesce(kept.ts_end, kept.ts), coalesce(kept.value, 0), kept.version)
              = (samples.ts, coalesce(samples.ts_end, samples.ts), coalesce(samples.value, 0), samples.version))
      AND NOT EXISTS (
          SELECT FROM {SPARED} WHERE samples.version = spared.version AND ts BETWEEN spared.first AND spared.last)
    RETURNING ts)
SELECT min(ts) AS first, max(ts) AS last, count(*) AS rows FROM gone""")
NEXT_PART = text("""
SELECT ts FROM headrace.samples WHERE series_id = :series_id AND ts BETWEEN :first AND :last
ORDER BY ts OFFSET :rows LIMIT 1""")
RESOLUTION = timedelta(microseconds=1)  # of timestamptz
MAX_ROWS = 50_000  # of one statement, which has to end before its timeout
MAX_RANGES = 2_000  # of one look-up of the records that overlap with them
MOVE = text(f"""
WITH gone AS (
    DELETE FROM headrace.sample_ranges USING headrace.series WHERE series.id = series_id AND user_id = :old
    RETURNING sample_ranges.*, resource, provider, source_type, subtype)
INSERT INTO headrace.sample_ranges AS stored ({COLUMNS})
SELECT series.id, gone.id, version, first, last, replaced_first, replaced_last
FROM gone JOIN headrace.series USING (resource, provider, source_type, subtype) WHERE user_id = :new {ON_CONFLICT}""")
REPLACED_OF_USER = text(f"""
SELECT {REPLACED} FROM headrace.sample_ranges
WHERE series_id IN (SELECT id FROM headrace.series WHERE user_id = :new) AND replaced_last IS NOT NULL
ORDER BY series_id, replaced_first""")


class ReplacedRange(NamedTuple):
    """The range of a series in which the samples of a record's versions before this one are replaced."""

    series_id: int
    id: str  # of the record
    version: datetime
    first: datetime
    last: datetime


class _Other(NamedTuple):
    """Another record in a series, and its samples there. None: the stored payload is a newer one without samples."""

    range: Row[Any]
    samples: Samples | None


@cache
def _mark_deleted(resource: Resource) -> TextClause:
    return text(f"""
UPDATE {record_table(resource)} SET deleted_version = greatest(deleted_version, :version)
WHERE user_id = :user_id AND id = :id""")


@cache
def _add(resource: Resource) -> TextClause:
    """Adds the ranges of records. If a newer version deleted a record, all its samples are replaced."""
    own, gone = "CASE WHEN NOT is_deleted THEN given.{0} END", "CASE WHEN is_deleted THEN given.{0} END"
    edges = ", ".join(kind.format(edge) for kind in (own, gone) for edge in ("first", "last"))
    return text(f"""
INSERT INTO headrace.sample_ranges AS stored ({COLUMNS})
SELECT given.series_id, given.id, CASE WHEN is_deleted THEN r.deleted_version ELSE given.version END, {edges}
FROM {PRESENT} JOIN {record_table(resource)} r USING (user_id, id),
LATERAL (SELECT coalesce(r.deleted_version > given.version, false) AS is_deleted) AS deletion
ORDER BY given.series_id, given.id {ON_CONFLICT}
WHERE stored.version <> excluded.version
   OR (stored.first <= excluded.first AND stored.last >= excluded.last) IS NOT TRUE
RETURNING {REPLACED}""")


def add_ranges(
    connection: Connection, resource: Resource, records: Sequence[Record], numbers: Numbers
) -> list[ReplacedRange]:
    """Adds the sample ranges of records that were merged just now. Returns the ranges that they replace."""
    found: list[Any] = []
    for one in records:
        if one.is_deleted:
            key = {"user_id": one.user_id, "id": one.id, "version": one.version}
            connection.execute(_mark_deleted(resource), key)
            source = {"provider": one.provider, "source_type": one.source_type}
            found += connection.execute(DELETE, key | source).mappings()
    for part in _once_each(records):
        rows = (
            (numbers[key], one.user_id, one.id, one.version, of.first, of.last)
            for one in part
            for key, of in zip(one.series, one.sample_ranges, strict=True)
        )
        found += connection.execute(_add(resource), PRESENT.values(rows)).mappings()
    return [ReplacedRange(**row) for row in found if row["first"] is not None]


def _once_each(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records with samples, in parts with at most one version of each record."""
    left = [one for one in records if one.sample_ranges]
    while left:
        part = {(one.user_id, one.id): one for one in left}
        yield list(part.values())
        left = [one for one in left if one is not part[one.user_id, one.id]]


def current(
    connection: Connection, samples: SampleBatch, numbers: Numbers, written: Written
) -> list[tuple[int, Samples]]:
    """Leaves out samples of a record if a newer version of it has samples in the series, or was deleted.

    Records their deliveries as stale.
    """
    versions = [(numbers[one.key], one.record_id, one.version) for _, one in samples]
    of_records = [version for version in versions if version[1]]
    if not of_records:
        return list(samples)
    late = {(row.series_id, row.id, row.version) for row in connection.execute(LATE, GIVEN.values(of_records))}
    written.stale.update(n for (n, one), version in zip(samples, versions, strict=True) if version in late and one.rows)
    return [one for one, version in zip(samples, versions, strict=True) if version not in late]


def remove(connection: Connection, ranges: Sequence[ReplacedRange], origin: Origin) -> tuple[int, Written]:
    """Deletes and announces the stored samples in replaced ranges. Returns their number, and the restored samples.

    The caller must announce the restored samples.
    """
    if not ranges:
        return 0, Written()
    others = _others(connection, ranges)
    gone = [part for one in ranges for part in _remove(connection, one, others.get(one.series_id, ()))]
    feed.announce_samples(connection, "remove", gone, origin)
    # Looked up again, because another worker may have committed an overlapping record since.
    restored = _restore(connection, gone, _others(connection, ranges), origin) if gone else Written()
    return sum(part.rows for part in gone), restored


def _remove(connection: Connection, one: ReplacedRange, others: Sequence[_Other]) -> Iterator[ChangedSamples]:
    """Deletes in parts. Yields those with a deleted sample."""
    near = [other for other in others if other.range.last >= one.first and other.range.first <= one.last]
    kept = [(row, other.samples.version) for other in near if other.samples for row in other.samples.rows]
    spared = SPARED.values((of.first, of.last, of.version) for of, samples in near if samples is None)
    for first, last in _parts(connection, one):
        part = {"series_id": one.series_id, "version": one.version, "first": first, "last": last}
        here = ((row.ts, row.ts_end, row.value, version) for row, version in kept if first <= row.ts <= last)
        found = connection.execute(REMOVE, part | spared | KEPT.values(here)).one()
        if found.rows:
            yield ChangedSamples(one.series_id, found.first, found.last, found.rows)


def _parts(connection: Connection, one: ReplacedRange) -> Iterator[tuple[datetime, datetime]]:
    """The first and last times of parts of a range that have at most MAX_ROWS samples."""
    first = one.first
    values = {"series_id": one.series_id, "last": one.last, "rows": MAX_ROWS}
    while edge := connection.scalar(NEXT_PART, values | {"first": first}):
        yield first, edge - RESOLUTION
        first = edge
    yield first, one.last


def _others(connection: Connection, ranges: Sequence[ReplacedRange]) -> Mapping[int, list[_Other]]:
    """The records that overlap with ranges, by series.

    Where there are any, transactions that replace samples of the user wait for each other: otherwise one could restore
    samples that another one is about to replace.
    """
    known: dict[tuple[str, str, str], list[Samples]] = {}
    found: defaultdict[int, list[_Other]] = defaultdict(list)
    values = RANGES.values(ranges)
    if users := {f"{row.user_id} {row.source_type}" for row in connection.execute(OTHERS, values)}:
        connection.execute(LOCK, {"names": list(users)})
    for row in connection.execute(OTHERS, values).all() if users else ():
        key = row.user_id, row.source_type, row.id
        if key not in known:
            known[key] = _stored_samples(connection, row)
        own = (row.resource, row.subtype, row.version)
        samples = next((one for one in known[key] if (one.resource, one.subtype, one.version) == own), None)
        found[row.series_id].append(_Other(row, samples))
    return found


def _stored_samples(connection: Connection, other: Row[Any]) -> list[Samples]:
    """The samples in the stored payload of a record."""
    query = text(f"""
SELECT version, stored_at, CAST(payload AS text) AS payload FROM {record_table(catalogue().of_terra(other.source_type))}
WHERE user_id = :user_id AND id = :id AND NOT deleted""")
    row = connection.execute(query, {"user_id": other.user_id, "id": other.id}).one_or_none()
    owner = Owner(other.user_id, other.provider)
    return samples_of(owner, other.source_type, row.payload.encode(), row.version, row.stored_at) if row else []


def _restore(
    connection: Connection, gone: Sequence[ChangedSamples], others: Mapping[int, Sequence[_Other]], origin: Origin
) -> Written:
    """Writes the samples of other records where samples are gone, by the guarded upsert."""
    restored = Written()
    given: list[tuple[int, Samples]] = []
    numbers: dict[SeriesKey, int] = {}
    for part in gone:
        for of, samples in others.get(part.series_id, ()):
            if samples:
                first, last = max(part.first, of.first), min(part.last, of.last)
                rows = [row for row in samples.rows if first <= row.ts <= last]
                given.append((0, replace(samples, rows=rows)))
                numbers[samples.key] = part.series_id
    write_samples(connection, given, numbers, origin, seen=(), written=restored)
    return restored


def merge_ranges(connection: Connection, ids: Mapping[str, str]) -> None:
    """Moves the ranges of the user `old` to `new`, with their samples, which are merged already."""
    connection.execute(MOVE, ids)
    ranges = [ReplacedRange(**row) for row in connection.execute(REPLACED_OF_USER, ids).mappings()]
    for start in range(0, len(ranges), MAX_RANGES):
        _, restored = remove(connection, ranges[start : start + MAX_RANGES], "webhook")
        feed.announce_samples(connection, "put", restored.samples, "webhook")
