"""Writes computed days and kept sessions: the rows that differ, announced in the change feed."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, text

from workers.daily.metrics import derived
from workers.daily.model import MAX_OFFSET, ZONE_SOURCES, DayValue, as_date, as_time
from workers.daily.read import Inputs, at_midnight
from workers.daily.sessions import KeptSession
from workers.store.feed import Change, Op, announce
from workers.store.retention import DAILY

TYPES = {
    "person": "text",
    "metric": "text",
    "local_date": "date",
    "sources": "int",
    "user_id": "text",
    "resource": "text",
    "value": "double precision",
    "summary_value": "double precision",
    "covered_minutes": "int",
    "samples": "int",
    "unit": "text",
    "provider": "text",
    "source_type": "text",
    "method": "text",
    "zone_source": "text",
}
STORED = text(f"""
SELECT given.n, {", ".join(f"d.{name}" for name in TYPES)}
FROM unnest(CAST(:numbers AS int[]), CAST(:persons AS text[]), CAST(:metrics AS text[]), CAST(:firsts AS date[]),
            CAST(:lasts AS date[])) AS given(n, person, metric, first, last)
JOIN headrace.days d ON (d.person, d.metric) = (given.person, given.metric)
    AND d.local_date BETWEEN given.first AND given.last""")
PUT = text(f"""
INSERT INTO headrace.days ({", ".join(TYPES)})
SELECT * FROM unnest({", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in TYPES.items())}) AS given
ORDER BY 1, 2, 3
ON CONFLICT (person, metric, local_date) DO UPDATE SET computed_at = now(),
    {", ".join(f"{name} = excluded.{name}" for name in list(TYPES)[3:])}""")
REMOVE = text("""
DELETE FROM headrace.days d USING unnest(CAST(:persons AS text[]), CAST(:metrics AS text[]), CAST(:dates AS date[]))
    AS given(person, metric, local_date)
WHERE (d.person, d.metric, d.local_date) = (given.person, given.metric, given.local_date)""")
SESSION_TYPES = {
    "user_id": "text",
    "resource": "text",
    "id": "text",
    "person": "text",
    "local_date": "date",
    "is_night": "boolean",
    "starts": "timestamptz",
    "ends": "timestamptz",
    "provider": "text",
    "source_type": "text",
    "parts": "double precision[]",
    "also": "text[]",
    "zone_source": "text",
}
SESSIONS_STORED = text(f"""
SELECT given.n, {", ".join(f"k.{name}" for name in SESSION_TYPES)}
FROM unnest(CAST(:numbers AS int[]), CAST(:persons AS text[]), CAST(:resources AS text[]), CAST(:firsts AS date[]),
            CAST(:lasts AS date[])) AS given(n, person, resource, first, last)
JOIN headrace.kept_sessions k ON (k.person, k.resource) = (given.person, given.resource)
    AND k.local_date BETWEEN given.first AND given.last""")
# As JSON, because arrays of different lengths do not fit into an array.
PUT_SESSIONS = text(f"""
INSERT INTO headrace.kept_sessions ({", ".join(SESSION_TYPES)})
SELECT * FROM jsonb_to_recordset(CAST(:rows AS jsonb))
    AS given({", ".join(f"{name} {kind}" for name, kind in SESSION_TYPES.items())})
ORDER BY 1, 2, 3
ON CONFLICT (user_id, resource, id) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in list(SESSION_TYPES)[3:])}""")
REMOVE_SESSIONS = text("""
DELETE FROM headrace.kept_sessions k USING unnest(CAST(:users AS text[]), CAST(:resources AS text[]),
    CAST(:ids AS text[])) AS given(user_id, resource, id)
WHERE (k.user_id, k.resource, k.id) = (given.user_id, given.resource, given.id)""")


@dataclass(frozen=True)
class Computed:
    """The days of one stretch, with the sources to which DayValue and TimedSession refer."""

    inputs: Inputs
    days: list[DayValue]
    kept: list[KeptSession] = field(default_factory=list)


class DayRow(NamedTuple):
    """A row of headrace.days, in the order of TYPES."""

    person: str
    metric: str
    local_date: date
    sources: int
    user_id: str | None
    resource: str
    value: float
    summary_value: float | None
    covered_minutes: int | None
    samples: int
    unit: str
    provider: str
    source_type: str
    method: str
    zone_source: str


class SessionRow(NamedTuple):
    """A row of headrace.kept_sessions, in the order of SESSION_TYPES."""

    user_id: str
    resource: str
    id: str
    person: str
    local_date: date
    is_night: bool
    starts: datetime
    ends: datetime
    provider: str
    source_type: str
    parts: list[float | None]
    also: list[str]
    zone_source: str


def write_days(
    connection: Connection,
    found: Sequence[Computed],
    users: Mapping[str, Sequence[str]],
    expired: Mapping[str, datetime],
) -> int:
    """Writes the days that differ, removes those that no longer exist, and announces both. Returns their number."""
    stored = _stored(connection, found)
    changes: list[Change] = []
    put: list[DayRow] = []
    gone: list[DayRow] = []
    for n, one in enumerate(found):
        stretch, known = one.inputs.stretch, stored[n]
        oldest = expired[DAILY].date() if DAILY in expired else date.min
        new = {(row.metric, row.local_date): row for row in _rows(one) if row.local_date >= oldest}
        kept = {key for key, row in known.items() if _is_kept(row, new.get(key), expired.get(stretch.resource))}
        written = [row for key, row in new.items() if key not in kept and row != known.get(key)]
        removed = [row for key, row in known.items() if key not in kept and key not in new]
        put += written
        gone += removed
        # A person without users has only days to remove: of a name that no user has any longer.
        owners = users.get(stretch.person) or sorted({row.user_id for row in removed if row.user_id})
        if (written or removed) and owners:
            dates = [row.local_date for row in (*written, *removed)]
            op: Op = "put" if written else "remove"
            changes.append(day_change(op, owners[0], dates, len(dates), stretch.origin))
    if put:
        connection.execute(PUT, dict(zip(TYPES, map(list, zip(*put, strict=True)), strict=True)))
    if gone:
        persons, metrics, dates, *_ = map(list, zip(*gone, strict=True))
        connection.execute(REMOVE, {"persons": persons, "metrics": metrics, "dates": dates})
    announce(connection, changes)
    return len(put) + len(gone)


def day_change(op: Op, user_id: str, dates: Collection[date], rows: int, origin: str) -> Change:
    """The change of days between the first and the last of these dates. The user is one of the person's."""
    period = at_midnight(min(dates)), at_midnight(max(dates))
    return Change(op, user_id, DAILY, None, None, None, *period, rows, origin)


