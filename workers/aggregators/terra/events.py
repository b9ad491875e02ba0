"""The meaning of Terra's events (Terra: reference/health-and-fitness-api/webhook-events, and the legacy ones)."""

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Annotated, TypeVar

import msgspec

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import INFERRED, Action, Connection, Download, LargeRequest, Notice, Parsed, Record, UserIdChange
from workers.aggregators.common import NULL, UNIX_EPOCH, DateText, Identifier, decode, version_of, wanted
from workers.aggregators.json import reject_duplicate_keys
from workers.aggregators.terra.mapping import TYPES
from workers.aggregators.terra.series import Clock
from workers.aggregators.terra.shapes import Batch, Owner

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


class _User(msgspec.Struct):
    user_id: Identifier
    provider: Identifier
    reference_id: str | None = None

    @property
    def owner(self) -> Owner:
        return Owner(self.user_id, self.provider.lower())


class _Data(msgspec.Struct):
    user: _User
    data: list[msgspec.Raw] | None = None
    athlete: msgspec.Raw = NULL  # in place of the array, in events of that type


class _Lifecycle(msgspec.Struct):
    user: _User
    status: str | None = None
    message: str | None = None


class _Reconnected(msgspec.Struct):
    new_user: _User
    old_user: _User | None = None


class _Elsewhere(msgspec.Struct):
    url: Annotated[str, msgspec.Meta(min_length=1, max_length=8192)]
    expires_in: float | None = None


class _Large(msgspec.Struct):
    user: _User
    reference: Identifier | None = None
    expected_payloads: float | None = None


class _Report(msgspec.Struct):
    data: msgspec.Raw
    event_id: str | None = None
    occurred_at: str | None = None
    upload_id: str | None = None


class _ReportError(msgspec.Struct):
    code: str | None = None


class _ReportData(msgspec.Struct):
    session_id: Identifier
    reference_id: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    report_date: DateText | None = None
    report_locale: str | None = None
    results_count: float | None = None
    error: _ReportError | None = None


@dataclass(frozen=True)
class _Event:
    name: str
    user: bytes  # JSON
    body: bytes
    version: datetime
    delivery: Delivery
    settings: Settings

    def read(self, kind: type[Kind]) -> Kind:
        """The body decoded as `kind`. Raises Unprocessable."""
        return decode(self.body, kind, self.name)  # type: ignore[no-any-return]

    def parsed(self, user: _User | None, *actions: Action, ignored: str | None = None) -> Parsed:
        """The actions that the operator wants, of an event about this user."""
        kept, left_out = wanted(actions, self.settings)
        user_id, reference = (user.user_id, user.reference_id) if user else (None, None)
        return Parsed(self.name, user_id, reference or None, kept, ignored or left_out, self.version)


