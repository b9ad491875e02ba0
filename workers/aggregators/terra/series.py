"""Samples from Terra's arrays: their times, and the forms of their values (running totals, stages of sleep)."""

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from app.catalogue import catalogue
from app.errors import Unprocessable
from workers.actions import INFERRED, Sample, SampleRange
from workers.aggregators.scalars import LATEST
from workers.aggregators.terra.mapping import INEXACT_STAGES, STAGES, Values

FLOATING = b'{"is_floating":true}'
FIRST_YEAR = 1900  # year 1 stands for "unknown"
INSTANT = timedelta(microseconds=1)
OFFSET = re.compile(r"([+-])([01]\d|2[0-3]):([0-5]\d)")
MIN_LENGTH = 17  # of a time with an offset. In `2026-03-14-05:00`, of 16 characters, Python reads a time of day.
AHEAD = "timestamp: more than two days after the receipt"
TS = operator.attrgetter("ts")
SeriesValues = tuple[str, str, list[Sample]]  # resource, subtype, and the samples of that series
UTC_TIMES = 0  # of timestamp_localization


class Instant(msgspec.Struct, frozen=True, gc=False):
    """A time of Terra's."""

    at: datetime  # in UTC: comparing and sorting times of other offsets costs ten times as much
    offset: int | None  # seconds east of UTC, where the time is the user's local time
    extra: bytes | None  # FLOATING where it has no offset

    @property
    def flags(self) -> dict[str, bool]:
        """The entries of `extra`."""
        return {"is_floating": True} if self.extra else {}


class Point(msgspec.Struct, frozen=True, gc=False):
    """A value of an array and its time."""

    moment: Instant
    value: Any  # a number, or a pair of them


class Span(NamedTuple):
    """The start and end of an object."""

    start: Instant | None
    end: Instant | None


@dataclass(frozen=True)
class Clock:
    """Reads the times of one object (Terra: `timestamp_localization`).

    A time without an offset is the user's local time. It is stored as if it were UTC, and flagged like Junction's
    floating times. Where Terra says that the object's times are UTC, an offset is not the user's and no time floats.
    """

    is_utc: bool = False

    def read(self, text: str | None, what: str) -> Instant | None:
        """None for an absent time or one that stands for "unknown". Raises Unprocessable if the text is no time."""
        if not text:
            return None
        try:
            if (known := _offset(text[-6:])) and len(text) >= MIN_LENGTH:
                at, (offset, seconds) = datetime.fromisoformat(f"{text[:-6]}+00:00"), known
                if FIRST_YEAR < at.year < LATEST.year:
                    return Instant(at - offset, None if self.is_utc else seconds, None)
            return self._any(datetime.fromisoformat(text))
        except ValueError:
            raise Unprocessable(f"{what}: expected an ISO 8601 date and time") from None
        except OverflowError:  # psycopg reads no later year
            raise Unprocessable(f"{what}: expected a time before the year 9999") from None

    def _any(self, given: datetime) -> Instant | None:
        """As `read`. Raises OverflowError for a time that psycopg cannot read."""
        if given.year < FIRST_YEAR:
            return None
        offset = given.utcoffset()
        at = given.replace(tzinfo=UTC) if offset is None else given.astimezone(UTC)
        if at > LATEST:
            raise OverflowError
        if offset is None:
            return Instant(at, None, None if self.is_utc else FLOATING)
        return Instant(at, None if self.is_utc else offset.days * 86_400 + offset.seconds, None)

    def points(self, given: Iterable[tuple[str | None, Any]], factor: float, what: str) -> tuple[list[Point], int]:
        """The values that are present and have a time; and the number of values without a time."""
        found: list[Point] = []
        without_timestamp = 0
        for text, value in given:
            if value is None:
                continue
            moment = self.read(text, what)
            if moment is None:
                without_timestamp += 1
            else:
                found.append(Point(moment, value if factor == 1.0 else value * factor))
        return found, without_timestamp


@lru_cache(1000)
def _offset(text: str) -> tuple[timedelta, int] | None:
    """The offset that a text like +01:00 stands for, also in seconds."""
    if not (found := OFFSET.fullmatch(text)):
        return None
    seconds = (int(found[2]) * 3600 + int(found[3]) * 60) * (-1 if found[1] == "-" else 1)
    return timedelta(seconds=seconds), seconds


