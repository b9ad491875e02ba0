"""Compares what Junction says it has with what is stored, one page of users per step, and fetches what is missing."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import Unprocessable
from app.observability import tracing
from workers import actions
from workers.aggregators import junction
from workers.aggregators.junction.introspection import Pull, ResourceCoverage
from workers.aggregators.listings import Listing
from workers.aggregators.requests import Request
from workers.daily.priorities import lacks_offsets, set_fallback_zone
from workers.fetch.client import AggregatorClient
from workers.fetch.http import HttpResponse
from workers.fetch.retry import FINAL, FetchAction
from workers.reconcile import gaps, runs
from workers.reconcile.gaps import Part, Stored
from workers.reconcile.runs import MAX_PAGES, MAX_SEEN_CURSORS, Recorder
from workers.store import coverage, lost_deliveries
from workers.store.backfills import EARLIEST_HISTORY
from workers.store.coverage import Gap, ResourceKey, Window, still_pulling
from workers.store.engine import transaction
from workers.store.users import erased_users, is_read_only
from workers.store.writer import BatchItem, write

T = TypeVar("T", Pull, ResourceCoverage)
R = TypeVar("R")
AGGREGATOR = "junction"
LISTING = "Junction's introspection"
JOB = "reconcile"
LOOK_BACK = timedelta(days=35)  # how far before the last reconciliation webhook data is compared again
MAX_RESTARTS = 5
CONNECTION = "connection"  # the resource of a gap that is about a connection

log = logging.getLogger(__name__)


class ReconcilePosition(runs.Position, frozen=True):
    """The position of a reconciliation, saved as JSON after each step."""

    part: Part = "pulls"
    cursor: str | None = None
    people: tuple[str, ...] = ()  # users whose connections are compared before the next page
    attempts: int = 0
    restarts: int = 0  # because Junction rejected a cursor
    pages: int = 0
    seen: tuple[str, ...] = ()  # the last cursors, to detect a loop
    began: datetime | None = None  # when the first page was read


Step = runs.Step[ReconcilePosition]


class Reconciler:
    """The comparison with Junction."""

    aggregator, name, listing, account = AGGREGATOR, "Junction", LISTING, AGGREGATOR
    job, is_exclusive, start = JOB, False, ReconcilePosition()

    def __init__(self, engine: Engine, settings: Settings, client: AggregatorClient, *, dry_run: bool = False) -> None:
        self._engine, self._settings, self._client = engine, settings, client
        self._recorder = Recorder(engine, AGGREGATOR, dry_run=dry_run)

    def since(self, done_at: datetime | None) -> datetime:
        """The start of the time for which webhook data is compared."""
        return min(datetime.now(UTC), done_at or EARLIEST_HISTORY) - LOOK_BACK

    def step(self, at: ReconcilePosition, since: datetime, user_id: str | None = None) -> Step:
        """Sends one request and compares. Raises Unprocessable if a retry cannot succeed, and TryLater."""
        if at.people:
            step = self._connections(at)
        else:
            step = self._pulls(at, user_id) if at.part == "pulls" else self._coverage(at, since, user_id)
        if step.to is None and at.began and not self._recorder.dry_run:
            lost_deliveries.reconciled(self._engine, AGGREGATOR, user_id, at.began)
        return step

    def skip(self, at: ReconcilePosition) -> ReconcilePosition:
        """The position after a user who cannot be compared. A page is compared user by user first."""
        if at.people:
            return msgspec.structs.replace(at, people=at.people[1:], skipped=at.skipped + 1)
        if at.alone is None:
            return msgspec.structs.replace(at, alone=0)
        return msgspec.structs.replace(at, alone=at.alone + 1, skipped=at.skipped + 1)

    def _pulls(self, at: ReconcilePosition, user_id: str | None) -> Step:
        """Compares the history that Junction pulled when users connected."""
        request = junction.pulls_request(at.cursor, user_id)
        listing = self._request(at, request, lambda response: junction.read_pulls(response.body))
        if isinstance(listing, runs.Step):
            return listing
        now = datetime.now(UTC)
        page, _ = runs.of_one(listing, at.alone)
        with transaction(self._engine) as connection:
            erased = erased_users(connection, listing.users)
            pulls = [one for one in page.rows if one.user_id not in erased and self._is_wanted(one)]
            spans = {
                _key(one): gaps.span_of_pull(one, now)
                for one in pulls
                if one.days_with_data and catalogue()[one.resource].has_days
            }
            days = coverage.days_stored(connection, spans)
            stored = Stored(coverage.fetched(connection, page.users), days)
        found = [gap for pull in pulls if (gap := gaps.of_pull(pull, stored, now))]
        return self._finish(at, listing, found, tuple(user for user in listing.users if user not in erased))

    def _coverage(self, at: ReconcilePosition, since: datetime, user_id: str | None) -> Step:
        """Compares the data that should have arrived by webhook."""
        request = junction.coverage_request(at.cursor, user_id)
        listing = self._request(at, request, lambda response: junction.read_coverage(response.body))
        if isinstance(listing, runs.Step):
            return listing
        now = datetime.now(UTC)
        page, _ = runs.of_one(listing, at.alone)
        by_connection: defaultdict[tuple[str, str], list[ResourceCoverage]] = defaultdict(list)
        with transaction(self._engine) as connection:
            pulling = self._recorder.pulling if self._recorder.dry_run else still_pulling(connection, page.users)
            erased = erased_users(connection, page.users)
            for one in page.rows:
                if one.user_id not in erased and self._is_wanted(one) and _key(one) not in pulling:
                    by_connection[one.user_id, one.provider].append(one)
            spans = {
                _key(one): span
                for some in by_connection.values()
                for one in some
                if (span := gaps.span_of_coverage(one, since, now))
            }
            stored = self._stored(connection, spans, page.users, since, now)
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
        windows = self._recorder.with_simulated(coverage.fetched(connection, users))
        newest = dict(coverage.newest_stored(connection, spans))
        for key in spans:
            if not catalogue()[key.resource].has_days and key in coverage.any_stored(connection, key.resource, users):
                newest[key] = now
        return Stored(windows, coverage.days_stored(connection, spans), newest, coverage.outages(connection, since))

    def _connections(self, at: ReconcilePosition) -> Step:
        """Compares the connections of one user: no other listing contains broken or restored connections."""
        user_id, *others = at.people
        to = msgspec.structs.replace(at, people=tuple(others), attempts=0)
        try:
            request = junction.connections_request(user_id)
            answer = self._request(at, request, partial(_read_connections, user_id))
        except Unprocessable:  # concerns this user only
            return Step(to)
        if isinstance(answer, runs.Step):
            return answer
        listing, asked_at = answer
        unread = listing.unread + listing.unread_parts
        runs.count_unread(AGGREGATOR, unread, LISTING)
        now = [one for one in listing.rows if isinstance(one, actions.Connection)]
        with transaction(self._engine) as connection:
            known = coverage.connected(connection, user_id)
            grants = _changed_grants(connection, user_id, listing)
            # An entry that could not be read may be one of the connections that are not in the list.
            gone = () if listing.unread else sorted(known.keys() - {one.provider for one in now})
            # As old as the request, by the clock of Junction: a connection that was made since is newer.
            now += [actions.Connection(user_id, name, "error", "deregistered", asked_at) for name in gone]
            changed = [one for one in now if known.get(one.provider) != one.status]
            if (changed or grants) and not self._recorder.dry_run:
                if is_read_only(connection, user_id, AGGREGATOR):
                    return Step(to, unread=unread)
                written: list[actions.Action] = [*changed, *grants]
                write(connection, [BatchItem(0, one) for one in written], "reconcile", {})
        zone = self._store_zone(at)
        return zone or Step(to, found=tuple(_connection_gap(one) for one in changed), unread=unread)

    def _store_zone(self, at: ReconcilePosition) -> Step | None:
        """Stores the fallback time zone of the user, if data of it has no offset. Returns the step that asks again."""
        user_id = at.people[0]
        with transaction(self._engine) as connection:
            if self._recorder.dry_run or not lacks_offsets(connection, user_id):
                return None
        try:
            zone = self._request(at, junction.zone_request(user_id), lambda response: junction.read_zone(response.body))
        except Unprocessable:  # concerns this user only
            return None
        if isinstance(zone, runs.Step):
            return zone
        with transaction(self._engine) as connection:
            set_fallback_zone(connection, user_id, zone)
        return None

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
        page, is_end = runs.of_one(listing, at.alone)
        kept, opened = self._recorder.record(at.part, page.users, found)
        compared = len(page.users) if at.part == "pulls" else 0
        if not is_end:
            to_next = msgspec.structs.replace(at, alone=(at.alone or 0) + 1, attempts=0)
            return Step(to_next, people=compared, found=kept, opened=opened)
        runs.count_unread(AGGREGATOR, listing.unread, LISTING)
        if at.pages > MAX_PAGES:
            raise Unprocessable(f"Junction's listing has more than {MAX_PAGES} pages: its cursors form a loop")
        seen, began = (*at.seen, at.cursor or "")[-MAX_SEEN_CURSORS:], at.began or datetime.now(UTC)
        to: ReconcilePosition | None = ReconcilePosition(
            at.part, listing.cursor, people, restarts=at.restarts, pages=at.pages + 1, seen=seen, began=began
        )
        if listing.cursor in seen:
            log.warning("Junction returned a cursor again; users on later pages are not compared")
        if listing.cursor is None or listing.cursor in seen:
            to = ReconcilePosition("supplies", None, people, began=began) if at.part == "pulls" else None
        return Step(to, people=compared, found=kept, opened=opened, unread=listing.unread)

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
            to = ReconcilePosition(at.part, restarts=at.restarts + 1, began=at.began)
        return Step(to, decision.seconds, reason=decision.reason)


def _key(one: Pull | ResourceCoverage) -> ResourceKey:
    return ResourceKey(one.user_id, one.provider, one.resource)


def _connection_gap(one: actions.Connection) -> Gap:
    return Gap(
        ResourceKey(one.user_id, one.provider, CONNECTION),
        "ours",
        f"the aggregator reports {one.status}, which is not stored",
    )


def _changed_grants(connection: Connection, user_id: str, listing: Listing[Any]) -> list[actions.Grants]:
    """The grants that differ from the stored ones: to write all would update some 20 rows per connection each time."""
    known, found = coverage.granted(connection, user_id), []
    for one in listing.rows:
        if isinstance(one, actions.Grants):
            changed = tuple(item for item in one.granted if known.get((one.provider, item[0])) != item[1])
            found += [replace(one, granted=changed)] if changed else []
    return found


def _read_connections(
    user_id: str, response: HttpResponse
) -> tuple[Listing[actions.Connection | actions.Grants], datetime]:
    return junction.read_connections(user_id, response.body, response.asked_at), response.asked_at
