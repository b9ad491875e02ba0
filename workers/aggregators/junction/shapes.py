"""Junction's objects, in every shape since 2022 (Junction: event structure), read as records and samples."""

import contextlib
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any

import msgspec

from app.catalogue import FieldType, Resource
from app.errors import Unprocessable
from workers.actions import Record, Sample, Samples
from workers.aggregators.common import CLOCK_SKEW, NULL, Identifier, decode
from workers.aggregators.json import reject_duplicate_keys
from workers.aggregators.repair import columns_of, value_of
from workers.aggregators.scalars import MAX_INTEGER, Unreadable, integer, moment, number, text

# These providers send local time marked as UTC (Junction: "floating time"). It is stored as received and flagged.
FLOATING_TIME = frozenset({"freestyle_libre", "abbott_libreview"})
SAMPLE_COLUMNS = frozenset({"timestamp", "start", "end", "value", "unit", "timezone_offset", "id"})
MAX_OFFSET = 86_400  # seconds
MAX_IDENTIFIER = 256
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

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

    provider: str | None = None
    slug: str | None = None
    source_slug: str | None = None
    type: str | None = None
    app_id: str | None = None
    device_id: str | None = None
    sport: str | None = None
    workout_id: str | None = None

    @property
    def slug_of_provider(self) -> str:
        return (self.provider or self.slug or self.source_slug or "").lower()


class SampleGroup(msgspec.Struct):
    """Samples of one source: an event's `data`, or one group of a page."""

    source: Source | None = None
    data: list[dict[str, Any]] = []  # structs, if decoded as `plain`


class _PlainGroup(SampleGroup):
    pass


@dataclass
class GroupContent:
    """The samples of a group by series, and the items of the group that cannot be used."""

    series: list[Samples]
    duplicates: int = 0  # samples with the key of another one, but different content; the last one is kept
    unreadable: tuple[str, ...] = ()  # fields of samples that are stored as NULL
    refused: list[tuple[str, bytes]] = dataclass_field(
        default_factory=list
    )  # the reason, and the group with only this item

    @property
    def read(self) -> int:
        """The number of samples."""
        return sum(len(one.rows) for one in self.series)


