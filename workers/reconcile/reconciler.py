"""Compares the data that Junction lists with the stored data, one page of users per step, and fetches missing data."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import Unprocessable
from app.observability import tracing
from workers import actions
from workers.aggregators.junction import introspection
from workers.aggregators.junction.introspection import Pull, ResourceCoverage
from workers.aggregators.listings import Listing
from workers.aggregators.requests import Request
from workers.daily.priorities import lacks_offsets, set_fallback_zone
from workers.fetch.client import AggregatorClient
from workers.fetch.http import HttpResponse
from workers.fetch.retry import FINAL, FetchAction
from workers.reconcile import gaps, runs
from workers.reconcile.gaps import Part, Stored
from workers.reconcile.runs import Recorder
from workers.store import coverage, lost_deliveries
from workers.store.backfills import EARLIEST_HISTORY
from workers.store.coverage import Gap, ResourceKey, Window, still_pulling
from workers.store.engine import transaction
from workers.store.users import erased_users, is_read_only
from workers.store.writer import BatchItem, write

R = TypeVar("R")
AGGREGATOR = "junction"
LISTING = "Junction's introspection"
JOB, LOST_JOB = "reconcile", "reconcile-lost"
LOOK_BACK = timedelta(days=35)  # how far before the last reconciliation webhook data is compared again
MAX_RESTARTS = 5
CONNECTION = "connection"  # the resource of a gap that is about a connection

log = logging.getLogger(__name__)


class ReconcilePosition(runs.Position, frozen=True):
    """The position of a reconciliation, saved as JSON after each step."""

    part: Part = "pulls"
    people: tuple[str, ...] = ()  # users whose connections are compared before the next page
    restarts: int = 0  # because Junction rejected a cursor
    began: datetime | None = None  # when the first page was read


Step = runs.Step[ReconcilePosition]
# The request for a page of each listing, of all users or one, and the reader of the answer.
LISTINGS: Mapping[Part, tuple[Callable[[str | None, str | None], Request], Callable[[bytes], Listing[Any]]]] = {
    "pulls": (introspection.pulls_request, introspection.read_pulls),
    "supplies": (introspection.coverage_request, introspection.read_coverage),
}


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
        try:
            step = self._connections(at) if at.people else self._page(at, since, user_id)
        except runs.Again as again:
            return again.step
        if step.to is None and at.began and not self._recorder.dry_run:
            lost_deliveries.reconciled(self._engine, AGGREGATOR, user_id, at.began)
        return step

    def skip(self, at: ReconcilePosition) -> ReconcilePosition:
        """The position after a user who cannot be compared. A page is compared user by user first."""
        if at.people:
            return msgspec.structs.replace(at, people=at.people[1:], skipped=at.skipped + 1)
        return runs.skip_in_page(at)

    def _page(self, at: ReconcilePosition, since: datetime, user_id: str | None) -> Step:
        """Compares one page of the history that Junction pulled, or of its coverage."""
        ask, read = LISTINGS[at.part]
        listing = self._request(at, ask(at.cursor, user_id), lambda response: read(response.body))
        page, is_end = runs.of_one(listing, at.alone)
        now = datetime.now(UTC)
        people: tuple[str, ...] = ()
        with transaction(self._engine) as connection:
            erased = erased_users(connection, listing.users)
            rows = [one for one in page.rows if one.user_id not in erased and self._is_wanted(one)]
            if at.part == "pulls":
                found = _gaps_of_pulls(connection, page.users, rows, now)
                people = tuple(user for user in listing.users if user not in erased)
            else:
                found = self._gaps_of_coverage(connection, page.users, rows, since, now)
        kept, opened = self._recorder.record(at.part, page.users, found)
        compared = len(page.users) if at.part == "pulls" else 0
        if not is_end:
            to_next = msgspec.structs.replace(at, alone=(at.alone or 0) + 1, attempts=0)
            return Step(to_next, people=compared, found=kept, opened=opened)
        runs.count_unread(AGGREGATOR, listing.unread, LISTING)
        began = at.began or now
        to = msgspec.structs.replace(runs.turned(at, self.name), people=people, began=began, alone=None)
        following = runs.next_page(to, listing.cursor)
        if following is None and listing.cursor:
            log.warning("Junction returned a cursor again; users on later pages are not compared")
        if following is None and at.part == "pulls":
            following = ReconcilePosition("supplies", people, began=began)
        return Step(following, people=compared, found=kept, opened=opened, unread=listing.unread)

    def _gaps_of_coverage(
        self,
        connection: Connection,
        users: Sequence[str],
        rows: Sequence[ResourceCoverage],
        since: datetime,
        now: datetime,
    ) -> list[Gap]:
        """The gaps in the data that should have arrived by webhook."""
        pulling = self._recorder.pulling if self._recorder.dry_run else still_pulling(connection, users)
        by_connection: defaultdict[tuple[str, str], list[ResourceCoverage]] = defaultdict(list)
        spans: dict[ResourceKey, Window] = {}
        for one in rows:
            if (key := gaps.key_of(one)) not in pulling:
                by_connection[one.user_id, one.provider].append(one)
                if span := gaps.span_of_coverage(one, since, now):
                    spans[key] = span
        windows = self._recorder.with_simulated(coverage.fetched(connection, users))
        newest = dict(coverage.newest_stored(connection, spans))
        for key in spans:
            if not catalogue()[key.resource].has_days and key in coverage.any_stored(connection, key.resource, users):
                newest[key] = now
        days, outages = coverage.days_stored(connection, spans), coverage.outages(connection, since)
        stored = Stored(windows, days, newest, outages)
        return [gap for some in by_connection.values() for gap in gaps.of_coverage(some, stored, since, now)]

    def _connections(self, at: ReconcilePosition) -> Step:
        """Compares the connections of one user: no other listing contains broken or restored connections."""
        user_id, *others = at.people
        to = msgspec.structs.replace(at, people=tuple(others), attempts=0)
        try:
            listing, asked_at = self._request(
                at,
                introspection.connections_request(user_id),
                lambda answer: (introspection.read_connections(user_id, answer.body, answer.asked_at), answer.asked_at),
            )
        except Unprocessable:  # concerns this user only
            return Step(to)
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
        self._store_zone(at)
        return Step(to, found=tuple(_connection_gap(one) for one in changed), unread=unread)

    def _store_zone(self, at: ReconcilePosition) -> None:
        """Stores the fallback time zone of the user, if data of it has no offset."""
        user_id = at.people[0]
        with transaction(self._engine) as connection:
            if self._recorder.dry_run or not lacks_offsets(connection, user_id):
                return
        request = introspection.zone_request(user_id)
        try:
            zone = self._request(at, request, lambda response: introspection.read_zone(response.body))
        except Unprocessable:  # concerns this user only
            return
        with transaction(self._engine) as connection:
            set_fallback_zone(connection, user_id, zone)

    def _is_wanted(self, one: Pull | ResourceCoverage) -> bool:
        """Whether the settings keep the resource; a legacy resource must be named in them."""
        resource = catalogue().get(one.resource)
        if resource is None or not self._settings.keeps(one.resource, one.provider):
            return False
        return not resource.legacy or one.resource in self._settings.resources

    def _request(self, at: ReconcilePosition, request: Request, read: Callable[[HttpResponse], R]) -> R:
        """The parsed response. Raises Again, Unprocessable, TryLater."""
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
        raise runs.Again(Step(to, decision.seconds, reason=decision.reason))


def _gaps_of_pulls(connection: Connection, users: Sequence[str], pulls: Sequence[Pull], now: datetime) -> list[Gap]:
    """The gaps in the history that Junction pulled when users connected."""
    counted = [one for one in pulls if one.days_with_data and catalogue()[one.resource].has_days]
    days = coverage.days_stored(connection, {gaps.key_of(one): gaps.span_of_pull(one, now) for one in counted})
    stored = Stored(coverage.fetched(connection, users), days)
    return [gap for pull in pulls if (gap := gaps.of_pull(pull, stored, now))]


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


class LostPosition(runs.Position, frozen=True):
    """The position of a run: users are compared in the order of their ids."""

    user_id: str = ""
    at: ReconcilePosition | None = None  # None: this user is finished


class LostDeliveryReconciler:
    """The comparison with Junction, limited to users with a lost delivery."""

    aggregator, name, listing, account = AGGREGATOR, "Junction", LISTING, AGGREGATOR
    job, is_exclusive, start = LOST_JOB, False, LostPosition()

    def __init__(self, engine: Engine, of_all: Reconciler) -> None:
        self._engine, self._of_all = engine, of_all

    def since(self, done_at: datetime | None) -> datetime:
        """The start of the time for which webhook data is compared, whenever the last run was."""
        del done_at
        return self._of_all.since(datetime.now(UTC))

    def step(self, at: LostPosition, since: datetime, user_id: str | None = None) -> runs.Step[LostPosition]:
        """Sends one request about the current user. An error for one user does not stop the run. Raises TryLater."""
        del user_id
        user, position = at.user_id, at.at
        if position is None:
            found = lost_deliveries.next_user(self._engine, AGGREGATOR, at.user_id)
            if found is None:
                return runs.Step(None)
            user, position = found, self._of_all.start
        try:
            step = self._of_all.step(position, since, user)
        except Unprocessable as reason:
            log.warning("a user with a lost delivery could not be compared: %s", reason)
            return runs.Step(LostPosition(user))
        return runs.Step(LostPosition(user, step.to), step.seconds, reason=step.reason)

    def skip(self, at: LostPosition) -> LostPosition:
        """The position after the current user."""
        user = at.user_id if at.at else lost_deliveries.next_user(self._engine, AGGREGATOR, at.user_id)
        return LostPosition(user or at.user_id, skipped=at.skipped + 1)
