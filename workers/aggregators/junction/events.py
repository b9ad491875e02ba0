"""What Junction's events mean."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from functools import cache
from typing import Any

import msgspec

from app.catalogue import EventType, Resource, catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import INFERRED, Action, Connection, Notice, Parsed, Record
from workers.aggregators import svix_ids
from workers.aggregators.common import decode, decode_or, moment, ordering_time, version_of, wanted
from workers.aggregators.json import reject_duplicate_keys
from workers.aggregators.junction.shapes import SampleGroup, Source, plain, record, samples


class _Envelope(msgspec.Struct):
    event_type: str | None = None
    type: str | None = None  # Svix's own operational events have this instead
    user_id: str | None = None
    client_user_id: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")


class _Owner(msgspec.Struct):
    user_id: str | None = None


class _Connected(msgspec.Struct):
    provider: Source | str | None = None
    source: Source | None = None
    error_type: str | None = None
    error_details: str | None = None


class _Historical(msgspec.Struct):
    start_date: Any = None  # what cannot be read is as good as absent
    end_date: Any = None
    is_final: bool | None = None
    provider: Source | str | None = None


def parse(delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
    """What an event means. Raises Unprocessable, without a value of the body, if it cannot be used."""
    reject_duplicate_keys(body, "not a Junction event")
    envelope = decode(body, _Envelope, "not a Junction event")
    name = envelope.event_type or envelope.type
    if not name:
        raise Unprocessable("not a Junction event: it has no event_type")
    event = catalogue().event(name)
    if event.does in ("unknown", "query", "lab"):
        reason = "an unknown event type" if event.does == "unknown" else "not data of a wearable"
        return Parsed(name, envelope.user_id, envelope.client_user_id, ignored=reason)
    user_id = envelope.user_id or _owner(envelope.data)
    if not user_id:
        raise Unprocessable("no user: neither user_id nor data.user_id")
    version = version_of(svix_ids.created_at(delivery.message_id) or ordering_time(delivery), delivery)
    duplicate_samples: list[int] = []
    found = list(_actions(event, user_id, bytes(envelope.data), version, duplicate_samples))
    found += [notice for action in found for notice in _streams_of(action, settings)]
    kept, ignored = wanted(found, settings)
    return Parsed(name, user_id, envelope.client_user_id, kept, ignored, version, sum(duplicate_samples))


def _streams_of(action: Action, settings: Settings) -> Iterator[Notice]:
    """The streams that an action announces, which are always fetched: that of a notice without data is its own.

    One that Junction announces no more is fetched with the records it belongs to, if it is asked for by name.
    """
    if not isinstance(action, Record | Notice):
        return
    resource = catalogue()[action.resource]
    if isinstance(action, Record) and resource.kind == "stream":
        yield Notice(action.user_id, action.provider, resource.name, None, None, is_final=True, item=action.id)
    for stream in _unannounced_streams():
        if stream.of == resource.name and stream.name in settings.resources:
            if isinstance(action, Notice):
                yield replace(action, resource=stream.name)
            else:
                yield Notice(action.user_id, action.provider, stream.name, None, None, is_final=True, item=action.id)


@cache
def _unannounced_streams() -> list[Resource]:
    return [stream for stream in catalogue().of_kind("stream") if stream.legacy]


def _actions(
    event: EventType, user_id: str, data: bytes, version: datetime, duplicate_samples: list[int]
) -> Iterator[Action]:
    resource = event.resource
    if event.does == "connection":
        yield _connection(event.name, user_id, data, version)
    elif event.does == "historical" and resource:
        yield _notice(resource, user_id, data)
    elif resource and resource.kind == "timeseries":
        group = decode_or(plain(resource), data, SampleGroup, f"{resource.name}: data is not a group of samples")
        yield from samples(resource, user_id, group, version, duplicate_samples)
    elif resource:
        # A stream's notice holds no data: whatever has been fetched goes before it.
        yield record(resource, user_id, data, INFERRED if resource.kind == "stream" else version)


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
    """A chunk of history. An absent `is_final` means final; an inverted window is turned round."""
    known = decode(data, _Historical, f"{resource.name}: history")
    edges = [edge for edge in (_edge(known.start_date), _edge(known.end_date)) if edge]
    start, end = sorted(edges) if len(edges) == 2 else (None, None)
    return Notice(user_id, _slug(known.provider), resource.name, start, end, known.is_final is not False)


def _edge(given: Any) -> datetime | None:
    """One end of a window; an absurd one must not cost the history, so it counts as absent."""
    try:
        return moment(given, "window")
    except Unprocessable:
        return None


def _owner(data: msgspec.Raw) -> str | None:
    try:
        return msgspec.json.decode(data, type=_Owner).user_id
    except (msgspec.ValidationError, UnicodeDecodeError):
        return None
