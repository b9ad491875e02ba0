"""What Junction's objects look like, in every shape since 2022, and the records and samples they become."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import Annotated, Any

import msgspec

from app.catalogue import Field, Resource
from app.errors import Unprocessable
from workers.actions import Record, Sample, Samples
from workers.aggregators.common import DateText, Identifier, decode, moment

# These give local time and call it UTC (Junction: "floating time"); it is kept as it came and marked.
FLOATING_TIME = frozenset({"freestyle_libre", "abbott_libreview"})
SAMPLE_COLUMNS = frozenset({"timestamp", "start", "end", "unit", "timezone_offset", "id"})

_TYPES: dict[str, Any] = {
    "text": str | None,
    "integer": int | float | None,
    "number": int | float | None,
    "boolean": bool | None,
    "date": DateText | None,
    "datetime": DateText | None,
}


class Source(msgspec.Struct):
    """Where data came from, in every shape since 2022. An empty string counts as absent."""

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

    @property
    def kind(self) -> str:
        return self.type or "unknown"


class SampleGroup(msgspec.Struct):
    """Samples of one source: an event's `data`, or one group of a page."""

    source: Source | None = None
    data: list[dict[str, Any]] = []  # in what `plain` reads, objects


def record(resource: Resource, user_id: str, data: bytes, version: datetime) -> Record:
    """One object of a summary, a stream's notice or a device. Its own `updated_at` goes before `version`."""
    known = decode(data, _record_type(resource), resource.name)
    source = known.source or Source()
    provider = (source.slug_of_provider or known.source_provider or known.provider or "").lower()
    kind = source.type or known.source_type or "unknown"
    updated_at = getattr(known, "updated_at", None)
    version = moment(updated_at, "updated_at") if updated_at else version
    return Record(resource.name, user_id, getattr(known, resource.identifier), provider, kind, data, version)


@cache
def _record_type(resource: Resource) -> Any:
    """A type that checks every scalar of the public schema while it is decoded, and passes over the rest."""
    fixed: dict[str, Any] = {
        "source": Source | None,
        "source_provider": str | None,
        "source_type": str | None,
        "provider": str | None,
    }
    scalars = {field.name: _TYPES[field.type] for field in resource.fields}
    fields: list[Any] = [(resource.identifier, Identifier)]
    fields += [(name, kind, None) for name, kind in (fixed | scalars).items()]
    return msgspec.defstruct(resource.name, fields)


@cache
def plain(resource: Resource) -> Any:
    """A group whose samples have nothing but what has a column, which nearly all are; None if the resource has more.

    Decoding refuses whatever else is in them, and whatever would need a second look. What it takes means the same as in
    mappings, at less than half of the cost (2.1 us a sample of a page instead of 6.2, measured in one run).
    """
    if resource.fields:
        return None
    parts = [part for part in resource.key if "." not in part]
    fields: list[Any] = [("value", float)]
    fields += [(name, str | None, None) for name in ("timestamp", "start", "end", "unit", *parts)]
    fields += [("timezone_offset", _Offset | None, None), ("id", Any, None)]
    fields += [("type", None, None)] if "type" not in parts else []
    item = msgspec.defstruct("Plain", fields, forbid_unknown_fields=True, gc=False)
    group: list[Any] = [("source", Source | None, None), ("data", list[item], [])]  # type: ignore[valid-type]
    return msgspec.defstruct("PlainGroup", group, bases=(_PlainGroup,))


class _PlainGroup(SampleGroup):
    pass


_Offset = Annotated[int, msgspec.Meta(ge=-86_400, le=86_400)]


def samples(
    resource: Resource, user_id: str, group: SampleGroup, version: datetime, duplicate_samples: list[int]
) -> Iterator[Samples]:
    """The samples of a group, by series. Where a key stands twice in one group the last one wins; that is counted."""
    source = group.source or Source()
    provider = source.slug_of_provider
    attributes = _attributes(source, floating=provider in FLOATING_TIME)
    read = _of_plain if isinstance(group, _PlainGroup) else _of_mappings
    series: dict[str, dict[datetime, Sample]] = {}
    for subtype, sample in read(resource, source, group.data, attributes):
        rows = series.setdefault(subtype, {})
        if (other := rows.get(sample.ts)) and other != sample:
            duplicate_samples.append(1)
        rows[sample.ts] = sample
    for subtype, rows in series.items():
        yield Samples(resource.name, user_id, provider, source.kind, subtype, list(rows.values()), version)


