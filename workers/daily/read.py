"""Reads the inputs of days: samples, summaries, sessions and priorities."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, TextClause, text

from app.catalogue import catalogue
from workers.daily.metrics import SESSIONS, SUMMARY, summarised
from workers.daily.model import MAX_OFFSET, DataSource, Summary, TimedSession, as_day
from workers.daily.priorities import in_order, lists_of
from workers.daily.queue import Stretch
from workers.daily.sessions import SLEEP, WORKOUTS
from workers.daily.state import ANY_OFFSET, ENDS, MAX_LENGTH, STARTS, Series, reach_of, series_of
from workers.store.schema import record_table
from workers.store.sql import RowParameters

MICROSECONDS = "CAST(date_part('epoch', {}) * 1000000 AS bigint)"
WINDOWS = RowParameters("n int, series_id int, first timestamptz, last timestamptz, has_fields boolean")
# :first and :last are constants for the whole statement, so that PostgreSQL can skip partitions when it plans.
# Arrays: reading a sample takes 0.9 to 1.2 us of this process's CPU time. As a row for each it took 2.5.
SAMPLES = text(f"""
SELECT given.n, array_agg({MICROSECONDS.format("s.ts")}) AS starts,
       array_agg({MICROSECONDS.format("greatest(s.ts_end, s.ts)")}) AS stops,
       array_agg(CASE WHEN abs(s.value) <= :max_amount THEN s.value END) AS values,
       array_agg(CASE WHEN abs(s.timezone_offset) <= {MAX_OFFSET} THEN s.timezone_offset END) AS offsets,
       array_agg(s.unit) AS units, array_agg(s.extra) FILTER (WHERE given.has_fields) AS fields
FROM {WINDOWS}
JOIN headrace.samples s ON s.series_id = given.series_id AND s.ts >= given.first AND s.ts < given.last
WHERE s.ts >= :first AND s.ts < :last AND coalesce(s.ts_end - s.ts, '0') <= :max_length
GROUP BY given.n ORDER BY given.n""")
MAX_AMOUNT = 1e290  # of a number: a product of it with microseconds, and a sum of millions, are finite
COLUMNS = {
    "sleep": [name.removeprefix("sleep_") for name in SLEEP],
    "workouts": [name.removeprefix("workouts_") for name in WORKOUTS],
    SUMMARY: list(summarised()),
}
PERIODS = RowParameters("n int, user_id text, first timestamptz, last timestamptz")  # the midnights around the dates
# The dates of a stretch depend on the sessions that can be on them, and on those that overlap one of these, directly or
# through others. PostgreSQL selects them by their times: a process that read all sessions of twelve days and dropped
# most of them took twice the CPU time.
# Overlaps are searched for up to 3 days before and 4 days after the dates.
SELECTED_SESSIONS = f"""
near AS (
    SELECT given.*, k.id, k.starts, k.ends, coalesce(max(k.ends) OVER earlier < k.starts, true) AS is_apart
    FROM {PERIODS} JOIN headrace.daily_records k ON k.user_id = given.user_id AND k.resource = '{{resource}}'
        AND k.starts >= given.first - interval '10 days' AND k.starts < given.last + interval '4 days'
        AND k.ends >= given.first - interval '3 days'
    WINDOW earlier AS (PARTITION BY given.n ORDER BY k.starts, k.ends, k.user_id, k.id
                       ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)),
joined AS (
    SELECT *, count(*) FILTER (WHERE is_apart) OVER (PARTITION BY n ORDER BY starts, ends, user_id, id) AS part
    FROM near),
selected AS (
    SELECT n, user_id, id, bool_or(starts < last + {ANY_OFFSET} AND ends >= first - {ANY_OFFSET}) OVER one AS is_needed
    FROM joined WINDOW one AS (PARTITION BY n, part))"""
SELECTED_SUMMARIES = f"""
selected AS (
    SELECT given.n, k.user_id, k.id, true AS is_needed
    FROM {PERIODS} JOIN headrace.daily_records k ON k.user_id = given.user_id AND k.resource = '{{resource}}'
        AND k.starts >= given.first - {ANY_OFFSET} AND k.starts < given.last + {ANY_OFFSET})"""


def _records(resource: str) -> TextClause:
    if resource == SUMMARY:
        selected, times = SELECTED_SUMMARIES, "calendar_date"
    else:
        start, stop = STARTS[resource], f"greatest({STARTS[resource]}, {ENDS[resource]})"
        selected = SELECTED_SESSIONS
        times = f"{MICROSECONDS.format(start)} AS start, {MICROSECONDS.format(stop)} AS stop"
    return text(f"""
WITH {selected.format(resource=resource)}
SELECT selected.n, r.user_id, r.id, r.provider, r.source_type, r.timezone_offset, {times},
       {", ".join(f"r.{name}" for name in COLUMNS[resource])}
