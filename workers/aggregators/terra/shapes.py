"""Terra's objects as records and samples: each is decoded once, and read by the tables of `mapping`."""

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from app.catalogue import catalogue
from app.errors import Unprocessable
from workers.actions import Action, Notes, Record, Refused, Sample, Samples
from workers.aggregators.common import MAX_AHEAD, MAX_NAME, NULL, decode, key_text, reject_too_many
from workers.aggregators.json import LARGE_BYTES, parts, reject_duplicate_keys
from workers.aggregators.scalars import day
from workers.aggregators.terra.mapping import (
    TYPES,
    Column,
    Derived,
    Newest,
    Scaled,
    Values,
    Whole,
)
from workers.aggregators.terra.repair import Repair
from workers.aggregators.terra.series import (
    FORMS,
    UTC_TIMES,
    Clock,
    Instant,
    SeriesValues,
    Span,
    last_time,
    ranges_of,
    until,
)
from workers.aggregators.terra.structures import (
    LOCALIZATION,
    SCORES,
    columns_of_type,
    fields_of,
    item_type,
    steps,
    structure,
)

DIGITS = b"-0123456789"


class Owner(NamedTuple):
    """A user of Terra: one person's connection with one provider."""

    user_id: str
    provider: str


@dataclass(frozen=True)
class _Object:
    """One object: its record, its samples by series, and its unusable parts."""

    record: Record
    series: list[SeriesValues]
    refused: tuple[str, ...]  # the reason of each refused value
    unreadable: tuple[str, ...]  # columns that are stored as NULL


@dataclass
class Batch:
    """The records and samples of the objects of one delivery or page. Of several with one key, the last one wins."""

    owner: Owner
    version: datetime
    latest: datetime  # the last time that a sample may have
    duplicate_samples: int = 0
    samples_without_timestamp: int = 0
    refused: list[Refused] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    _objects: dict[tuple[str, str], _Object] = field(default_factory=dict)

    def add(self, name: str, raw: bytes, *, is_unique: bool = True) -> None:
        """Adds an object of one of Terra's types. An object without a key, or any refused value, is in `refused`."""
        try:
            found = self._read(name, raw, is_unique=is_unique)
        except Unprocessable as reason:
            self.refused.append(Refused(str(reason), as_event(name, self.owner, raw)))
            reject_too_many(self.refused, name)
            return
        self._objects[found.record.resource, found.record.id] = found
        self.unreadable.update(found.unreadable)
        if found.refused:
            self.refused.append(Refused(found.refused[0], as_event(name, self.owner, raw), len(found.refused)))

    def _read(self, name: str, raw: bytes, *, is_unique: bool) -> _Object:
        """Without `is_unique`, an object of an array may repeat a name."""
        if is_unique or reject_duplicate_keys(raw, name, in_arrays=False):
            with contextlib.suppress(Unprocessable):
                return self._object(Item(name, raw), raw)
        return self._object(Item(name, raw, is_lenient=True), raw)

    def _object(self, item: "Item", raw: bytes) -> _Object:
        key = item.key(self.owner)
        series = [] if item.is_retracted else [*item.samples(), *item.scores(key)]
        late: list[str] = []
        ranges = tuple(ranges_of(series))
        if last_time(series, ranges) > self.latest:
            series, late = until(self.latest, series)
            ranges = tuple(ranges_of(series))
        record = Record(
            resource=item.resource.name,
            user_id=self.owner.user_id,
            id=key,
            provider=self.owner.provider,
            source_type=item.name,
            payload=raw,
            version=self.version,
            columns=item.columns(),
            is_deleted=item.is_retracted,
            sample_ranges=ranges,
        )
        self.samples_without_timestamp += item.samples_without_timestamp
        return _Object(record, series, (*item.refused, *late), tuple(item.unreadable))

    @property
    def records(self) -> int:
        """The number of objects with a key."""
        return len(self._objects)

    @property
    def notes(self) -> Notes:
        """The differences between the stored and the received objects."""
        return Notes(tuple(sorted(self.unreadable)), self.samples_without_timestamp)

    def actions(self) -> tuple[Action, ...]:
        """The records, and the samples of each by series."""
        found = self._objects.values()
        return (*(one.record for one in found), *(samples for one in found for samples in self._samples(one)))

    def _samples(self, found: _Object) -> Iterator[Samples]:
        """The samples of an object by series. Two arrays may have samples of one series (glucose)."""
        merged: dict[tuple[str, str], dict[datetime, Sample]] = {}
        for resource, subtype, samples in found.series:
            rows = merged.setdefault((resource, subtype), {})
            for sample in samples:
                if (other := rows.get(sample.ts)) is not None and other != sample:
                    self.duplicate_samples += 1
                rows[sample.ts] = sample
        (user_id, provider), record = self.owner, found.record
        for (resource, subtype), rows in merged.items():
            if rows:
                kept = list(rows.values())
                yield Samples(resource, user_id, provider, record.source_type, subtype, kept, self.version, record.id)