def plain(found: Sequence[Point], _: Span, series: Values) -> Iterator[Sample]:
    """Each value at its time."""
    unit = series.unit
    for point in found:
        moment = point.moment
        yield Sample(moment.at, None, point.value, unit, moment.offset, moment.extra)


def pairs(found: Sequence[Point], _: Span, series: Values) -> Iterator[Sample]:
    """Each pair of values at its time, under the names of the resource's columns."""
    first, second = (column.name for column in catalogue()[series.resource].fields)
    for point in found:
        moment = point.moment
        extra = msgspec.json.encode({first: point.value[0], second: point.value[1]} | moment.flags)
        yield Sample(moment.at, None, None, series.unit, moment.offset, extra)


def grown(found: Sequence[Point], span: Span, series: Values) -> Iterator[Sample]:
    """The growth of a running total since the value before it; the interval begins there.

    The total counts from the start of the object, so the first interval begins at the start. If the start is not
    earlier than the first value, that interval lasts one microsecond, so that its value is neither lost nor counted
    twice. A total that falls was reset.
    """
    since, before, unit = span.start.at if span.start else None, 0.0, series.unit
    for point in _in_order(found):
        moment, value = point.moment, point.value
        at = moment.at
        start = since if since is not None and since < at else at - INSTANT
        yield Sample(start, at, value - before if value >= before else value, unit, moment.offset, moment.extra)
        since, before = at, value


def stages(found: Sequence[Point], span: Span, series: Values) -> Iterator[Sample]:
    """Stages of sleep in Junction's numbers. Each lasts until the next begins, the last one until the end.

    Where Junction's number loses information, `extra` holds Terra's `level`.
    """
    ordered = _in_order(found)
    ends: list[datetime | None] = [after.moment.at for _, after in pairwise(ordered)]
    ends.append(span.end.at if ordered and span.end and span.end.at > ordered[-1].moment.at else None)
    for point, end in zip(ordered, ends, strict=False):
        moment, level, extra = point.moment, point.value, point.moment.extra
        if level not in STAGES or level in INEXACT_STAGES:
            extra = msgspec.json.encode({"level": level} | moment.flags)
        yield Sample(moment.at, end, float(STAGES.get(int(level), -1)), series.unit, moment.offset, extra)


def _in_order(found: Sequence[Point]) -> list[Point]:
    """By time. Of several values with one time, the last one."""
    last = {point.moment.at: point for point in found}
    return [last[at] for at in sorted(last)]


FORMS: Mapping[str, Callable[[Sequence[Point], Span, Values], Iterator[Sample]]] = {
    "plain": plain,
    "running total": grown,
    "stages": stages,
    "pairs": pairs,
}


def ranges_of(series: Sequence[SeriesValues]) -> Iterator[SampleRange]:
    """The ranges of the series that are not empty. Two arrays may have samples of one series (glucose).

    An empty array, or a score that is null later, deletes nothing (Terra: data superset and overwrite).
    """
    times: dict[tuple[str, str], list[datetime]] = {}
    for resource, subtype, rows in series:
        if rows:
            times.setdefault((resource, subtype), []).extend(map(TS, rows))
    for (resource, subtype), found in times.items():
        yield SampleRange(resource, subtype, min(found), max(found))


def last_time(series: Sequence[SeriesValues], ranges: Sequence[SampleRange]) -> datetime:
    """The last time of an object's samples. Samples with an end are in order of time."""
    ends = (rows[-1].ts_end for _, _, rows in series if rows)
    return max((*filter(None, ends), *(one.last for one in ranges)), default=INFERRED)


def until(latest: datetime, series: Sequence[SeriesValues]) -> tuple[list[SeriesValues], list[str]]:
    """The samples until `latest`, and the reason of each other one.

    The value of a running total has its own time as the end of its interval.
    """
    late = [f"{name}: {AHEAD}" for name, _, rows in series for one in rows if (one.ts_end or one.ts) > latest]
    kept = [
        (name, subtype, [one for one in rows if (one.ts_end or one.ts) <= latest]) for name, subtype, rows in series
    ]
    return kept, late
