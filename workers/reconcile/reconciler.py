"""Compares what Junction says it has with what is stored, one page of users per step, and fetches what is missing."""

import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
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
from workers.fetch.retry import FINAL, FetchAction
from workers.reconcile import gaps
from workers.reconcile.gaps import Part, Stored
from workers.store import coverage, jobs
from workers.store.backfills import EARLIEST_HISTORY, BackfillRequest, open_backfill
from workers.store.coverage import Fetched, ResourceKey
from workers.store.engine import transaction
from workers.store.gaps import Gap, Window, keep_gaps, still_pulling
from workers.store.users import is_read_only, upsert_users
from workers.store.writer import BatchItem, write

T = TypeVar("T", Pull, ResourceCoverage)
R = TypeVar("R")
AGGREGATOR = "junction"
JOB = "reconcile"
LOOK_BACK = timedelta(days=35)  # how far before the last reconciliation webhook data is compared again
TIME_SLICE_SECONDS = 20.0
MAX_RESTARTS = 5
MAX_SEEN_CURSORS = 8
MAX_PAGES = 100_000  # five million users
CONNECTION = "connection"  # the resource of a gap that is about a connection

log = logging.getLogger(__name__)


class ReconcilePosition(msgspec.Struct, frozen=True):
    """The position of a reconciliation, saved as JSON after each step."""

    part: Part = "pulls"
    cursor: str | None = None
    people: tuple[str, ...] = ()  # users whose connections are compared before the next page
    attempts: int = 0
    restarts: int = 0  # because Junction rejected a cursor
    pages: int = 0
    seen: tuple[str, ...] = ()  # the last cursors, to detect a loop


@dataclass(frozen=True)
class Step:
    """The result of one request. `to` is the next position, None at the end; it may be continued after `seconds`."""

    to: ReconcilePosition | None
    seconds: float = 0.0
    people: int = 0
    found: tuple[Gap, ...] = ()
    opened: tuple[int, ...] = ()
    reason: str = ""  # of the wait


