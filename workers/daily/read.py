"""Reads what days are computed from: samples, summaries, sessions, priorities and offsets."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from app.catalogue import catalogue
from workers.daily.metrics import SESSIONS, SUMMARY, parts_of, summarised
from workers.daily.model import MAX_OFFSET, DataSource, Summary, TimedSession, as_day, as_moment
from workers.daily.priorities import lists_of
from workers.daily.queue import Stretch
from workers.daily.ranks import in_order
from workers.daily.sessions import SLEEP, WORKOUTS
from workers.daily.state import ENDS, MAX_LENGTH, STARTS, Series, reach_of, series_of
from workers.store.schema import record_table

MICROSECONDS = "CAST(date_part('epoch', {}) * 1000000 AS bigint)"
# Constants for the whole statement, so that PostgreSQL can skip partitions when it plans.
SAMPLES = text(f"""
SELECT given.n, {MICROSECONDS.format("s.ts")} AS start,
       {MICROSECONDS.format("greatest(s.ts_end, s.ts)")} AS stop, s.value, s.timezone_offset, s.unit,
       CASE WHEN given.has_fields THEN s.extra END AS fields
FROM unnest(CAST(:numbers AS int[]), CAST(:series AS int[]), CAST(:firsts AS timestamptz[]),
            CAST(:lasts AS timestamptz[]), CAST(:fields AS boolean[])) AS given(n, series_id, first, last, has_fields)
JOIN headrace.samples s ON s.series_id = given.series_id AND s.ts >= given.first AND s.ts < given.last
WHERE s.ts >= :first AND s.ts < :last AND coalesce(s.ts_end - s.ts, '0') <= :max_length
ORDER BY given.n, s.ts""")
# A session is found by the time of its start, and may decide which sessions that overlap it are kept. Of those that
# are over long before the first date, none can overlap a session of this date, not even through a third one.
SESSIONS_BEFORE, SESSIONS_AFTER, SESSIONS_ENDED = timedelta(days=8), timedelta(days=4), timedelta(days=3)
MAX_AMOUNT = 1e290  # of a number: a product of it with microseconds, and a sum of millions, are finite
COLUMNS = {
    "sleep": [name.removeprefix("sleep_") for name in SLEEP],
    "workouts": [name.removeprefix("workouts_") for name in WORKOUTS],
    SUMMARY: list(summarised()),
}
GIVEN_RECORDS = """
FROM unnest(CAST(:numbers AS int[]), CAST(:users AS text[]), CAST(:firsts AS timestamptz[]),
            CAST(:lasts AS timestamptz[]), CAST(:ended AS timestamptz[])) AS given(n, user_id, first, last, ended)
JOIN headrace.daily_records k ON k.user_id = given.user_id AND k.resource = '{resource}'
    AND k.starts >= given.first AND k.starts < given.last AND k.ends >= given.ended
JOIN {table} r ON r.user_id = k.user_id AND r.id = k.id AND NOT r.deleted"""


def _named(columns: Sequence[str]) -> list[str]:
    return [f"r.{name}" for name in columns]


def _records(resource: str, columns: Sequence[str]) -> Any:
    table = record_table(catalogue()[resource])
    names = ", ".join(columns)
    return text(f"""
SELECT given.n, r.user_id, r.id, r.provider, r.source_type, {names}
{GIVEN_RECORDS.format(resource=resource, table=table)}
ORDER BY given.n, r.version DESC, r.user_id, r.id""")


RECORDS = {
    name: _records(
        name, [f"{STARTS[name]} AS starts", f"{ENDS[name]} AS ends", "r.timezone_offset", *_named(COLUMNS[name])]
    )
    for name in SESSIONS
} | {SUMMARY: _records(SUMMARY, ["r.calendar_date", *_named(COLUMNS[SUMMARY])])}


class RawSample(NamedTuple):
    """A sample as it is stored. `source` is its source's place in the order of ranks."""

    source: int
    start: int
    stop: int
    value: float | None
    offset: int | None
    unit: str
    user_id: str
    fields: Mapping[str, Any] | None


@dataclass
class Inputs:
    """What one stretch is computed from."""

    stretch: Stretch
    sources: list[DataSource] = field(default_factory=list)  # best first; twice if two users have it
    samples: list[RawSample] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)
    sessions: list[tuple[TimedSession, bool]] = field(default_factory=list)  # and whether it has an offset of its own


class _Window(NamedTuple):
    """A series in the window of a stretch."""

    n: int
    series: Series
    first: datetime
    last: datetime


Owned = tuple[DataSource, str]  # a source and its user: two users of a person may have the same one


def read(connection: Connection, stretches: Sequence[Stretch], users: Mapping[str, Sequence[str]]) -> list[Inputs]:
    """Reads the inputs of each stretch, in a fixed number of queries. `users` are those of each person."""
    found = [Inputs(one) for one in stretches]
    windows = _windows(connection, stretches, users)
    records = {name: _read_records(connection, name, stretches, users) for name in RECORDS}
    lists = lists_of(connection, [(one.person, one.resource) for one in stretches])
    places: list[dict[Owned, int]] = []
    for n, one in enumerate(found):
        owned = {(DataSource(w.series.provider, w.series.source_type), w.series.user_id) for w in windows if w.n == n}
        rows = [row for of_resource in records.values() for row in of_resource[n]]
        owned |= {(DataSource(row.provider, row.source_type), row.user_id) for row in rows}
        order = in_order({source for source, _ in owned}, lists[one.stretch.person, one.stretch.resource])
        ranked = sorted(owned, key=lambda pair, order=order: (order.index(pair[0]), pair[1]))  # type: ignore[misc]
        one.sources = [source for source, _ in ranked]
        places.append({pair: place for place, pair in enumerate(ranked)})
        _add_records(one, records, n, places[n])
    _read_samples(connection, found, windows, places)
    return found


