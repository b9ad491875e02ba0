"""Junction's reports about itself (Junction: introspection): history pulls, coverage, connections; and the refresh.

Entries that cannot be read are left out and counted (workers/aggregators/listings.py). Only a body without a list of
entries is Unprocessable.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Literal

import msgspec

from workers.actions import Connection, Grants
from workers.aggregators.common import NULL, Identifier, canonical_id, optional_text
from workers.aggregators.junction.shapes import read_grants
from workers.aggregators.listings import EntryReader, Listing, answer, moment, read_listing
from workers.aggregators.requests import Request, segment

Entries = Sequence[msgspec.Raw]
USERS_A_PAGE = "50"
Status = Literal["pulled", "pulling", "failed", "not pulled"]
STATUSES: dict[str, Status] = {
    "success": "pulled",
    "failure": "failed",
    "scheduled": "pulling",
    "in_progress": "pulling",
    "retrying": "pulling",
}


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


class Refreshed(msgspec.Struct, frozen=True):
    """The result of a refresh by source and resource (`oura/sleep`), or the error that prevented it."""

    done: tuple[str, ...] = msgspec.field(default=(), name="refreshed_sources")
    under_way: tuple[str, ...] = msgspec.field(default=(), name="in_progress_sources")
    failed: tuple[str, ...] = msgspec.field(default=(), name="failed_sources")
    error: str | None = None


class _Pull(msgspec.Struct):
    status: Literal["success", "failure", "scheduled", "in_progress", "retrying"]
    range_start: Any = None
    range_end: Any = None
    start: Any = None  # the older names
    end: Any = None
    timeline: dict[str, Any] | None = None
    days_with_data: int | None = None
    error_details: str | None = None


class _Pulls(msgspec.Struct):
    pulled: dict[str, msgspec.Raw] = {}
    not_pulled: list[msgspec.Raw] = []


class _Statistics(msgspec.Struct):
    oldest_data: Any = None
    newest_data: Any = None


class _User(msgspec.Struct):
    user_id: Identifier  # the public example has an empty one
    provider: dict[str, msgspec.Raw] = {}


class _ConnectionError(msgspec.Struct):
    error_type: str | None = None
    error_message: str | None = None


class _Connected(msgspec.Struct):
    slug: Identifier
    status: Literal["connected", "error"] = "connected"
    error_details: _ConnectionError | None = None
    resource_availability: msgspec.Raw = NULL


class _ZonedUser(msgspec.Struct):
    fallback_time_zone: Any = None


class _Providers(msgspec.Struct):
    providers: list[msgspec.Raw] | None


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
    """The answer to `pulls_request`. Raises Unprocessable for a body that is no page."""
    return read_listing(body, "historical pulls", _pulls)


def read_coverage(body: bytes) -> Listing[ResourceCoverage]:
    """The answer to `coverage_request`. Raises Unprocessable for a body that is no page."""
    return read_listing(body, "resources", _coverage)


def connections_request(user_id: str) -> Request:
    """The connections of one user."""
    return Request(f"/v2/user/providers/{segment(user_id)}")


def read_connections(user_id: str, body: bytes, asked_at: datetime) -> Listing[Connection | Grants]:
    """The answer to `connections_request`. Raises Unprocessable for a body without a list."""
    given, reader = answer(body, _Providers, "providers"), EntryReader()
    if given.providers is None:  # unlike an empty list, it does not say that there is no connection
        reader.unread += 1
    found: list[Connection | Grants] = []
    unread_parts = 0
    for one in reader.each(given.providers or (), _Connected, lambda one: one):
        connection = _connection(user_id, one, asked_at)
        granted, unread = read_grants(one.resource_availability)
        found += [connection, *([Grants(user_id, connection.provider, granted, asked_at)] if granted else [])]
        unread_parts += unread
    return Listing(tuple(found), (user_id,), unread=reader.unread, unread_parts=unread_parts)


def zone_request(user_id: str) -> Request:
    """One user, of which only the fallback time zone is read."""
    return Request(f"/v2/user/{segment(user_id)}")


def read_zone(body: bytes) -> str:
    """The fallback time zone in the answer to `zone_request`, '' if the user has no such zone. Raises Unprocessable."""
    found = answer(body, _ZonedUser, "a user").fallback_time_zone
    return optional_text(found.get("id")) or "" if isinstance(found, dict) else ""


def refresh_request(user_id: str) -> Request:
    """Fetches new data from the user's providers immediately; Junction allows eight refreshes per hour and user."""
    return Request(f"/v2/user/refresh/{segment(user_id)}", method="POST")


def read_refresh(body: bytes) -> Refreshed:
    """The answer to `refresh_request`, including a refusal. Raises Unprocessable."""
    return answer(body, Refreshed, "refresh")  # type: ignore[no-any-return]


def _by_provider(reader: EntryReader, users: Entries, kind: Any) -> Iterator[tuple[str, str, Any]]:
    """The entries of a page by user and provider."""
    for user in reader.each(users, _User, lambda user: user):
        user_id = canonical_id(user.user_id)
        reader.users.append(user_id)
        for provider, entry in reader.named(user.provider, kind, lambda name, entry: (name.lower(), entry)):
            yield user_id, provider, entry


def _pulls(reader: EntryReader, users: Entries) -> Iterator[Pull]:
    for user_id, provider, pulls in _by_provider(reader, users, _Pulls):
        yield from reader.named(pulls.pulled, _Pull, partial(_pull, user_id, provider))
        yield from reader.each(pulls.not_pulled, Identifier, partial(Pull, user_id, provider, status="not pulled"))


def _coverage(reader: EntryReader, users: Entries) -> Iterator[ResourceCoverage]:
    for user_id, provider, resources in _by_provider(reader, users, dict[str, msgspec.Raw]):
        yield from reader.named(resources, _Statistics, partial(_resource, user_id, provider))


def _resource(user_id: str, provider: str, name: str, one: _Statistics) -> ResourceCoverage:
    return ResourceCoverage(user_id, provider, name, moment(one.oldest_data), moment(one.newest_data))


def _pull(user_id: str, provider: str, name: str, pull: _Pull) -> Pull:
    times, status = pull.timeline or {}, STATUSES[pull.status]
    return Pull(
        user_id=user_id,
        provider=provider,
        resource=name,
        status=status,
        start=moment(pull.range_start) or moment(pull.start),
        end=moment(pull.range_end) or moment(pull.end),
        began=moment(times.get("started_at")) or moment(times.get("scheduled_at")),
        days_with_data=(pull.days_with_data or 0) if status == "pulled" else 0,
        status_text=", ".join(part for part in (pull.status, pull.error_details) if part),
    )


def _connection(user_id: str, one: _Connected, asked_at: datetime) -> Connection:
    if one.status == "connected":
        return Connection(user_id, one.slug.lower(), "connected", None, asked_at)
    given = one.error_details or _ConnectionError()
    error = ": ".join(part for part in (given.error_type, given.error_message) if part)
    return Connection(user_id, one.slug.lower(), "error", error or "unknown", asked_at)