class Reconciler:
    """Runs a reconciliation one request at a time. It never sleeps."""

    def __init__(self, engine: Engine, settings: Settings, client: AggregatorClient, *, dry_run: bool = False) -> None:
        self._engine, self._settings, self._client, self._dry_run = engine, settings, client, dry_run
        # What a dry run would have stored in the parts before.
        self._would_open: defaultdict[ResourceKey, list[Fetched]] = defaultdict(list)
        self._pulling: set[ResourceKey] = set()

    def step(self, at: ReconcilePosition, since: datetime, user_id: str | None = None) -> Step:
        """Sends one request and compares. Raises Unprocessable if a retry cannot succeed, and TryLater."""
        if at.people:
            return self._connections(at)
        return self._pulls(at, user_id) if at.part == "pulls" else self._coverage(at, since, user_id)

    def _pulls(self, at: ReconcilePosition, user_id: str | None) -> Step:
        """Compares the history that Junction pulled when users connected."""
        request = junction.pulls_request(at.cursor, user_id)
        listing = self._request(at, request, lambda response: junction.read_pulls(response.body))
        if isinstance(listing, Step):
            return listing
        now = datetime.now(UTC)
        with transaction(self._engine) as connection:
            erased = coverage.erased(connection, listing.users)
            pulls = [one for one in listing.rows if one.user_id not in erased and self._is_wanted(one)]
            spans = {
                _key(one): gaps.span_of_pull(one, now)
                for one in pulls
                if one.days_with_data and catalogue()[one.resource].has_days
            }
            days = coverage.days_stored(connection, spans)
            stored = Stored(coverage.fetched(connection, listing.users), days)
        found = [gap for pull in pulls if (gap := gaps.of_pull(pull, stored, now))]
        return self._finish(at, listing, found, tuple(user for user in listing.users if user not in erased))

    def _coverage(self, at: ReconcilePosition, since: datetime, user_id: str | None) -> Step:
        """Compares the data that should have arrived by webhook."""
        request = junction.coverage_request(at.cursor, user_id)
        listing = self._request(at, request, lambda response: junction.read_coverage(response.body))
        if isinstance(listing, Step):
            return listing
        now = datetime.now(UTC)
        by_connection: defaultdict[tuple[str, str], list[ResourceCoverage]] = defaultdict(list)
        with transaction(self._engine) as connection:
            pulling = self._pulling if self._dry_run else still_pulling(connection, listing.users)
            erased = coverage.erased(connection, listing.users)
            for one in listing.rows:
                if one.user_id not in erased and self._is_wanted(one) and _key(one) not in pulling:
                    by_connection[one.user_id, one.provider].append(one)
            spans = {
                _key(one): span
                for some in by_connection.values()
                for one in some
                if (span := gaps.span_of_coverage(one, since, now))
            }
            stored = self._stored(connection, spans, listing.users, since, now)
        found = [gap for some in by_connection.values() for gap in gaps.of_coverage(some, stored, since, now)]
        return self._finish(at, listing, found)

    def _stored(
        self,
        connection: Connection,
        spans: Mapping[ResourceKey, Window],
        users: Sequence[str],
        since: datetime,
        now: datetime,
    ) -> Stored:
        windows = dict(coverage.fetched(connection, users))
        for key, some in self._would_open.items():
            windows[key] = [*windows.get(key, ()), *some]
        newest = dict(coverage.newest_stored(connection, spans))
        for key in spans:
            if not catalogue()[key.resource].has_days and key in coverage.any_stored(connection, key.resource, users):
                newest[key] = now
        return Stored(windows, coverage.days_stored(connection, spans), newest, coverage.outages(connection, since))

    def _connections(self, at: ReconcilePosition) -> Step:
        """Compares the connections of one user: no other listing contains broken or restored connections."""
        user_id, *others = at.people
        to = msgspec.structs.replace(at, people=tuple(others), attempts=0)
        request = junction.connections_request(user_id)
        try:
            now = self._request(at, request, partial(_read_connections, user_id))
        except Unprocessable:  # concerns this user only
            return Step(to)
        if isinstance(now, Step):
            return now
        with transaction(self._engine) as connection:
            known = coverage.connected(connection, [user_id]).get(user_id, {})
            gone = sorted(known.keys() - {one.provider for one in now})
            asked_at = datetime.now(UTC)
            now += [actions.Connection(user_id, name, "error", "deregistered", asked_at) for name in gone]
            changed = [one for one in now if known.get(one.provider) != one.status]
            if changed and not self._dry_run:
                if is_read_only(connection, user_id):
                    return Step(to)
                write(connection, [BatchItem(0, one) for one in changed], "reconcile", {})
        return Step(to, found=tuple(_connection_gap(one) for one in changed))

    def _is_wanted(self, one: Pull | ResourceCoverage) -> bool:
        """Whether the settings keep the resource; a legacy resource must be named in them."""
        resource = catalogue().get(one.resource)
        if resource is None or not self._settings.keeps(one.resource, one.provider):
            return False
        return not resource.legacy or one.resource in self._settings.resources

    def _finish(
        self, at: ReconcilePosition, listing: Listing[T], found: Sequence[Gap], people: tuple[str, ...] = ()
    ) -> Step:
        """Opens backfills for the gaps, stores the gaps and returns the next position."""
        opened: list[int] = []
        if self._dry_run:
            self._simulate(found)
        else:
            with transaction(self._engine) as connection:
                users = upsert_users(connection, dict.fromkeys(gap.key.user_id for gap in found))
                found = [gap for gap in found if not users[gap.key.user_id].is_read_only]
                opened = [backfill_id for gap in found for backfill_id in _open_backfills(connection, gap)]
                keep_gaps(connection, at.part, listing.users, found)
        if at.pages > MAX_PAGES:
            raise Unprocessable(f"Junction's listing has more than {MAX_PAGES} pages: its cursors form a loop")
        seen = (*at.seen, at.cursor or "")[-MAX_SEEN_CURSORS:]
        to: ReconcilePosition | None = ReconcilePosition(
            at.part, listing.cursor, people, restarts=at.restarts, pages=at.pages + 1, seen=seen
        )
        if listing.cursor in seen:
            log.warning("Junction returned a cursor again; users on later pages are not compared")
        if listing.cursor is None or listing.cursor in seen:
            to = ReconcilePosition("supplies", None, people) if at.part == "pulls" else None
        compared = len(listing.users) if at.part == "pulls" else 0
        return Step(to, people=compared, found=tuple(found), opened=tuple(dict.fromkeys(opened)))

    def _simulate(self, found: Iterable[Gap]) -> None:
        now = datetime.now(UTC)
        for gap in found:
            for start, end in gap.windows:
                window = Fetched(start, end, "reconcile", "open", created_at=now, finished_at=None)
                self._would_open[gap.key].append(window)
            if gap.is_pulling:
                self._pulling.add(gap.key)

    def _request(self, at: ReconcilePosition, request: Request, read: Callable[[HttpResponse], R]) -> R | Step:
        """The parsed response, or the step that sends the request again. Raises Unprocessable, TryLater."""
        with tracing.span("page", aggregator=AGGREGATOR, part=at.part):
            reply = self._client.fetch(request, read, attempts=at.attempts)
            tracing.set_attributes(decision=reply.decision.action)
        if reply.value is not None:
            return reply.value
        decision = reply.decision
        if decision.action in FINAL:
            raise Unprocessable(f"Junction answers {request.path} with {decision.reason}")
        to = msgspec.structs.replace(at, attempts=at.attempts + decision.counts)
        if decision.action == FetchAction.RESTART:
            if at.restarts >= MAX_RESTARTS:
                raise Unprocessable(f"Junction rejected its own cursors {MAX_RESTARTS} times")
            to = ReconcilePosition(at.part, restarts=at.restarts + 1)
        return Step(to, decision.seconds, reason=decision.reason)


