"""Compares what Junction says it has with what is stored, a page of people at a time; the difference is fetched."""

import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import msgspec
from sqlalchemy import Connection, Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import Unprocessable
from app.observability import tracing
from workers import actions
from workers.actions import Notice
from workers.aggregators import junction
from workers.aggregators.junction.introspection import Listing, Pull, ResourceCoverage
from workers.aggregators.requests import Request
from workers.fetch.client import AggregatorClient
from workers.fetch.http import HttpResponse
from workers.fetch.retry import Decision, FetchAction
from workers.reconcile import gaps
from workers.reconcile.gaps import Part, Stored
from workers.store import coverage, jobs
from workers.store.backfills import EARLIEST_HISTORY, BackfillRequest, open_backfill
from workers.store.coverage import Fetched, ResourceKey
from workers.store.engine import transaction
from workers.store.gaps import Gap, keep_gaps, still_pulling
from workers.store.users import is_read_only, upsert_users
from workers.store.writer import BatchItem, write

T = TypeVar("T", Pull, ResourceCoverage)
R = TypeVar("R")
AGGREGATOR = "junction"
JOB = "reconcile"
LOOK_BACK = timedelta(days=35)  # beyond the last time, of what came by webhook: older days were compared then
TIME_SLICE_SECONDS = 20.0
MAX_RESTARTS = 5
MAX_SEEN_CURSORS = 8
MAX_PAGES = 100_000  # five million people
CONNECTION = "connection"  # stands where a gap names its resource

log = logging.getLogger(__name__)


class ReconcilePosition(msgspec.Struct, frozen=True):
    """How far a reconciliation has come: it may be put down and taken up anywhere."""

    part: Part = "pulls"
    cursor: str | None = None
    people: tuple[str, ...] = ()  # whose connections are to be asked about before it goes on
    attempts: int = 0
    restarts: int = 0  # because a cursor was no longer good
    pages: int = 0
    seen: tuple[str, ...] = ()  # the last cursors, so that pages that lead to each other are noticed


@dataclass(frozen=True)
class Step:
    """What one request brought, where it goes on, and how many seconds from now. `to` is None at the end."""

    to: ReconcilePosition | None
    seconds: float = 0.0
    people: int = 0
    found: tuple[Gap, ...] = ()
    opened: tuple[int, ...] = ()
    reason: str = ""  # why it waits


class _Suspend(Exception):
    """There is no answer to be had now."""

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision.reason)
        self.decision = decision


