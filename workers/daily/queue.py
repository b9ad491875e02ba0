"""The queue of days to compute: one row per person and resource, with the dates."""

from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, text

from workers.daily.metrics import derived, summarised
from workers.daily.model import as_day
from workers.store.sql import RowParameters

ORIGIN = "reconcile"  # of changes of days that no event of a provider caused
STRETCHES = RowParameters("person text, resource text, first date, last date, origin text")
ADD = text(f"""
INSERT INTO headrace.daily_queue AS queued (person, resource, dates, origin)
SELECT person, resource, range_agg(daterange(first, last, '[]')), max(origin) FROM {STRETCHES}
GROUP BY person, resource ORDER BY person, resource
ON CONFLICT (person, resource) DO UPDATE SET dates = queued.dates + excluded.dates, origin = excluded.origin,
    since = least(queued.since, clock_timestamp())""")
# All resources that have stored rows or days, of everyone or of the given people. A resource may have only days left.
ADD_ALL = text("""
WITH present AS MATERIALIZED (
    SELECT user_id, coalesce(client_user_id, user_id) AS person FROM headrace.users
    WHERE erased_at IS NULL AND merged_into IS NULL
      AND (CAST(:persons AS text[]) IS NULL OR coalesce(client_user_id, user_id) = ANY(:persons))),
known AS (
    SELECT person, resource FROM present JOIN headrace.series USING (user_id)
    UNION SELECT person, 'sleep' FROM present
    WHERE EXISTS (SELECT FROM headrace.sleep r WHERE r.user_id = present.user_id)
    UNION SELECT person, 'workouts' FROM present
    WHERE EXISTS (SELECT FROM headrace.workouts r WHERE r.user_id = present.user_id)
    UNION SELECT person, resource FROM present, unnest(CAST(:summarised AS text[])) AS resource
    WHERE EXISTS (SELECT FROM headrace.activity r WHERE r.user_id = present.user_id)
    UNION SELECT person, resource FROM headrace.days
    WHERE CAST(:persons AS text[]) IS NULL OR person = ANY(:persons))
INSERT INTO headrace.daily_queue AS queued (person, resource, dates, origin)
SELECT person, resource, datemultirange(daterange(NULL, NULL)), CAST(:origin AS text) FROM known
WHERE resource = ANY(:resources) ORDER BY person, resource
ON CONFLICT (person, resource) DO UPDATE SET dates = excluded.dates, origin = excluded.origin,
    since = least(queued.since, clock_timestamp()), failures = 0, error = ''""")
NO_HURRY = text("SET LOCAL statement_timeout = '30min'")  # for all users and days of a large installation
# Locked rows are left to the process that computes them. The newest dates come first.
TAKE = text("""
WITH taken AS MATERIALIZED (
    SELECT person, resource, dates, origin, failures, since FROM headrace.daily_queue
    WHERE (CAST(:person AS text) IS NULL OR person = :person)
      AND since <= clock_timestamp() - make_interval(secs => :linger)
    ORDER BY since LIMIT :limit FOR UPDATE SKIP LOCKED)
SELECT person, resource, lower(part) AS first, upper(part) - 1 AS last, origin, failures
FROM taken, unnest(dates) AS part ORDER BY since, person, resource, last DESC NULLS FIRST""")
REPLACE = text("""
UPDATE headrace.daily_queue SET dates = datemultirange(daterange(CAST(:first AS date), CAST(:last AS date), '[]'))
WHERE person = :person AND resource = :resource""")
REMOVE = text("DELETE FROM headrace.daily_queue WHERE person = :person AND resource = :resource")
# The other dates of a row go to the end of the queue; those of a row that has failed stay, and are taken one by one.
DONE = text(f"""
WITH done AS MATERIALIZED (
    SELECT person, resource, range_agg(daterange(first, last, '[]')) AS dates FROM {STRETCHES}
    GROUP BY person, resource),
gone AS (
    DELETE FROM headrace.daily_queue queued USING done
    WHERE (queued.person, queued.resource) = (done.person, done.resource) AND queued.dates <@ done.dates)
UPDATE headrace.daily_queue queued
SET dates = queued.dates - done.dates, since = CASE WHEN failures = 0 THEN clock_timestamp() ELSE since END FROM done
WHERE (queued.person, queued.resource) = (done.person, done.resource) AND NOT queued.dates <@ done.dates""")
# A row that failed comes again after 1, 2, 4 s and so on, at most after five minutes.
POSTPONE = text("""
UPDATE headrace.daily_queue SET failures = failures + 1, error = :error,
    since = clock_timestamp() + least(interval '1 second' * power(2, least(failures, 20)), interval '5 minutes')
WHERE person = :person AND resource = :resource""")
FAILING = 3  # after so many failures, a row is reported, and `rebuild` does not wait for it
COUNT = text(f"""
SELECT count(*) FROM headrace.daily_queue
WHERE failures < {FAILING} AND (CAST(:person AS text) IS NULL OR person = :person)""")
FAILED = text(f"""
SELECT resource, error, count(*) AS people FROM headrace.daily_queue
WHERE failures >= {FAILING} AND (CAST(:person AS text) IS NULL OR person = :person)
GROUP BY resource, error ORDER BY people DESC, resource, error""")
# Dates without a bound count as one day: how many they are is only known when a worker takes the row.
PENDING = text("""
SELECT coalesce(sum(coalesce(upper(part) - lower(part), 1)), 0)::bigint
FROM headrace.daily_queue, unnest(dates) AS part""")
# Changes that are not in the queue yet count too, because without a worker of the lane `derive` the queue stays empty.
BEHIND = text("""
SELECT greatest(clock_timestamp() - least(
    (SELECT min(since) FROM headrace.daily_queue),
    (SELECT changed_at FROM headrace.changes
     WHERE position > coalesce((SELECT position FROM headrace.daily_feed), 0) ORDER BY position LIMIT 1)), '0')""")