def run_slice(engine: Engine, reconciler: Reconciler, period: float) -> float | None:
    """Continues the scheduled reconciliation for one time slice. Returns the seconds until the next slice, if any.

    The position is saved after every step: a killed worker costs one request.
    """
    if (job := jobs.claim(engine, JOB)) is None:
        return None
    at, until, seconds = _position(job.position), time.monotonic() + TIME_SLICE_SECONDS, 0.0
    since = min(datetime.now(UTC), job.done_at or EARLIEST_HISTORY) - LOOK_BACK
    try:
        while not seconds and time.monotonic() < until:
            step = reconciler.step(at, since)
            if step.to is None:
                jobs.save(engine, JOB, None, period)
                return None
            at, seconds = step.to, step.seconds
            jobs.save(engine, JOB, at, seconds, held=not seconds)
    except Unprocessable as reason:
        log.warning("reconciliation stopped: %s; the next one starts in %.0f hours", reason, period / 3600)
        jobs.save(engine, JOB, None, period)
        return None
    if not seconds:
        jobs.save(engine, JOB, at, 0)
    return seconds


def _position(saved: bytes | None) -> ReconcilePosition:
    try:
        return msgspec.json.decode(saved, type=ReconcilePosition) if saved else ReconcilePosition()
    except msgspec.ValidationError:  # saved by an older version in another form: start again
        return ReconcilePosition()


def _key(one: Pull | ResourceCoverage) -> ResourceKey:
    return ResourceKey(one.user_id, one.provider, one.resource)


def _connection_gap(one: actions.Connection) -> Gap:
    return Gap(
        ResourceKey(one.user_id, one.provider, CONNECTION),
        "ours",
        f"the aggregator reports {one.status}, which is not stored",
    )


def _read_connections(user_id: str, response: HttpResponse) -> list[actions.Connection]:
    return junction.read_connections(user_id, response.body, response.asked_at)


def _open_backfills(connection: Connection, gap: Gap) -> Iterator[int]:
    """Opens a backfill for the gap, with one chunk for each of its windows."""
    now = datetime.now(UTC)
    for start, end in gap.windows:
        request = BackfillRequest(AGGREGATOR, f"reconcile-{uuid.uuid4()}", "reconcile", now)
        notice = Notice(**gap.key._asdict(), window_start=start, window_end=end, is_final=True)
        backfill_id = open_backfill(connection, request, notice)
        if backfill_id is not None:
            yield backfill_id
