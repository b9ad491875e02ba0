"""The users of people, the reach of their samples, and the times of their records.

They determine which days a changed row can touch, and which rows can touch a day. They do not shrink when rows are
removed, because a removed row may have been in a day that is computed again.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from sqlalchemy import Connection, text

from app.catalogue import catalogue
from workers.daily.metrics import SESSIONS, SUMMARY
from workers.daily.model import MAX_OFFSET
from workers.store.schema import record_table
from workers.store.sql import RowParameters

# A longer sample says nothing about a day, and is left out: its days could not be found without reading everything.
MAX_LENGTH = timedelta(days=31)
ANY_OFFSET = f"interval '{MAX_OFFSET} seconds'"
# The lock makes an erasure of the user wait for this transaction, which may write days (workers/store/erase.py).
USERS = text("""
SELECT user_id, coalesce(client_user_id, user_id) AS person FROM headrace.users
WHERE coalesce(client_user_id, user_id) = ANY(:persons) AND erased_at IS NULL AND merged_into IS NULL
ORDER BY user_id FOR KEY SHARE""")
SERIES = text("""
SELECT n.id, n.user_id, n.resource, n.provider, n.source_type, coalesce(s.longest, '0') AS longest, s.min_offset,
       s.max_offset, coalesce(s.lacks_offset, true) AS lacks_offset
FROM headrace.series n LEFT JOIN headrace.daily_series s ON s.series_id = n.id
WHERE n.user_id = ANY(:users) AND n.resource = ANY(:resources) ORDER BY n.id""")
# Lengths over the limit are not stored: these samples are left out.
REACH = f"""
INSERT INTO headrace.daily_series AS known (series_id, longest, min_offset, max_offset, lacks_offset)
SELECT n.id, coalesce(max(s.ts_end - s.ts) FILTER (WHERE s.ts_end - s.ts BETWEEN '0' AND :max_length), '0'),
       min(s.timezone_offset) FILTER (WHERE abs(s.timezone_offset) <= {MAX_OFFSET}),
       max(s.timezone_offset) FILTER (WHERE abs(s.timezone_offset) <= {MAX_OFFSET}),
       bool_or(s.timezone_offset IS NULL OR abs(s.timezone_offset) > {MAX_OFFSET})
FROM {{source}} GROUP BY n.id ORDER BY n.id
ON CONFLICT (series_id) DO UPDATE SET longest = greatest(known.longest, excluded.longest),
    min_offset = least(known.min_offset, excluded.min_offset),
    max_offset = greatest(known.max_offset, excluded.max_offset),
    lacks_offset = known.lacks_offset OR excluded.lacks_offset
WHERE excluded.longest > known.longest OR excluded.lacks_offset > known.lacks_offset
   OR excluded.min_offset < coalesce(known.min_offset, 999999)
   OR excluded.max_offset > coalesce(known.max_offset, -999999)"""
CHANGES = RowParameters("user_id text, resource text, first timestamptz, last timestamptz")
REACH_OF_CHANGES = text(
    REACH.format(
        source=f"""{CHANGES}
JOIN headrace.series n USING (user_id, resource)
JOIN headrace.samples s ON s.series_id = n.id AND s.ts BETWEEN given.first AND given.last
    AND s.ts BETWEEN :first AND :last"""
    )
)
REACH_OF_SERIES = text(
    REACH.format(source="headrace.series n JOIN headrace.samples s ON s.series_id = n.id WHERE n.id = ANY(:series)")
)
BOUNDS = text("""
SELECT min(first) AS first, max(last) AS last FROM unnest(CAST(:series AS int[])) AS given(id),
LATERAL (SELECT (SELECT min(ts) FROM headrace.samples WHERE series_id = given.id) AS first,
                (SELECT max(ts) FROM headrace.samples WHERE series_id = given.id) AS last) AS bounds""")
# Where each record's times are: of a summary the middle of its local day, of which it has only the date.
STARTS = {"sleep": "bedtime_start", "workouts": "time_start"}
MOMENTS = {"sleep": "ends", "workouts": "starts"}  # on whose local date a session is
ENDS = {"sleep": "bedtime_stop", "workouts": "coalesce(time_end, time_start)"}
NOON = "(calendar_date + interval '12 hours') AT TIME ZONE 'UTC' - make_interval(secs => coalesce(timezone_offset, 0))"


@dataclass(frozen=True)
class Series:
    """A series of samples, with the reach of its samples."""

    id: int
    user_id: str
    resource: str
    provider: str
    source_type: str
    longest: timedelta
    min_offset: int | None  # None: no sample had one
    max_offset: int | None
    lacks_offset: bool


@dataclass(frozen=True)
class Reach:
    """How far before and after a moment the local days lie that a sample at this moment can touch."""

    before: timedelta
    after: timedelta

    def dates(self, first: datetime, last: datetime) -> tuple[date, date]:
        """The local dates that samples between two moments can touch."""
        return (first - self.before).date(), (last + self.after).date()


def reach_of(series: Iterable[Series]) -> Reach:
    """Of a person's series of one resource; -18 h to +18 h if a sample without an offset can have any."""
    series = list(series)
    is_open = not series or any(one.lacks_offset or one.min_offset is None for one in series)
    lowest = -MAX_OFFSET if is_open else min(one.min_offset or 0 for one in series)
    highest = MAX_OFFSET if is_open else max(one.max_offset or 0 for one in series)
    longest = max((one.longest for one in series), default=timedelta(0))
    return Reach(timedelta(seconds=-lowest), timedelta(seconds=highest) + longest)


