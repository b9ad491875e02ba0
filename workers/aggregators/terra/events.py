"""What Terra's events mean (Terra: reference/health-and-fitness-api/webhook-events, and the legacy ones before it)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import INFERRED, Action, Connection, Download, LargeRequest, Notice, Parsed, Record, UserIdChange
from workers.aggregators.common import UNIX_EPOCH, DateText, decode, version_of, wanted
from workers.aggregators.json import reject_duplicate_keys
from workers.aggregators.terra.mapping import TYPES
from workers.aggregators.terra.series import Clock
from workers.aggregators.terra.shapes import NOTHING, Batch, Owner

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
MAX_TEXT = 500
EXPIRES_SECONDS = 300.0  # of Terra's own examples; elsewhere it says about ten minutes
MAX_EXPIRY_SECONDS = 3600.0
IGNORED = {
    "auth_cancelled": "nobody was connected",
    "processing": "Terra is at it; the data will come",
    "rate_limit_hit": "Terra tries again by itself",
    "healthcheck": "a sign of life",
    "google_no_datasource": "the account has no source of data",
    "permission_change": "what may be read has changed; the data will tell",
}

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Url = Annotated[str, msgspec.Meta(min_length=1, max_length=8192)]


class _Envelope(msgspec.Struct):
    type: str


class _User(msgspec.Struct):
    user_id: Text
    provider: Text
    reference_id: str | None = None

    @property
    def owner(self) -> Owner:
        return Owner(self.user_id, self.provider.lower())


class _About(msgspec.Struct):
    """Whom any event is about, in whatever form; what cannot be read is as good as absent."""

    user: Any = None


class _Data(msgspec.Struct):
    user: _User
    data: list[msgspec.Raw] | None = None
    athlete: msgspec.Raw = NOTHING  # that event has no array


class _Lifecycle(msgspec.Struct):
    user: _User
    status: str | None = None
    message: str | None = None


class _Reconnected(msgspec.Struct):
    new_user: _User
    old_user: _User | None = None


class _Elsewhere(msgspec.Struct):
    url: Url
    expires_in: float | None = None


class _Large(msgspec.Struct):
    user: _User
    reference: Text | None = None
    expected_payloads: float | None = None


class _Report(msgspec.Struct):
    data: msgspec.Raw
    event_id: str | None = None
    occurred_at: str | None = None
    upload_id: str | None = None


class _ReportError(msgspec.Struct):
    code: str | None = None


class _ReportData(msgspec.Struct):
    session_id: Text
    reference_id: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    report_date: DateText | None = None
    report_locale: str | None = None
    results_count: float | None = None
    error: _ReportError | None = None


@dataclass(frozen=True)
class _Event:
    """An event on its way to what it means."""

    name: str
    body: bytes
    version: datetime
    delivery: Delivery
    settings: Settings

    def read(self, kind: Any) -> Any:
        """The body as something. Raises Unprocessable."""
        return decode(self.body, kind, self.name)

    def parsed(self, user: _User | None, *actions: Action, ignored: str | None = None) -> Parsed:
        """What is done for a user, and why if that is nothing."""
        kept, left_out = wanted(actions, self.settings)
        user_id, reference = (user.user_id, user.reference_id) if user else (None, None)
        return Parsed(self.name, user_id, reference or None, kept, ignored or left_out, self.version)


def parse(delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
    """What an event means. Raises Unprocessable, without a value of the body, if it cannot be used.

    Its version is the moment at which Terra says that it made the event, in a header that retries repeat. The header
    is not signed, so it is not believed beyond five minutes from now, and nothing is deleted for its sake.
    """
    reject_duplicate_keys(body, "not a Terra event")
    name = decode(body, _Envelope, "not a Terra event").type
    told = None if delivery.ordering_ms is None else _instant(delivery.ordering_ms, delivery)
    event = _Event(name, body, version_of(told, delivery), delivery, settings)
    if name in TYPES:
        return _data(event)
    if name in HANDLERS:
        return HANDLERS[name](event)
    return _ignored(event, IGNORED.get(name, "an unknown event type"))


def _instant(milliseconds: int, delivery: Delivery) -> datetime:
    """Unix milliseconds as a moment, those beyond the calendar as one long after now."""
    return UNIX_EPOCH + timedelta(milliseconds=min(milliseconds, int(delivery.received_at * 1000) + 86_400_000))


def _ignored(event: _Event, reason: str) -> Parsed:
    """An event that nothing is done with; its name is only told if it is one."""
    name = event.name if NAME.fullmatch(event.name) else "unknown"
    try:
        user = msgspec.convert(event.read(_About).user, _User)
    except (Unprocessable, msgspec.ValidationError):
        return Parsed(name, ignored=reason, occurred_at=event.version)
    return Parsed(name, user.user_id, user.reference_id, ignored=reason, occurred_at=event.version)


def _data(event: _Event) -> Parsed:
    """Objects of one of Terra's types. They say as well that there is a connection, in case nobody told."""
    known = event.read(_Data)
    batch = Batch(known.user.owner, event.version)
    for raw in (known.athlete,) if event.name == "athlete" else known.data or ():
        if raw != NOTHING:
            batch.add(event.name, bytes(raw))
    found, ignored = wanted(batch.actions(), event.settings)
    if ignored is None:
        found = (*found, Connection(*_names(known.user), "connected", None, INFERRED))
    client = known.user.reference_id or None
    told = event.version
    return Parsed(
        event.name,
        known.user.user_id,
        client,
        found,
        ignored,
        told,
        batch.duplicate_samples,
        batch.samples_without_timestamp,
    )


