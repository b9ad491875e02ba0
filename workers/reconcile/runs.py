"""Shared by the reconciliations: steps of one request each, time slices, and the backfills that fill gaps."""

import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from sqlalchemy import Connection, Engine

from app.errors import RetryAlone, TryLater, Unprocessable
from app.observability import metrics
from workers.actions import Notice
from workers.aggregators.listings import Listing
from workers.fetch.backoff import backoff
from workers.ingest.outcomes import is_last_try
from workers.store import jobs
from workers.store.backfills import BackfillRequest, open_backfill
from workers.store.coverage import Fetched, Gap, ResourceKey, keep_gaps
from workers.store.engine import transaction
from workers.store.users import Claim, ClientId, upsert_users


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a position that every reconciliation has."""

    cursor: str | None = None
    attempts: int = 0  # of the same request
    pages: int = 0
    seen: tuple[str, ...] = ()  # the last cursors, to detect a loop
    # Steps that PostgreSQL did not execute
    alone: int | None = None  # the page's users are compared one by one; this one is next
    failures: int = 0  # tries of this step
    skipped: int = 0  # users who are left out of this run
    error: str = ""  # of the last one


P = TypeVar("P", bound=Position)
T = TypeVar("T")
TIME_SLICE_SECONDS = 20.0
MAX_SEEN_CURSORS = 8
MAX_PAGES = 100_000  # five million users
MAX_RETRY_SECONDS = 60.0
EARLIEST_COMPARED = datetime(2000, 1, 1, tzinfo=UTC)  # of a run that compares everything
MAX_SKIPPED = 20  # users; with more, the fault is that of the database, and the run ends

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step(Generic[P]):
    """The result of one request. `to` is the next position, None at the end; it may be continued after `seconds`."""

    to: P | None
    seconds: float = 0.0
    people: int = 0
    found: tuple[Gap, ...] = ()
    opened: tuple[int, ...] = ()
    reason: str = ""  # of the wait
    unread: int = 0  # entries of the aggregator's listing that could not be read
    notes: tuple[str, ...] = ()  # data that is missing and cannot be fetched


class AlreadyRunning(TryLater):
    """Another process holds the lease of an exclusive comparison."""


class Again(Exception):
    """A request has no usable answer yet: the step that sends it again."""

    def __init__(self, step: Step[Any]) -> None:
        super().__init__(step.reason)
        self.step = step


class Comparison(Protocol[P]):
    """A reconciliation with one aggregator, one request at a time. It never sleeps."""

    aggregator: str
    name: str  # the aggregator's name in messages
    listing: str  # the name of its listings in messages
    account: str  # the account of its pauses in Redis
    job: str  # its row in headrace.jobs
    is_exclusive: bool  # only one process at a time may send requests
    start: P

    def since(self, done_at: datetime | None) -> datetime:
        """The start of the compared time, if the last complete run ended at `done_at`."""

    def step(self, at: P, since: datetime, user_id: str | None = None) -> Step[P]:
        """Sends one request and compares. Raises Unprocessable if a retry cannot succeed, and TryLater."""

    def skip(self, at: P) -> P:
        """The position after a user who cannot be compared, or the same page user by user. Raises Unprocessable."""


class Recorder:
    """Stores gaps and opens their backfills. A dry run keeps them in memory, for the parts that follow."""

    def __init__(self, engine: Engine, aggregator: str, *, dry_run: bool) -> None:
        self._engine, self._aggregator, self.dry_run = engine, aggregator, dry_run
        self._would_open: defaultdict[ResourceKey, list[Fetched]] = defaultdict(list)
        self.pulling: set[ResourceKey] = set()

    def record(
        self, part: str, users: Sequence[str], found: Sequence[Gap], clients: Mapping[str, ClientId] | None = None
    ) -> tuple[tuple[Gap, ...], tuple[int, ...]]:
        """The gaps of users whose data may be written, and the ids of the backfills. Replaces these users' gaps."""
        if self.dry_run:
            self._simulate(found)
            return tuple(found), ()
        with transaction(self._engine) as connection:
            claims = {Claim(self._aggregator, gap.key.user_id) for gap in found}
            given = {claim: (clients or {}).get(claim.user_id) for claim in claims}
            known = {claim.user_id: user for claim, user in upsert_users(connection, given).items()}
            found = [gap for gap in found if not known[gap.key.user_id].is_read_only]
            opened = [backfill_id for gap in found for backfill_id in self._open(connection, gap)]
            keep_gaps(connection, part, users, found)
        return tuple(found), tuple(dict.fromkeys(opened))

    def with_simulated(self, fetched: Mapping[ResourceKey, Sequence[Fetched]]) -> dict[ResourceKey, list[Fetched]]:
        """Fetched windows, with those that a dry run would have opened."""
        windows = {key: list(some) for key, some in fetched.items()}
        for key, some in self._would_open.items():
            windows.setdefault(key, []).extend(some)
        return windows

    def _simulate(self, found: Iterable[Gap]) -> None:
        now = datetime.now(UTC)
        for gap in found:
            for start, end in gap.windows:
                window = Fetched(start, end, "reconcile", "open", created_at=now, finished_at=None)
                self._would_open[gap.key].append(window)
            if gap.is_pulling:
                self.pulling.add(gap.key)

    def _open(self, connection: Connection, gap: Gap) -> Iterator[int]:
        """Opens a backfill for the gap, with one chunk for each of its windows."""
        now = datetime.now(UTC)
        for start, end in gap.windows:
            request = BackfillRequest(self._aggregator, f"reconcile-{uuid.uuid4()}", "reconcile", now)
            notice = Notice(**gap.key._asdict(), window_start=start, window_end=end, is_final=True)
            backfill_id = open_backfill(connection, request, notice)
            if backfill_id is not None:
                yield backfill_id


