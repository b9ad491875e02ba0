"""The meaning of Junction's events (Junction: event catalogue)."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import msgspec

from app.catalogue import EventType, Resource, catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import INFERRED, Action, Connection, Grants, LostDelivery, Notice, Parsed, Record, Refused
from workers.aggregators import svix_ids
from workers.aggregators.common import (
    MAX_AHEAD,
    NULL,
    canonical_id,
    decode,
    first_reason,
    key_text,
    optional_text,
    or_none,
    ordered_at,
    version_of,
    wanted,
)
from workers.aggregators.json import UNREADABLE, checked, is_unambiguous, reject_duplicate_keys, storable, with_nulls
from workers.aggregators.junction.samples import GroupReader
from workers.aggregators.junction.shapes import read_grants, record, source_of
from workers.aggregators.scalars import boolean, moment

MAX_NAME = 200  # of an event type that is not known
MAX_ERROR = 1000  # characters of a connection's error
EXHAUSTED = "message.attempt.exhausted"  # an operational event of Svix, which is not in Junction's catalogue
NO_WEARABLE_DATA = "no wearable data"
IGNORED = {"unknown": "an unknown event type"} | dict.fromkeys(("query", "lab", "order"), NO_WEARABLE_DATA)


class _Envelope(msgspec.Struct):
    event_type: Any = None
    type: Any = None  # in Svix's own operational events
    user_id: Any = None
    client_user_id: Any = None
    team_id: Any = None
    data: msgspec.Raw = NULL


class _Owner(msgspec.Struct):
    user_id: Any = None


class _Event(NamedTuple):
    """An event of a user, whose type is known."""

    type: EventType
    user_id: str
    client_user_id: str | None
    data: bytes
    created_at: datetime
    delivery: Delivery
    is_unique: bool  # no object in an array repeats a name


class _Content(NamedTuple):
    """The content of an event's data."""

    actions: Sequence[Action] = ()
    unreadable: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()
    duplicates: int = 0
    notes: tuple[str, ...] = ()


class _Connected(msgspec.Struct):
    provider: msgspec.Raw = NULL
    source: msgspec.Raw = NULL
    resource_availability: msgspec.Raw = NULL
    error_type: Any = None
    error_details: Any = None


class _Exhausted(msgspec.Struct):
    message_id: Any = msgspec.field(default=None, name="msgId")
    event_id: Any = msgspec.field(default=None, name="msgEventId")
    user_id: Any = None
    client_user_id: Any = None


class _Historical(msgspec.Struct):
    start_date: Any = None
    end_date: Any = None
    is_final: Any = None
    provider: msgspec.Raw = NULL


