"""Junction's objects, in every shape since 2022 (Junction: event structure), read as records."""

import contextlib
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Literal

import msgspec

from app.catalogue import FieldType, Resource
from app.errors import Unprocessable
from workers.actions import Record
from workers.aggregators.common import CLOCK_SKEW, MAX_ID, MAX_NAME, NULL, Identifier, ShortText, decode, key_text
from workers.aggregators.json import UNREADABLE
from workers.aggregators.listings import EntryReader
from workers.aggregators.repair import columns_of, value_of
from workers.aggregators.scalars import MAX_INTEGER, Unreadable, moment, text

# What PostgreSQL reads as Python does. Any other time is read leniently.
ZONE = r"(?:Z|[+-](?:0\d|1[0-4])(?::?\d\d)?)?"
TIME = re.compile(rf"\d{{4}}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{{1,9}})?)?{ZONE})?")
USUAL_LENGTH, DAY_LENGTH = len("2026-03-14T06:30:00+00:00"), len("2026-03-14")
FIRST_DAY, LAST_DAY = "0001-01-03", "9999-12-29"  # compared as text; times beyond are read leniently, which is exact
FIELD_TYPES: Mapping[FieldType, Any] = {
    "text": str | None,
    "integer": Annotated[float, msgspec.Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)] | None,
    "number": float | None,
    "boolean": bool | None,
    "date": str | None,
    "datetime": str | None,
}


class Source(msgspec.Struct):
    """The `source` of data, in every shape since 2022. An empty string counts as absent."""

    provider: ShortText | None = None
    slug: ShortText | None = None
    source_slug: ShortText | None = None
    type: ShortText | None = None
    app_id: str | None = None  # in no key, as the next
    device_id: str | None = None
    sport: ShortText | None = None
    workout_id: ShortText | None = None

    @property
    def slug_of_provider(self) -> str:
        return (self.provider or self.slug or self.source_slug or "").lower()


class _Grant(msgspec.Struct):
    status: Literal["available", "unavailable"]  # unavailable: the user denied a scope that the resource requires


KEYED_FIELDS = frozenset(Source.__struct_fields__) - {"app_id", "device_id"}
SOURCE_FIELDS = ("source_provider", "source_type", "provider")  # of a record without a source


def record(resource: Resource, user_id: str, data: bytes, event_at: datetime) -> tuple[Record, tuple[str, ...]]:
    """One object of a summary, a stream's notice or a device; and the names of the fields that cannot be read.

    The version is its own `updated_at`, at most five minutes after the event, or else the time of the event. Raises
    Unprocessable if the object has no id.
    """
    try:
        return _strict_record(resource, user_id, data, event_at), ()
    except (*UNREADABLE, ValueError):
        return _lenient_record(resource, user_id, data, event_at)


def _strict_record(resource: Resource, user_id: str, data: bytes, event_at: datetime) -> Record:
    """Raises ValueError and msgspec's errors if a field does not have the documented type."""
    known = msgspec.json.decode(data, type=_record_type(resource))
    for value in _times(resource)(known):
        if value is not None:
            _check_time(value)
    source = known.source or Source()
    provider = (source.slug_of_provider or known.source_provider or known.provider or "").lower()
    kind = source.type or known.source_type or "unknown"
    version = _version(getattr(known, "updated_at", None), event_at)
    identifier = getattr(known, resource.identifier)
    return Record(resource.name, user_id, identifier, provider, kind, data, version, event_at=event_at)


def _check_time(value: str) -> None:
    """Raises ValueError for a time that PostgreSQL, or psycopg in some time zone, cannot read.

    The usual forms need no pattern, which takes three times as long as the rest.
    """
    length = len(value)
    is_usual = length == USUAL_LENGTH and value[10] == "T" and value[20:22] < "15"
    is_day = length == DAY_LENGTH and value[4] == value[7] == "-"
    if not (is_usual or is_day or TIME.fullmatch(value)) or not FIRST_DAY <= value < LAST_DAY:
        raise Unreadable("a time that psycopg reads in every time zone")
    datetime.fromisoformat(value)


