"""Samples that a newer version of their record has replaced: the ranges of a record's samples, series by series.

A newer version of a record with samples in a series replaces all samples of its older versions there, and a deletion
replaces them in every series. In the range of the older versions, no sample of the series is stored that is older than
the record. So every order of arrival ends in the same rows. Only the objects of Terra replace samples in this way.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import Connection, TextClause, text

from app.catalogue import Resource
from workers.actions import Origin, Record, Samples, SeriesKey
from workers.store import feed
from workers.store.feed import ChangedSamples
from workers.store.schema import record_table


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
RETURNING stored.series_id, stored.version, replaced_first AS first, replaced_last AS last""")
OVERLAPPING = text("""
SELECT DISTINCT series_id, version, replaced_first AS first, replaced_last AS last
FROM unnest(CAST(:series AS int[]), CAST(:firsts AS timestamptz[]), CAST(:lasts AS timestamptz[]))
     AS given(series_id, first, last)
JOIN headrace.sample_ranges stored USING (series_id)
WHERE replaced_last >= given.first AND replaced_first <= given.last""")
REMOVE = text("""
WITH gone AS (
    DELETE FROM headrace.samples WHERE series_id = :series_id AND ts BETWEEN :first AND :last AND version < :version
    RETURNING ts)
SELECT min(ts), max(ts), count(*) FROM gone""")
NEXT_PART = text("""
SELECT ts FROM headrace.samples WHERE series_id = :series_id AND ts BETWEEN :first AND :last
ORDER BY ts OFFSET :rows LIMIT 1""")
RESOLUTION = timedelta(microseconds=1)  # of timestamptz
MAX_ROWS = 50_000  # of one statement, which has to end before its timeout
MOVE = text(f"""
INSERT INTO headrace.sample_ranges AS stored ({COLUMNS})
SELECT n.id, r.id, version, first, last, replaced_first, replaced_last
FROM headrace.series o JOIN headrace.series n USING (resource, provider, source_type, subtype)
JOIN headrace.sample_ranges r ON r.series_id = o.id WHERE o.user_id = :old AND n.user_id = :new {ON_CONFLICT}""")
DROP = text("""
DELETE FROM headrace.sample_ranges WHERE series_id IN (SELECT id FROM headrace.series WHERE user_id = :old)""")
REPLACED_OF_USER = text("""
SELECT series_id, version, replaced_first AS first, replaced_last AS last
FROM headrace.sample_ranges JOIN headrace.series ON series.id = series_id
WHERE user_id = :new AND replaced_last IS NOT NULL""")


@dataclass(frozen=True)
class ReplacedRange:
    """In this range of a series, samples of a lower version are replaced."""

    series_id: int
    version: datetime
    first: datetime
    last: datetime


@cache
def _add(resource: Resource) -> TextClause:
    """Adds the ranges of records. A record that was deleted in a newer version has only replaced samples."""
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
RETURNING series_id, version, replaced_first AS first, replaced_last AS last""")


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
    """The records with samples, in parts of which none has two versions of one record."""
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
    """The samples without those that a newer version of their record has replaced."""
    of_records = [one for _, one in samples if one.is_of_record and one.rows]
    if not of_records:
        return list(samples)
    values = {
        "series": [numbers[one.key] for one in of_records],
        "firsts": [min(row.ts for row in one.rows) for one in of_records],
        "lasts": [max(row.ts for row in one.rows) for one in of_records],
    }
    ranges = [ReplacedRange(**row) for row in connection.execute(OVERLAPPING, values).mappings()]
    return [(n, _without(one, numbers[one.key], ranges)) for n, one in samples] if ranges else list(samples)


def _without(samples: Samples, number: int, ranges: Sequence[ReplacedRange]) -> Samples:
    newer = [one for one in ranges if one.series_id == number and one.version > samples.version]
    if not newer:
        return samples
    rows = [row for row in samples.rows if not any(one.first <= row.ts <= one.last for one in newer)]
    return replace(samples, rows=rows)


def remove(connection: Connection, one: ReplacedRange, origin: Origin) -> int:
    """Deletes the stored samples of a range that were replaced, in parts. Returns their number."""
    left, gone = asdict(one), []
    while edge := connection.scalar(NEXT_PART, left | {"rows": MAX_ROWS}):
        gone.append(connection.execute(REMOVE, left | {"last": edge - RESOLUTION}).one())
        left["first"] = edge
    gone.append(connection.execute(REMOVE, left).one())
    feed.announce_samples(connection, "remove", [ChangedSamples(one.series_id, *part) for part in gone], origin)
    return sum(rows for _, _, rows in gone)


def merge_ranges(connection: Connection, ids: Mapping[str, str]) -> None:
    """Moves the ranges of the user `old` to `new`, with their samples, which are merged already."""
    connection.execute(MOVE, ids)
    connection.execute(DROP, ids)
    for row in connection.execute(REPLACED_OF_USER, ids).mappings().all():
        remove(connection, ReplacedRange(**row), "webhook")