def samples_of(owner: Owner, name: str, raw: bytes, version: datetime, stored_at: datetime) -> list[Samples]:
    """The samples of an object that was stored before as a record. Later ones than at its receipt are not refused."""
    batch = Batch(owner, version, stored_at + MAX_AHEAD)
    batch.add(name, raw)
    return [one for one in batch.actions() if isinstance(one, Samples)]


def items(array: bytes, what: str, kind: Any = msgspec.Raw) -> Iterator[Any]:
    """The items of an array, decoded part by part as `kind`. The array may be null. Raises Unprocessable."""
    for part in parts(array):
        yield from decode(part, list[kind] | None, what) or ()


def as_event(name: str, owner: Owner, raw: bytes) -> bytes:
    """JSON of an event with one object."""
    user = {"user_id": owner.user_id, "provider": owner.provider}
    content = {"athlete": msgspec.Raw(raw)} if name == "athlete" else {"data": [msgspec.Raw(raw)]}
    return msgspec.json.encode({"type": name, "user": user} | content)


class Item:
    """One object of one of Terra's types, decoded.

    Raises Unprocessable if a field of the tables has a wrong type. With `is_lenient`, such a field is read in another
    way or left out, see `Repair`.
    """

    def __init__(self, name: str, raw: bytes, *, is_lenient: bool = False) -> None:
        self.name, self._kind = name, TYPES[name]
        self.resource = catalogue().of_terra(name)
        self.samples_without_timestamp = 0
        self.refused: list[str] = []
        self.unreadable: set[str] = set()
        self._is_lenient = is_lenient
        if is_lenient:
            repair = Repair(name, fields_of(name))
            raw = repair.repaired(raw)
            self.refused, self.unreadable = repair.refused, repair.unreadable
        self._decoded = decode(raw, structure(name, in_parts=len(raw) > LARGE_BYTES), name)
        self._clock = Clock(self._at(LOCALIZATION) == UTC_TIMES)
        self._span = Span(self._moment(self._kind.start), self._moment(self._kind.end))

    def _at(self, path: str) -> Any:
        """The value at a path; None if a part of the path is absent."""
        value = self._decoded
        for name in steps(path):
            if value is None:
                return None
            value = getattr(value, name)
        return value

    def _array(self, path: str) -> Iterator[Any]:
        found = self._at(path)
        if isinstance(found, msgspec.Raw):
            found = items(bytes(found), self.name, item_type(self.name, path))
        return (one for one in found or () if one is not None)

    def _moment(self, path: str | None) -> Instant | None:
        return self._clock.read(self._at(path), f"{self.name}: {path}") if path else None

    @property
    def is_retracted(self) -> bool:
        """Whether Terra deletes the object by this."""
        return self._kind.retracted is not None and self._at(self._kind.retracted[0]) == self._kind.retracted[1]

    def key(self, owner: Owner) -> str:
        """The id of the object among those of its owner. Times stay as received: in UTC a day could be another."""
        return key_text(self._key(owner), f"{self.name}: the key")

    def _key(self, owner: Owner) -> str:
        kind = self._kind
        for path in kind.key:
            if given := self._at(path):
                return str(given)
        if kind.otherwise == "user":
            return owner.user_id
        if self._span.start is None or kind.start is None or kind.otherwise == "nothing":
            missing = kind.start if kind.otherwise != "nothing" else " or ".join(kind.key)
            raise Unprocessable(f"{self.name}: without {missing} the object has no key")
        start, end = self._at(kind.start), self._at(kind.end or kind.start)
        return day(start).isoformat() if kind.otherwise == "day" else f"{start}|{end or ''}"

    def columns(self) -> bytes:
        """JSON of the typed columns that the object has."""
        found: dict[str, Any] = {}
        for name, (source, kind) in columns_of_type(self.name).items():
            if (value := self._value(source)) is None:
                continue
            try:
                found[name] = kind.convert(value) if kind.convert else value
            except ValueError as expected:
                if not self._is_lenient:
                    raise Unprocessable(f"{self.name}: {name}: expected {expected}") from None
                self.unreadable.add(name)
        return msgspec.json.encode(found)

    def _value(self, source: Column) -> Any:
        start, end = self._span
        match source:
            case str():
                return self._at(source)
            case Scaled(path, factor):
                value = self._at(path)
                return value if value is None else value * factor
            case Newest(array, time, name, factor):
                given = map(operator.attrgetter(time, name), self._array(array))
                found, _ = self._clock.points(given, factor, f"{self.name}: {array}.{time}")
                # Of several at one time the last one, as for samples.
                return max(reversed(found), key=lambda point: point.moment.at).value if found else None
            case Derived.OFFSET:
                return start.offset if start else None
            case Derived.DURATION:
                return (end.at - start.at).total_seconds() if start and end else None

    def samples(self) -> Iterator[SeriesValues]:
        """The samples, series by series. Counts values without a time in `samples_without_timestamp`."""
        for series in self._kind.series:
            if isinstance(series, Whole):
                yield series.resource, "", self._whole(series)
            else:
                yield from self._values(series)

    def _values(self, series: Values) -> Iterator[SeriesValues]:
        items = self._array(series.array)
        if series.unless:
            name, number = series.unless
            items = (one for one in items if getattr(one, name) != number)
        by_subtype: dict[str, Any] = {} if series.subtype else {"": items}
        if series.subtype:
            for one in items:
                by_subtype.setdefault(getattr(one, series.subtype) or "", []).append(one)
        read = operator.attrgetter(series.time, *series.names)
        what = f"{self.name}: {series.array}.{series.time}"
        for subtype, of_subtype in by_subtype.items():
            given: Iterator[Any] = map(read, of_subtype)
            if len(series.names) > 1:
                given = ((row[0], None if None in row[1:] else row[1:]) for row in given)
            found, without_timestamp = self._clock.points(given, series.factor, what)
            self.samples_without_timestamp += without_timestamp
            yield series.resource, subtype, list(FORMS[series.form](found, self._span, series))

    def _whole(self, series: Whole) -> list[Sample]:
        value, (start, end) = self._at(series.path), self._span
        if value is None:
            return []
        if start is None:
            self.samples_without_timestamp += 1
            return []
        until = end.at if end and end.at > start.at else None
        return [Sample(start.at, until, value * series.factor, series.unit, start.offset, start.extra)]

    def scores(self, key: str) -> Iterator[SeriesValues]:
        """Terra's own scores, each a sample of its own, so that a score that is null later erases nothing.

        A score that is no number (the contributions to a score, a traffic light) is `content` in `extra`.
        """
        start = self._span.start
        if start is None:
            return
        for name, raw in (self._at(SCORES) or {}).items():
            if raw == NULL:
                continue
            if len(name) > MAX_NAME:  # the subtype of the score's series
                self.refused.append(f"{self.name}: {SCORES}: a name is longer than {MAX_NAME} characters")
                continue
            content = bytes(raw)
            is_number = content[0] in DIGITS
            value = decode(content, float, f"{self.name}: {SCORES}") if is_number else None
            about: dict[str, Any] = {"type": self.name, "summary_id": key} | start.flags
            extra = msgspec.json.encode(about if is_number else about | {"content": raw})
            yield "terra_scores", name, [Sample(start.at, None, value, "", start.offset, extra)]
