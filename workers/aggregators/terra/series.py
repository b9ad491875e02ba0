"""Samples from Terra's arrays: their times, and the forms of their values (running totals, stages of sleep)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from app.catalogue import catalogue
from app.errors import Unprocessable
from workers.actions import Sample
from workers.aggregators.terra.mapping import INEXACT_STAGES, STAGES, Values

FLOATING = b'{"is_floating":true}'
FIRST_YEAR = 1900  # year 1 stands for "unknown"
INSTANT = timedelta(microseconds=1)
UTC_TIMES = 0  # of timestamp_localization


class Instant(msgspec.Struct, frozen=True, gc=False):
    """A time as Terra sent it."""

    at: datetime
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
            at = datetime.fromisoformat(text)
        except ValueError:
            raise Unprocessable(f"{what}: expected an ISO 8601 date and time") from None
        if at.year < FIRST_YEAR:
            return None
        offset = at.utcoffset()
        if offset is None:
            return Instant(at.replace(tzinfo=UTC), None, None if self.is_utc else FLOATING)
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
