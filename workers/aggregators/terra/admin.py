"""Terra's Admin API: failed deliveries, users with the time of their newest data, and the token.

Pure: requests, and readers for the answers. The API changed in autumn 2026 (docs.tryterra.co/reference/admin-api):
`SEGMENTS` has the present path of events and the previous one. The new rows are documented in excerpts only, so each
field is read under both names, and may be absent or null. Entries that cannot be read are left out and counted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec

from app.config.settings import Settings
from app.errors import Unprocessable
from workers.aggregators.admin_token import Token
from workers.aggregators.common import MAX_ID, Identifier, canonical_id
from workers.aggregators.listings import Listing, answer, moment, read_listing
from workers.aggregators.requests import Request, segment

SEGMENTS = ("events", "webhook-events")
RETENTION = timedelta(days=14)  # of events: 14 days (September 2026) or 30 days (November 2026)
UNKNOWN_ENVIRONMENT = "dev_id_not_found"  # the code of a 404 that is not about the path or the user
MAX_DETAIL = 200  # characters of a problem that are shown
TOKENS = re.compile(r"terra_[a-z]{2}_\S+")
Short = Annotated[str, msgspec.Meta(max_length=256)]


@dataclass(frozen=True)
class FailedDelivery:
    """A delivery that did not reach the endpoint. Its row does not name the user; the list can be filtered by user."""

    event_id: str
    sent_at: datetime
    data_type: str
    provider: str  # '' if the row has none


@dataclass(frozen=True)
class AdminUser:
    """A user, that is, a person's connection with one provider, as Terra lists it."""

    user_id: str
    provider: str
    is_active: bool
    reference_id: str | None = None
    newest: datetime | None = None  # `most_recent_data_at`
    created_at: datetime | None = None


class ApiProblem(msgspec.Struct, frozen=True):
    """An error (RFC 9457)."""

    code: Short = ""
    title: Short = ""
    detail: str | None = None

    @property
    def text(self) -> str:
        """The code, with the detail: of `scope_missing` it names the scope. Without tokens and control characters."""
        text = ": ".join(part for part in (self.code or self.title, (self.detail or "")[:MAX_DETAIL]) if part)
        return "".join(each if each.isprintable() else " " for each in TOKENS.sub("TOKEN", text))


class _Event(msgspec.Struct):
    event_id: Any = None
    id: Any = None
    sent_at: Any = None
    created_at: Any = None
    data_type: Any = None
    type: Any = None
    provider: Any = None


class _User(msgspec.Struct):
    user_id: Identifier
    provider: Identifier
    active: Any = None
    reference_id: Any = None
    most_recent_data_at: Any = None
    created_at: Any = None


class _Token(msgspec.Struct):
    expires_at: Any = None
    grant_anchor_at: Any = None


def connect(settings: Settings) -> tuple[str, Mapping[str, str]]:
    """The base URL and the headers of every request. Raises Misconfigured."""
    return settings.terra_admin_base_url.rstrip("/"), {"Authorization": f"Bearer {settings.need_terra_admin_token()}"}


def token_request() -> Request:
    return Request("/me")


def events_request(
    dev_id: str,
    segment: str,
    *,
    since: datetime,
    until: datetime,
    cursor: str | None = None,
    user_id: str | None = None,
) -> Request:
    """One page of the deliveries that failed, newest first, of all users or one."""
    given = {"outcome": "failed", "since": _text(since), "until": _text(until), "user_id": user_id}
    return _page(dev_id, segment, given, cursor)


def users_request(dev_id: str, cursor: str | None = None, user_id: str | None = None) -> Request:
    """One page of the users, or one user."""
    return _page(dev_id, "users", {"user_id": user_id}, cursor)


def read_token(body: bytes) -> Token:
    """The answer to `token_request`; a time that cannot be read is unknown. Raises Unprocessable."""
    given: _Token = answer(body, _Token, "the token")
    expires_at, approved_at = _moment_or_none(given.expires_at), _moment_or_none(given.grant_anchor_at)
    return Token(expires_at=expires_at, approved_at=approved_at)


def read_events(body: bytes) -> Listing[FailedDelivery]:
    """The answer to `events_request`. Raises Unprocessable for a body that is no page."""
    return read_listing(body, "events", lambda reader, entries: reader.each(entries, _Event, _event))


def read_users(body: bytes) -> Listing[AdminUser]:
    """The answer to `users_request`. Raises Unprocessable for a body that is no page."""
    return read_listing(body, "users", lambda reader, entries: reader.each(entries, _User, _user))


def read_problem(body: bytes) -> ApiProblem:
    """The content of an error; empty if the body has another form."""
    try:
        return answer(body, ApiProblem, "a problem")  # type: ignore[no-any-return]
    except Unprocessable:
        return ApiProblem()


def _page(dev_id: str, path: str, given: Mapping[str, str | None], cursor: str | None) -> Request:
    query = {**given, "cursor": cursor}  # no limit: Terra does not document its maximum
    path = f"/environments/{segment(dev_id)}/{path}"
    return Request(path, tuple((name, value) for name, value in query.items() if value), bool(cursor))


def _event(given: _Event) -> FailedDelivery:
    """The names of types have become `unified_api.sleep.updated` in the newer documentation."""
    event_id, name = _name(given.event_id) or _name(given.id), _name(given.data_type) or _name(given.type)
    sent_at = moment(given.sent_at) or moment(given.created_at)
    if not (event_id and name and sent_at):
        raise Unprocessable("an event without an id, a type or a time")
    parts = name.split(".")
    kind = parts[-2] if len(parts) > 1 else name
    return FailedDelivery(event_id, sent_at, kind.lower(), _name(given.provider).lower())


def _user(given: _User) -> AdminUser:
    return AdminUser(
        user_id=canonical_id(given.user_id),
        provider=given.provider.lower(),
        is_active=given.active is not False,
        reference_id=_name(given.reference_id) or None,
        newest=moment(given.most_recent_data_at),
        created_at=_moment_or_none(given.created_at),
    )


def _name(value: Any) -> str:
    """A name, or '' for a value of another form."""
    return value if isinstance(value, str) and len(value) <= MAX_ID else ""


def _moment_or_none(value: Any) -> datetime | None:
    try:
        return moment(value)
    except Unprocessable:
        return None


def _text(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