class Reconciler:
    """Goes on with a reconciliation, a request at a time. Nothing in it sleeps."""

    def __init__(self, engine: Engine, settings: Settings, account: AggregatorClient, *, dry_run: bool = False) -> None:
        self._engine, self._settings = engine, settings
        self._account = account
        self._dry_run = dry_run
        self._would_open: defaultdict[ResourceKey, list[Fetched]] = defaultdict(list)
        self._pulling: set[ResourceKey] = set()

    def step(self, at: ReconcilePosition, since: datetime, user_id: str | None = None) -> Step:
        """Goes on by one request. Raises Unprocessable if Junction refuses it for good, and TryLater."""
        try:
            if at.people:
                return self._connections(at)
            return self._pulls(at, user_id) if at.part == "pulls" else self._coverage(at, since, user_id)
        except _Suspend as waits:
            decision = waits.decision
            to = msgspec.structs.replace(at, attempts=at.attempts + decision.counts)
            if decision.action == FetchAction.RESTART:
                if at.restarts >= MAX_RESTARTS:
                    raise Unprocessable(f"Junction's cursors are no good, {MAX_RESTARTS} times") from None
                to = ReconcilePosition(at.part, restarts=at.restarts + 1)
            return Step(to, decision.seconds, reason=decision.reason)

    def _pulls(self, at: ReconcilePosition, user_id: str | None) -> Step:
        request = junction.pulls_request(at.cursor, user_id)
        listing = self._ask(request, at, lambda answer: junction.read_pulls(answer.body))
        now = datetime.now(UTC)
        with transaction(self._engine) as connection:
            erased = coverage.erased(connection, listing.users)
            pulls = [one for one in listing.rows if one.user_id not in erased and self._matters(one)]
            spans = {
                _key(one): gaps.span_of_pull(one, now)
                for one in pulls
                if one.days_with_data and catalogue()[one.resource].has_days
            }
            days = coverage.days_stored(connection, spans)
            stored = Stored(coverage.fetched(connection, listing.users), days)
        found = [gap for pull in pulls if (gap := gaps.of_pull(pull, stored, now))]
        return self._end(at, listing, found, tuple(user for user in listing.users if user not in erased))

    def _coverage(self, at: ReconcilePosition, since: datetime, user_id: str | None) -> Step:
        request = junction.coverage_request(at.cursor, user_id)
        listing = self._ask(request, at, lambda answer: junction.read_coverage(answer.body))
        now = datetime.now(UTC)
        with transaction(self._engine) as connection:
            pulling = self._pulling if self._dry_run else still_pulling(connection, listing.users)
            erased = coverage.erased(connection, listing.users)
            rows = [one for one in listing.rows if one.user_id not in erased and self._matters(one)]
            listed = [one for one in rows if _key(one) not in pulling]
            stored = self._stored(connection, listed, listing.users, since, now)
        by_connection: defaultdict[tuple[str, str], list[ResourceCoverage]] = defaultdict(list)
        for one in listed:
            by_connection[one.user_id, one.provider].append(one)
        found = [gap for some in by_connection.values() for gap in gaps.of_coverage(some, stored, since, now)]
        return self._end(at, listing, found)

    def _stored(
        self,
        connection: Connection,
        listed: Sequence[ResourceCoverage],
        users: Sequence[str],
        since: datetime,
        now: datetime,
    ) -> Stored:
        spans = {_key(one): span for one in listed if (span := gaps.span_of_coverage(one, since, now))}
        windows = dict(coverage.fetched(connection, users))
        for key, some in self._would_open.items():
            windows[key] = [*windows.get(key, ()), *some]
        newest = dict(coverage.newest_stored(connection, spans))
        for key in spans:
            if not catalogue()[key.resource].has_days and key in coverage.any_stored(connection, key.resource, users):
                newest[key] = now
        return Stored(windows, coverage.days_stored(connection, spans), newest, coverage.outages(connection, since))

    def _connections(self, at: ReconcilePosition) -> Step:
        """Asks how somebody's connections are: a broken one is in no other list, nor one that was mended."""
        user_id, *others = at.people
        to = ReconcilePosition(at.part, at.cursor, tuple(others), restarts=at.restarts, pages=at.pages, seen=at.seen)
        request = junction.connections_request(user_id)
        try:
            now = self._ask(request, at, lambda answer: _read_connections(user_id, answer))
        except Unprocessable:  # of one person; the others are still to be compared
            return Step(to)
        with transaction(self._engine) as connection:
            known = coverage.connected(connection, [user_id]).get(user_id, {})
            gone = sorted(known.keys() - {one.provider for one in now})
            asked_at = datetime.now(UTC)
            now += [actions.Connection(user_id, name, "error", "deregistered", asked_at) for name in gone]
            news = [one for one in now if known.get(one.provider) != one.status]
            if news and not self._dry_run:
                if is_read_only(connection, user_id):
                    return Step(to)
                write(connection, [BatchItem(0, one) for one in news], "reconcile", {})
        keys = [(ResourceKey(user_id, one.provider, CONNECTION), one.status) for one in news]
        return Step(to, found=tuple(Gap(key, "ours", f"{status}, and we did not know") for key, status in keys))

    def _matters(self, one: Pull | ResourceCoverage) -> bool:
        """Whether the operator wants it."""
        resource = catalogue().get(one.resource)
        if resource is None or not self._settings.keeps(one.resource, one.provider):
            return False
        return not resource.legacy or one.resource in self._settings.resources

    def _end(
        self, at: ReconcilePosition, listing: Listing[T], found: Sequence[Gap], people: tuple[str, ...] = ()
    ) -> Step:
        """Has what is missing fetched, keeps the account of it, and says where to go on."""
        opened: list[int] = []
        if self._dry_run:
            self._pretend(found)
        else:
            with transaction(self._engine) as connection:
                users = upsert_users(connection, dict.fromkeys(gap.key.user_id for gap in found))
                found = [gap for gap in found if not users[gap.key.user_id].is_read_only]
                opened = [number for gap in found for number in _open(connection, gap)]
                keep_gaps(connection, at.part, listing.users, found)
        if at.pages > MAX_PAGES:
            raise Unprocessable("Junction's cursors go in a circle")
        seen = (*at.seen, at.cursor or "")[-MAX_SEEN_CURSORS:]
        to: ReconcilePosition | None = ReconcilePosition(
            at.part, listing.cursor, people, restarts=at.restarts, pages=at.pages + 1, seen=seen
        )
        if listing.cursor in seen:
            log.warning("a cursor of Junction's leads back; whoever comes after it is not compared")
        if listing.cursor is None or listing.cursor in seen:
            to = ReconcilePosition("supplies", None, people) if at.part == "pulls" else None
        compared = len(listing.users) if at.part == "pulls" else 0
        return Step(to, people=compared, found=tuple(found), opened=tuple(dict.fromkeys(opened)))

    def _pretend(self, found: Iterable[Gap]) -> None:
        now = datetime.now(UTC)
        for gap in found:
            self._would_open[gap.key] += [Fetched(*window, "reconcile", "open", now, None) for window in gap.windows]
            if gap.is_pulling:
                self._pulling.add(gap.key)

    def _ask(self, request: Request, at: ReconcilePosition, read: Callable[[HttpResponse], R]) -> R:
        """What an answer says. Raises _Suspend, or DeadLetter where asking again cannot help."""
        with tracing.span("page", aggregator=AGGREGATOR, part=at.part):
            reply = self._account.fetch(request, read, attempts=at.attempts)
            tracing.set_attributes(decision=reply.decision.action)
        if reply.value is not None:
            return reply.value
        if reply.decision.action in (FetchAction.NOT_FOUND, FetchAction.FAIL, FetchAction.REJECT):
            raise Unprocessable(f"Junction answers {request.path} with {reply.decision.reason}")
        raise _Suspend(reply.decision)