def _lenient_record(
    resource: Resource, user_id: str, data: bytes, event_at: datetime
) -> tuple[Record, tuple[str, ...]]:
    known = decode(data, dict[str, msgspec.Raw], resource.name)
    identifier = _text(known.get(resource.identifier))
    if not 1 <= len(identifier) <= MAX_ID:
        raise Unprocessable(f"{resource.name}: {resource.identifier}: expected an id of 1 to {MAX_ID} characters")
    columns, unreadable = columns_of(resource, known)
    texts = {name: key_text(_text(known.get(name)), name, MAX_NAME) for name in SOURCE_FIELDS}
    source = source_of(known.get("source"))
    provider = source.slug_of_provider or texts["source_provider"] or texts["provider"]
    updated_at = msgspec.json.decode(columns).get("updated_at") if resource.has_version else None
    found = Record(
        resource=resource.name,
        user_id=user_id,
        id=identifier,
        provider=provider.lower(),
        source_type=source.type or texts["source_type"] or "unknown",
        payload=data,
        version=_version(updated_at, event_at),
        columns=columns,
        event_at=event_at,
    )
    return found, unreadable


def _version(updated_at: str | None, event_at: datetime) -> datetime:
    """A wrong clock must not win over all later versions."""
    return min(moment(updated_at), event_at + CLOCK_SKEW) if updated_at else event_at


def _text(raw: bytes | None) -> str:
    """A scalar as text; '' for anything else."""
    with contextlib.suppress(ValueError):
        return text(value_of(raw))
    return ""


def as_event(name: str, user_id: str, data: bytes, client_user_id: str | None = None) -> bytes:
    """JSON of an event."""
    body = {"event_type": name, "user_id": user_id, "client_user_id": client_user_id, "data": msgspec.Raw(data)}
    return msgspec.json.encode(body)


def source_of(raw: bytes | None) -> Source:
    """A source of any shape. A text is the provider. Raises Unprocessable for a text that is too long for a key."""
    with contextlib.suppress(*UNREADABLE):
        return msgspec.json.decode(raw or NULL, type=Source | None) or Source()
    parts: Mapping[str, bytes] = {"provider": raw or NULL}
    with contextlib.suppress(*UNREADABLE):
        parts = msgspec.json.decode(raw or NULL, type=dict[str, msgspec.Raw])
    texts = {name: _text(part) for name, part in parts.items()}
    for name in KEYED_FIELDS & texts.keys():
        key_text(texts[name], f"source.{name}", MAX_NAME)
    return msgspec.convert(texts, Source)


def read_grants(given: msgspec.Raw) -> tuple[tuple[tuple[str, bool], ...], int]:
    """The resources of a connection, each with whether the user allowed the provider to share it.

    Also the number of entries that could not be read. The enum of `status` is not exhaustive: an entry with another
    status is left out.
    """
    reader = EntryReader()
    try:
        entries = msgspec.json.decode(given, type=dict[str, msgspec.Raw] | None)
    except UNREADABLE:
        return (), 1
    granted = reader.named(entries or {}, _Grant, lambda name, grant: (name, grant.status == "available"))
    return tuple(granted), reader.unread


@cache
def _record_type(resource: Resource) -> Any:
    """A type that checks every scalar of the public schema during decoding and skips all other fields."""
    known: dict[str, Any] = {"source": Source | None} | dict.fromkeys(SOURCE_FIELDS, ShortText | None)
    known |= {field.name: FIELD_TYPES[field.type] for field in resource.fields}
    fields: list[Any] = [(resource.identifier, Identifier), *((name, kind, None) for name, kind in known.items())]
    return msgspec.defstruct(resource.name, fields)


@cache
def _times(resource: Resource) -> Callable[[Any], Iterable[str | None]]:
    """A function that returns the dates and times of a decoded object."""
    names = [field.name for field in resource.fields if field.type in ("date", "datetime")]
    return operator.attrgetter(*names, *names[:1]) if names else lambda _: ()  # of one name, it returns no tuple
