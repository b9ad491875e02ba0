"""The ranks of sources, and the priorities and zones that operators set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from workers.daily import queue
from workers.daily.metrics import SESSIONS
from workers.daily.model import ANY, SOURCE_TYPES, DataSource

PLACES = {name: place for place, name in enumerate(SOURCE_TYPES)}
Entry = tuple[str, str]  # provider and source type, each possibly ANY
LISTS = text("""
SELECT person, resource, sources FROM headrace.daily_priorities
WHERE person = ANY(:persons) AND resource = ANY(:resources)""")
LISTED = text("""
SELECT person, resource, sources, set_at FROM headrace.daily_priorities
WHERE CAST(:person AS text) IS NULL OR person = :person ORDER BY person <> '*', person, resource <> '*', resource""")
SET = text("""
INSERT INTO headrace.daily_priorities AS stored (person, resource, sources) VALUES (:person, :resource, :sources)
ON CONFLICT (person, resource) DO UPDATE SET sources = excluded.sources, set_at = now()
WHERE stored.sources <> excluded.sources RETURNING 1""")
RESET = text("""
DELETE FROM headrace.daily_priorities
WHERE person = :person AND (CAST(:resource AS text) IS NULL OR resource = :resource) RETURNING resource""")
STORED_SOURCES = text("SELECT DISTINCT provider, source_type FROM headrace.series")
ZONE = text("""
SELECT zone AS name, set_by FROM (
    SELECT zone, 'operator' AS set_by, '' AS user_id FROM headrace.daily_zones WHERE person = :person
    UNION ALL
    SELECT zone, 'aggregator', user_id FROM headrace.daily_people WHERE person = :person AND zone IS NOT NULL) AS known