def _stored(connection: Connection, found: Sequence[Computed]) -> dict[int, dict[tuple[str, date], DayRow]]:
    given = [
        (n, one.inputs.stretch.person, metric, one.inputs.stretch.first, one.inputs.stretch.last)
        for n, one in enumerate(found)
        for metric in derived()[one.inputs.stretch.resource]
    ]
    stored: dict[int, dict[tuple[str, date], DayRow]] = defaultdict(dict)
    if given:
        names = ("numbers", "persons", "metrics", "firsts", "lasts")
        values = dict(zip(names, map(list, zip(*given, strict=True)), strict=True))
        for n, *columns in connection.execute(STORED, values):
            row = DayRow(*columns)
            stored[n][row.metric, row.local_date] = row
    return stored


def _rows(one: Computed) -> Iterable[DayRow]:
    stretch = one.inputs.stretch
    for day in one.days:
        source = one.inputs.sources[day.source]
        yield DayRow(
            person=stretch.person,
            metric=day.metric,
            local_date=as_date(day.day),
            sources=day.sources,
            user_id=min(day.users) if len(day.users) == 1 else None,
            resource=stretch.resource,
            value=day.value,
            summary_value=day.summary_value,
            covered_minutes=day.covered_minutes,
            samples=day.samples,
            unit=day.unit,
            provider=source.provider,
            source_type=source.source_type,
            method=day.method,
            zone_source=ZONE_SOURCES[day.zone],
        )


def _is_kept(stored: DayRow, new: DayRow | None, expired: datetime | None) -> bool:
    """Whether a stored day stays as it is: some of the rows that it was computed from have expired."""
    is_old = expired is not None and has_expired(stored.local_date, expired)
    return is_old and (new is None or new.samples < stored.samples)


def has_expired(day: date, before: datetime) -> bool:
    """Whether a local date begins before a moment, at any offset."""
    return at_midnight(day) - timedelta(seconds=MAX_OFFSET) < before


def write_sessions(connection: Connection, found: Sequence[Computed], expired: Mapping[str, datetime]) -> None:
    """Writes the kept sessions that differ, and removes those that are no longer kept."""
    if not found:
        return
    stretches = [one.inputs.stretch for one in found]
    values = {
        "numbers": list(range(len(found))),
        "persons": [one.person for one in stretches],
        "resources": [one.resource for one in stretches],
        "firsts": [one.first for one in stretches],
        "lasts": [one.last for one in stretches],
    }
    known: dict[int, list[SessionRow]] = defaultdict(list)
    for n, *columns in connection.execute(SESSIONS_STORED, values):
        known[n].append(SessionRow(*columns))
    put: list[SessionRow] = []
    gone: list[SessionRow] = []
    for n, one in enumerate(found):
        oldest = expired[DAILY].date() if DAILY in expired else date.min
        new = [row for kept in one.kept if (row := _session_row(one, kept)).local_date >= oldest]
        put += [row for row in new if row not in known[n]]
        ids = {(row.user_id, row.id) for row in new}
        edge = expired.get(one.inputs.stretch.resource)
        gone += [
            row
            for row in known[n]
            if (row.user_id, row.id) not in ids and not (edge and has_expired(row.local_date, edge))
        ]
    if gone:  # before the others are written: a session may have moved from one stretch to another
        users, resources, ids_, *_ = map(list, zip(*gone, strict=True))
        connection.execute(REMOVE_SESSIONS, {"users": users, "resources": resources, "ids": ids_})
    if put:
        rows = msgspec.json.encode([row._asdict() for row in put]).decode()
        connection.execute(PUT_SESSIONS, {"rows": rows})


def _session_row(one: Computed, kept: KeptSession) -> SessionRow:
    session, source = kept.session, one.inputs.sources[kept.session.source]
    return SessionRow(
        user_id=session.user_id,
        resource=one.inputs.stretch.resource,
        id=session.id,
        person=one.inputs.stretch.person,
        local_date=as_date(kept.day),
        is_night=kept.is_night,
        starts=as_time(session.start),
        ends=as_time(session.stop),
        provider=source.provider,
        source_type=source.source_type,
        parts=list(session.values),
        also=sorted(other.id for other in kept.others),
        zone_source=ZONE_SOURCES[session.zone],
    )
