"""Samples that a newer version of their record has replaced: the ranges of a record's samples, series by series.

A newer version of a record with samples in a series replaces all samples of its older versions there, and a deletion
replaces them in every series. What is stored of a series are the samples of the present versions of its records; of
several at one time, that of the newest version. So every order of arrival ends in the same rows. Only the objects of
Terra replace samples in this way.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import Connection, Row, TextClause, text

from app.catalogue import Resource, catalogue
from workers.actions import Origin, Record, Sample, Samples, SeriesKey
from workers.aggregators.terra.shapes import Owner, samples_of
from workers.store import feed
from workers.store.feed import ChangedSamples
from workers.store.samples import write_samples
from workers.store.schema import record_table
from workers.store.written import Written


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
DELETE = text("""
UPDATE headrace.sample_ranges stored SET version = :version, first = NULL, last = NULL,
    replaced_first = least(replaced_first, first), replaced_last = greatest(replaced_last, last)
FROM headrace.series WHERE series.id = stored.series_id AND stored.id = :id AND stored.version < :version
  AND (series.user_id, series.provider, series.source_type) = (:user_id, :provider, :source_type)
RETURNING stored.series_id, stored.id, stored.version, replaced_first AS first, replaced_last AS last""")
LATE = text("""
SELECT series_id, id, given.version
FROM unnest(CAST(:series AS int[]), CAST(:ids AS text[]), CAST(:versions AS timestamptz[]))
     AS given(series_id, id, version)
JOIN headrace.sample_ranges stored USING (series_id, id) WHERE stored.version > given.version""")
# Other records that overlap with ranges in which samples are replaced. Samples of newer ones are not replaced there.
# OFFSET 0: otherwise PostgreSQL reads all ranges of a series, and not only those from `first` on.
OTHERS = text("""
SELECT DISTINCT stored.*, user_id, resource, provider, source_type, subtype
FROM unnest(CAST(:series AS int[]), CAST(:ids AS text[]), CAST(:versions AS timestamptz[]),
            CAST(:firsts AS timestamptz[]), CAST(:lasts AS timestamptz[]))
     AS given(series_id, id, version, first, last),
LATERAL (SELECT * FROM headrace.sample_ranges one WHERE one.series_id = given.series_id AND one.id <> given.id
         AND one.version < given.version AND one.last >= given.first AND one.first <= given.last OFFSET 0) AS stored
JOIN headrace.series ON series.id = stored.series_id
ORDER BY stored.series_id, stored.id""")
LOCK = text("""
SELECT pg_advisory_xact_lock(hashtext('headrace.sample_ranges'), key)
FROM (SELECT DISTINCT hashtext(name) AS key FROM unnest(CAST(:names AS text[])) AS name ORDER BY key) AS keys""")
# NOT EXISTS and not NOT IN, which PostgreSQL compares row by row once the samples to keep exceed work_mem.
REMOVE = text("""
WITH gone AS (
    DELETE FROM headrace.samples WHERE series_id = :series_id AND ts BETWEEN :first AND :last AND version < :version
      AND NOT EXISTS (
          SELECT FROM unnest(CAST(:times AS timestamptz[]), CAST(:ends AS timestamptz[]), CAST(:values AS float8[]),
                             CAST(:versions AS timestamptz[])) AS kept(ts, ts_end, value, version)
          WHERE (kept.ts, coalesce(kept.ts_end, kept.ts), coalesce(kept.value, 0), kept.version)
              = (samples.ts, coalesce(samples.ts_end, samples.ts), coalesce(samples.value, 0), samples.version))
      AND NOT EXISTS (
          SELECT FROM unnest(CAST(:firsts AS timestamptz[]), CAST(:lasts AS timestamptz[]), CAST(:of AS timestamptz[]))
              AS kept(first, last, version)
          WHERE samples.version = kept.version AND ts BETWEEN kept.first AND kept.last)
    RETURNING ts)
SELECT min(ts) AS first, max(ts) AS last, count(*) AS rows FROM gone""")
NEXT_PART = text("""
SELECT ts FROM headrace.samples WHERE series_id = :series_id AND ts BETWEEN :first AND :last
ORDER BY ts OFFSET :rows LIMIT 1""")
RESOLUTION = timedelta(microseconds=1)  # of timestamptz
MAX_ROWS = 50_000  # of one statement, which has to end before its timeout
MAX_RANGES = 2_000  # of one look-up of the records that overlap with them
MOVE = text(f"""
INSERT INTO headrace.sample_ranges AS stored ({COLUMNS})
SELECT n.id, r.id, version, first, last, replaced_first, replaced_last
FROM headrace.series o JOIN headrace.series n USING (resource, provider, source_type, subtype)
JOIN headrace.sample_ranges r ON r.series_id = o.id WHERE o.user_id = :old AND n.user_id = :new {ON_CONFLICT}""")
DROP = text("""
DELETE FROM headrace.sample_ranges WHERE series_id IN (SELECT id FROM headrace.series WHERE user_id = :old)""")
REPLACED_OF_USER = text("""
SELECT series_id, sample_ranges.id, version, replaced_first AS first, replaced_last AS last
FROM headrace.sample_ranges JOIN headrace.series ON series.id = series_id
WHERE user_id = :new AND replaced_last IS NOT NULL ORDER BY series_id, replaced_first""")


@dataclass(frozen=True)
class ReplacedRange:
    """The range of a series in which the samples of a record's versions before this one are replaced."""

    series_id: int
    id: str  # of the record
    version: datetime
    first: datetime
    last: datetime