def users_of(connection: Connection, persons: Sequence[str]) -> dict[str, list[str]]:
    """The users of each person, locked against an erasure until the transaction ends."""
    found: dict[str, list[str]] = {}
    for row in connection.execute(USERS, {"persons": list(persons)}).all():
        found.setdefault(row.person, []).append(row.user_id)
    return found


def series_of(
    connection: Connection, users: Mapping[str, Sequence[str]], resources: Iterable[str]
) -> defaultdict[tuple[str, str], list[Series]]:
    """The series of each person and resource, with their reach. `users` are those of each person."""
    persons = {user: person for person, ids in users.items() for user in ids}
    found: defaultdict[tuple[str, str], list[Series]] = defaultdict(list)
    values = {"users": list(persons), "resources": sorted(set(resources))}
    for row in connection.execute(SERIES, values).mappings().all():
        found[persons[row["user_id"]], row["resource"]].append(Series(**row))
    return found


def extend_reach(connection: Connection, ranges: Iterable[tuple[str, str, datetime, datetime]]) -> None:
    """Reads the samples in changed ranges: user, resource, first and last time."""
    if rows := list(ranges):
        bounds = {"first": min(row[2] for row in rows), "last": max(row[3] for row in rows)}
        connection.execute(REACH_OF_CHANGES, {**CHANGES.values(rows), **bounds, "max_length": MAX_LENGTH})


def read_reach(connection: Connection, series: Sequence[Series]) -> tuple[datetime, datetime] | None:
    """Reads all samples of the series, and returns the time of the first and the last one."""
    values = {"series": [one.id for one in series]}
    connection.execute(REACH_OF_SERIES, values | {"max_length": MAX_LENGTH})
    row = connection.execute(BOUNDS, values).one()
    return (row.first, row.last) if row.first is not None else None


def _record_source(resource: str, where: str) -> str:
    start, end = STARTS.get(resource, NOON), ENDS.get(resource, NOON)
    return f"""
SELECT user_id, '{resource}' AS resource, id, {start} AS starts, greatest({start}, {end}) AS ends, timezone_offset
FROM {record_table(catalogue()[resource])} AS r
WHERE {where} AND NOT deleted AND {start} IS NOT NULL AND {end} IS NOT NULL AND NOT EXISTS (
    SELECT 1 FROM headrace.retractions t WHERE (t.user_id, t.resource, t.id) = (r.user_id, '{resource}', r.id))"""


# The local dates that a record touches are those of `first` and `last`. A session decides which of the sessions that
# overlap it are kept, and these may be on the day before or after, at any offset; one that overlaps no other is on the
# date of its own `moment` only. PostgreSQL joins the dates: reading two rows for each record took a fifth of the time
# of this lane.
TOUCHED_BY_SUMMARIES = """
dated AS (
    SELECT user_id, noon AS first, noon AS last
    FROM times, LATERAL (SELECT starts + make_interval(secs => coalesce(timezone_offset, 0)) AS noon) AS local)"""
# A changed session that overlaps only other changed ones needs no margin: each of them touches its own dates.
# Others that began more than three days earlier are not searched for: their dates are beyond the margin.
TOUCHED_BY_SESSIONS = f"""
placed AS MATERIALIZED (
    SELECT user_id, starts, ends, {{moment}} AS moment,
           CASE WHEN abs(timezone_offset) <= {MAX_OFFSET} THEN make_interval(secs => timezone_offset) END AS shift,
           EXISTS (
               SELECT FROM headrace.users own
               JOIN headrace.users every
                   ON coalesce(every.client_user_id, every.user_id) = coalesce(own.client_user_id, own.user_id)
               JOIN headrace.daily_records k ON k.user_id = every.user_id AND k.resource = times.resource
                   AND k.starts BETWEEN times.starts - interval '3 days' AND times.ends
                   AND k.ends >= times.starts
               WHERE own.user_id = times.user_id AND (k.user_id, k.id) <> (times.user_id, times.id)) AS is_overlapping
    FROM times),
dated AS (
    SELECT user_id,
           CASE WHEN is_overlapping THEN starts - interval '1 day' - {ANY_OFFSET}
                ELSE coalesce(moment + shift, moment - {ANY_OFFSET}) END AS first,
           CASE WHEN is_overlapping THEN ends + interval '1 day' + {ANY_OFFSET}
                ELSE coalesce(moment + shift, moment + {ANY_OFFSET}) END AS last
    FROM placed)"""