def record(resource: Resource, user_id: str, data: bytes, event_at: datetime) -> tuple[Record, tuple[str, ...]]:
    """One object of a summary, a stream's notice or a device; and the names of the fields that cannot be read.

    The version is its own `updated_at`, at most five minutes after the event, or else the time of the event. Raises
    Unprocessable if the object has no id.
    """
    try:
        return _strict_record(resource, user_id, data, event_at), ()
    except (*UNDECODABLE, ValueError):
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
    if not 1 <= len(identifier) <= MAX_IDENTIFIER:
        raise Unprocessable(
            f"{resource.name}: {resource.identifier}: expected an id of 1 to {MAX_IDENTIFIER} characters"
        )
    columns, unreadable = columns_of(resource, known)
    source = source_of(known.get("source"))
    provider = source.slug_of_provider or _text(known.get("source_provider")) or _text(known.get("provider"))
    updated_at = msgspec.json.decode(columns).get("updated_at") if resource.has_version else None
    found = Record(
        resource=resource.name,
        user_id=user_id,
        id=identifier,
        provider=provider.lower(),
        source_type=source.type or _text(known.get("source_type")) or "unknown",
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
    """A source of any shape. A text is the provider."""
    parts: Mapping[str, bytes] = {"provider": raw or NULL}
    with contextlib.suppress(*UNDECODABLE):
        parts = msgspec.json.decode(raw or NULL, type=dict[str, msgspec.Raw])
    return msgspec.convert({name: _text(part) for name, part in parts.items()}, Source)


@cache
def _record_type(resource: Resource) -> Any:
    """A type that checks every scalar of the public schema during decoding and skips all other fields."""
    names = ("source_provider", "source_type", "provider")
    known: dict[str, Any] = {"source": Source | None} | dict.fromkeys(names, str | None)
    known |= {field.name: FIELD_TYPES[field.type] for field in resource.fields}
    fields: list[Any] = [(resource.identifier, Identifier), *((name, kind, None) for name, kind in known.items())]
    return msgspec.defstruct(resource.name, fields)


@cache
def _times(resource: Resource) -> Callable[[Any], Iterable[str | None]]:
    """A function that returns the dates and times of a decoded object."""
    names = [field.name for field in resource.fields if field.type in ("date", "datetime")]
    return operator.attrgetter(*names, *names[:1]) if names else lambda _: ()  # of one name, it returns no tuple


@cache
def plain(resource: Resource) -> Any:
    """The type of a group whose samples have no fields but those with a column; None if the resource has more columns.

    Nearly all groups fit. Decoding refuses a sample with another field or a value that needs a check; `SampleGroup`
    reads these. Both ways mean the same, but this costs less than half (2.1 us a sample of a page instead of 6.2,
    measured in one run).
    """
    if resource.fields:
        return None
    own = _parts_in_sample(resource)
    fields: list[Any] = [("value", float), ("id", Any, None)]
    fields += [(name, str | None, None) for name in ("timestamp", "start", "end", "unit", *own)]
    fields += [("timezone_offset", Annotated[int, msgspec.Meta(ge=-MAX_OFFSET, le=MAX_OFFSET)] | None, None)]
    fields += [("type", None, None)] if "type" not in own else []
    item = msgspec.defstruct("Plain", fields, forbid_unknown_fields=True, gc=False)
    group: list[Any] = [("source", Source | None, None), ("data", list[item], [])]  # type: ignore[valid-type]
    return msgspec.defstruct("PlainGroup", group, bases=(_PlainGroup,))


@dataclass(frozen=True)
class GroupReader:
    """Reads groups of samples of one resource and user. `latest` is the last time that a sample may have."""

    resource: Resource
    user_id: str
    version: datetime
    latest: datetime

    def read(self, raw: bytes, *, is_unique: bool = True) -> GroupContent:
        """The content of a group, read item by item if it cannot be read as a whole or repeats a name.

        Raises Unprocessable for a group without a list of items.
        """
        if is_unique:
            with contextlib.suppress(Unprocessable, *UNDECODABLE):
                return self.decoded(msgspec.json.decode(raw, type=plain(self.resource) or SampleGroup))
        return self._item_by_item(raw)

    def decoded(self, group: SampleGroup) -> GroupContent:
        """The content of a decoded group. Raises Unprocessable if one of the samples cannot be used."""
        reader = _SampleReader(self.resource, group.source or Source(), self.latest)
        read = reader.plain if isinstance(group, _PlainGroup) else reader.mapping
        return reader.content(map(read, group.data), self.user_id, self.version)

    def _item_by_item(self, raw: bytes) -> GroupContent:
        what = f"{self.resource.name}: data"
        reject_duplicate_keys(raw, what, in_arrays=False)
        group = decode(raw, dict[str, msgspec.Raw], what)
        source = group.get("source", NULL)
        reader = _SampleReader(self.resource, source_of(source), self.latest)
        found, refused = [], []
        for item in decode(group.get("data", b"[]"), list[msgspec.Raw] | None, what) or ():
            try:
                reject_duplicate_keys(bytes(item), self.resource.name)
                found.append(reader.mapping(decode(item, dict[str, Any], self.resource.name)))
            except Unprocessable as reason:
                refused.append((str(reason), msgspec.json.encode({"source": source, "data": [item]})))
        return replace(reader.content(found, self.user_id, self.version), refused=refused)


def _parts_in_sample(resource: Resource) -> list[str]:
    """The parts of a resource's key that are fields of the sample. The others are fields of its source."""
    return [part for part in resource.key if "." not in part]


class _SampleReader:
    """Reads the samples of one group, each into its subtype and a Sample. Raises Unprocessable."""

    def __init__(self, resource: Resource, source: Source, latest: datetime) -> None:
        self._resource, self._source, self._latest = resource, source, latest
        self._first_late_day = (latest - timedelta(days=1)).date().isoformat()  # in the easternmost time zone
        provider = source.slug_of_provider
        self.unreadable: set[str] = set()
        self._own = _parts_in_sample(resource)
        self._of_source = [getattr(source, part.partition(".")[2]) or "" for part in resource.key if "." in part]
        self._subtype = "/".join(self._of_source)
        # True of every sample of a source, but not part of the key: devices come and go for the same data.
        self._attributes: dict[str, Any] = {}
        if source.app_id:
            self._attributes["app_id"] = source.app_id
        if source.device_id:
            self._attributes["device_id"] = source.device_id
        if provider in FLOATING_TIME:
            self._attributes["is_floating"] = True
        self._encoded_attributes = msgspec.json.encode(self._attributes) if self._attributes else None

    def content(self, found: Iterable[tuple[str, Sample]], user_id: str, version: datetime) -> GroupContent:
        """The samples that were read, by series. Of several with one key, the last one."""
        series: defaultdict[str, dict[datetime, Sample]] = defaultdict(dict)
        duplicates = 0
        for subtype, sample in found:
            rows, ts = series[subtype], sample.ts
            if (other := rows.get(ts)) and other != sample:
                duplicates += 1
            rows[ts] = sample
        name, provider, kind = self._resource.name, self._source.slug_of_provider, self._source.type or "unknown"
        actions = [
            Samples(name, user_id, provider, kind, subtype, list(rows.values()), version)
            for subtype, rows in series.items()
        ]
        return GroupContent(actions, duplicates, tuple(sorted(self.unreadable)))

    def plain(self, item: Any) -> tuple[str, Sample]:
        """Reads a sample that was decoded as the type of `plain`."""
        own, subtype, end = self._own, self._subtype, item.end
        if own:
            subtype = "/".join([*self._of_source, *[getattr(item, part) or "" for part in own]])
        ts = self._time(item.timestamp or item.start)
        ts_end = self._end(end) if end else None
        return subtype, Sample(ts, ts_end, item.value, item.unit or "", item.timezone_offset, self._encoded_attributes)

    def mapping(self, item: dict[str, Any]) -> tuple[str, Sample]:
        """Reads any sample."""
        own, subtype, end = self._own, self._subtype, item.get("end")
        if own:
            texts = ["" if (value := item.get(part)) is None else self._scalar(text, value, part) for part in own]
            subtype = "/".join([*self._of_source, *texts])
        ts = self._time(item.get("timestamp") or item.get("start"))
        value = None if self._resource.fields else self._scalar(number, item.get("value"), "value")
        unit = self._optional(text, item.get("unit"), "unit") or ""
        ts_end = self._optional(moment, end, "end") if end else None
        offset = self._optional(_offset, item.get("timezone_offset"), "timezone_offset")
        return subtype, Sample(ts, ts_end, value, unit, offset, self._extra(item))

    def _time(self, value: Any) -> datetime:
        """The time of a sample. Intervals often have no timestamp, but then they have a start."""
        try:
            # Compared as text, which costs a tenth, most times are neither too late nor too early in any time zone.
            is_between = FIRST_DAY < value < self._first_late_day and value[4] == "-"
            given = datetime.fromisoformat(value) if is_between else self._checked_time(value)
        except (TypeError, ValueError, LookupError):
            given = self._checked_time(value)
        return given if given.tzinfo else given.replace(tzinfo=UTC)

    def _checked_time(self, value: Any) -> datetime:
        if value is None:
            raise Unprocessable(f"{self._resource.name}: a sample has neither timestamp nor start")
        try:
            given = moment(value)
        except ValueError as expected:
            raise Unprocessable(f"{self._resource.name}: timestamp: expected {expected}") from None
        if given > self._latest:
            raise Unprocessable(f"{self._resource.name}: timestamp: more than two days after the receipt")
        return given

    def _end(self, value: str) -> datetime:
        try:
            return moment(value)
        except ValueError as expected:
            raise Unprocessable(f"{self._resource.name}: end: expected {expected}") from None

    def _extra(self, item: dict[str, Any]) -> bytes | None:
        """The resource's own columns (systolic and diastolic, or a note's text in `value`) and fields without one."""
        extra = dict(self._attributes)
        for field in self._resource.fields:
            read, name = (number, field.name) if field.type == "number" else (text, "value")
            extra[field.name] = self._scalar(read, item.get(name), name)
        for name, value in item.items():
            if value is not None and name not in SAMPLE_COLUMNS and name not in self._resource.key:
                extra.setdefault(name, value)
        return msgspec.json.encode(extra) if extra else None

    def _scalar(self, read: Callable[[Any], Any], value: Any, name: str) -> Any:
        """A scalar without which the sample cannot be used."""
        try:
            return read(value)
        except ValueError as expected:
            raise Unprocessable(f"{self._resource.name}: {name}: expected {expected}") from None

    def _optional(self, read: Callable[[Any], Any], value: Any, name: str) -> Any:
        """A scalar that may be NULL. The name of one that cannot be read is added to `unreadable`."""
        try:
            return None if value is None else read(value)
        except ValueError:
            self.unreadable.add(name)
            return None


def _offset(value: Any) -> int:
    """Seconds east of UTC."""
    seconds = integer(value)
    if abs(seconds) > MAX_OFFSET:
        raise Unreadable("at most a day")
    return seconds
