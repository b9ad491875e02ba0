"""Junction's samples, in every shape since 2022 (Junction: event structure), read by series."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import chain
from typing import Annotated, Any

import msgspec

from app.catalogue import Resource
from app.errors import Unprocessable
from workers.actions import Refused, Sample, Samples
from workers.aggregators.common import MAX_NAME, NULL, ShortText, decode, reject_too_many
from workers.aggregators.json import UNREADABLE, parts, reject_duplicate_keys
from workers.aggregators.junction.shapes import FIRST_DAY, Source, as_event, source_of
from workers.aggregators.scalars import Unreadable, integer, moment, number, short_text, text

# These providers send local time marked as UTC (Junction: "floating time"). It is stored as received and flagged.
FLOATING_TIME = frozenset({"freestyle_libre", "abbott_libreview"})
SAMPLE_COLUMNS = frozenset({"timestamp", "start", "end", "value", "unit", "timezone_offset", "id"})
MAX_OFFSET = 86_400  # seconds


class _Group(msgspec.Struct):
    """Samples of one source: an event's `data`, or one group of a page."""

    source: msgspec.Raw = NULL
    data: msgspec.Raw = NULL


@dataclass
class GroupContent:
    """The samples of a group by series, and the items of the group that cannot be used."""

    series: list[Samples]
    duplicates: int  # samples with the key of another one, but different content; the last one is kept
    unreadable: tuple[str, ...]  # fields of samples that are stored as NULL
    refused: list[Refused]

    @property
    def read(self) -> int:
        """The number of samples."""
        return sum(len(one.rows) for one in self.series)


ITEMS = msgspec.json.Decoder(list[dict[str, Any]])


@cache
def plain_items(resource: Resource) -> "msgspec.json.Decoder[list[Any]] | None":
    """The decoder of samples that have no fields but those with a column; None if the resource has more columns.

    Nearly all samples fit. Decoding refuses a sample with another field or a value that needs a check; these are read
    as mappings. Both ways mean the same, but this costs less than half (2.1 us a sample of a page instead of 6.2,
    measured in one run). Making the decoder costs as much as five samples.
    """
    if resource.fields:
        return None
    own = _parts_in_sample(resource)
    fields: list[Any] = [("value", float), ("id", Any, None)]
    fields += [(name, str | None, None) for name in ("timestamp", "start", "end")]
    fields += [(name, ShortText | None, None) for name in ("unit", *own)]
    fields += [("timezone_offset", Annotated[int, msgspec.Meta(ge=-MAX_OFFSET, le=MAX_OFFSET)] | None, None)]
    fields += [("type", None, None)] if "type" not in own else []
    item = msgspec.defstruct("Plain", fields, forbid_unknown_fields=True, gc=False)
    return msgspec.json.Decoder(list[item])  # type: ignore[valid-type]


@dataclass(frozen=True)
class GroupReader:
    """Reads groups of samples of one resource and user. `latest` is the last time that a sample may have."""

    resource: Resource
    user_id: str
    version: datetime
    latest: datetime
    event_name: str  # of an event with such a group
    client_user_id: str | None = None

    def read(self, raw: bytes, *, is_unique: bool = True) -> GroupContent:
        """The content of a group, part by part. A part is read item by item if one of its samples cannot be used.

        Without `is_unique`, an item may repeat a name. Raises Unprocessable for a group without a list of items.
        """
        what = f"{self.resource.name}: data"
        if not is_unique:
            reject_duplicate_keys(raw, what, in_arrays=False)
        group = decode(raw, _Group, what)
        reader = SampleReader(self.resource, source_of(group.source), self.latest)
        refused: list[Refused] = []
        found = chain.from_iterable(
            (self._whole_part(part, reader) if is_unique else None) or self._item_by_item(part, reader, group, refused)
            for part in parts(bytes(group.data))
        )
        return reader.content(found, self.user_id, self.version, refused)

    def refusal(self, reason: Unprocessable, part: bytes) -> Refused:
        """A group, or a group with one item, that cannot be used."""
        return Refused(str(reason), as_event(self.event_name, self.user_id, part, self.client_user_id))

    def _whole_part(self, part: bytes, reader: "SampleReader") -> list[tuple[str, Sample]] | None:
        """The samples of an array; None if one of them cannot be used."""
        plain = plain_items(self.resource)
        with contextlib.suppress(Unprocessable, *UNREADABLE):
            return list(map(reader.plain, plain.decode(part)) if plain else map(reader.mapping, ITEMS.decode(part)))
        return None

    def _item_by_item(
        self, part: bytes, reader: "SampleReader", group: _Group, refused: list[Refused]
    ) -> list[tuple[str, Sample]]:
        """The samples of an array. Adds each other item to `refused`. Raises Unprocessable if there are too many."""
        name = self.resource.name
        found = []
        for item in decode(part, list[msgspec.Raw] | None, f"{name}: data") or ():
            try:
                reject_duplicate_keys(bytes(item), name)
                found.append(reader.mapping(decode(item, dict[str, Any], name)))
            except Unprocessable as reason:
                alone = msgspec.json.encode({"source": group.source, "data": [item]})
                refused.append(self.refusal(reason, alone))
                reject_too_many(refused, name)
        return found


def _parts_in_sample(resource: Resource) -> list[str]:
    """The parts of a resource's key that are fields of the sample. The others are fields of its source."""
    return [part for part in resource.key if "." not in part]


class SampleReader:
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

    def content(
        self, found: Iterable[tuple[str, Sample]], user_id: str, version: datetime, refused: list[Refused]
    ) -> GroupContent:
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
        return GroupContent(actions, duplicates, tuple(sorted(self.unreadable)), refused)

    def plain(self, item: Any) -> tuple[str, Sample]:
        """Reads a sample that `plain_items` has decoded."""
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
            texts = ["" if (value := item.get(part)) is None else self._scalar(_name, value, part) for part in own]
            subtype = "/".join([*self._of_source, *texts])
        ts = self._time(item.get("timestamp") or item.get("start"))
        value = None if self._resource.fields else self._scalar(number, item.get("value"), "value")
        unit = self._optional(_name, item.get("unit"), "unit") or ""
        ts_end = self._optional(moment, end, "end") if end else None
        if ts_end:
            self._not_late(ts_end, "end")
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
        return self._not_late(given, "timestamp")

    def _end(self, value: str) -> datetime:
        try:
            return self._not_late(moment(value), "end")
        except ValueError as expected:
            raise Unprocessable(f"{self._resource.name}: end: expected {expected}") from None

    def _not_late(self, given: datetime, name: str) -> datetime:
        if given > self._latest:
            raise Unprocessable(f"{self._resource.name}: {name}: more than two days after the receipt")
        return given

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


def _name(value: Any) -> str:
    """A text of a key, or a unit."""
    return short_text(value, MAX_NAME)


def _offset(value: Any) -> int:
    """Seconds east of UTC."""
    seconds = integer(value)
    if abs(seconds) > MAX_OFFSET:
        raise Unreadable("at most a day")
    return seconds