FIRST = "CAST(greatest(first, '0001-01-02') AT TIME ZONE 'UTC' AS date)"
LAST = "CAST(least(last, '9999-12-30') AT TIME ZONE 'UTC' AS date)"
RECORDS = RowParameters("user_id text, id text")


def _update_records(resource: str) -> str:
    """Returns ranges by user: the dates that the given records touch, before and after, and where offsets are known."""
    is_session = resource in SESSIONS
    dated = TOUCHED_BY_SESSIONS.format(moment=MOMENTS[resource]) if is_session else TOUCHED_BY_SUMMARIES
    return f"""
WITH given AS MATERIALIZED (SELECT * FROM {RECORDS}),
old AS MATERIALIZED (
    SELECT k.* FROM headrace.daily_records k JOIN given USING (user_id, id) WHERE k.resource = '{resource}'),
new AS MATERIALIZED ({_record_source(resource, "(user_id, id) IN (SELECT user_id, id FROM given)")}),
gone AS (
    DELETE FROM headrace.daily_records k USING old
    WHERE (k.user_id, k.resource, k.id) = (old.user_id, '{resource}', old.id)
      AND NOT EXISTS (SELECT 1 FROM new WHERE (new.user_id, new.id) = (old.user_id, old.id))),
put AS (
    INSERT INTO headrace.daily_records AS k SELECT * FROM new ORDER BY user_id, id
    ON CONFLICT (user_id, resource, id) DO UPDATE SET starts = excluded.starts, ends = excluded.ends,
        timezone_offset = excluded.timezone_offset
    WHERE (k.starts, k.ends, k.timezone_offset) IS DISTINCT FROM
          (excluded.starts, excluded.ends, excluded.timezone_offset)),
times AS MATERIALIZED (SELECT * FROM old UNION SELECT * FROM new),
{dated},
dates AS (SELECT user_id, range_agg(daterange({FIRST}, {LAST}, '[]')) AS parts FROM dated GROUP BY user_id),
known AS (
    SELECT user_id, range_agg(tstzrange(starts, ends + interval '1 day')) AS parts FROM times
    WHERE timezone_offset IS NOT NULL GROUP BY user_id)
SELECT user_id, true AS is_dates, lower(part) AS first, upper(part) - 1 AS last,
       CAST(NULL AS timestamptz) AS starts, CAST(NULL AS timestamptz) AS ends FROM dates, unnest(parts) AS part
UNION ALL
SELECT user_id, false, NULL, NULL, lower(part), upper(part) - interval '1 day' FROM known, unnest(parts) AS part"""


UPDATE_RECORDS = {name: text(_update_records(name)) for name in (*SESSIONS, SUMMARY)}
RECORDS_OF = """
SELECT user_id, id FROM {table} WHERE user_id = ANY(:users)
UNION SELECT user_id, id FROM headrace.daily_records WHERE user_id = ANY(:users) AND resource = :resource"""


@dataclass(frozen=True)
class TouchedByRecords:
    """Local dates, both inclusive, and times with a known offset that records touch, before and after they changed."""

    dates: list[tuple[str, date, date]]  # of a user
    known: list[tuple[str, datetime, datetime]]


def update_records(connection: Connection, resource: str, keys: Iterable[tuple[str, str]]) -> TouchedByRecords:
    """Stores the times of changed records, each a user and an id, and returns what they touch."""
    rows = connection.execute(UPDATE_RECORDS[resource], RECORDS.values(keys)).all()
    return TouchedByRecords(
        [(row.user_id, row.first, row.last) for row in rows if row.is_dates],
        [(row.user_id, row.starts, row.ends) for row in rows if not row.is_dates],
    )


def records_of(connection: Connection, resource: str, users: Sequence[str]) -> list[tuple[str, str]]:
    """The user and the id of all records of users, including those whose times are known from before."""
    query = text(RECORDS_OF.format(table=record_table(catalogue()[resource])))
    rows = connection.execute(query, {"users": list(users), "resource": resource})
    return [(row.user_id, row.id) for row in rows]