def count_unread(aggregator: str, unread: int, listing: str) -> None:
    """Counts and logs the entries of a page that could not be read."""
    if unread:
        metrics.UNREAD_ENTRIES.labels(aggregator).inc(unread)
        log.warning("%d entries of %s could not be read, and are not compared", unread, listing)


def of_one(listing: Listing[Any], number: int | None) -> tuple[Listing[Any], bool]:
    """The page, or only its user with this number; and whether the page ends with it."""
    if number is None:
        return listing, True
    users = listing.users or tuple(dict.fromkeys(row.user_id for row in listing.rows))
    chosen = users[number : number + 1]
    rows = tuple(row for row in listing.rows if row.user_id in chosen)
    return replace(listing, rows=rows, users=chosen), number + 1 >= len(users)


def turned(at: P, name: str) -> P:
    """The position with one more page. Raises Unprocessable."""
    if at.pages > MAX_PAGES:
        raise Unprocessable(f"{name}'s listings have more than {MAX_PAGES} pages: their cursors form a loop")
    return msgspec.structs.replace(at, attempts=0, pages=at.pages + 1)


def next_page(at: P, cursor: str | None) -> P | None:
    """The position at the next page; None after the last page, and if the cursor was returned before."""
    if cursor is None or cursor in at.seen:
        return None
    return msgspec.structs.replace(at, cursor=cursor, seen=(*at.seen, cursor)[-MAX_SEEN_CURSORS:])


def skip_in_page(at: P) -> P:
    """The position after a user of a page who cannot be compared. The page is compared user by user first."""
    if at.alone is None:
        return msgspec.structs.replace(at, alone=0)
    return msgspec.structs.replace(at, alone=at.alone + 1, skipped=at.skipped + 1)


def next_step(comparison: Comparison[P], at: P, since: datetime, user_id: str | None = None) -> Step[P]:
    """Runs one step. After several tries that PostgreSQL did not execute, one user is left out and the others follow.

    Raises Unprocessable if a retry cannot succeed, and TryLater in an outage.
    """
    try:
        step = comparison.step(at, since, user_id)
    except RetryAlone as error:
        return _retry_or_skip(comparison, at, error)
    if step.to is None:
        return step
    failures = at.failures if step.seconds else 0  # a step that waits for its request has not been executed yet
    return replace(step, to=msgspec.structs.replace(step.to, failures=failures, skipped=at.skipped, error=at.error))


