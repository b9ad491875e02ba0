"""What Junction tells of itself: how far its history pulls are, what it has sent, who is connected; and the refresh."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import msgspec

from app.errors import Unprocessable
from workers.actions import Connection
from workers.aggregators.common import decode, moment
from workers.aggregators.requests import Request

T = TypeVar("T")
USERS_A_PAGE = "50"
EARLIEST_STATISTICS = datetime(2000, 1, 1, tzinfo=UTC)  # before that nobody wore one; year 1 stands for "unknown"
NO_CURSOR = ("", "None")  # the public example says "None", as text


@dataclass(frozen=True)
class Pull:
    """How the pull of one resource's past went, from the provider to Junction."""

    user_id: str
    provider: str
    resource: str
    status: Literal["pulled", "pulling", "failed", "not pulled"]
    start: datetime | None = None
    end: datetime | None = None
    began: datetime | None = None
    days_with_data: int = 0
    status_text: str = ""  # the status in Junction's words, with the error if there is one


@dataclass(frozen=True)
class ResourceCoverage:
    """Between which moments Junction has anything of a resource."""

    user_id: str
    provider: str
    resource: str
    oldest: datetime | None
    newest: datetime | None


@dataclass(frozen=True)
class Listing(Generic[T]):
    """One page about some users; there are more where there is a cursor."""

    rows: tuple[T, ...]
    users: tuple[str, ...]
    cursor: str | None


@dataclass(frozen=True)
class Refreshed:
    """What became of a refresh, by source and resource (`oura/sleep`); or why there was none."""

    done: tuple[str, ...]
    under_way: tuple[str, ...]
    failed: tuple[str, ...]
    error: str | None


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
    user_id: str
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


class _Refreshed(msgspec.Struct):
    refreshed_sources: list[str] = []
    in_progress_sources: list[str] = []
    failed_sources: list[str] = []
    error: str | None = None


def pulls_request(cursor: str | None = None, user_id: str | None = None) -> Request:
    """One page of the history pulls."""
    return _introspect("historical_pull", cursor, user_id)


def coverage_request(cursor: str | None = None, user_id: str | None = None) -> Request:
    """One page of what there is of each resource."""
    return _introspect("resources", cursor, user_id)


def _introspect(part: str, cursor: str | None, user_id: str | None) -> Request:
    query = [("user_limit", USERS_A_PAGE)]
    query += [("user_id", user_id)] if user_id else []
    query += [("next_cursor", cursor)] if cursor else []
    return Request(f"/v2/introspect/{part}", tuple(query), bool(cursor))


def read_pulls(body: bytes) -> Listing[Pull]:
    """A page may be short, or empty, and not the last: only its cursor tells. Raises Unprocessable."""
    page = decode(body, _Page, "historical pulls")
    found = []
    for user in _people(page):
        for provider, raw in user.provider.items():
            pulls = decode(bytes(raw), _Pulls, "historical pulls")
            found += [_pull(user.user_id, provider, name, bytes(one)) for name, one in pulls.pulled.items()]
            found += [Pull(user.user_id, provider.lower(), name, "not pulled") for name in pulls.not_pulled]
    return Listing(tuple(found), _users(page), _cursor(page))


def read_coverage(body: bytes) -> Listing[ResourceCoverage]:
    """As `read_pulls`. Raises Unprocessable."""
    page = decode(body, _Page, "resources")
    found = [
        ResourceCoverage(user.user_id, provider.lower(), name, _moment(one.oldest_data), _moment(one.newest_data))
        for user in _people(page)
        for provider, raw in user.provider.items()
        for name, one in decode(bytes(raw), dict[str, _Statistics], "resources").items()
    ]
    return Listing(tuple(found), _users(page), _cursor(page))


def connections_request(user_id: str) -> Request:
    """Who this person is connected with."""
    return Request(f"/v2/user/providers/{quote(user_id, safe='')}")


def read_connections(user_id: str, body: bytes, asked_at: datetime) -> list[Connection]:
    """The answer to that. Raises Unprocessable."""
    return [_connection(user_id, one, asked_at) for one in decode(body, _Providers, "providers").providers]


def refresh_request(user_id: str) -> Request:
    """Asks the providers of a person for what is new, now; Junction allows eight an hour."""
    return Request(f"/v2/user/refresh/{quote(user_id, safe='')}", method="POST")


def read_refresh(body: bytes) -> Refreshed:
    """The answer to that, a refusal included. Raises Unprocessable."""
    said = decode(body, _Refreshed, "refresh")
    done, under_way, failed = map(tuple, (said.refreshed_sources, said.in_progress_sources, said.failed_sources))
    return Refreshed(done, under_way, failed, said.error)


def _pull(user_id: str, provider: str, name: str, raw: bytes) -> Pull:
    """One that cannot be read must not cost the others: it is as good as under way."""
    try:
        pull: _Pull = decode(raw, _Pull, "a historical pull")
    except Unprocessable as reason:
        return Pull(user_id, provider.lower(), name, "pulling", status_text=str(reason))
    status_text = ", ".join(part for part in (pull.status, pull.error_details) if part)
    edges = (_moment(pull.range_start or pull.start), _moment(pull.range_end or pull.end))
    times = pull.timeline or {}
    began = _moment(times.get("started_at") or times.get("scheduled_at"))
    whose = (user_id, provider.lower(), name)
    match pull.status:
        case "success":
            return Pull(*whose, "pulled", *edges, began, pull.days_with_data or 0, status_text)
        case "failure":
            return Pull(*whose, "failed", *edges, began, status_text=status_text)
        case _:  # scheduled, in_progress, retrying, or one that is not known yet
            return Pull(*whose, "pulling", *edges, began, status_text=status_text)


def _connection(user_id: str, one: _Connected, asked_at: datetime) -> Connection:
    if one.status == "connected":
        return Connection(user_id, one.slug.lower(), "connected", None, asked_at)
    said = one.error_details or _ConnectionError()
    error = ": ".join(part for part in (said.error_type, said.error_message) if part)
    return Connection(user_id, one.slug.lower(), "error", error or "unknown", asked_at)


def _cursor(page: _Page) -> str | None:
    cursor = page.next_cursor or page.next or ""
    return None if cursor in NO_CURSOR else cursor


def _users(page: _Page) -> tuple[str, ...]:
    return tuple(user.user_id for user in _people(page))


def _people(page: _Page) -> list[_User]:
    """The public example has a user without an id."""
    return [user for user in page.data if user.user_id]


def _moment(given: Any) -> datetime | None:
    try:
        return max(moment(given, "introspection"), EARLIEST_STATISTICS) if given else None
    except (Unprocessable, OverflowError):
        return None