def _of_plain(
    resource: Resource, source: Source, data: Sequence[Any], attributes: dict[str, Any]
) -> Iterator[tuple[str, Sample]]:
    extra = msgspec.json.encode(attributes) if attributes else None
    own = [part for part in resource.key if "." not in part]
    subtype = "/".join(_discriminator(part, {}, source) for part in resource.key)
    for item in data:
        if own:
            known = {part: getattr(item, part) for part in own}
            subtype = "/".join(_discriminator(part, known, source) for part in resource.key)
        at, end = item.timestamp or item.start or _dateless(resource), item.end
        ts, ts_end = moment(at, "timestamp"), moment(end, "end") if end else None
        yield subtype, Sample(ts, ts_end, item.value, item.unit or "", item.timezone_offset, extra)


def _of_mappings(
    resource: Resource, source: Source, data: Sequence[Any], attributes: dict[str, Any]
) -> Iterator[tuple[str, Sample]]:
    for item in data:
        subtype = "/".join(_discriminator(part, item, source) for part in resource.key)
        yield subtype, _sample(resource, item, attributes)


def _dateless(resource: Resource) -> str:
    raise Unprocessable(f"{resource.name}: a sample has neither timestamp nor start")


def _attributes(source: Source, *, floating: bool) -> dict[str, Any]:
    """What is true of every sample of a source but no part of its key: devices come and go for the same data."""
    found: dict[str, Any] = {}
    if source.app_id:
        found["app_id"] = source.app_id
    if source.device_id:
        found["device_id"] = source.device_id
    if floating:
        found["is_floating"] = True
    return found


def _discriminator(part: str, item: dict[str, Any], source: Source) -> str:
    owner, _, name = part.rpartition(".")
    value = getattr(source, name) if owner else item.get(name)
    if value is not None and not isinstance(value, str):
        raise Unprocessable(f"{part}: expected text")
    return value or ""


def _sample(resource: Resource, item: dict[str, Any], attributes: dict[str, Any]) -> Sample:
    at = item.get("timestamp") or item.get("start") or _dateless(resource)  # intervals often have no timestamp
    end = item.get("end")
    offset = item.get("timezone_offset")
    if offset is not None and (type(offset) is not int or abs(offset) > 86_400):
        raise Unprocessable(f"{resource.name}: timezone_offset: expected seconds")
    unit = item.get("unit") or ""
    if not isinstance(unit, str):
        raise Unprocessable(f"{resource.name}: unit: expected text")
    value = None if resource.fields else _number(item.get("value"), resource.name)
    return Sample(
        moment(at, "timestamp"),
        moment(end, "end") if end else None,
        value,
        unit,
        offset,
        _extra(resource, item, attributes),
    )


def _extra(resource: Resource, item: dict[str, Any], attributes: dict[str, Any]) -> bytes | None:
    extra = dict(attributes)
    if resource.fields:
        extra |= {field.name: _own_value(resource, field, item) for field in resource.fields}
        known = SAMPLE_COLUMNS | {"value"}
    else:
        known = _PLAIN_COLUMNS
    for name, value in item.items():
        if value is not None and name not in known and name not in resource.key:
            extra.setdefault(name, value)
    return msgspec.json.encode(extra) if extra else None


_PLAIN_COLUMNS = SAMPLE_COLUMNS | {"value"}


def _own_value(resource: Resource, field: Field, item: dict[str, Any]) -> float | str:
    """A value that has a column of its own: systolic and diastolic, or a note's text, which stands under `value`."""
    if field.type == "number":
        return _number(item.get(field.name), f"{resource.name}: {field.name}")
    value = item.get("value")
    if not isinstance(value, str):
        raise Unprocessable(f"{resource.name}: value: expected text")
    return value


def _number(value: Any, what: str) -> float:
    if type(value) is float:
        return value
    try:
        return float(value) if type(value) is int else _not_a_number(what)
    except OverflowError:
        return _not_a_number(what)


def _not_a_number(what: str) -> float:
    raise Unprocessable(f"{what}: expected a number")