def parse(delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
    """The actions of an event. Raises Unprocessable, without a value of the body."""
    body, is_unique, replaced = checked(body, "not a Junction event")
    envelope = _envelope(body)
    name = key_text(envelope.event_type, "event_type") or key_text(envelope.type, "type")
    if not name:
        raise Unprocessable("not a Junction event: it has no event_type")
    if name == EXHAUSTED:
        return _exhausted(delivery, envelope)
    event_type, client_user_id = catalogue().event(name), optional_text(envelope.client_user_id)
    user_id = canonical_id(key_text(envelope.user_id, "user_id"))
    team_id = optional_text(envelope.team_id)
    if event_type.does in IGNORED:
        return Parsed(name, user_id or None, client_user_id, ignored=IGNORED[event_type.does], team_id=team_id)
    user_id = user_id or _owner(envelope.data)
    if not user_id:
        raise Unprocessable("no user: neither user_id nor data.user_id")
    sent_at = svix_ids.created_at(delivery.message_id) or ordered_at(delivery)
    version, data = version_of(sent_at, delivery), bytes(envelope.data)
    event = _Event(event_type, user_id, client_user_id, data, version, delivery, is_unique)
    content = _content(event)
    unnamed = ("client_user_id",) if client_user_id is None and envelope.client_user_id not in (None, "") else ()
    streams = [notice for action in content.actions for notice in _streams_of(action, settings)]
    kept, ignored = wanted([*content.actions, *streams], settings)
    unreadable = (*unnamed, *content.unreadable)
    notes = replace(replaced, unreadable=unreadable) if unreadable else replaced
    return Parsed(
        event_type=name,
        user_id=user_id,
        client_user_id=client_user_id,
        actions=kept,
        ignored=ignored,
        occurred_at=version,
        duplicate_samples=content.duplicates,
        refused=() if ignored else content.refused,
        notes=(*notes.sentences(), *content.notes),
        is_undated=sent_at is None,
        team_id=team_id,
    )


def _envelope(body: bytes) -> _Envelope:
    """The envelope. Where one of its fields holds a number that no double can hold, that field is absent."""
    what = "not a Junction event"
    try:
        return decode(body, _Envelope, what)  # type: ignore[no-any-return]
    except Unprocessable:
        known = decode(body, dict[str, msgspec.Raw], what)
    data = known.pop("data", NULL)
    return msgspec.convert({name: optional_text(part) for name, part in known.items()} | {"data": data}, _Envelope)


def identify(body: bytes) -> Parsed:
    """The type and the user of an event that `parse` refuses, as far as they can be read.

    An event that repeats a name has no user: it may name two.
    """
    body = with_nulls(storable(body)[0])
    try:
        envelope = msgspec.json.decode(body, type=_Envelope)
    except UNREADABLE:
        return Parsed("")
    name = optional_text(envelope.event_type, None) or optional_text(envelope.type, None) or ""
    if not is_unambiguous(body):
        return Parsed(name[:MAX_NAME])
    user_id = canonical_id(optional_text(envelope.user_id) or "")
    with contextlib.suppress(Unprocessable):
        user_id = user_id or _owner(envelope.data)
    return Parsed(name[:MAX_NAME], user_id or None, optional_text(envelope.client_user_id))


def _owner(data: msgspec.Raw) -> str:
    try:
        return canonical_id(key_text(msgspec.json.decode(data, type=_Owner).user_id, "user_id"))
    except (msgspec.ValidationError, UnicodeDecodeError):
        return ""


def _content(event: _Event) -> _Content:
    resource, user_id, version = event.type.resource, event.user_id, event.created_at
    if event.type.does == "connection":
        return _connection(event.type.name, user_id, event.data, version)
    if resource is None:
        return _Content()
    if event.type.does == "historical":
        return _historical(resource, user_id, event.data)
    if resource.kind == "timeseries":
        return _samples(event, resource)
    if not event.is_unique:
        reject_duplicate_keys(event.data, resource.name)
    # A stream's notice holds no data, so a stream that was fetched overrides it.
    found, unreadable = record(resource, user_id, event.data, INFERRED if resource.kind == "stream" else version)
    return _Content([found], unreadable)


def _samples(event: _Event, resource: Resource) -> _Content:
    """Raises Unprocessable if every sample was refused."""
    latest = event.delivery.received + MAX_AHEAD
    reader = GroupReader(
        resource, event.user_id, event.created_at, latest, event.type.name, client_user_id=event.client_user_id
    )
    group = reader.read(event.data, is_unique=event.is_unique)
    if group.refused and not group.series:
        raise first_reason(group.refused, resource.name)
    return _Content(group.series, group.unreadable, tuple(group.refused), group.duplicates)


def _streams_of(action: Action, settings: Settings) -> list[Notice]:
    """Notices to fetch the streams of a record or of a window of history.

    The stream of a notice without data is always fetched. A stream that Junction no longer announces is fetched with
    the records that it belongs to, if HEADRACE_RESOURCES names it.
    """
    if not isinstance(action, Record | Notice):
        return []
    unannounced = (stream.name for stream in _unannounced_streams() if stream.of == action.resource)
    names = [name for name in unannounced if name in settings.resources]
    if isinstance(action, Notice):
        return [replace(action, resource=name) for name in names]
    if catalogue()[action.resource].kind == "stream":
        names.insert(0, action.resource)
    return [Notice(action.user_id, action.provider, name, None, None, is_final=True, item=action.id) for name in names]


@cache
def _unannounced_streams() -> list[Resource]:
    return [stream for stream in catalogue().of_kind("stream") if stream.legacy]


def _exhausted(delivery: Delivery, envelope: _Envelope) -> Parsed:
    """The report that all attempts of a delivery failed (Junction: retry policy).

    In Svix's form `data` names the message, its endpoint and the last attempt, but no user.
    """
    try:
        known = msgspec.json.decode(envelope.data, type=_Exhausted)
    except UNREADABLE:
        known = _Exhausted()
    named = optional_text(known.message_id, None) or optional_text(known.event_id, None)
    user_id = canonical_id(optional_text(envelope.user_id) or optional_text(known.user_id) or "") or None
    client_user_id = optional_text(envelope.client_user_id) or optional_text(known.client_user_id)
    lost = LostDelivery((named or f"report:{delivery.message_id}")[:MAX_NAME], user_id, client_user_id)
    return Parsed(EXHAUSTED, user_id, client_user_id, (lost,), team_id=optional_text(envelope.team_id))


def _connection(name: str, user_id: str, data: bytes, version: datetime) -> _Content:
    """A connection, and what the user granted.

    Four shapes: provider or source, as an object (`slug`, or `source_slug` in the oldest), or provider as text.
    """
    known = decode(data, _Connected, "connection")
    provider = source_of(known.provider).slug_of_provider or source_of(known.source).slug_of_provider
    if not provider:
        raise Unprocessable("connection: neither provider nor source has a slug")
    granted, unread = read_grants(known.resource_availability)
    grants = [Grants(user_id, provider, granted, version)] if granted else []
    notes = (f"grants that cannot be read: {unread}",) if unread else ()
    if not name.endswith(".error"):
        return _Content([Connection(user_id, provider, "connected", None, version), *grants], notes=notes)
    parts = (optional_text(part, None) for part in (known.error_type, known.error_details))
    error = ": ".join(part for part in parts if part)[:MAX_ERROR] or "unknown"
    return _Content([Connection(user_id, provider, "error", error, version), *grants], notes=notes)


def _historical(resource: Resource, user_id: str, data: bytes) -> _Content:
    """A window of history. An absent `is_final` means final; the edges of an inverted window are swapped.

    An edge that cannot be read counts as absent and is noted, so that it does not cost the history.
    """
    known = decode(data, _Historical, f"{resource.name}: history")
    given = {"start_date": known.start_date, "end_date": known.end_date}
    found = {name: edge for name, value in given.items() if (edge := or_none(moment, value))}
    start, end = sorted(found.values()) if len(found) == 2 else (None, None)
    provider = source_of(known.provider).slug_of_provider
    notice = Notice(
        user_id, provider, resource.name, start, end, is_final=or_none(boolean, known.is_final) is not False
    )
    unread = [name for name, value in given.items() if value not in (None, "") and name not in found]
    notes = (f"the default window is fetched, because these cannot be read: {', '.join(unread)}",) if unread else ()
    return _Content([notice], notes=notes)