def parse(delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
    """The actions of an event. Raises Unprocessable, without a value of the body.

    The version is Terra's ordering timestamp, a header that retries repeat. The header is not signed, so the version is
    at most five minutes ahead of the receipt, and no deletion depends on it.
    """
    reject_duplicate_keys(body, "not a Terra event")
    envelope = decode(body, _Envelope, "not a Terra event")
    name, created_at = envelope.type, None
    if delivery.ordering_ms is not None:  # a time beyond the calendar counts as a day ahead
        milliseconds = min(delivery.ordering_ms, int(delivery.received_at * 1000) + 86_400_000)
        created_at = UNIX_EPOCH + timedelta(milliseconds=milliseconds)
    event = _Event(name, bytes(envelope.user), body, version_of(created_at, delivery), delivery, settings)
    if name in TYPES:
        return _data(event)
    if name in HANDLERS:
        return HANDLERS[name](event)
    return _ignored(event, IGNORED.get(name, "an unknown event type"))


def _ignored(event: _Event, reason: str) -> Parsed:
    """An event without actions. Its type is recorded if it has the form of one, its user if it has one."""
    user = None
    with contextlib.suppress(Unprocessable):
        user = decode(event.user, _User, event.name)
    name = event.name if NAME.fullmatch(event.name) else "unknown"
    return replace(event, name=name).parsed(user, ignored=reason)


def _data(event: _Event) -> Parsed:
    """Objects of one of Terra's types. They imply a connection, in case its own event was lost."""
    known = event.read(_Data)
    batch = Batch(known.user.owner, event.version)
    for raw in (known.athlete,) if event.name == "athlete" else known.data or ():
        if raw != NULL:
            batch.add(event.name, bytes(raw))
    parsed = event.parsed(known.user, *batch.actions())
    implied = () if parsed.ignored else (Connection(*known.user.owner, "connected", None, INFERRED),)
    return replace(
        parsed,
        actions=(*parsed.actions, *implied),
        duplicate_samples=batch.duplicate_samples,
        samples_without_timestamp=batch.samples_without_timestamp,
    )


def _auth(event: _Event) -> Parsed:
    """A connection. Terra does not announce its history, so the backfill of every type begins here."""
    known = event.read(_Lifecycle)
    if known.status != "success":
        return _ignored(event, NOT_CONNECTED)
    window = (event.version - timedelta(days=event.settings.history_days), event.version)
    names = [resource.name for resource in catalogue().values() if resource.terra]
    notices = (Notice(*known.user.owner, name, *window, is_final=True) for name in names)
    return event.parsed(known.user, Connection(*known.user.owner, "connected", None, event.version), *notices)


def _ended(event: _Event) -> Parsed:
    """The person or the provider ended the connection. Stored data stays; late data does not reconnect it."""
    user = event.read(_Lifecycle).user
    return event.parsed(user, Connection(*user.owner, "disconnected", None, event.version))


def _broken(event: _Event) -> Parsed:
    known = event.read(_Lifecycle)
    error = (known.message or event.name)[:MAX_TEXT]
    return event.parsed(known.user, Connection(*known.user.owner, "error", error, event.version))


def _reconnected(event: _Event) -> Parsed:
    """A person has a new user id. The `auth` event of the new user starts the backfill."""
    known = event.read(_Reconnected)
    new, old = known.new_user, known.old_user
    changes = [UserIdChange(old.user_id, new.user_id)] if old and old.user_id != new.user_id else []
    return event.parsed(new, *changes, Connection(*new.owner, "connected", None, event.version))


def _elsewhere(event: _Event) -> Parsed:
    """The event must be downloaded from a URL. Only the download names its user."""
    known = event.read(_Elsewhere)
    expires_in = EXPIRES_SECONDS if known.expires_in is None else known.expires_in
    return event.parsed(None, Download(known.url, min(max(expires_in, 0.0), MAX_EXPIRY_SECONDS)))


def _large(event: _Event) -> Parsed:
    known = event.read(_Large)
    reference = known.reference or (event.delivery.reference or "").partition(":chunk:")[0]
    if not reference:
        return _ignored(event, "it does not name the request that it belongs to")
    count = known.expected_payloads
    expected = None if count is None or not 0 <= count <= 1_000_000 else int(count)
    return event.parsed(known.user, LargeRequest(reference, *known.user.owner, expected))


def _report(event: _Event) -> Parsed:
    """A laboratory report, or the failure to read one. It belongs to a person, not to one of their connections."""
    known = event.read(_Report)
    data = decode(bytes(known.data), _ReportData, event.name)
    occurred = Clock().read(known.occurred_at, f"{event.name}: occurred_at")
    if occurred:
        event = replace(event, version=version_of(occurred.at, event.delivery))
    columns = {
        "status": event.name.rpartition(".")[2],
        "event_id": known.event_id,
        "upload_id": known.upload_id,
        "occurred_at": occurred.at.isoformat() if occurred else None,
        "report_date": data.report_date and data.report_date[:10],
        "report_locale": data.report_locale,
        "results_count": data.results_count,
        "error_code": data.error and data.error.code,
    }
    user = _User(f"reference:{data.reference_id or ''}", "terra", data.reference_id)
    record = Record(
        resource=catalogue().of_terra("lab_report").name,
        user_id=user.user_id,
        id=data.session_id,
        provider=user.provider,
        source_type="lab_report",
        payload=bytes(known.data),
        version=event.version,
        columns=msgspec.json.encode(columns),
    )
    return event.parsed(user, record)


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