@dataclass
class Restored:
    """Samples that were hidden by those of another record, which was replaced."""

    samples: list[ChangedSamples] = field(default_factory=list)
    numbers: dict[SeriesKey, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of samples."""
        return sum(one.rows for one in self.samples)


@dataclass(frozen=True)
class _Other:
    """Another record in a series, and its samples there. None: the stored payload is a newer one without samples."""

    range: Row[Any]
    samples: Samples | None


@cache
def _add(resource: Resource) -> TextClause:
    """Adds the ranges of records. If a newer version deleted a record, all its samples are replaced."""
    own, gone = "CASE WHEN NOT is_deleted THEN given.{0} END", "CASE WHEN is_deleted THEN given.{0} END"
    edges = ", ".join(kind.format(edge) for kind in (own, gone) for edge in ("first", "last"))
    return text(f"""
INSERT INTO headrace.sample_ranges AS stored ({COLUMNS})
SELECT given.series_id, given.id, CASE WHEN is_deleted THEN r.deleted_version ELSE given.version END, {edges}
FROM unnest(CAST(:series AS int[]), CAST(:users AS text[]), CAST(:ids AS text[]), CAST(:versions AS timestamptz[]),
            CAST(:firsts AS timestamptz[]), CAST(:lasts AS timestamptz[]))
     AS given(series_id, user_id, id, version, first, last)
JOIN {record_table(resource)} r USING (user_id, id),
LATERAL (SELECT coalesce(r.deleted_version > given.version, false) AS is_deleted) AS deletion
ORDER BY given.series_id, given.id {ON_CONFLICT}
WHERE stored.version <> excluded.version
   OR (stored.first <= excluded.first AND stored.last >= excluded.last) IS NOT TRUE
RETURNING series_id, id, version, replaced_first AS first, replaced_last AS last""")


def add_ranges(
    connection: Connection, resource: Resource, records: Sequence[Record], numbers: Mapping[SeriesKey, int]
) -> list[ReplacedRange]:
    """Adds the sample ranges of records that were merged just now. Returns the ranges of what they have replaced."""
    found = []
    for record in records:
        if record.is_deleted:
            found += _delete(connection, resource, record)
    for part in _once_each(records):
        rows = [(numbers[key], one, of) for one in part for key, of in zip(one.series, one.sample_ranges, strict=True)]
        values = {
            "series": [number for number, _, _ in rows],
            "users": [one.user_id for _, one, _ in rows],
            "ids": [one.id for _, one, _ in rows],
            "versions": [one.version for _, one, _ in rows],
            "firsts": [of.first for _, _, of in rows],
            "lasts": [of.last for _, _, of in rows],
        }
        found += connection.execute(_add(resource), values).mappings()
    return [ReplacedRange(**row) for row in found if row["first"] is not None]


def _once_each(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records with samples, in parts with at most one version of each record."""
    left = [one for one in records if one.sample_ranges]
    while left:
        part = {(one.user_id, one.id): one for one in left}
        yield list(part.values())
        left = [one for one in left if one is not part[one.user_id, one.id]]


def _delete(connection: Connection, resource: Resource, record: Record) -> list[Any]:
    key = {"user_id": record.user_id, "id": record.id, "version": record.version}
    connection.execute(_mark_deleted(resource), key)
    source = {"provider": record.provider, "source_type": record.source_type}
    return list(connection.execute(DELETE, key | source).mappings())


@cache
def _mark_deleted(resource: Resource) -> TextClause:
    return text(f"""
UPDATE {record_table(resource)} SET deleted_version = greatest(deleted_version, :version)
WHERE user_id = :user_id AND id = :id""")


def current(
    connection: Connection, samples: Sequence[tuple[int, Samples]], numbers: Mapping[SeriesKey, int]
) -> list[tuple[int, Samples]]:
    """The samples without those of records of which a newer version has samples in the series, or was deleted."""
    of_records = [one for _, one in samples if one.record_id]
    if not of_records:
        return list(samples)
    values = {
        "series": [numbers[one.key] for one in of_records],
        "ids": [one.record_id for one in of_records],
        "versions": [one.version for one in of_records],
    }
    late = {tuple(row) for row in connection.execute(LATE, values)}
    return [
        (n, replace(one, rows=[]) if late and (numbers[one.key], one.record_id, one.version) in late else one)
        for n, one in samples
    ]


def remove(connection: Connection, ranges: Sequence[ReplacedRange], origin: Origin) -> tuple[int, Restored]:
    """Deletes the stored samples that were replaced, and announces it. Returns their number.

    Samples of other records stay, and are restored where a deleted sample was newer; the caller has to announce these.
    """
    if not ranges:
        return 0, Restored()
    others = _others(connection, ranges)
    gone = [part for one in ranges for part in _remove(connection, one, others.get(one.series_id, ()))]
    feed.announce_samples(connection, "remove", gone, origin)
    if not gone:
        return 0, Restored()
    # Looked up again, because another worker may have committed an overlapping record since.
    return sum(part.rows for part in gone), _restore(connection, gone, _others(connection, ranges), origin)


def _remove(connection: Connection, one: ReplacedRange, others: Sequence[_Other]) -> Iterator[ChangedSamples]:
    """Deletes in parts. Yields those with a deleted sample."""
    others = [other for other in others if other.range.last >= one.first and other.range.first <= one.last]
    kept = [(row, other.samples.version) for other in others if other.samples for row in other.samples.rows]
    spared = [other.range for other in others if not other.samples]
    spared_ranges = {
        "firsts": [range_.first for range_ in spared],
        "lasts": [range_.last for range_ in spared],
        "of": [range_.version for range_ in spared],
    }
    for first, last in _parts(connection, one):
        part = {"first": first, "last": last}
        kept_here = [(row, version) for row, version in kept if first <= row.ts <= last]
        found = connection.execute(REMOVE, asdict(one) | spared_ranges | part | _arrays(kept_here)).one()
        if found.rows:
            yield ChangedSamples(one.series_id, *found)


def _parts(connection: Connection, one: ReplacedRange) -> Iterator[tuple[datetime, datetime]]:
    """The first and last times of parts of a range that have at most MAX_ROWS samples."""
    first = one.first
    values = {"series_id": one.series_id, "last": one.last, "rows": MAX_ROWS}
    while edge := connection.scalar(NEXT_PART, values | {"first": first}):
        yield first, edge - RESOLUTION
        first = edge
    yield first, one.last


def _arrays(kept: Sequence[tuple[Sample, datetime]]) -> dict[str, list[Any]]:
    return {
        "times": [row.ts for row, _ in kept],
        "ends": [row.ts_end for row, _ in kept],
        "values": [row.value for row, _ in kept],
        "versions": [version for _, version in kept],
    }


def _others(connection: Connection, ranges: Sequence[ReplacedRange]) -> dict[int, list[_Other]]:
    """The records that overlap with ranges, by series.

    Where there are any, transactions that replace samples of the user wait for each other: otherwise one could restore
    samples that another one is about to replace.
    """
    values = {
        "series": [one.series_id for one in ranges],
        "ids": [one.id for one in ranges],
        "versions": [one.version for one in ranges],
        "firsts": [one.first for one in ranges],
        "lasts": [one.last for one in ranges],
    }
    known: dict[tuple[str, str, str], list[Samples]] = {}
    found: dict[int, list[_Other]] = {}
    if users := {f"{row.user_id} {row.source_type}" for row in connection.execute(OTHERS, values)}:
        connection.execute(LOCK, {"names": list(users)})
    for row in connection.execute(OTHERS, values).all() if users else ():
        key = row.user_id, row.source_type, row.id
        if key not in known:
            known[key] = _stored_samples(connection, row)
        own = (row.resource, row.subtype, row.version)
        samples = next((one for one in known[key] if (one.resource, one.subtype, one.version) == own), None)
        found.setdefault(row.series_id, []).append(_Other(row, samples))
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
    connection: Connection,
    gone: Sequence[ChangedSamples],
    others: Mapping[int, Sequence[_Other]],
    origin: Origin,
) -> Restored:
    """Writes the samples of other records where samples are gone, by the guarded upsert."""
    restored, given = Restored(), []
    for part in gone:
        for other in others.get(part.series_id, ()):
            if other.samples:
                first, last = max(part.first, other.range.first), min(part.last, other.range.last)
                rows = [row for row in other.samples.rows if first <= row.ts <= last]
                given.append((0, replace(other.samples, rows=rows)))
                restored.numbers[other.samples.key] = part.series_id
    if given:
        written = Written()
        write_samples(connection, given, restored.numbers, origin, seen=(), written=written)
        restored.samples = written.samples
    return restored


def merge_ranges(connection: Connection, ids: Mapping[str, str]) -> None:
    """Moves the ranges of the user `old` to `new`, with their samples, which are merged already."""
    connection.execute(MOVE, ids)
    connection.execute(DROP, ids)
    ranges = [ReplacedRange(**row) for row in connection.execute(REPLACED_OF_USER, ids).mappings()]
    for start in range(0, len(ranges), MAX_RANGES):
        _, restored = remove(connection, ranges[start : start + MAX_RANGES], "webhook")
        feed.announce_samples(connection, "put", restored.samples, "webhook")
