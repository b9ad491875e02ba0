"""Follows the change feed: puts the days that changes touch into the queue, and keeps its own position."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, Row, text

from workers.daily import queue
from workers.daily.metrics import SESSIONS, SUMMARY, derived, summarised
from workers.daily.neighbours import nearest_known
from workers.daily.people import check_all, people_of
from workers.daily.queue import Stretch
from workers.daily.state import extend_reach, reach_of, series_of, update_records, users_of
from workers.store.engine import transaction
from workers.store.sql import RowParameters

MAX_CHANGES = 2000  # of one transaction
# A process that computes days holds rows of the queue for up to a second or two. A plan for any parameters, which
# PostgreSQL may choose from the sixth execution on, does not know that the arrays are short: it read whole partitions.
TRANSACTION_SETTINGS = text("""
SELECT set_config('lock_timeout', '20s', true), set_config('plan_cache_mode', 'force_custom_plan', true)""")
# Not a lock of the row: `is_due` updates it, and the thread that numbers the feed would wait for this transaction.
LOCK = text("SELECT pg_try_advisory_xact_lock(hashtext('headrace.daily_feed'))")
POSITION = text("""
SELECT position, people_checked_at < now() - interval '5 minutes' AS is_check_due FROM headrace.daily_feed""")
IS_STARTED = text("SELECT 1 FROM headrace.daily_feed")
START = text("""
INSERT INTO headrace.daily_feed (position) SELECT newest FROM headrace.feed
ON CONFLICT DO NOTHING RETURNING position""")
DROPPED = text("SELECT dropped, newest FROM headrace.feed")
CHANGES = text("""
SELECT position, op, user_id, resource, record_id, ts_min, ts_max, origin FROM headrace.changes
WHERE position > :position ORDER BY position LIMIT :limit""")
ADVANCE = text("UPDATE headrace.daily_feed SET position = :position")
CHECKED = text("UPDATE headrace.daily_feed SET people_checked_at = now()")
# At most one task per second: a run takes several seconds, and the tasks of each change would wait in the lane.
REQUEST = text("""
UPDATE headrace.daily_feed f SET requested_at = now() FROM headrace.feed
WHERE f.requested_at < now() - interval '1 second' AND (EXISTS (SELECT FROM headrace.daily_queue WHERE since <= now())
    OR f.position < feed.newest OR f.people_checked_at < now() - interval '5 minutes') RETURNING 1""")
BEFORES = RowParameters("resource text, before timestamptz")
EXPIRE = text(f"""
INSERT INTO headrace.daily_expiry AS known (resource, before)
SELECT resource, max(before) FROM {BEFORES} GROUP BY resource ORDER BY resource
ON CONFLICT (resource) DO UPDATE SET before = excluded.before WHERE known.before < excluded.before""")
RECORDS = RowParameters("user_id text, resource text, id text")
FORGET = text(f"""
WITH gone AS (DELETE FROM headrace.daily_records k USING {RECORDS}
WHERE (k.user_id, k.resource, k.id) = (given.user_id, given.resource, given.id) RETURNING k.resource, k.ends)
SELECT resource, max(ends) AS before FROM gone GROUP BY resource""")
LACKING = text("""
SELECT DISTINCT n.user_id, n.resource FROM headrace.series n JOIN headrace.daily_series s ON s.series_id = n.id
WHERE n.user_id = ANY(:users) AND s.lacks_offset
UNION SELECT DISTINCT user_id, resource FROM headrace.daily_records
WHERE user_id = ANY(:users) AND timezone_offset IS NULL AND resource = ANY(:sessions)""")
QueueDays = Callable[[Connection, Sequence[Row[Any]]], None]
RETENTION = "retention"  # the origin of changes that leave days as they are


class _Touched(NamedTuple):
    """A range of time in which an offset of a person may have changed."""

    person: str
    first: datetime
    last: datetime
    origin: str


def is_due(engine: Engine) -> bool:
    """Whether a task has to be sent, because there are changes to follow or days to compute."""
    with transaction(engine) as connection:
        return connection.scalar(IS_STARTED) is None or connection.scalar(REQUEST) is not None


def follow(engine: Engine, limit: int = MAX_CHANGES, queue_days: QueueDays | None = None) -> bool:
    """Queues the days that the next changes touch, and advances, in one transaction. Returns whether more may be left.

    At the first start, and where the feed no longer has the next changes, everything is queued. `queue_days` replaces
    `queue_changes`.
    """
    with transaction(engine) as connection:
        connection.execute(TRANSACTION_SETTINGS)
        if not connection.scalar(LOCK):  # another process follows
            return False
        if connection.scalar(START) is not None:
            queue.add_all(connection, None)
            return True
        found = connection.execute(POSITION).one()
        if found.is_check_due:
            check_all(connection)
            connection.execute(CHECKED)
        feed = connection.execute(DROPPED).one()
        if found.position < feed.dropped:
            queue.add_all(connection, None)
            connection.execute(ADVANCE, {"position": feed.newest})
            return True
        changes = connection.execute(CHANGES, {"position": found.position, "limit": limit}).all()
        if changes:
            (queue_days or queue_changes)(connection, changes)
            connection.execute(ADVANCE, {"position": changes[-1].position})
        return len(changes) == limit


def queue_changes(connection: Connection, changes: Sequence[Row[Any]]) -> None:
    """Queues the days that changes touch. Rows that have expired leave their days as they are."""
    _note_expired(connection, [one for one in changes if one.origin == RETENTION])
    sessions = (*SESSIONS, SUMMARY)
    followed = {*derived(), *sessions}
    changes = [one for one in changes if one.resource in followed and one.origin != RETENTION and one.op != "erase"]
    if not changes:
        return
    person_of = people_of(connection, {one.user_id for one in changes})
    changes = [one for one in changes if one.user_id in person_of]
    stretches, touched = _of_samples(connection, [one for one in changes if one.ts_min is not None], person_of)
    for resource in sessions:
        records = [one for one in changes if one.resource == resource and one.record_id is not None]
        of_records, known = _of_records(connection, resource, records, person_of)
        stretches += of_records
        touched += known
    queue.add(connection, [*stretches, *_without_offsets(connection, touched)])


def queue_people(connection: Connection, changes: Sequence[Row[Any]]) -> None:
    """Queues all days of the people of these changes."""
    persons = people_of(connection, {one.user_id for one in changes})
    queue.add_all(connection, sorted(set(persons.values())))


def _note_expired(connection: Connection, expired: Sequence[Row[Any]]) -> None:
    samples = [one for one in expired if one.ts_max is not None and one.resource in derived()]
    expire(connection, {one.resource: one.ts_max for one in sorted(samples, key=lambda one: one.ts_max)})
    if records := [one for one in expired if one.record_id is not None]:
        keys = RECORDS.values((one.user_id, one.resource, one.record_id) for one in records)
        forgotten = connection.execute(FORGET, keys)
        expire(connection, {row.resource: row.before for row in forgotten})


def expire(connection: Connection, befores: Mapping[str, datetime]) -> None:
    """Stores the moment before which rows of each resource may have expired. It never moves back.

    Days of counters are also computed from summaries.
    """
    given = [*befores.items()]
    if SUMMARY in befores:
        given += [(name, befores[SUMMARY]) for name in summarised()]
    if given:
        connection.execute(EXPIRE, BEFORES.values(given))


def _of_samples(
    connection: Connection, changes: Sequence[Row[Any]], person_of: Mapping[str, str]
) -> tuple[list[Stretch], list[_Touched]]:
    if not changes:
        return [], []
    extend_reach(
        connection, {(one.user_id, one.resource, one.ts_min, one.ts_max) for one in changes if one.op == "put"}
    )
    users = users_of(connection, sorted(set(person_of.values())))
    known = series_of(connection, users, [one.resource for one in changes])
    stretches, touched = [], []
    for one in changes:
        person = person_of[one.user_id]
        mine = known[person, one.resource]
        first, last = reach_of(mine).dates(one.ts_min, one.ts_max)
        stretches.append(Stretch(person, one.resource, first, last, one.origin))
        if any(series.min_offset is not None for series in mine):
            touched.append(_Touched(person, one.ts_min, one.ts_max, one.origin))
    return stretches, touched


def _of_records(
    connection: Connection, resource: str, changes: Sequence[Row[Any]], person_of: Mapping[str, str]
) -> tuple[list[Stretch], list[_Touched]]:
    if not changes:
        return [], []
    found = update_records(connection, resource, {(one.user_id, one.record_id) for one in changes})
    origins = {one.user_id: one.origin for one in changes}
    names = summarised() if resource == SUMMARY else (resource,)
    stretches = [
        Stretch(person_of[user], name, first, last, origins[user])
        for user, first, last in found.dates
        for name in names
    ]
    return stretches, [_Touched(person_of[user], first, last, origins[user]) for user, first, last in found.known]


def _without_offsets(connection: Connection, touched: Sequence[_Touched]) -> list[Stretch]:
    """The days of samples and sessions without an offset, whose nearest known offset may have changed."""
    if not touched:
        return []
    by_person: dict[str, list[_Touched]] = defaultdict(list)
    for one in touched:
        by_person[one.person].append(one)
    users = users_of(connection, sorted(by_person))
    everyone = [user for ids in users.values() for user in ids]
    lacking: dict[str, set[str]] = defaultdict(set)
    for row in connection.execute(LACKING, {"users": everyone, "sessions": list(SESSIONS)}):
        lacking[row.user_id].add(row.resource)
    series = series_of(connection, users, set().union(*lacking.values()))
    stretches = []
    for person, ids in users.items():
        resources = sorted({name for user in ids for name in lacking[user] if name in derived()})
        for one in _merged(by_person[person]) if resources else ():
            before, after = nearest_known(connection, ids, one.first, one.last)
            for name in resources:
                reach = reach_of(series[person, name])
                margin = timedelta(days=1) if name in SESSIONS else timedelta(0)
                first = before and (before - reach.before - margin).date()
                last = after and (after + reach.after + margin).date()
                stretches.append(Stretch(person, name, first, last, one.origin))  # type: ignore[arg-type]
    return stretches


def _merged(touched: Iterable[_Touched]) -> list[_Touched]:
    """Ranges less than a day apart as one."""
    found: list[_Touched] = []
    for one in sorted(touched, key=lambda one: one.first):
        if found and one.first - found[-1].last < timedelta(days=1):
            found[-1] = found[-1]._replace(last=max(found[-1].last, one.last))
        else:
            found.append(one)
    return found
