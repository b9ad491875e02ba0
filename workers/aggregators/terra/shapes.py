"""Terra's objects as records and samples: read by the tables of `mapping`, one decoding for each object."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cache
from typing import Annotated, Any

import msgspec

from app.catalogue import FieldType, catalogue
from app.errors import Unprocessable
from workers.actions import Action, Record, Sample, Samples
from workers.aggregators.common import DateText, decode
from workers.aggregators.terra.mapping import TYPES, Column, Derive, Newest, Scaled, Series
from workers.aggregators.terra.series import FORMS, UTC_TIMES, Clock, Given, Instant, Span, points

LOCALIZATION = "metadata.timestamp_localization"
SCORES = "data_enrichment"
DIGITS = b"-0123456789"
NOTHING = msgspec.Raw(b"null")
DATA_TYPES: Mapping[FieldType, Any] = {
    "text": str,
    "integer": float,  # 146.3 beats a minute is one that is rounded, and 146.0 is one
    "number": float,
    "boolean": bool,
    "date": DateText,
    "datetime": DateText,
}
SeriesValues = tuple[str, str, list[Sample]]  # resource, subtype, and the samples of that series


@dataclass(frozen=True)
class Owner:
    """Whose data it is: a user of Terra's is one person's connection with one provider."""

    user_id: str
    provider: str


@dataclass
class Batch:
    """What the objects of one delivery or page become. Of a key that stands in it twice, what stands last is taken."""

    owner: Owner
    version: datetime
    duplicate_samples: int = 0
    samples_without_timestamp: int = 0
    _records: dict[tuple[str, str], Record] = field(default_factory=dict)
    _samples: dict[tuple[str, str, str], dict[datetime, Sample]] = field(default_factory=dict)

    def add(self, name: str, raw: bytes) -> None:
        """An object of one of Terra's types. Raises Unprocessable, having taken nothing of it, if it cannot be used."""
        item = Item(name, raw)
        key, columns, samples_without_timestamp = item.key(self.owner), item.columns(), list[int]()
        found = [] if item.is_retracted else [*item.samples(samples_without_timestamp), *item.scores(key)]
        whose = (self.owner.user_id, key, self.owner.provider)
        record = Record(item.resource.name, *whose, name, raw, self.version, columns, item.is_retracted)
        self._records[record.resource, key] = record
        self.samples_without_timestamp += sum(samples_without_timestamp)
        for resource, subtype, samples in found:
            self._take(self._samples.setdefault((resource, name, subtype), {}), samples)

    def _take(self, rows: dict[datetime, Sample], samples: Iterable[Sample]) -> None:
        for sample in samples:
            if (other := rows.get(sample.ts)) is not None and other != sample:
                self.duplicate_samples += 1
            rows[sample.ts] = sample

    def actions(self) -> tuple[Action, ...]:
        """Its records, and its samples by series. What has no samples says nothing about those that are stored."""
        whose = self.owner
        series = (
            Samples(resource, whose.user_id, whose.provider, name, subtype, list(rows.values()), self.version)
            for (resource, name, subtype), rows in self._samples.items()
            if rows
        )
        return (*self._records.values(), *series)


