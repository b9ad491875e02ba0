"""Junction's reports about itself (Junction: introspection): history pulls, coverage, connections; and the refresh."""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import msgspec

from app.errors import Unprocessable
from workers.actions import Connection
from workers.aggregators.common import decode, moment_or_none
from workers.aggregators.requests import Request

T = TypeVar("T")
USERS_A_PAGE = "50"
EARLIEST_STATISTICS = datetime(2000, 1, 1, tzinfo=UTC)  # before any wearable; year 1 stands for "unknown"
NO_CURSOR = ("", "None")  # the public example has the text "None"
Status = Literal["pulled", "pulling", "failed", "not pulled"]
_moment = partial(moment_or_none, earliest=EARLIEST_STATISTICS)
STATUSES: dict[str, Status] = {"success": "pulled", "failure": "failed"}  # any other: pulling (the list may grow)


@dataclass(frozen=True)
class Pull:
    """The pull of one resource's history from the provider to Junction."""

    user_id: str
    provider: str
    resource: str
    status: Status
    start: datetime | None = None
    end: datetime | None = None
    began: datetime | None = None
    days_with_data: int = 0
    status_text: str = ""  # Junction's own status, with the error if there is one


@dataclass(frozen=True)
class ResourceCoverage:
    """The oldest and newest data of a resource at Junction."""

    user_id: str
    provider: str
    resource: str
    oldest: datetime | None
    newest: datetime | None


@dataclass(frozen=True)
class Listing(Generic[T]):
    """One page about some users. A cursor means that there are more pages, even if this one is short or empty."""

    rows: tuple[T, ...]
    users: tuple[str, ...]
    cursor: str | None


class Refreshed(msgspec.Struct, frozen=True):
    """The result of a refresh by source and resource (`oura/sleep`), or the error that prevented it."""

    done: tuple[str, ...] = msgspec.field(default=(), name="refreshed_sources")
    under_way: tuple[str, ...] = msgspec.field(default=(), name="in_progress_sources")
    failed: tuple[str, ...] = msgspec.field(default=(), name="failed_sources")
    error: str | None = None


class _Pull(msgspec.Struct):
    status: str
    range_start: Any = None
    range_end: Any = None
    start: Any = None  # the older names
    end: Any = None
    timeline: dict[str, Any] | None = None
    days_with_data: int | None = None
    error_details: str | None = None


class _Pulls(msgspec.Struct):
    pulled: dict[str, msgspec.Raw] = {}
    not_pulled: list[str] = []


class _Statistics(msgspec.Struct):
    oldest_data: Any = None
    newest_data: Any = None


class _User(msgspec.Struct):
    user_id: str  # the public example has an empty one
    provider: dict[str, msgspec.Raw] = {}


class _Page(msgspec.Struct):
    data: list[_User]
    next_cursor: str | None = None
    next: str | None = None


class _ConnectionError(msgspec.Struct):
    error_type: str | None = None
    error_message: str | None = None


class _Connected(msgspec.Struct):
    slug: str
    status: str = "connected"
    error_details: _ConnectionError | None = None


class _Providers(msgspec.Struct):
    providers: list[_Connected]


def pulls_request(cursor: str | None = None, user_id: str | None = None) -> Request:
    """One page of the history pulls, of all users or one."""
    return _introspect("historical_pull", cursor, user_id)


def coverage_request(cursor: str | None = None, user_id: str | None = None) -> Request:
    """One page of the coverage of each resource, of all users or one."""
    return _introspect("resources", cursor, user_id)


def _introspect(part: str, cursor: str | None, user_id: str | None) -> Request:
    query = {"user_limit": USERS_A_PAGE, "user_id": user_id, "next_cursor": cursor}
    given = tuple((name, value) for name, value in query.items() if value)
    return Request(f"/v2/introspect/{part}", given, bool(cursor))


def read_pulls(body: bytes) -> Listing[Pull]:
    """The answer to `pulls_request`. Raises Unprocessable."""
    page = decode(body, _Page, "historical pulls")
    found = []
    for user_id, provider, raw in _by_provider(page):
        pulls = decode(raw, _Pulls, "historical pulls")
        found += [_pull(user_id, provider, name, bytes(one)) for name, one in pulls.pulled.items()]
        found += [Pull(user_id, provider, name, "not pulled") for name in pulls.not_pulled]
    return _listing(page, found)


def read_coverage(body: bytes) -> Listing[ResourceCoverage]:
    """The answer to `coverage_request`. Raises Unprocessable."""
    page = decode(body, _Page, "resources")
    found = [
        ResourceCoverage(user_id, provider, name, _moment(one.oldest_data), _moment(one.newest_data))
        for user_id, provider, raw in _by_provider(page)
        for name, one in decode(raw, dict[str, _Statistics], "resources").items()
    ]
    return _listing(page, found)


def connections_request(user_id: str) -> Request:
    """The connections of one user."""
    return Request(f"/v2/user/providers/{quote(user_id, safe='')}")


def read_connections(user_id: str, body: bytes, asked_at: datetime) -> list[Connection]:
    """The answer to `connections_request`. Raises Unprocessable."""
    return [_connection(user_id, one, asked_at) for one in decode(body, _Providers, "providers").providers]


def refresh_request(user_id: str) -> Request:
    """Fetches new data from the user's providers immediately; Junction allows eight refreshes per hour and user."""
    return Request(f"/v2/user/refresh/{quote(user_id, safe='')}", method="POST")


def read_refresh(body: bytes) -> Refreshed:
    """The answer to `refresh_request`, including a refusal. Raises Unprocessable."""
    return decode(body, Refreshed, "refresh")  # type: ignore[no-any-return]


def _by_provider(page: _Page) -> list[tuple[str, str, bytes]]:
    return [
        (user.user_id, provider.lower(), bytes(raw))
        for user in page.data
        if user.user_id
        for provider, raw in user.provider.items()
    ]


def _listing(page: _Page, rows: list[T]) -> Listing[T]:
    cursor = page.next_cursor or page.next or ""
    users = tuple(user.user_id for user in page.data if user.user_id)
    return Listing(tuple(rows), users, None if cursor in NO_CURSOR else cursor)


def _pull(user_id: str, provider: str, name: str, raw: bytes) -> Pull:
    """A pull that cannot be read counts as in progress, so that it does not cost the others."""
    try:
        pull: _Pull = decode(raw, _Pull, "a historical pull")
    except Unprocessable as reason:
        return Pull(user_id, provider, name, "pulling", status_text=str(reason))
    times = pull.timeline or {}
    status = STATUSES.get(pull.status, "pulling")
    return Pull(
        user_id=user_id,
        provider=provider,
        resource=name,
        status=status,
        start=_moment(pull.range_start or pull.start),
        end=_moment(pull.range_end or pull.end),
        began=_moment(times.get("started_at") or times.get("scheduled_at")),
        days_with_data=(pull.days_with_data or 0) if status == "pulled" else 0,
        status_text=", ".join(part for part in (pull.status, pull.error_details) if part),
    )


def _connection(user_id: str, one: _Connected, asked_at: datetime) -> Connection:
    if one.status == "connected":
        return Connection(user_id, one.slug.lower(), "connected", None, asked_at)
    given = one.error_details or _ConnectionError()
    error = ": ".join(part for part in (given.error_type, given.error_message) if part)
    return Connection(user_id, one.slug.lower(), "error", error or "unknown", asked_at)
