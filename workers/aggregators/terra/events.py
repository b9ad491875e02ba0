"""The meaning of Terra's events (Terra: reference/health-and-fitness-api/webhook-events, and the legacy ones)."""

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import (
    INFERRED,
    Action,
    Connection,
    Download,
    LargeRequest,
    Notes,
    Notice,
    Parsed,
    Record,
    UserIdChange,
)
from workers.aggregators.common import (
    MAX_AHEAD,
    MAX_ID,
    MAX_NAME,
    NULL,
    canonical_id,
    decode,
    first_reason,
    optional_text,
    or_none,
    ordered_at,
    version_of,
    wanted,
)
from workers.aggregators.json import checked, is_unambiguous, storable, with_nulls
from workers.aggregators.repair import columns_of, value_of
from workers.aggregators.scalars import integer, moment, number
from workers.aggregators.terra.mapping import TYPES
from workers.aggregators.terra.shapes import Batch, Owner, items

Kind = TypeVar("Kind")
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
MAX_TEXT = 500
EXPIRES_SECONDS = 300.0  # from Terra's examples; another page says about ten minutes
MAX_EXPIRY_SECONDS = 3600.0
NOT_CONNECTED = "no connection was made"
IGNORED = {
    "auth_cancelled": NOT_CONNECTED,
    "processing": "Terra is still processing the request; it sends the data later",
    "rate_limit_hit": "Terra retries by itself",
    "healthcheck": "a health check",
    "google_no_datasource": "the account has no data source",
    "permission_change": "the permissions changed; later data reflects that",
}


class _Envelope(msgspec.Struct):
    type: str
    user: msgspec.Raw = NULL


@dataclass(frozen=True)
class _User:
    owner: Owner
    reference_id: str | None = None
    is_unnamed: bool = False  # it has a reference_id that cannot be read


class _Named(msgspec.Struct):
    user_id: Any = None
    provider: Any = None
    reference_id: msgspec.Raw = NULL


class _Data(msgspec.Struct):
    data: msgspec.Raw = NULL  # an array
    athlete: msgspec.Raw = NULL  # in place of the array, in events of that type


class _Lifecycle(msgspec.Struct):
    status: Any = None
    message: Any = None


class _Reconnected(msgspec.Struct):
    new_user: msgspec.Raw
    old_user: msgspec.Raw = NULL


class _Elsewhere(msgspec.Struct):
    url: Annotated[str, msgspec.Meta(min_length=1, max_length=8192)]
    expires_in: Any = None


class _Large(msgspec.Struct):
    reference: Any = None
    expected_payloads: Any = None


@dataclass(frozen=True)
class _Event:
    name: str
    raw_user: bytes  # JSON
    body: bytes
    version: datetime
    delivery: Delivery
    settings: Settings
    is_unique: bool  # no object in an array repeats a name
    notes: tuple[str, ...] = ()

    @property
    def user(self) -> _User:
        """The user of the event. Raises Unprocessable without a user_id or a provider."""
        return _user(self.raw_user, self.name)

    def read(self, kind: type[Kind]) -> Kind:
        """The body decoded as `kind`. Raises Unprocessable."""
        return decode(self.body, kind, self.name)  # type: ignore[no-any-return]

    def parsed(self, user: _User | None, *actions: Action, ignored: str | None = None) -> Parsed:
        """The actions that the operator wants, of an event about this user."""
        kept, left_out = wanted(actions, self.settings)
        unnamed = ("reference_id",) if user and user.is_unnamed else ()
        return Parsed(
            event_type=self.name,
            user_id=user.owner.user_id if user else None,
            client_user_id=user.reference_id if user else None,
            actions=kept,
            ignored=ignored or left_out,
            occurred_at=self.version,
            notes=(*Notes(unnamed).sentences(), *self.notes),
            is_undated=self.delivery.ordering_ms is None,
        )

    def connection(
        self, user: _User, status: Literal["connected", "error", "disconnected"], error: str | None = None
    ) -> Connection:
        """A change of the user's connection at the time of the event."""
        return Connection(user.owner.user_id, user.owner.provider, status, error, self.version)