FROM selected JOIN {record_table(catalogue()[resource])} r USING (user_id, id)
WHERE is_needed AND NOT r.deleted ORDER BY selected.n, r.version DESC, r.user_id, r.id""")


RECORDS = {name: _records(name) for name in (*SESSIONS, SUMMARY)}


class StoredSamples(NamedTuple):
    """The samples of one series, in any order: a list per column. A value or an offset that is not usable is None.

    `source` is the place of the series in the order of ranks. `fields` is None if the resource has none.
    """

    source: int
    user_id: str
    starts: list[int]
    stops: list[int]
    values: list[float | None]
    offsets: list[int | None]
    units: list[str]
    fields: list[Mapping[str, Any] | None] | None

    def numbers(self, field: str | None) -> list[float | None]:
        """The numbers of a metric: the values, or a field of each sample. None if a number is not usable."""
        return self.values if field is None else [usable((one or {}).get(field)) for one in self.fields or ()]


Owned = tuple[DataSource, str]  # a source and its user: two users of a person may have the same one


@dataclass
class Inputs:
    """The stored rows from which one stretch is computed."""

    stretch: Stretch
    sources: list[DataSource] = field(default_factory=list)  # best first; twice if two users have it
    samples: list[StoredSamples] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)
    sessions: list[tuple[TimedSession, bool]] = field(default_factory=list)  # and whether it has an offset of its own
    places: dict[Owned, int] = field(default_factory=dict)  # in `sources`


class _Window(NamedTuple):
    """A series in the window of a stretch."""

    series: Series
    first: datetime
    last: datetime


def read(connection: Connection, stretches: Sequence[Stretch], users: Mapping[str, Sequence[str]]) -> list[Inputs]:
    """Reads the inputs of each stretch, in a fixed number of queries. `users` are those of each person."""
    found = [Inputs(one) for one in stretches]
    windows = _windows(connection, stretches, users)
    records = {name: _read_records(connection, name, stretches, users) for name in RECORDS}
    lists = lists_of(connection, [(one.person, one.resource) for one in stretches])
    for n, one in enumerate(found):
        rows = [(resource, row, _owned(row)) for resource, of_resource in records.items() for row in of_resource[n]]
        owned = {_owned(window.series) for window in windows[n]} | {of for _, _, of in rows}
        order = in_order({source for source, _ in owned}, lists[one.stretch.person, one.stretch.resource])
        ranked = sorted(owned, key=lambda pair, order=order: (order.index(pair[0]), pair[1]))  # type: ignore[misc]
        one.sources = [source for source, _ in ranked]
        one.places = {pair: place for place, pair in enumerate(ranked)}
        for resource, row, of in rows:
            _add_record(one, resource, row, one.places[of])
    _read_samples(connection, found, windows)
    return found


def _owned(of: Any) -> Owned:
    """Of a series, or of a row of a record."""
    return DataSource(of.provider, of.source_type), of.user_id


def _windows(
    connection: Connection, stretches: Sequence[Stretch], users: Mapping[str, Sequence[str]]
) -> list[list[_Window]]:
    """The windows of each stretch."""
    known = series_of(connection, users, [one.resource for one in stretches])
    windows = []
    for one in stretches:
        mine = known[one.person, one.resource]
        reach = reach_of(mine)
        minute = timedelta(minutes=1)  # of which gauges compare all samples
        first = at_midnight(one.first) - reach.after - minute
        last = at_midnight(one.last) + timedelta(days=1) + reach.before + minute
        windows.append([_Window(series, first, last) for series in mine])
    return windows


def at_midnight(day: date) -> datetime:
    """The midnight of UTC at which a date begins."""
    return datetime.combine(day, time(), UTC)


def _read_samples(connection: Connection, found: Sequence[Inputs], windows: Sequence[Sequence[_Window]]) -> None:
    asked = [(one, window) for one, mine in zip(found, windows, strict=True) for window in mine]
    if not asked:
        return
    given = WINDOWS.values(
        (n, window.series.id, window.first, window.last, bool(catalogue()[window.series.resource].fields))
        for n, (_, window) in enumerate(asked)
    )
    bounds = {"first": min(window.first for _, window in asked), "last": max(window.last for _, window in asked)}
    limits = {"max_length": MAX_LENGTH, "max_amount": MAX_AMOUNT}
    for n, *columns in connection.execute(SAMPLES, {**given, **bounds, **limits}).all():
        one, window = asked[n]
        one.samples.append(StoredSamples(one.places[_owned(window.series)], window.series.user_id, *columns))


def _read_records(
    connection: Connection, resource: str, stretches: Sequence[Stretch], users: Mapping[str, Sequence[str]]
) -> dict[int, list[Any]]:
    of = summarised() if resource == SUMMARY else (resource,)
    given = [
        (n, user, at_midnight(one.first), at_midnight(one.last) + timedelta(days=1))
        for n, one in enumerate(stretches)
        if one.resource in of
        for user in users.get(one.person, ())
    ]
    found: dict[int, list[Any]] = defaultdict(list)
    for row in connection.execute(RECORDS[resource], PERIODS.values(given)).all() if given else ():
        found[row.n].append(row)
    return found


def _add_record(one: Inputs, resource: str, row: Any, place: int) -> None:
    if resource == SUMMARY:
        value = usable(getattr(row, one.stretch.resource))
        if value is not None and row.calendar_date is not None:
            one.summaries.append(Summary(place, as_day(row.calendar_date), value, row.user_id))
        return
    offset = row.timezone_offset if abs(row.timezone_offset or 0) <= MAX_OFFSET else None
    session = TimedSession(
        source=place,
        start=row.start,
        stop=row.stop,
        offset=offset or 0,
        zone=0,
        user_id=row.user_id,
        id=row.id,
        values=tuple(usable(getattr(row, name)) for name in COLUMNS[resource]),
    )
    one.sessions.append((session, offset is not None))


def usable(value: Any) -> float | None:
    """A stored number; None if there is none, or the sums of a day could overflow by it."""
    return float(value) if isinstance(value, int | float) and abs(value) <= MAX_AMOUNT else None