def _auth(event: _Event) -> Parsed:
    """A connection, and with it history that nobody will announce: the backfill of every type begins here."""
    known = event.read(_Lifecycle)
    if known.status != "success":
        return _ignored(event, "nobody was connected")
    window = (event.version - timedelta(days=event.settings.history_days), event.version)
    notices = (
        Notice(*_names(known.user), resource.name, *window, is_final=True)
        for resource in catalogue().values()
        if resource.terra
    )
    return event.parsed(known.user, Connection(*_names(known.user), "connected", None, event.version), *notices)


def _ended(event: _Event) -> Parsed:
    """The person or the provider ended it; what is stored stays, and data that comes late does not bring it back."""
    user = event.read(_Lifecycle).user
    return event.parsed(user, Connection(*_names(user), "disconnected", None, event.version))


def _broken(event: _Event) -> Parsed:
    known = event.read(_Lifecycle)
    error = (known.message or event.name)[:MAX_TEXT]
    return event.parsed(known.user, Connection(*_names(known.user), "error", error, event.version))


def _reconnected(event: _Event) -> Parsed:
    """A person goes by another id. Their history is announced by the `auth` of the new one."""
    known = event.read(_Reconnected)
    new, old = known.new_user, known.old_user
    found: tuple[Action, ...] = (Connection(*_names(new), "connected", None, event.version),)
    if old and old.user_id != new.user_id:
        found = (UserIdChange(old.user_id, new.user_id), *found)
    return event.parsed(new, *found)


def _elsewhere(event: _Event) -> Parsed:
    """The event is at a URL; whose it is, nobody says before it was fetched."""
    known = event.read(_Elsewhere)
    expires = EXPIRES_SECONDS if known.expires_in is None else known.expires_in
    return event.parsed(None, Download(known.url, min(max(expires, 0.0), MAX_EXPIRY_SECONDS)))


def _large(event: _Event) -> Parsed:
    known = event.read(_Large)
    reference = known.reference or (event.delivery.reference or "").partition(":chunk:")[0]
    if not reference:
        return _ignored(event, "it does not say which request it is about")
    count = known.expected_payloads
    expected = None if count is None or not 0 <= count <= 1_000_000 else int(count)
    return event.parsed(known.user, LargeRequest(reference, *_names(known.user), expected))


def _report(event: _Event) -> Parsed:
    """A laboratory report, or that one could not be read. It belongs to a person and to no connection of theirs."""
    known = event.read(_Report)
    data = decode(bytes(known.data), _ReportData, event.name)
    occurred = Clock().read(known.occurred_at, f"{event.name}: occurred_at")
    version = version_of(occurred.at, event.delivery) if occurred else event.version
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
    user_id, name = f"reference:{data.reference_id or ''}", catalogue().of_terra("lab_report").name
    payload, typed = bytes(known.data), msgspec.json.encode(columns)
    record = Record(name, user_id, data.session_id, "terra", "lab_report", payload, version, typed)
    kept, ignored = wanted((record,), event.settings)
    return Parsed(event.name, user_id, data.reference_id or None, kept, ignored, version)


def _names(user: _User) -> tuple[str, str]:
    return user.user_id, user.provider.lower()


HANDLERS: Mapping[str, Callable[[_Event], Parsed]] = {
    "auth": _auth,
    "deauth": _ended,
    "access_revoked": _ended,
    "connection_error": _broken,
    "user_reauth": _reconnected,
    "s3_payload": _elsewhere,
    "s3_upload": _elsewhere,  # the name that it has in Terra's list of types
    "large_request_processing": _large,
    "large_request_sending": _large,
    "lab_report.completed": _report,
    "lab_report.failed": _report,
}