class Stretch(NamedTuple):
    """Dates of one person and resource to compute, both inclusive. In `add`, None is a date without a bound."""

    person: str
    resource: str
    first: date
    last: date
    origin: str

    @property
    def dates(self) -> int:
        """The number of dates."""
        return (self.last - self.first) // timedelta(days=1) + 1

    def has(self, day: int) -> bool:
        """Whether a day number is that of one of the dates."""
        return as_day(self.first) <= day <= as_day(self.last)


class Queued(NamedTuple):
    """A part of a row of the queue. A bound is None if it depends on what is stored."""

    person: str
    resource: str
    first: date | None
    last: date | None
    origin: str
    failures: int  # of the row, in a row


class FailedDays(NamedTuple):
    """Days of a resource that cannot be computed."""

    resource: str
    error: str
    people: int


def add(connection: Connection, stretches: Iterable[Stretch]) -> None:
    """Adds dates to the queue."""
    connection.execute(ADD, STRETCHES.values(stretches))


def add_all(
    connection: Connection,
    persons: list[str] | None,
    resources: Iterable[str] | None = None,
    origin: str = ORIGIN,
) -> None:
    """Adds all dates of these people (None: everyone) to the queue, for these resources (None: every one)."""
    if persons is None:
        connection.execute(NO_HURRY)
    values = {"persons": persons, "resources": list(resources or derived()), "origin": origin}
    connection.execute(ADD_ALL, values | {"summarised": list(summarised())})


def take(connection: Connection, limit: int, person: str | None = None, *, linger: float = 0.0) -> list[Queued]:
    """Locks the oldest rows of the queue until the transaction ends, and returns their parts, the newest date first.

    Rows are left that have been in the queue for less than `linger` seconds.
    """
    values = {"limit": limit, "person": person, "linger": linger}
    return [Queued(**row) for row in connection.execute(TAKE, values).mappings().all()]


def bound(connection: Connection, one: Queued, dates: tuple[date, date] | None) -> None:
    """Replaces dates without a bound; None removes the row."""
    values = {"person": one.person, "resource": one.resource}
    if dates is None:
        connection.execute(REMOVE, values)
    else:
        connection.execute(REPLACE, values | {"first": dates[0], "last": dates[1]})


def done(connection: Connection, stretches: Sequence[Stretch]) -> None:
    """Removes computed dates from rows that this transaction has locked."""
    if stretches:
        connection.execute(DONE, STRETCHES.values(stretches))


def postpone(connection: Connection, one: Queued, error: str) -> None:
    """Puts a row that could not be computed behind the others."""
    connection.execute(POSTPONE, {"person": one.person, "resource": one.resource, "error": error})


def count(connection: Connection, person: str | None = None) -> int:
    """The number of rows, pairs of a person and a resource, without those that failed several times."""
    return int(connection.scalar(COUNT, {"person": person}) or 0)


def failed(connection: Connection, person: str | None = None) -> list[FailedDays]:
    """Days whose computation has failed several times, by resource and error."""
    return [FailedDays(**row) for row in connection.execute(FAILED, {"person": person}).mappings()]


def pending_days(connection: Connection) -> int:
    """The number of days in the queue, each of one person and resource."""
    return int(connection.scalar(PENDING) or 0)


def behind(connection: Connection) -> timedelta:
    """How long the oldest dates have been in the queue, or the oldest change has not been followed; 0 without any."""
    return connection.scalar(BEHIND) or timedelta(0)
