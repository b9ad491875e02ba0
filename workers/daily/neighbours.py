"""The offset of samples and records that have none: of the person's nearest one that has, or of the person's zone."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from sqlalchemy import Connection, text

from workers.daily.model import MAX_OFFSET, as_moment, as_time
from workers.daily.offsets import OffsetTimeline

# The points at which the offset of a person's samples and records changes, in a range of time; and, so that the
# nearest one is among them, the last point of each series before it and the first one after it. Points in the range are
# left out by comparing all points in the range, and no others.
POINTS = text("""
WITH records AS MATERIALIZED (
    SELECT CASE resource WHEN 'sleep' THEN ends ELSE starts END AS ts, timezone_offset
    FROM headrace.daily_records WHERE user_id = ANY(:users) AND abs(timezone_offset) <= :max_offset),
known AS (
    SELECT s.ts, s.timezone_offset FROM headrace.samples s
    WHERE s.series_id = ANY(:series) AND s.ts BETWEEN :first AND :last AND abs(s.timezone_offset) <= :max_offset
    UNION ALL SELECT ts, timezone_offset FROM records WHERE ts BETWEEN :first AND :last),
near AS (
    SELECT ts, timezone_offset, lag(timezone_offset) OVER in_time AS before, lead(timezone_offset) OVER in_time AS after
    FROM known WINDOW in_time AS (ORDER BY ts, timezone_offset))
SELECT ts, timezone_offset FROM near
WHERE before IS DISTINCT FROM timezone_offset OR after IS DISTINCT FROM timezone_offset
UNION ALL SELECT earlier.ts, earlier.timezone_offset FROM unnest(CAST(:series AS int[])) AS given(id), LATERAL (
    SELECT ts, timezone_offset FROM headrace.samples WHERE series_id = given.id AND ts < :first
       AND abs(timezone_offset) <= :max_offset ORDER BY ts DESC LIMIT 1) AS earlier
UNION ALL SELECT later.ts, later.timezone_offset FROM unnest(CAST(:series AS int[])) AS given(id), LATERAL (
    SELECT ts, timezone_offset FROM headrace.samples WHERE series_id = given.id AND ts > :last
       AND abs(timezone_offset) <= :max_offset ORDER BY ts LIMIT 1) AS later
UNION ALL (SELECT ts, timezone_offset FROM records WHERE ts < :first ORDER BY ts DESC, timezone_offset LIMIT 1)
UNION ALL (SELECT ts, timezone_offset FROM records WHERE ts > :last ORDER BY ts, timezone_offset LIMIT 1)""")
WITH_OFFSETS = text("""
SELECT n.id FROM headrace.series n JOIN headrace.daily_series s ON s.series_id = n.id
WHERE n.user_id = ANY(:users) AND s.min_offset IS NOT NULL""")
ZONE = text("""
SELECT zone FROM headrace.daily_zones WHERE person = :person
UNION ALL (SELECT zone FROM headrace.daily_people WHERE person = :person AND zone IS NOT NULL ORDER BY user_id)""")
IN_ZONE = text("""
SELECT CAST(date_part('epoch', (ts AT TIME ZONE :zone) - (ts AT TIME ZONE 'UTC')) AS int)
FROM unnest(CAST(:moments AS timestamptz[])) WITH ORDINALITY AS given(ts, n) ORDER BY n""")
NEIGHBOUR, USER_ZONE, UTC_ZONE = 1, 2, 3  # places of ZONE_SOURCES


def offsets_at(
    connection: Connection, person: str, users: Sequence[str], moments: Iterable[int]
) -> dict[int, tuple[int, int]]:
    """The offset of a person at moments at which a sample or record has none, and the place of its ZONE_SOURCES."""
    wanted = sorted(set(moments))
    if not wanted:
        return {}
    timeline = timeline_of(connection, users, as_time(wanted[0]), as_time(wanted[-1]))
    near = {moment: timeline.nearest(moment) for moment in wanted}
    found = {moment: (offset, NEIGHBOUR) for moment, offset in near.items() if offset is not None}
    if found:
        return found
    zone = connection.scalar(ZONE, {"person": person})
    if zone is None:
        return dict.fromkeys(wanted, (0, UTC_ZONE))
    offsets = connection.scalars(IN_ZONE, {"zone": zone, "moments": [as_time(one) for one in wanted]})
    return {moment: (offset, USER_ZONE) for moment, offset in zip(wanted, offsets, strict=True)}


def timeline_of(connection: Connection, users: Sequence[str], first: datetime, last: datetime) -> OffsetTimeline:
    """The offsets of users from which the nearest one to any moment between two can be read."""
    series = list(connection.scalars(WITH_OFFSETS, {"users": list(users)}))
    values = {"series": series, "users": list(users), "first": first, "last": last, "max_offset": MAX_OFFSET}
    return OffsetTimeline((as_moment(row.ts), row.timezone_offset) for row in connection.execute(POINTS, values))


EDGES = text("""
SELECT max(before) AS before, min(after) AS after FROM (
    SELECT (SELECT max(ts) FROM headrace.samples WHERE series_id = given.id AND ts < :first
            AND abs(timezone_offset) <= :max_offset) AS before,
           (SELECT min(ts) FROM headrace.samples WHERE series_id = given.id AND ts > :last
            AND abs(timezone_offset) <= :max_offset) AS after
    FROM unnest(CAST(:series AS int[])) AS given(id)
    UNION ALL
    SELECT max(point) FILTER (WHERE point < :first), min(point) FILTER (WHERE point > :last) FROM (
        SELECT CASE resource WHEN 'sleep' THEN ends ELSE starts END AS point FROM headrace.daily_records
        WHERE user_id = ANY(:users) AND abs(timezone_offset) <= :max_offset) AS records) AS edges""")


def nearest_known(
    connection: Connection, users: Sequence[str], first: datetime, last: datetime
) -> tuple[datetime | None, datetime | None]:
    """The last moment before a range of time, and the first one after it, at which the offset of users is known.

    A changed offset in the range can touch samples without an offset up to these moments.
    """
    series = list(connection.scalars(WITH_OFFSETS, {"users": list(users)}))
    values = {"series": series, "users": list(users), "first": first, "last": last, "max_offset": MAX_OFFSET}
    row = connection.execute(EDGES, values).one()
    return row.before, row.after