def _windows(connection: Connection, stretches: Sequence[Stretch], users: Mapping[str, Sequence[str]]) -> list[_Window]:
    everyone = sorted({user for one in stretches for user in users.get(one.person, ())})
    known: dict[tuple[str, str], list[Series]] = defaultdict(list)
    for series in series_of(connection, everyone, sorted({one.resource for one in stretches})):
        known[series.user_id, series.resource].append(series)
    windows: list[_Window] = []
    for n, one in enumerate(stretches):
        mine = [series for user in users.get(one.person, ()) for series in known[user, one.resource]]
        reach = reach_of(mine)
        first, last = at_midnight(one.first) - reach.after, at_midnight(one.last) + timedelta(days=1) + reach.before
        minute = timedelta(minutes=1)  # of which gauges compare all samples
        windows += [_Window(n, series, first - minute, last + minute) for series in mine]
    return windows


def at_midnight(day: date) -> datetime:
    """The midnight of UTC at which a date begins."""
    return datetime.combine(day, time(), UTC)


def _read_samples(
    connection: Connection, found: Sequence[Inputs], windows: Sequence[_Window], places: Sequence[Mapping[Owned, int]]
) -> None:
    if not windows:
        return
    values = {
        "numbers": list(range(len(windows))),
        "series": [one.series.id for one in windows],
        "firsts": [one.first for one in windows],
        "lasts": [one.last for one in windows],
        "fields": [bool(catalogue()[one.series.resource].fields) for one in windows],
        "first": min(one.first for one in windows),
        "last": max(one.last for one in windows),
        "max_length": MAX_LENGTH,
    }
    targets = []
    for one in windows:
        place = places[one.n][DataSource(one.series.provider, one.series.source_type), one.series.user_id]
        targets.append((found[one.n].samples, place, one.series.user_id))
    for n, start, stop, value, offset, unit, fields in connection.execute(SAMPLES, values):
        rows, place, user_id = targets[n]
        known = offset if offset is None or abs(offset) <= MAX_OFFSET else None
        rows.append(RawSample(place, start, stop, value, known, unit, user_id, fields))


def _read_records(
    connection: Connection, resource: str, stretches: Sequence[Stretch], users: Mapping[str, Sequence[str]]
) -> dict[int, list[Any]]:
    of = summarised() if resource == SUMMARY else (resource,)
    given = [
        (n, user, first - SESSIONS_BEFORE, at_midnight(one.last) + SESSIONS_AFTER, first - SESSIONS_ENDED)
        for n, one in enumerate(stretches)
        if one.resource in of
        for first in (at_midnight(one.first),)
        for user in users.get(one.person, ())
    ]
    found: dict[int, list[Any]] = defaultdict(list)
    if given:
        names = ("numbers", "users", "firsts", "lasts", "ended")
        columns = dict(zip(names, map(list, zip(*given, strict=True)), strict=True))
        for row in connection.execute(RECORDS[resource], columns):
            found[row.n].append(row)
    return found


def _add_records(
    one: Inputs, records: Mapping[str, Mapping[int, list[Any]]], n: int, places: Mapping[Owned, int]
) -> None:
    for resource, of_resource in records.items():
        for row in of_resource.get(n, ()):
            place = places[DataSource(row.provider, row.source_type), row.user_id]
            if resource == SUMMARY:
                value = usable(getattr(row, one.stretch.resource))
                if value is not None and row.calendar_date is not None:
                    one.summaries.append(Summary(place, as_day(row.calendar_date), value, row.user_id))
            else:
                one.sessions.append(_session(row, place, COLUMNS[resource]))


def _session(row: Any, place: int, columns: Sequence[str]) -> tuple[TimedSession, bool]:
    offset = row.timezone_offset if abs(row.timezone_offset or 0) <= MAX_OFFSET else None
    starts, ends = as_moment(row.starts), as_moment(max(row.starts, row.ends))
    values = tuple(usable(getattr(row, name)) for name in columns)
    session = TimedSession(place, starts, ends, offset or 0, 0, row.user_id, row.id, values)
    return session, offset is not None


def usable(value: Any) -> float | None:
    """A stored number; None if there is none, or the sums of a day could overflow by it."""
    return float(value) if isinstance(value, int | float) and abs(value) <= MAX_AMOUNT else None


def parts(one: Inputs) -> list[tuple[str, list[tuple[RawSample, float]]]]:
    """The samples of each number of the resource, by metric, with the number."""
    found = []
    for part in parts_of(catalogue()[one.stretch.resource]):
        rows = []
        for raw in one.samples:
            value = usable(raw.value if part.field is None else (raw.fields or {}).get(part.field))
            if value is not None:
                rows.append((raw, value))
        found.append((part.metric, rows))
    return found


def is_within(stretch: Stretch, day: int) -> bool:
    """Whether a day belongs to the dates that are computed."""
    return as_day(stretch.first) <= day <= as_day(stretch.last)
