"""Keeps days up to date for a time slice, and rebuilds them."""

import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import groupby

from sqlalchemy import Connection, Engine, text

from app.config.settings import Settings
from app.errors import Unprocessable, describe, is_outage
from app.observability import metrics
from workers.daily import queue
from workers.daily.compute import recompute
from workers.daily.follow import MAX_CHANGES, TRANSACTION_SETTINGS, expire, follow, queue_people
from workers.daily.metrics import SESSIONS, SUMMARY, derived, summarised
from workers.daily.model import ANY
from workers.daily.people import people_of
from workers.daily.queue import Queued, Stretch
from workers.daily.read import at_midnight
from workers.daily.state import reach_of, read_reach, records_of, series_of, update_records, users_of
from workers.store import retention
from workers.store.engine import transaction
from workers.store.retention import DAILY

SLICE_SECONDS = 5.0
# A transaction computes as many rows of the queue as take about this long, so that everyone's newest days come soon.
BATCH_SECONDS = 0.5
MAX_BATCH = 256
# Of longer stretches of samples, a transaction computes only one, as far as it has about MAX_SAMPLES samples.
SHORT_DAYS = 10
MAX_SAMPLES = 50_000  # of one series in one transaction: 0.3 s
# Of all stretches in one transaction. A date of a short stretch of samples counts as SAMPLE_DATES, because all its
# samples are read into memory: with one per second of 61 people at once, that is 5 million.
MAX_DATES, SAMPLE_DATES = 3660, 60
EXPIRIES = text("SELECT resource, before FROM headrace.daily_expiry")
STORED_DATES = text("""
SELECT min(local_date) AS first, max(local_date) AS last FROM headrace.days
WHERE person = :person AND metric = ANY(:metrics)""")
EDGE = text("""
SELECT max(edge) FROM unnest(CAST(:series AS int[])) AS given(id), LATERAL (
    SELECT ts FROM headrace.samples WHERE series_id = given.id AND ts >= :first AND ts < :last
    ORDER BY ts DESC OFFSET :limit LIMIT 1) AS newest(edge)""")
# Changes of one person and resource that follow each other within this time are computed together.
LINGER_SECONDS = 1.5
PAUSE_SECONDS = 0.25  # while no row of the queue is old enough
log = logging.getLogger(__name__)