def _user(raw: bytes, what: str) -> _User:
    named = decode(raw, _Named, f"{what}: user")
    user_id, provider = optional_text(named.user_id), optional_text(named.provider)
    for name, value, longest in (("user_id", user_id, MAX_ID), ("provider", provider, MAX_NAME)):
        if not value or len(value) > longest:
            raise Unprocessable(f"{what}: user.{name}: expected a text of 1 to {longest} characters")
    reference_id = optional_text(named.reference_id)
    is_unnamed = reference_id is None and bytes(named.reference_id) not in (b"null", b'""')
    owner = Owner(canonical_id(user_id or ""), (provider or "").lower())
    return _User(owner, reference_id, is_unnamed)


def parse(delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
    """The actions of an event. Raises Unprocessable, without a value of the body.

    The version is Terra's ordering timestamp, a header that retries repeat. The header is not signed, so the version is
    at most five minutes ahead of the receipt, and no deletion depends on it.
    """
    body, is_unique, notes = checked(body, "not a Terra event")
    envelope = decode(body, _Envelope, "not a Terra event")
    name, version = envelope.type, version_of(ordered_at(delivery), delivery)
    event = _Event(name, bytes(envelope.user), body, version, delivery, settings, is_unique, notes.sentences())
    if name in TYPES:
        return _data(event)
    if name in HANDLERS:
        return HANDLERS[name](event)
    return _ignored(event, IGNORED.get(name, "an unknown event type"))


def identify(body: bytes) -> Parsed:
    """The type and the user of an event that `parse` refuses, as far as they can be read.

    An event that repeats a name has no user: it may name two.
    """
    found = Parsed("")
    body = with_nulls(storable(body)[0])
    with contextlib.suppress(Unprocessable):
        envelope = decode(body, _Envelope, "")
        found = Parsed(envelope.type[:MAX_ID])
        if not is_unambiguous(body):
            return found
        user = _user(envelope.user, "")
        found = replace(found, user_id=user.owner.user_id, client_user_id=user.reference_id)
    return found


def _ignored(event: _Event, reason: str) -> Parsed:
    """An event without actions. Its type is recorded if it has the form of one, its user if it has one."""
    user = None
    with contextlib.suppress(Unprocessable):
        user = event.user
    name = event.name if NAME.fullmatch(event.name) else "unknown"
    return replace(event, name=name).parsed(user, ignored=reason)


def _data(event: _Event) -> Parsed:
    """Objects of one of Terra's types. They imply a connection, in case its own event was lost.

    Raises Unprocessable if there is no user, or if every object was refused.
    """
    known, user = event.read(_Data), event.user
    batch = Batch(user.owner, event.version, event.delivery.received + MAX_AHEAD)
    for raw in (known.athlete,) if event.name == "athlete" else items(bytes(known.data), event.name):
        if raw != NULL:
            batch.add(event.name, bytes(raw), is_unique=event.is_unique)
    if batch.refused and not batch.records:
        raise first_reason(batch.refused, event.name)
    parsed = event.parsed(user, *batch.actions())
    implied = (
        () if parsed.ignored else (Connection(user.owner.user_id, user.owner.provider, "connected", None, INFERRED),)
    )
    return replace(
        parsed,
        actions=(*parsed.actions, *implied),
        duplicate_samples=batch.duplicate_samples,
        samples_without_timestamp=batch.samples_without_timestamp,
        refused=() if parsed.ignored else tuple(batch.refused),
        notes=(*batch.notes.sentences(), *parsed.notes),
    )


def _auth(event: _Event) -> Parsed:
    """A connection. Terra does not announce its history, so the backfill of every type begins here."""
    if event.read(_Lifecycle).status != "success":
        return _ignored(event, NOT_CONNECTED)
    user = event.user
    notices = (
        Notice(
            user_id=user.owner.user_id,
            provider=user.owner.provider,
            resource=resource.name,
            window_start=event.version - timedelta(days=event.settings.history_days),
            window_end=event.version,
            is_final=True,
        )
        for resource in catalogue().values()
        if resource.terra
    )
    return event.parsed(user, event.connection(user, "connected"), *notices)


def _ended(event: _Event) -> Parsed:
    """The person or the provider ended the connection. Stored data stays; late data does not reconnect it."""
    user = event.user
    return event.parsed(user, event.connection(user, "disconnected"))


def _broken(event: _Event) -> Parsed:
    user, message = event.user, event.read(_Lifecycle).message
    error = (optional_text(message, None) or event.name)[:MAX_TEXT]
    return event.parsed(user, event.connection(user, "error", error))


def _reconnected(event: _Event) -> Parsed:
    """A person has a new user id. The `auth` event of the new user starts the backfill."""
    known = event.read(_Reconnected)
    new = _user(known.new_user, event.name)
    old = None if known.old_user == NULL else _user(known.old_user, event.name)
    is_changed = old and old.owner.user_id != new.owner.user_id
    changes = [UserIdChange(old.owner.user_id, new.owner.user_id)] if old and is_changed else []
    return event.parsed(new, *changes, event.connection(new, "connected"))


def _elsewhere(event: _Event) -> Parsed:
    """The event must be downloaded from a URL. Only the download names its user."""
    known = event.read(_Elsewhere)
    given = or_none(number, known.expires_in)
    expires_in = EXPIRES_SECONDS if given is None else given
    return event.parsed(None, Download(known.url, min(max(expires_in, 0.0), MAX_EXPIRY_SECONDS)))


def _large(event: _Event) -> Parsed:
    known, user = event.read(_Large), event.user
    reference = optional_text(known.reference) or (event.delivery.reference or "").partition(":chunk:")[0]
    if not reference:
        return _ignored(event, "it does not name the request that it belongs to")
    count = or_none(integer, known.expected_payloads)
    expected = None if count is None or not 0 <= count <= 1_000_000 else count
    request = LargeRequest(reference[:MAX_ID], user.owner.user_id, user.owner.provider, expected)
    return event.parsed(user, request)


def _report(event: _Event) -> Parsed:
    """A laboratory report, or the failure to read one. It belongs to a person, not to one of their connections."""
    known = event.read(dict[str, msgspec.Raw])
    raw = bytes(known.get("data", NULL))
    data = decode(raw, dict[str, msgspec.Raw], event.name)
    session_id, reference_id = (optional_text(data.get(name), None) for name in ("session_id", "reference_id"))
    if not session_id or len(session_id) > MAX_ID or len(reference_id or "") > MAX_ID:
        raise Unprocessable(f"{event.name}: session_id and reference_id: expected texts of at most {MAX_ID} characters")
    if occurred := or_none(lambda given: moment(value_of(given)), known.get("occurred_at")):
        event = replace(event, version=version_of(occurred, event.delivery))
    resource, error = catalogue().of_terra("lab_report"), data.get("error", NULL)
    with contextlib.suppress(Unprocessable):
        error = decode(error, dict[str, msgspec.Raw], "").get("code", NULL)
    status = msgspec.Raw(msgspec.json.encode(event.name.rpartition(".")[2]))
    columns, unreadable = columns_of(resource, {**data, **known, "status": status, "error_code": error})
    user = _User(Owner(f"reference:{reference_id or ''}", "terra"), reference_id)
    record = Record(
        resource=resource.name,
        user_id=user.owner.user_id,
        id=session_id,
        provider=user.owner.provider,
        source_type="lab_report",
        payload=raw,
        version=event.version,
        columns=columns,
    )
    return replace(event, notes=(*Notes(unreadable).sentences(), *event.notes)).parsed(user, record)


HANDLERS: Mapping[str, Callable[[_Event], Parsed]] = {
    "auth": _auth,
    "deauth": _ended,
    "access_revoked": _ended,
    "connection_error": _broken,
    "user_reauth": _reconnected,
    "s3_payload": _elsewhere,
    "s3_upload": _elsewhere,  # its name in Terra's list of types
    "large_request_processing": _large,
    "large_request_sending": _large,
    "lab_report.completed": _report,
    "lab_report.failed": _report,
}