class Item:
    """One object of one of Terra's types, decoded. Raises Unprocessable if a field that is read has a wrong type."""

    def __init__(self, name: str, raw: bytes) -> None:
        self._name, self._kind = name, TYPES[name]
        self.resource = catalogue().of_terra(name)
        self._decoded = decode(raw, _structure(name), name)
        self._clock = Clock(self._at(LOCALIZATION) == UTC_TIMES)
        self._span = Span(self._moment(self._kind.start), self._moment(self._kind.end))

    def _at(self, path: str) -> Any:
        """The value at a path, None where the way ends before it."""
        return _follow(self._decoded, path)

    def _moment(self, path: str | None) -> Instant | None:
        return self._clock.read(self._at(path), f"{self._name}: {path}") if path else None

    @property
    def is_retracted(self) -> bool:
        """Whether Terra takes it back by this."""
        return self._kind.retracted is not None and self._at(self._kind.retracted[0]) == self._kind.retracted[1]

    def key(self, owner: Owner) -> str:
        """What it is told from others of its owner by; times as they were delivered, and never as UTC has them."""
        kind = self._kind
        for path in kind.key:
            if given := self._at(path):
                return str(given)
        if kind.otherwise == "user":
            return owner.user_id
        if self._span.start is None or kind.start is None or kind.otherwise == "nothing":
            missing = kind.start if kind.otherwise != "nothing" else " or ".join(kind.key)
            raise Unprocessable(f"{self._name}: without {missing} nothing tells it from others")
        start, end = self._at(kind.start), self._at(kind.end or kind.start)
        return _day(start, f"{self._name}: {kind.start}") if kind.otherwise == "day" else f"{start}|{end or ''}"

    def columns(self) -> bytes:
        """JSON of the typed columns of its resource, as far as Terra says the same."""
        types = {column.name: column.type for column in self.resource.fields}
        found: dict[str, Any] = {}
        for name, source in (self._kind.columns or {}).items():
            value = self._value(source)
            if value is not None:
                found[name] = CONVERTERS[types[name]](value, f"{self._name}: {name}")
        return msgspec.json.encode(found)

    def _value(self, source: Column) -> Any:
        match source:
            case Scaled(path, factor):
                value = self._at(path)
                return value if value is None else value * factor
            case Newest():
                return self._newest(source)
            case Derive("offset"):
                return self._span.start.offset if self._span.start else None
            case Derive():
                start, end = self._span
                return (end.at - start.at).total_seconds() if start and end else None
        return self._at(source)

    def _newest(self, source: Newest) -> float | None:
        array, _, name = source.path.partition("[].")
        given = ((getattr(one, source.time), getattr(one, name)) for one in self._array(array))
        found = points(given, self._clock, source.factor, f"{self._name}: {array}.{source.time}").values
        # Of several at one moment the one that stands last, as for samples.
        return max(reversed(found), key=lambda point: point.moment.at).value if found else None

    def _array(self, path: str) -> Iterable[Any]:
        return (one for one in self._at(path) or () if one is not None)

    def samples(self, samples_without_timestamp: list[int]) -> Iterator[SeriesValues]:
        """Its samples, series by series; how many values have no time is added to `samples_without_timestamp`."""
        for series in self._kind.series:
            array, is_array, name = series.path.partition("[]")
            if not is_array:
                yield from self._whole(series, samples_without_timestamp)
            elif series.pair:
                yield from self._pairs(series, series.pair, array, samples_without_timestamp)
            else:
                what = f"{self._name}: {array}.{series.time}"
                for subtype, given in _given(series, self._array(array), name.removeprefix(".")).items():
                    found = points(given, self._clock, series.factor, what)
                    samples_without_timestamp.append(found.samples_without_timestamp)
                    yield series.resource, subtype, list(FORMS[series.form](found.values, self._span, series.unit))

    def _whole(self, series: Series, samples_without_timestamp: list[int]) -> Iterator[SeriesValues]:
        """One value for all of its time."""
        value, (start, end) = self._at(series.path), self._span
        if value is None:
            return
        if start is None:
            samples_without_timestamp.append(1)
            return
        until = end.at if end and end.at > start.at else None
        sample = Sample(start.at, until, value * series.factor, series.unit, start.offset, start.extra)
        yield series.resource, "", [sample]

    def _pairs(
        self, series: Series, pair: tuple[str, str], array: str, samples_without_timestamp: list[int]
    ) -> Iterator[SeriesValues]:
        """Two values of one moment, under the names that the resource has for them; one alone means nothing."""
        names = [column.name for column in catalogue()[series.resource].fields]
        values = operator.attrgetter(series.time, *pair)
        found: list[Sample] = []
        for text, *given in map(values, self._array(array)):
            if None in given:
                continue
            moment = self._clock.read(text, f"{self._name}: {array}.{series.time}")
            if moment is None:
                samples_without_timestamp.append(1)
                continue
            extra = dict(zip(names, given, strict=True)) | _floating(moment)
            found.append(Sample(moment.at, None, None, series.unit, moment.offset, msgspec.json.encode(extra)))
        yield series.resource, "", found

    def scores(self, key: str) -> Iterator[SeriesValues]:
        """What Terra itself concludes from it, each a sample of its own: one that comes as null later erases nothing.

        What is no number (the contributions to a score, a traffic light) stands in `extra` as `content`.
        """
        start = self._span.start
        for name, raw in (self._at(SCORES) or {}).items() if start else ():
            content = bytes(raw)
            if start is None or raw == NOTHING:
                continue
            about: dict[str, Any] = {"type": self._name, "summary_id": key} | _floating(start)
            is_number = content[0] in DIGITS
            value = decode(content, float, f"{self._name}: {SCORES}") if is_number else None
            extra = about if is_number else about | {"content": raw}
            yield "terra_scores", name, [Sample(start.at, None, value, "", start.offset, msgspec.json.encode(extra))]