class Deriver:
    """Computes the days of the queue. Any number of processes may run one."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._batch = 8  # rows of the queue in one transaction
        self._changes = MAX_CHANGES  # of the feed in one transaction

    def run(
        self, is_stopping: Callable[[], bool], seconds: float = SLICE_SECONDS, *, linger: float = LINGER_SECONDS
    ) -> bool:
        """Follows the feed and computes for a time slice. Returns whether it stopped before everything was done.

        The priority of this process and of PostgreSQL's for it is low (`make_background`), so it does not rest.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until and not is_stopping():
            has_more = self.follow()
            if self.step(linger=linger) is None and not has_more:
                if self._is_empty():
                    return False
                time.sleep(PAUSE_SECONDS)
        return True

    def follow(self) -> bool:
        """Follows the next changes of the feed. Returns whether more may be left.

        If they cannot be followed, then one by one. Instead of one that cannot, all days of its person are queued.
        """
        try:
            has_more = follow(self._engine, self._changes)
        except Exception as error:
            if is_outage(error):
                raise
            if self._changes == 1:
                log.warning("a change cannot be followed, so all days of its person are computed (%s)", describe(error))
                self._step_over()
            self._changes = 1
            return True
        self._changes = min(MAX_CHANGES, self._changes * 2)
        return has_more

    def _step_over(self) -> None:
        """Queues all days of the person of the next change, or leaves the change out if that fails too."""
        try:
            follow(self._engine, 1, queue_people)
        except Exception as error:
            if is_outage(error):
                raise
            log.error("days of a person are not computed: run `headrace derive rebuild` (%s)", describe(error))  # noqa: TRY400 - no traceback
            follow(self._engine, 1, lambda _connection, _changes: None)

    def _is_empty(self) -> bool:
        with transaction(self._engine) as connection:
            return queue.count(connection) == 0

    def rebuild(self, person: str | None, on_progress: Callable[[int, int], None]) -> int:
        """Computes all days of a person, or of everyone. Returns the number of rows that were written.

        `on_progress` gets the number of pairs of person and resource that are done, and of all. Raises Unprocessable
        if some cannot be computed, after all others.
        """
        with transaction(self._engine) as connection:
            connection.execute(TRANSACTION_SETTINGS)
            queue.add_all(connection, None if person is None else [person])
            total = queue.count(connection, person)
        left, written = total, 0
        while left:
            changed = self.step(person)
            written += changed or 0
            if changed is None:  # other processes compute the rest
                time.sleep(0.2)
            with transaction(self._engine) as connection:
                left = queue.count(connection, person)
            total = max(total, left)
            on_progress(total - left, total)
        with transaction(self._engine) as connection:
            if failed := queue.failed(connection, person):
                people = sum(one.people for one in failed)
                raise Unprocessable(f"days of {people} people and resources cannot be computed: {failed[0].error}")
        return written

    def step(self, person: str | None = None, *, linger: float = 0.0) -> int | None:
        """Computes a batch. Returns the number of rows that were written; None if the queue has nothing to take.

        A row that cannot be computed is postponed, so that it does not hold up others.
        """
        began = time.monotonic()
        taken: list[Queued] = []
        try:
            with transaction(self._engine) as connection:
                connection.execute(TRANSACTION_SETTINGS)
                taken = queue.take(connection, self._batch, person, linger=linger)
                written, computed = _compute(connection, taken, expiries(connection, self._settings))
        except Exception as error:
            if is_outage(error) or not taken:
                raise
            if self._batch == 1:
                self._postpone(taken[0], describe(error))
            self._batch = 1
            return 0
        if not taken:
            return None
        metrics.DAYS_COMPUTED.inc(computed)
        took = time.monotonic() - began
        self._batch = min(MAX_BATCH, self._batch * 2) if took < BATCH_SECONDS else max(1, self._batch // 2)
        return written

    def _postpone(self, one: Queued, error: str) -> None:
        log.warning("days of %s of a person cannot be computed (%s)", one.resource, error)
        with transaction(self._engine) as connection:
            queue.postpone(connection, one, error)


def expiries(connection: Connection, settings: Settings) -> dict[str, datetime]:
    """The moment before which rows of each resource may have expired: by the setting, now or at any earlier time.

    For days themselves, DAILY, only the present setting counts.
    """
    stored = _stored_expiries(connection)
    limits = retention.limits(settings, datetime.now(UTC).replace(minute=0, second=0, microsecond=0))
    newer = {name: before for name, before in limits.items() if name not in stored or before > stored[name]}
    if newer:
        expire(connection, newer)
        stored = _stored_expiries(connection)
    stored.pop(DAILY, None)
    return stored | ({DAILY: limits[DAILY]} if DAILY in limits else {})


def _stored_expiries(connection: Connection) -> dict[str, datetime]:
    return {row.resource: row.before for row in connection.execute(EXPIRIES)}


def _compute(connection: Connection, taken: Sequence[Queued], expired: dict[str, datetime]) -> tuple[int, int]:
    """Returns the number of rows that were written, and of days that were computed."""
    stretches: list[Stretch] = []
    room, has_long = MAX_DATES, False
    for _, parts in groupby(taken, key=lambda one: (one.person, one.resource)):
        of_row = list(parts)
        if of_row[0].resource not in derived():  # ANY, or a resource that the catalogue no longer has
            if of_row[0].resource == ANY:
                queue.add_all(connection, [of_row[0].person], origin=of_row[0].origin)
            queue.bound(connection, of_row[0], None)
            continue
        if any(one.first is None or one.last is None for one in of_row):
            queue.bound(connection, of_row[0], _stored_dates(connection, of_row[0]))
            continue
        for one in of_row if not of_row[0].failures else [_alone(of_row)]:
            stretch = Stretch(one.person, one.resource, one.first or date.min, one.last or date.max, one.origin)
            weight = 1 if stretch.resource in SESSIONS else SAMPLE_DATES
            if weight > 1 and stretch.dates > SHORT_DAYS:
                if has_long:
                    continue
                stretch, has_long, weight = _limited(connection, stretch), True, 1
            if dates := room // weight:
                stretches.append(_newest(stretch, dates))
                room -= weight * stretches[-1].dates
    written = recompute(connection, stretches, expired) if stretches else 0
    queue.done(connection, stretches)
    return written, sum(one.dates for one in stretches)


def _alone(parts: Sequence[Queued]) -> Queued:
    """One date of a row that has failed, so that its other dates do not wait for the one that cannot be computed."""
    newest, oldest = parts[0], parts[-1]
    return newest._replace(first=newest.last) if newest.failures % 2 else oldest._replace(last=oldest.first)


def _stored_dates(connection: Connection, one: Queued) -> tuple[date, date] | None:
    """The first and the last date that the stored rows of a person and resource can touch, or days already have.

    Reads all of them, so that their reach is known.
    """
    users = users_of(connection, [one.person])
    mine = users.get(one.person, [])
    people_of(connection, mine)
    found: list[tuple[date, date]] = []
    if period := read_reach(connection, series_of(connection, users, [one.resource])[one.person, one.resource]):
        reach = reach_of(series_of(connection, users, [one.resource])[one.person, one.resource])
        found.append(reach.dates(*period))
    name = SUMMARY if one.resource in summarised() else one.resource
    if name in (*SESSIONS, SUMMARY):
        records = update_records(connection, name, records_of(connection, name, mine))
        found += [(first, last) for _, first, last in records.dates]
    row = connection.execute(STORED_DATES, {"person": one.person, "metrics": list(derived()[one.resource])}).one()
    if row.first is not None:
        found.append((row.first, row.last))
    return (min(first for first, _ in found), max(last for _, last in found)) if found else None


def _newest(stretch: Stretch, dates: int) -> Stretch:
    """The newest dates of a stretch, at most this many."""
    return stretch if stretch.dates <= dates else stretch._replace(first=stretch.last - timedelta(days=dates - 1))


def _limited(connection: Connection, stretch: Stretch) -> Stretch:
    """The newest dates of a stretch of samples that have a bounded number of samples."""
    known = series_of(connection, users_of(connection, [stretch.person]), [stretch.resource])
    series = [one.id for one in known[stretch.person, stretch.resource]]
    first = _newest(stretch, MAX_DATES).first
    period = {"first": at_midnight(first), "last": at_midnight(stretch.last) + timedelta(days=2)}
    edge = connection.scalar(EDGE, {"series": series, "limit": MAX_SAMPLES, **period})
    if edge is not None:
        first = min(max(first, edge.date() + timedelta(days=1)), stretch.last)
    return stretch._replace(first=first)