def _retry_or_skip(comparison: Comparison[P], at: P, error: RetryAlone) -> Step[P]:
    tries = at.failures + 1
    if not is_last_try(tries, error):
        seconds = backoff(at.failures, limit=MAX_RETRY_SECONDS)
        return Step(msgspec.structs.replace(at, failures=tries), seconds, reason=str(error))
    if at.skipped >= MAX_SKIPPED:
        raise Unprocessable(f"more than {MAX_SKIPPED} users could not be compared: {error}")
    to = msgspec.structs.replace(comparison.skip(at), failures=0, error=str(error))
    if to.skipped == at.skipped:
        return Step(to)
    note = f"a user could not be compared with {comparison.name} in {tries} tries: {error}"
    log.warning("%s", note)
    return Step(to, notes=(note,))


def leased_steps(
    engine: Engine, comparison: Comparison[Any], period: float, since: datetime, users: Iterable[str | None]
) -> Generator[Step[Any], None, None]:
    """Every step of a command, with the pauses that the aggregator asks for. A caller stops if a pause is too long.

    An exclusive comparison holds the lease of its job, so that no worker sends requests at the same time. Raises
    AlreadyRunning.
    """
    if comparison.is_exclusive:
        jobs.ensure_job(engine, comparison.job, period)
        if not jobs.hold(engine, comparison.job):
            what = f"a worker or another command is comparing with {comparison.name}"
            raise AlreadyRunning(f"{what}; try again when it has ended")
    try:
        for user in users:
            at = comparison.start
            while at is not None:
                step = next_step(comparison, at, since, user)
                at = step.to
                yield step
                if comparison.is_exclusive:
                    jobs.hold(engine, comparison.job, step.seconds, renew=True)
                time.sleep(step.seconds)
    finally:
        if comparison.is_exclusive:
            jobs.release(engine, comparison.job)


def run_slice(engine: Engine, comparison: Comparison[Any], period: float) -> float | None:
    """Continues the scheduled reconciliation for one time slice. Returns the seconds until the next slice, if any.

    The position is saved after every step: a killed worker costs one request.
    """
    if (job := jobs.claim(engine, comparison.job)) is None:
        return None
    at, until, seconds = _position(job.position, comparison.start), time.monotonic() + TIME_SLICE_SECONDS, 0.0
    since = comparison.since(job.done_at)
    try:
        while not seconds and time.monotonic() < until:
            step = next_step(comparison, at, since)
            if step.to is None:
                _report(engine, comparison, at, period)
                jobs.save(engine, comparison.job, None, period)
                return None
            at, seconds = step.to, step.seconds
            jobs.save(engine, comparison.job, at, seconds, held=not seconds)
    except Unprocessable as reason:
        hours = period / 3600
        log.warning(
            "reconciliation with %s stopped: %s; the next one starts in %.0f hours", comparison.name, reason, hours
        )
        jobs.report(engine, comparison.job, str(reason), 2 * period)
        jobs.save(engine, comparison.job, None, period, completed=False)
        return None
    if not seconds:
        jobs.save(engine, comparison.job, at, 0)
    return seconds


def _report(engine: Engine, comparison: Comparison[P], at: P, period: float) -> None:
    """Reports the users whom a run has left out, until the next run ends."""
    error = f"{at.skipped} users could not be compared: {at.error}" if at.skipped else ""
    jobs.report(engine, comparison.job, error, 2 * period)


def _position(saved: bytes | None, start: P) -> P:
    try:
        return msgspec.json.decode(saved, type=type(start)) if saved else start
    except msgspec.ValidationError:  # saved by an older version in another form: start again
        return start