def _given(series: Series, array: Iterable[Any], name: str) -> dict[str, list[Given]]:
    """Times and values of an array by subtype, without the items that mean something else."""
    if series.unless:
        other, number = series.unless
        array = [one for one in array if getattr(one, other) != number]
    times = operator.attrgetter(series.time, name)
    if not series.subtype:
        return {"": list(map(times, array))}
    found: dict[str, list[Given]] = {}
    for one in array:
        found.setdefault(getattr(one, series.subtype) or "", []).append(times(one))
    return found


def _floating(moment: Instant) -> dict[str, bool]:
    return {"is_floating": True} if moment.extra else {}


def _day(text: str, what: str) -> str:
    """The day of a time as it was delivered."""
    try:
        return date.fromisoformat(text[:10]).isoformat()
    except ValueError:
        raise Unprocessable(f"{what}: expected a date") from None


def _instant(text: str, what: str) -> str | None:
    moment = Clock().read(text, what)
    return moment.at.isoformat() if moment else None


def _as_it_is(value: Any, _: str) -> Any:
    return value


CONVERTERS: Mapping[FieldType, Callable[[Any, str], Any]] = {
    "text": _as_it_is,
    "number": _as_it_is,
    "boolean": _as_it_is,
    "integer": lambda value, _: float(round(value)),
    "date": _day,
    "datetime": _instant,
}


def _follow(owner: Any, path: str) -> Any:
    for name in _steps(path):
        if owner is None:
            return None
        owner = getattr(owner, name)
    return owner


@cache
def _steps(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


@cache
def _structure(name: str) -> Any:
    """A type that checks, while it is decoded, everything of an object that is read, and passes over the rest."""
    kind = TYPES[name]
    leaves: dict[str, Any] = {LOCALIZATION: float, SCORES: dict[str, msgspec.Raw]}
    leaves |= dict.fromkeys(kind.key, Annotated[str, msgspec.Meta(max_length=256)])
    types = {column.name: column.type for column in catalogue().of_terra(name).fields}
    for column, source in (kind.columns or {}).items():
        leaves |= _leaves_of_column(source, DATA_TYPES[types[column]])
    for series in kind.series:
        leaves |= _leaves_of_series(series)
    leaves |= {path: DateText for path in (kind.start, kind.end) if path}
    leaves |= {kind.retracted[0]: float} if kind.retracted else {}
    return _struct(name, leaves)


def _leaves_of_column(source: Column, kind: Any) -> dict[str, Any]:
    match source:
        case Scaled(path):
            return {path: float}
        case Newest(path, time):
            return {path: float, f"{path.partition('[]')[0]}[].{time}": str}
        case Derive():
            return {}
    return {source: kind}


def _leaves_of_series(series: Series) -> dict[str, Any]:
    array, is_array, _ = series.path.partition("[]")
    if not is_array:
        return {series.path: float}
    names: dict[str, Any] = {series.time: str}
    names |= dict.fromkeys(series.pair, float) if series.pair else {}
    names |= {series.unless[0]: float} if series.unless else {}
    names |= {series.subtype: str} if series.subtype else {}
    return {f"{array}[].{name}": kind for name, kind in names.items()} | ({} if series.pair else {series.path: float})


def _struct(name: str, leaves: Mapping[str, Any]) -> Any:
    """A structure of structures by paths. Whatever is in it may be absent or null."""
    fields: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path, kind in leaves.items():
        head, _, rest = path.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = kind
        else:
            fields[head] = kind
    for head, inner in below.items():
        plain = head.removesuffix("[]")
        fields[plain] = _struct(plain, inner) if plain == head else list[_struct(plain, inner) | None]  # type: ignore[misc]
    return msgspec.defstruct(name, [(one, kind | None, None) for one, kind in fields.items()])
