"""The meaning of Junction's events (Junction: event catalogue)."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import msgspec

from app.catalogue import EventType, Resource, catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import INFERRED, Action, Connection, Notice, Parsed, Record
from workers.aggregators import svix_ids
from workers.aggregators.common import NULL, UNIX_EPOCH, decode, decode_or, moment_or_none, version_of, wanted
from workers.aggregators.json import reject_duplicate_keys
from workers.aggregators.junction.shapes import SampleGroup, Source, plain, record, samples

IGNORED = {"unknown": "an unknown event type", "query": "no wearable data", "lab": "no wearable data"}


class _Envelope(msgspec.Struct):
    event_type: str | None = None
    type: str | None = None  # in Svix's own operational events
    user_id: str | None = None
    client_user_id: str | None = None
    data: msgspec.Raw = NULL


class _Owner(msgspec.Struct):
    user_id: str | None = None


class _Connected(msgspec.Struct):
    provider: Source | str | None = None
    source: Source | None = None
    error_type: str | None = None
    error_details: str | None = None


class _Historical(msgspec.Struct):
    start_date: Any = None
    end_date: Any = None
    is_final: bool | None = None
    provider: Source | str | None = None


def parse(delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
    """The actions of an event. Raises Unprocessable, without a value of the body."""
    reject_duplicate_keys(body, "not a Junction event")
    envelope = decode(body, _Envelope, "not a Junction event")
    name = envelope.event_type or envelope.type
    if not name:
        raise Unprocessable("not a Junction event: it has no event_type")
    event = catalogue().event(name)
    if event.does in IGNORED:
        return Parsed(name, envelope.user_id, envelope.client_user_id, ignored=IGNORED[event.does])
    user_id = envelope.user_id or _owner(envelope.data)
    if not user_id:
        raise Unprocessable("no user: neither user_id nor data.user_id")
    version = version_of(svix_ids.created_at(delivery.message_id) or _ordering_time(delivery), delivery)
    found, duplicate_samples = _actions(event, user_id, bytes(envelope.data), version)
    streams = [notice for action in found for notice in _streams_of(action, settings)]
    kept, ignored = wanted([*found, *streams], settings)
    return Parsed(name, user_id, envelope.client_user_id, kept, ignored, version, duplicate_samples)


def _owner(data: msgspec.Raw) -> str | None:
    try:
        return msgspec.json.decode(data, type=_Owner).user_id
    except (msgspec.ValidationError, UnicodeDecodeError):
        return None


def _ordering_time(delivery: Delivery) -> datetime | None:
    try:
        return UNIX_EPOCH + timedelta(milliseconds=delivery.ordering_ms) if delivery.ordering_ms is not None else None
    except OverflowError:
        return None


def _actions(event: EventType, user_id: str, data: bytes, version: datetime) -> tuple[Sequence[Action], int]:
    """The actions of an event, and the number of its duplicate samples."""
    resource = event.resource
    if event.does == "connection":
        return [_connection(event.name, user_id, data, version)], 0
    if resource is None:
        return [], 0
    if event.does == "historical":
        return [_notice(resource, user_id, data)], 0
    if resource.kind == "timeseries":
        group = decode_or(plain(resource), data, SampleGroup, f"{resource.name}: data is not a group of samples")
        return samples(resource, user_id, group, version)
    # A stream's notice holds no data, so a stream that was fetched overrides it.
    return [record(resource, user_id, data, INFERRED if resource.kind == "stream" else version)], 0


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


def _connection(name: str, user_id: str, data: bytes, version: datetime) -> Connection:
    """Four shapes: provider or source, as an object (`slug`, or `source_slug` in the oldest), or provider as text."""
    known = decode(data, _Connected, "connection")
    provider = _slug(known.provider) or _slug(known.source)
    if not provider:
        raise Unprocessable("connection: neither provider nor source has a slug")
    if not name.endswith(".error"):
        return Connection(user_id, provider, "connected", None, version)
    error = ": ".join(part for part in (known.error_type, known.error_details) if part)
    return Connection(user_id, provider, "error", error or "unknown", version)


def _slug(given: Source | str | None) -> str:
    return given.lower() if isinstance(given, str) else given.slug_of_provider if given else ""


def _notice(resource: Resource, user_id: str, data: bytes) -> Notice:
    """A window of history. An absent `is_final` means final; the edges of an inverted window are swapped.

    An edge that cannot be read counts as absent, so that it does not cost the history.
    """
    known = decode(data, _Historical, f"{resource.name}: history")
    edges = [edge for edge in map(moment_or_none, (known.start_date, known.end_date)) if edge]
    start, end = sorted(edges) if len(edges) == 2 else (None, None)
    return Notice(user_id, _slug(known.provider), resource.name, start, end, known.is_final is not False)
