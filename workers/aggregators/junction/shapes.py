"""Junction's objects, in every shape since 2022 (Junction: event structure), read as records and samples."""

from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Annotated, Any

import msgspec

from app.catalogue import FieldType, Resource
from app.errors import Unprocessable
from workers.actions import Record, Sample, Samples
from workers.aggregators.common import DateText, Identifier, decode, moment

# These providers send local time marked as UTC (Junction: "floating time"). It is stored as received and flagged.
FLOATING_TIME = frozenset({"freestyle_libre", "abbott_libreview"})
SAMPLE_COLUMNS = frozenset({"timestamp", "start", "end", "value", "unit", "timezone_offset", "id"})
MAX_OFFSET = 86_400  # seconds

FIELD_TYPES: Mapping[FieldType, Any] = {
    "text": str | None,
    "integer": int | float | None,
    "number": int | float | None,
    "boolean": bool | None,
    "date": DateText | None,
    "datetime": DateText | None,
}
EXPECTED = {str: "text", float: "a number", int: "seconds"}


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


def record(resource: Resource, user_id: str, data: bytes, version: datetime) -> Record:
    """One object of a summary, a stream's notice or a device. Its own `updated_at` overrides `version`."""
    known = decode(data, _record_type(resource), resource.name)
    source = known.source or Source()
    provider = (source.slug_of_provider or known.source_provider or known.provider or "").lower()
    kind = source.type or known.source_type or "unknown"
    if updated_at := getattr(known, "updated_at", None):
        version = moment(updated_at, "updated_at")
    return Record(resource.name, user_id, getattr(known, resource.identifier), provider, kind, data, version)


@cache
def _record_type(resource: Resource) -> Any:
    """A type that checks every scalar of the public schema during decoding and skips all other fields."""
    names = ("source_provider", "source_type", "provider")
    known: dict[str, Any] = {"source": Source | None} | dict.fromkeys(names, str | None)
    known |= {field.name: FIELD_TYPES[field.type] for field in resource.fields}
    fields: list[Any] = [(resource.identifier, Identifier), *((name, kind, None) for name, kind in known.items())]
    return msgspec.defstruct(resource.name, fields)


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


def samples(resource: Resource, user_id: str, group: SampleGroup, version: datetime) -> tuple[list[Samples], int]:
    """The samples of a group by series. Of samples with one key the last wins; returns how many others differed."""
    source = group.source or Source()
    reader = _SampleReader(resource, source)
    read = reader.plain if isinstance(group, _PlainGroup) else reader.mapping
    series: defaultdict[str, dict[datetime, Sample]] = defaultdict(dict)
    duplicate_samples = 0
    for subtype, sample in map(read, group.data):
        rows, ts = series[subtype], sample.ts
        if (other := rows.get(ts)) and other != sample:
            duplicate_samples += 1
        rows[ts] = sample
    kind = source.type or "unknown"
    found = [
        Samples(resource.name, user_id, reader.provider, kind, subtype, list(rows.values()), version)
        for subtype, rows in series.items()
    ]
    return found, duplicate_samples


def _parts_in_sample(resource: Resource) -> list[str]:
    """The parts of a resource's key that are fields of the sample. The others are fields of its source."""
    return [part for part in resource.key if "." not in part]


class _SampleReader:
    """Reads the samples of one group, each into its subtype and a Sample. Raises Unprocessable."""

    def __init__(self, resource: Resource, source: Source) -> None:
        self._resource, self.provider = resource, source.slug_of_provider
        self._own = _parts_in_sample(resource)
        self._of_source = [getattr(source, part.partition(".")[2]) or "" for part in resource.key if "." in part]
        self._subtype = "/".join(self._of_source)
        # True of every sample of a source, but not part of the key: devices come and go for the same data.
        self._attributes: dict[str, Any] = {}
        if source.app_id:
            self._attributes["app_id"] = source.app_id
        if source.device_id:
            self._attributes["device_id"] = source.device_id
        if self.provider in FLOATING_TIME:
            self._attributes["is_floating"] = True
        self._encoded_attributes = msgspec.json.encode(self._attributes) if self._attributes else None

    def plain(self, item: Any) -> tuple[str, Sample]:
        """Reads a sample that was decoded as the type of `plain`."""
        own, subtype, end = self._own, self._subtype, item.end
        if own:
            subtype = "/".join([*self._of_source, *[getattr(item, part) or "" for part in own]])
        ts = moment(item.timestamp or item.start or self._undated(), "timestamp")
        ts_end = moment(end, "end") if end else None
        return subtype, Sample(ts, ts_end, item.value, item.unit or "", item.timezone_offset, self._encoded_attributes)

    def mapping(self, item: dict[str, Any]) -> tuple[str, Sample]:
        """Reads any sample."""
        own, subtype, end, offset = self._own, self._subtype, item.get("end"), item.get("timezone_offset")
        if own:
            texts = ["" if (value := item.get(part)) is None else self._scalar(str, value, part) for part in own]
            subtype = "/".join([*self._of_source, *texts])
        ts = moment(item.get("timestamp") or item.get("start") or self._undated(), "timestamp")
        ts_end = moment(end, "end") if end else None
        value = None if self._resource.fields else self._scalar(float, item.get("value"), "value")
        unit = self._scalar(str, item.get("unit") or "", "unit")
        if offset is not None and abs(self._scalar(int, offset, "timezone_offset")) > MAX_OFFSET:
            raise Unprocessable(f"{self._resource.name}: timezone_offset: expected at most a day")
        return subtype, Sample(ts, ts_end, value, unit, offset, self._extra(item))

    def _extra(self, item: dict[str, Any]) -> bytes | None:
        """The resource's own columns (systolic and diastolic, or a note's text in `value`) and fields without one."""
        extra = dict(self._attributes)
        for field in self._resource.fields:
            kind, name = (float, field.name) if field.type == "number" else (str, "value")
            extra[field.name] = self._scalar(kind, item.get(name), name)
        for name, value in item.items():
            if value is not None and name not in SAMPLE_COLUMNS and name not in self._resource.key:
                extra.setdefault(name, value)
        return msgspec.json.encode(extra) if extra else None

    def _scalar(self, kind: type, value: Any, name: str) -> Any:
        """A scalar as text, a number or seconds, as EXPECTED names them. An integer is a number, a boolean is not."""
        if type(value) is kind:
            return value
        try:
            if kind is float and type(value) is int:
                return float(value)
        except OverflowError:
            pass
        raise Unprocessable(f"{self._resource.name}: {name}: expected {EXPECTED[kind]}")

    def _undated(self) -> str:
        """Intervals often have no timestamp, but then they have a start."""
        raise Unprocessable(f"{self._resource.name}: a sample has neither timestamp nor start")
