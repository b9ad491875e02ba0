"""The offset of samples and records that have none: of the person's nearest one that has, or of the person's zone."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, TextClause, text

from workers.daily.model import MAX_OFFSET, as_moment, as_time
from workers.daily.priorities import zone_of

RECORDS = """
WITH records AS MATERIALIZED (
    SELECT CASE resource WHEN 'sleep' THEN ends ELSE starts END AS ts, timezone_offset
    FROM headrace.daily_records WHERE user_id = ANY(:users) AND abs(timezone_offset) <= :max_offset)"""
EDGES = """
SELECT earlier.ts, earlier.timezone_offset FROM unnest(CAST(:series AS int[])) AS given(id), LATERAL (
    SELECT ts, timezone_offset FROM headrace.samples WHERE series_id = given.id AND ts < :first
       AND abs(timezone_offset) <= :max_offset ORDER BY ts DESC LIMIT 1) AS earlier
UNION ALL SELECT later.ts, later.timezone_offset FROM unnest(CAST(:series AS int[])) AS given(id), LATERAL (
    SELECT ts, timezone_offset FROM headrace.samples WHERE series_id = given.id AND ts > :last
       AND abs(timezone_offset) <= :max_offset ORDER BY ts LIMIT 1) AS later
UNION ALL (SELECT ts, timezone_offset FROM records WHERE ts < :first ORDER BY ts DESC, timezone_offset LIMIT 1)
UNION ALL (SELECT ts, timezone_offset FROM records WHERE ts > :last ORDER BY ts, timezone_offset LIMIT 1)"""
# The last known offset of each series before a range of time, and the first one after it.
AROUND = text(f"{RECORDS}{EDGES}")
# And the points in the range at which the offset of the person's samples and records changes. The others in the range
# are left out by comparing all points in the range, and no others.
POINTS = text(f"""{RECORDS},
known AS (
    SELECT s.ts, s.timezone_offset FROM headrace.samples s
    WHERE s.series_id = ANY(:series) AND s.ts BETWEEN :first AND :last AND abs(s.timezone_offset) <= :max_offset
    UNION ALL SELECT ts, timezone_offset FROM records WHERE ts BETWEEN :first AND :last),
near AS (
    SELECT ts, timezone_offset, lag(timezone_offset) OVER in_time AS before, lead(timezone_offset) OVER in_time AS after
    FROM known WINDOW in_time AS (ORDER BY ts, timezone_offset))
SELECT ts, timezone_offset FROM near
WHERE before IS DISTINCT FROM timezone_offset OR after IS DISTINCT FROM timezone_offset
UNION ALL {EDGES}""")
WITH_OFFSETS = text("""
SELECT n.id FROM headrace.series n JOIN headrace.daily_series s ON s.series_id = n.id
WHERE n.user_id = ANY(:users) AND s.min_offset IS NOT NULL""")
IN_ZONE = text("""
SELECT CAST(date_part('epoch', (ts AT TIME ZONE :zone) - (ts AT TIME ZONE 'UTC')) AS int)
FROM unnest(CAST(:moments AS timestamptz[])) WITH ORDINALITY AS given(ts, n) ORDER BY n""")
NEIGHBOUR, USER_ZONE, UTC_ZONE = 1, 2, 3  # places of ZONE_SOURCES


class OffsetTimeline:
    """The known offsets of a person, from which the nearest one to any moment is read.

    The points between two equal ones may be left out: the nearest offset is the same.
    """

    def __init__(self, points: Iterable[tuple[int, int]]) -> None:
        """`points` are moments with the offset in seconds, in any order."""
        known = sorted({point for point in points if abs(point[1]) <= MAX_OFFSET})
        self._moments = [moment for moment, _ in known]
        self._offsets = [offset for _, offset in known]

    def nearest(self, moment: int) -> int | None:
        """The offset of the nearest point; None without points.

        Of two points at the same distance the earlier one decides, of two at one moment the smaller offset.
        """
        if not self._moments:
            return None
        after = bisect_right(self._moments, moment)
        if after == len(self._moments) or (
            after > 0 and moment - self._moments[after - 1] <= self._moments[after] - moment
        ):
            after -= 1
        return self._offsets[bisect_left(self._moments, self._moments[after])]


def offsets_at(
    connection: Connection, person: str, users: Sequence[str], moments: Iterable[int]
) -> dict[int, tuple[int, int]]:
    """The offset of a person at moments at which a sample or record has none, and the place of its ZONE_SOURCES."""
    wanted = sorted(set(moments))
    if not wanted:
        return {}
    points = _points(connection, POINTS, users, as_time(wanted[0]), as_time(wanted[-1]))
    timeline = OffsetTimeline((as_moment(row.ts), row.timezone_offset) for row in points)
    near = {moment: timeline.nearest(moment) for moment in wanted}
    found = {moment: (offset, NEIGHBOUR) for moment, offset in near.items() if offset is not None}
    if found:
        return found
    zone = zone_of(connection, person)
    if zone is None:
        return dict.fromkeys(wanted, (0, UTC_ZONE))
    offsets = connection.scalars(IN_ZONE, {"zone": zone.name, "moments": [as_time(one) for one in wanted]})
    return {moment: (offset, USER_ZONE) for moment, offset in zip(wanted, offsets, strict=True)}


def nearest_known(
    connection: Connection, users: Sequence[str], first: datetime, last: datetime
) -> tuple[datetime | None, datetime | None]:
    """The last moment before a range of time, and the first one after it, at which the offset of users is known.

    A changed offset in the range can touch samples without an offset up to these moments.
    """
    moments = [row.ts for row in _points(connection, AROUND, users, first, last)]
    before, after = (one for one in moments if one < first), (one for one in moments if one > last)
    return max(before, default=None), min(after, default=None)


def _points(
    connection: Connection, query: TextClause, users: Sequence[str], first: datetime, last: datetime
) -> Sequence[Row[Any]]:
    series = list(connection.scalars(WITH_OFFSETS, {"users": list(users)}))
    values = {"series": series, "users": list(users), "first": first, "last": last, "max_offset": MAX_OFFSET}
    return connection.execute(query, values).all()