def run_slice(engine: Engine, reconciler: Reconciler, period: float) -> float | None:
    """Goes on with the reconciliation that is a chore, for one turn; how many seconds from now to go on, if it waits.

    The position is saved after every step: a killed worker costs one request.
    """
    if (job := jobs.claim(engine, JOB)) is None:
        return None
    at, until = _position(job.position), time.monotonic() + TIME_SLICE_SECONDS
    since = min(datetime.now(UTC), job.done_at or EARLIEST_HISTORY) - LOOK_BACK
    try:
        while time.monotonic() < until:
            step = reconciler.step(at, since)
            if step.to is None:
                jobs.save(engine, JOB, None, period)
                return None
            at = step.to
            jobs.save(engine, JOB, at, step.seconds, held=not step.seconds)
            if step.seconds:
                return step.seconds
    except Unprocessable as reason:
        log.warning("reconciliation: %s; the next one is in %.0f hours", reason, period / 3600)
        jobs.save(engine, JOB, None, period)
        return None
    jobs.save(engine, JOB, at, 0)
    return 0.0


def _position(kept: bytes | None) -> ReconcilePosition:
    """Where it was; at the beginning if an older version of ours put it down in another form."""
    try:
        return msgspec.json.decode(kept, type=ReconcilePosition) if kept else ReconcilePosition()
    except msgspec.ValidationError:
        return ReconcilePosition()


def _key(one: Pull | ResourceCoverage) -> ResourceKey:
    return ResourceKey(one.user_id, one.provider, one.resource)


def _read_connections(user_id: str, answer: HttpResponse) -> list[actions.Connection]:
    return junction.read_connections(user_id, answer.body, answer.asked_at)


def _open(connection: Connection, gap: Gap) -> Iterator[int]:
    """A backfill for what is missing, a chunk for each window."""
    now = datetime.now(UTC)
    for start, end in gap.windows:
        asked = BackfillRequest(AGGREGATOR, f"reconcile-{uuid.uuid4()}", "reconcile", now)
        backfill_id = open_backfill(connection, asked, Notice(*gap.key, start, end, is_final=True))
        if backfill_id is not None:
            yield backfill_id