ORDER BY set_by DESC, user_id LIMIT 1""")
SET_ZONE = text("""
INSERT INTO headrace.daily_zones AS stored (person, zone) VALUES (:person, :zone)
ON CONFLICT (person) DO UPDATE SET zone = excluded.zone, set_at = now()
WHERE stored.zone <> excluded.zone RETURNING 1""")
RESET_ZONE = text("DELETE FROM headrace.daily_zones WHERE person = :person RETURNING 1")
ZONES = text("SELECT name FROM pg_timezone_names ORDER BY name")
LACKS_OFFSETS = text("""
SELECT 1 FROM headrace.daily_people p WHERE p.user_id = :user AND (
    EXISTS (SELECT FROM headrace.series n JOIN headrace.daily_series s ON s.series_id = n.id
            WHERE n.user_id = p.user_id AND s.lacks_offset)
    OR EXISTS (SELECT FROM headrace.daily_records r
               WHERE r.user_id = p.user_id AND r.timezone_offset IS NULL AND r.resource = ANY(:sessions)))""")
SET_FALLBACK = text("""
UPDATE headrace.daily_people SET zone = nullif(:zone, '')
WHERE user_id = :user AND zone IS DISTINCT FROM nullif(:zone, '')
  AND (:zone = '' OR EXISTS (SELECT FROM pg_timezone_names WHERE name = :zone)) RETURNING person""")


class Zone(NamedTuple):
    """The zone of a person."""

    name: str
    set_by: str  # `operator` or `aggregator`


@dataclass(frozen=True)
class PriorityList:
    """Sources as PROVIDER/SOURCE_TYPE, best first, of one person and resource; ANY is everyone, or every resource."""

    person: str
    resource: str
    sources: tuple[str, ...]
    set_at: datetime


def in_order(sources: Iterable[DataSource], lists: Sequence[Sequence[Entry]]) -> list[DataSource]:
    """The sources from the best to the worst. Of the lists, the first one with an entry for a source ranks it.

    Sources of one entry, and sources that no list names, follow the order of source types, then their names. A source
    type that the order does not name ranks as `unknown`: Terra's are the types of its objects.
    """
    return sorted(sources, key=lambda source: (*_place(source, lists), *_by_type(source)))


def _place(source: DataSource, lists: Sequence[Sequence[Entry]]) -> tuple[int, int]:
    for number, entries in enumerate(lists):
        for place, (provider, source_type) in enumerate(entries):
            if provider in (ANY, source.provider) and source_type in (ANY, source.source_type):
                return number, place
    return len(lists), 0


def _by_type(source: DataSource) -> tuple[int, str, str]:
    return PLACES.get(source.source_type, PLACES["unknown"]), source.provider, source.source_type


def lists_of(connection: Connection, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[list[Entry]]]:
    """The lists that rank the sources of each person and resource, in their order."""
    pairs = list(wanted)
    values = {"persons": [ANY, *(person for person, _ in pairs)], "resources": [ANY, *(name for _, name in pairs)]}
    stored = {(row.person, row.resource): row.sources for row in connection.execute(LISTS, values)}
    return {
        (person, resource): [
            [_entry(name) for name in stored[whose, what]]
            for whose in (person, ANY)
            for what in (resource, ANY)
            if (whose, what) in stored
        ]
        for person, resource in pairs
    }


def _entry(name: str) -> Entry:
    provider, _, source_type = name.partition("/")
    return provider, source_type


def set_list(connection: Connection, person: str, resource: str, sources: Sequence[str]) -> bool:
    """Replaces a list, and queues the days that it touches. False if it is stored already."""
    values = {"person": person, "resource": resource, "sources": list(sources)}
    if connection.scalar(SET, values) is None:
        return False
    _queue(connection, person, resource)
    return True


def reset(connection: Connection, person: str, resource: str | None) -> list[str]:
    """Removes the list of a resource, or all lists of the person. Returns their resources."""
    gone = list(connection.scalars(RESET, {"person": person, "resource": resource}))
    for name in gone:
        _queue(connection, person, name)
    return sorted(gone)


def _queue(connection: Connection, person: str, resource: str) -> None:
    queue.add_all(connection, None if person == ANY else [person], None if resource == ANY else [resource])


def listed(connection: Connection, person: str | None = None) -> list[PriorityList]:
    """The lists of a person, or all lists; those of everyone come first."""
    rows = connection.execute(LISTED, {"person": person})
    return [PriorityList(row.person, row.resource, tuple(row.sources), row.set_at) for row in rows]


def stored_sources(connection: Connection) -> list[DataSource]:
    """The sources of all stored samples."""
    return [DataSource(row.provider, row.source_type) for row in connection.execute(STORED_SOURCES)]


def zone_of(connection: Connection, person: str) -> Zone | None:
    """The zone that an operator set for a person, else the aggregator's fallback zone of one of the person's users."""
    row = connection.execute(ZONE, {"person": person}).mappings().first()
    return Zone(**row) if row else None


def set_zone(connection: Connection, person: str, zone: str | None) -> bool:
    """Sets the zone of a person, or removes it (None), and queues the person's days. False if nothing changed."""
    if zone is None:
        changed = connection.scalar(RESET_ZONE, {"person": person})
    else:
        changed = connection.scalar(SET_ZONE, {"person": person, "zone": zone})
    if changed:
        queue.add_all(connection, [person])
    return bool(changed)


def lacks_offsets(connection: Connection, user_id: str) -> bool:
    """Whether samples or records of the user have no offset, so that the aggregator's fallback zone can decide."""
    return connection.scalar(LACKS_OFFSETS, {"user": user_id, "sessions": list(SESSIONS)}) is not None


def set_fallback_zone(connection: Connection, user_id: str, zone: str) -> None:
    """Stores the aggregator's fallback zone of a user, '' for none, and queues the person's days if it is another.

    A zone that PostgreSQL does not know is ignored.
    """
    person = connection.scalar(SET_FALLBACK, {"user": user_id, "zone": zone})
    if person is not None:
        queue.add_all(connection, [person])


def known_zones(connection: Connection) -> list[str]:
    """The names of time zones that this PostgreSQL knows."""
    return list(connection.scalars(ZONES))
