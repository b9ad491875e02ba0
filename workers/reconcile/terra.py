"""Compares Terra's Admin API with the stored data: failed deliveries, and users whose newest data is not stored.

Only windows are taken from the Admin API; backfills fetch the data through the read API. The Admin API also has the
bodies, but without an ordering timestamp, so that an old body would overwrite newer data.

A listed delivery does not name its user. The failed deliveries of each active user of the same provider are therefore
listed as well, until every failed delivery is matched with a user.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Literal, TypeVar

import msgspec
from sqlalchemy import Engine

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.errors import Unprocessable
from app.observability import metrics, tracing
from workers.actions import INFERRED
from workers.aggregators.admin_token import Token, TokenFault
from workers.aggregators.listings import Listing
from workers.aggregators.requests import Request
from workers.aggregators.terra import admin
from workers.aggregators.terra.admin import AdminUser, ApiProblem, FailedDelivery
from workers.aggregators.terra.events import IGNORED
from workers.fetch.http import Client
from workers.fetch.rate_limits import Throttle, key_id
from workers.fetch.retry import FINAL, UNREADABLE, FetchAction, decide
from workers.reconcile import gaps, runs
from workers.reconcile.gaps import Stored
from workers.reconcile.runs import Recorder, Step
from workers.store import coverage, jobs
from workers.store.backfills import EARLIEST_HISTORY
from workers.store.coverage import ResourceKey, forget_gaps
from workers.store.engine import transaction
from workers.store.users import erased_users

R = TypeVar("R", Token, Listing[FailedDelivery], Listing[AdminUser])
AGGREGATOR = "terra"
LISTING = "Terra's Admin API"
ACCOUNT = "terra-admin"  # in Redis: rates and pauses
JOB = "reconcile-terra"
DELIVERIES, NEWEST = "deliveries", "newest"  # parts of the stored gaps
RATE = "60/minute"  # Terra documents that there is a limit per token, but not its value
MAX_ASKED = 5000  # users whose failed deliveries are listed in one run: 83 minutes at RATE
HINTS = {
    400: "update Headrace: the Admin API may have changed",
    401: "set TERRA_ADMIN_TOKEN",
    403: "set TERRA_ADMIN_TOKEN",
    404: "check TERRA_DEV_ID and TERRA_ADMIN_BASE_URL",
}
# Before the last completed run: Terra retries for 8.5 h, during which a delivery is listed with each failed attempt.
OVERLAP = timedelta(hours=24)

log = logging.getLogger(__name__)


class TerraPosition(runs.Position, frozen=True):
    """The position of a reconciliation, saved as JSON after each step."""

    part: Literal["token", "events", "users", "end"] = "token"
    since: datetime | None = None  # of the deliveries
    until: datetime | None = None
    segment: int = 0  # of admin.SEGMENTS
    failed: dict[str, int] = msgspec.field(default_factory=dict)  # deliveries without a user yet, by provider or ''
    people: tuple[tuple[str, str], ...] = ()  # users, with their providers, whose deliveries are listed next
    person_cursor: str | None = None
    asked: int = 0  # users whose deliveries were listed
    unavailable: int = 0  # failed deliveries of types that the read API does not have
    fault: str = ""  # why Terra refused a part


class _Refused(Exception):
    """Terra refuses the token, its scope, the environment, the path or a parameter."""

    def __init__(self, status: int, problem: ApiProblem) -> None:
        super().__init__(f"status {status}" + (f", {problem.text}" if problem.text else ""))
        self.status, self.problem = status, problem


class TerraReconciler:
    """The comparison with Terra."""

    aggregator, name, listing, account = AGGREGATOR, "Terra", LISTING, ACCOUNT
    job, is_exclusive, start = JOB, True, TerraPosition()

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        client: Client,
        throttle: Throttle,
        *,
        dry_run: bool = False,
        is_command: bool = False,
    ) -> None:
        self._engine, self._settings, self._client, self._throttle = engine, settings, client, throttle
        self._dev_id, self._is_command = settings.need_terra_dev_id(), is_command
        self._key = key_id(f"{ACCOUNT} {settings.need_terra_admin_token()}")
        self._recorder = Recorder(engine, AGGREGATOR, dry_run=dry_run)

    def since(self, done_at: datetime | None) -> datetime:
        """The start of the time for which failed deliveries are listed."""
        return (done_at or EARLIEST_HISTORY) - OVERLAP

    def step(self, at: TerraPosition, since: datetime, user_id: str | None = None) -> Step[TerraPosition]:
        """Sends one request and compares. Raises Unprocessable if a retry cannot succeed, and TryLater."""
        try:
            return self._part(at, since, user_id)
        except runs.Again as again:
            return again.step
        except _Refused as refusal:
            return self._refused(at, refusal, user_id)

    def _part(self, at: TerraPosition, since: datetime, user_id: str | None) -> Step[TerraPosition]:
        if at.people:
            return self._failed_of_user(at)
        match at.part:
            case "token":
                return self._token(at, since, user_id)
            case "events":
                return self._events(at, user_id)
            case "users":
                return self._users(at, user_id)
        return self._end(at)

    def skip(self, at: TerraPosition) -> TerraPosition:
        """The position after a user who cannot be compared. A page is compared user by user first."""
        if at.people:
            return self._after_person(msgspec.structs.replace(at, person_cursor=None, skipped=at.skipped + 1))
        if at.part != "users":
            raise Unprocessable("PostgreSQL did not execute a step that concerns no user")
        return runs.skip_in_page(at)

    def _token(self, at: TerraPosition, since: datetime, user_id: str | None) -> Step[TerraPosition]:
        token = self._ask(at, admin.token_request(), admin.read_token)
        self._note(token)
        if not (user_id or self._recorder.dry_run):
            with transaction(self._engine) as connection:
                forget_gaps(connection, DELIVERIES)
        now = datetime.now(UTC)
        return Step(TerraPosition("events", since=max(since, now - admin.RETENTION), until=now))

    def _events(self, at: TerraPosition, user_id: str | None) -> Step[TerraPosition]:
        """Counts the failed deliveries, by provider."""
        listing = self._ask(at, self._events_request(at, at.cursor, user_id), admin.read_events)
        rows = _first_attempts(listing)
        failed = Counter(at.failed) + Counter(one.provider for one in rows if self._resource(one))
        unavailable = at.unavailable + sum(one.data_type not in _fetchable().keys() | IGNORED.keys() for one in rows)
        to = msgspec.structs.replace(at, failed=dict(failed), unavailable=unavailable)
        return Step(self._after_page(to, listing.cursor, "users"), unread=_counted(listing))

    def _users(self, at: TerraPosition, user_id: str | None) -> Step[TerraPosition]:
        """Compares the newest data of a page of users, and selects those that may have failed deliveries."""
        listing = self._ask(at, admin.users_request(self._dev_id, at.cursor, user_id), admin.read_users)
        page, is_end = runs.of_one(listing, at.alone)
        active = [one for one in page.rows if one.is_active]
        keys = {one.user_id: self._keys(one) for one in active}
        erased, stored = self._stored(list(keys), [key for some in keys.values() for key in some])
        users = [one for one in active if one.user_id not in erased]
        now = datetime.now(UTC)
        first = now - timedelta(days=self._settings.history_days)
        found = [gap for one in users for gap in gaps.of_newest(keys[one.user_id], one.newest, stored, first, now)]
        clients = {one.user_id: (one.reference_id, one.created_at or INFERRED) for one in users if one.reference_id}
        kept, opened = self._recorder.record(NEWEST, [one.user_id for one in page.rows], found, clients)
        people = tuple((one.user_id, one.provider) for one in users if {"", one.provider} & at.failed.keys())
        people = people[: MAX_ASKED - at.asked]
        to = msgspec.structs.replace(at, people=people, asked=at.asked + len(people))
        if is_end:
            to = self._after_page(to, listing.cursor, "end")
        else:
            to = msgspec.structs.replace(runs.turned(to, self.name), alone=(at.alone or 0) + 1)
        return Step(to, people=len(page.rows), found=kept, opened=opened, unread=_counted(listing))

    def _failed_of_user(self, at: TerraPosition) -> Step[TerraPosition]:
        """Opens backfills for the failed deliveries of one user."""
        user_id, provider = at.people[0]
        listing = self._ask(at, self._events_request(at, at.person_cursor, user_id), admin.read_events)
        rows = _first_attempts(listing)
        sent: defaultdict[ResourceKey, list[datetime]] = defaultdict(list)
        for one in rows:
            if resource := self._resource(one, provider):
                sent[ResourceKey(user_id, provider, resource.name)].append(one.sent_at)
        _, stored = self._stored([user_id], list(sent))
        now = datetime.now(UTC)
        found = [gap for key, times in sent.items() if (gap := gaps.of_failures(key, times, stored, now))]
        kept, opened = self._recorder.record(DELIVERIES, (user_id,), found)
        matched = Counter(one.provider for one in rows if self._resource(one))
        cursor = None if listing.cursor == at.person_cursor else listing.cursor
        to = msgspec.structs.replace(at, failed=dict(Counter(at.failed) - matched), person_cursor=cursor)
        return Step(self._after_person(to), found=kept, opened=opened, unread=_counted(listing))

    def _end(self, at: TerraPosition) -> Step[TerraPosition]:
        """Raises Unprocessable if Terra refused a part, so that the next run lists the same deliveries again."""
        if at.fault:
            raise Unprocessable(at.fault)
        notes = []
        if unmatched := sum(at.failed.values()):
            notes.append(f"{unmatched} failed deliveries could not be matched with any of {at.asked} users")
        if at.unavailable:
            hint = "resend them in Terra's dashboard"
            notes.append(f"{at.unavailable} failed deliveries have a type that the read API does not return; {hint}")
        for text in notes:
            log.warning(text)
        return Step(None, notes=tuple(notes))

    def _refused(self, at: TerraPosition, refusal: _Refused, user_id: str | None) -> Step[TerraPosition]:
        """Continues without the refused part, where that is possible. Raises Unprocessable."""
        if refusal.status in (400, 404) and refusal.problem.code != admin.UNKNOWN_ENVIRONMENT:
            if at.people and refusal.status == 404:  # Terra does not know this user any more
                return Step(self._after_person(msgspec.structs.replace(at, person_cursor=None)))
            if at.part == "events" and at.segment + 1 < len(admin.SEGMENTS):
                return Step(msgspec.structs.replace(at, segment=at.segment + 1))
            if at.part == "events" and user_id and refusal.status == 404:
                return Step(self._after_page(at, None, "users"))
        about = "the users" if at.part == "users" and not at.people else "the failed deliveries"
        hint = HINTS[refusal.status]
        fault = f"Terra's Admin API does not list {about} ({refusal})"
        self._note(TokenFault(fault, hint))
        fault += f"; {hint}"
        if refusal.status == 403 and (at.part == "events" or at.people):
            to = msgspec.structs.replace(at, people=(), person_cursor=None, failed={}, fault=fault)
            return Step(self._after_page(to, None, "users") if at.part == "events" else to)
        raise Unprocessable(fault)

    def _keys(self, user: AdminUser) -> list[ResourceKey]:
        return [
            ResourceKey(user.user_id, user.provider, one.name)
            for one in _fetchable().values()
            if self._settings.keeps(one.name, user.provider)
        ]

    def _resource(self, failed: FailedDelivery, provider: str = "") -> Resource | None:
        """The resource of a delivery, if the read API returns it and the settings keep it."""
        resource, provider = _fetchable().get(failed.data_type), provider or failed.provider
        is_kept = resource and (not provider or self._settings.keeps(resource.name, provider))
        return resource if is_kept else None

    def _stored(self, users: Sequence[str], keys: Sequence[ResourceKey]) -> tuple[set[str], Stored]:
        """The erased users among these, and the stored data of these keys."""
        with transaction(self._engine) as connection:
            fetched = self._recorder.with_simulated(coverage.fetched(connection, users))
            return erased_users(connection, users), Stored(fetched, newest=coverage.newest_stored(connection, keys))

    def _events_request(self, at: TerraPosition, cursor: str | None, user_id: str | None) -> Request:
        since, until = at.since or EARLIEST_HISTORY, at.until or datetime.now(UTC)
        segment = admin.SEGMENTS[at.segment]
        return admin.events_request(self._dev_id, segment, since=since, until=until, cursor=cursor, user_id=user_id)

    def _after_page(self, at: TerraPosition, cursor: str | None, following: Literal["users", "end"]) -> TerraPosition:
        """The position after a page: the next page, or else the following part."""
        at = runs.turned(at, self.name)
        at = msgspec.structs.replace(at, alone=None)
        return runs.next_page(at, cursor) or msgspec.structs.replace(at, part=following, cursor=None, seen=())

    def _after_person(self, at: TerraPosition) -> TerraPosition:
        """The position after a page of one user's deliveries. Once all are matched, the other users are skipped."""
        people = at.people if at.person_cursor else at.people[1:] if at.failed else ()
        return msgspec.structs.replace(runs.turned(at, self.name), people=people)

    def _note(self, values: TokenFault) -> None:
        if not self._recorder.dry_run and (not self._is_command or self._is_of_workers(values)):
            values = msgspec.structs.replace(values, checked_at=datetime.now(UTC), key=self._key)
            jobs.note(self._engine, jobs.TERRA_TOKEN, values)

    def _is_of_workers(self, values: TokenFault) -> bool:
        """Whether a command has the workers' token. Of another one `headrace status` shows no state, and no fault."""
        with transaction(self._engine) as connection:
            noted = jobs.noted(connection, jobs.TERRA_TOKEN)
        if noted is None:  # no worker has used its token yet
            return not values.fault
        return msgspec.json.decode(noted, type=TokenFault).key == self._key

    def _ask(self, at: TerraPosition, request: Request, read: Callable[[bytes], R]) -> R:
        """The parsed response. Raises Again, _Refused, Unprocessable, TryLater."""
        seconds = self._throttle.wait(ACCOUNT) or self._throttle.take(RATE, ACCOUNT)
        if seconds > 0:
            raise runs.Again(Step(at, seconds, reason=f"at most {RATE.replace('/', ' requests per ')}"))
        attributes: dict[str, str | int] = {"aggregator": AGGREGATOR, "part": at.part, "attempt": at.attempts + 1}
        with metrics.REQUEST_SECONDS.labels(AGGREGATOR).time(), tracing.client_span(request.method, **attributes):
            response = self._client.fetch(request)
            tracing.set_status(response.status)
        status, fault = response.status, ""
        metrics.REQUESTS.labels(AGGREGATOR, metrics.status_class(status)).inc()
        if status == 200:
            try:
                return read(response.body)
            except Unprocessable as reason:
                status, fault = UNREADABLE, str(reason)
        if status in (401, 403, 404) or (status == 400 and not request.has_cursor):
            raise _Refused(status, admin.read_problem(response.body))
        decision = decide(
            status,
            response.headers,
            attempts=at.attempts,
            now=datetime.now(UTC),
            has_cursor=request.has_cursor,
            fault=fault,
        )
        if decision.action in FINAL:
            raise Unprocessable(f"Terra answers {request.path} with {decision.reason}")
        if decision.action == FetchAction.PAUSE:
            self._throttle.pause(ACCOUNT, decision.seconds, decision.reason)
        to = msgspec.structs.replace(at, attempts=at.attempts + decision.counts)
        if decision.action == FetchAction.RESTART:
            to = msgspec.structs.replace(to, cursor=None, person_cursor=None, seen=())
        raise runs.Again(Step(to, decision.seconds, reason=decision.reason))


@cache
def _fetchable() -> dict[str, Resource]:
    """The resources that the read API returns, by Terra's type."""
    return {one.terra: one for one in catalogue().values() if one.terra}


def _first_attempts(listing: Listing[FailedDelivery]) -> list[FailedDelivery]:
    """The row of each delivery's first attempt: a later attempt does not make a window that was fetched incomplete."""
    newest_first = sorted(listing.rows, key=lambda one: one.sent_at, reverse=True)
    return list({one.event_id: one for one in newest_first}.values())


def _counted(listing: Listing[FailedDelivery] | Listing[AdminUser]) -> int:
    runs.count_unread(AGGREGATOR, listing.unread, LISTING)
    return listing.unread
