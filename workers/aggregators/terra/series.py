"""Samples out of Terra's arrays: when each was measured, what a running total grew by, how long a stage lasted."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

import msgspec

from app.errors import Unprocessable
from workers.actions import Sample
from workers.aggregators.terra.mapping import INEXACT_STAGES, STAGES

FLOATING = b'{"is_floating":true}'
FIRST_YEAR = 1900  # year 1 stands for "unknown"
INSTANT = timedelta(microseconds=1)
UTC_TIMES = 0  # of timestamp_localization


class Instant(msgspec.Struct, frozen=True, gc=False):
    """When something was, and how it is known. There is one for every value of an array."""

    at: datetime
    offset: int | None  # seconds east of UTC, where the time is the user's own
    extra: bytes | None  # FLOATING where it was given without an offset


class Point(msgspec.Struct, frozen=True, gc=False):
    """A value of an array, and its moment."""

    moment: Instant
    value: float


@dataclass(frozen=True)
class Clock:
    """How the times of an object are to be read (Terra: `timestamp_localization`).

    A time without an offset is the user's local time: it is kept as it came, as if it were UTC, and marked, as
    Junction's floating times are. Where Terra says that its times are UTC, neither is the offset the user's nor is
    anything floating.
    """

    is_utc: bool = False

    def read(self, text: str | None, what: str) -> Instant | None:
        """An instant; None if there is none, or one that stands for "unknown". Raises Unprocessable if unreadable."""
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


class Span(NamedTuple):
    """When an object begins and ends."""

    start: Instant | None
    end: Instant | None


Given = tuple[str | None, float | None]  # a time and a value, as they stand in an array


class Usable(NamedTuple):
    """The usable values of an array, and how many nothing says the time of."""

    values: list[Point]
    samples_without_timestamp: int


def points(given: Iterable[Given], clock: Clock, factor: float, what: str) -> Usable:
    """The values of an array that are there and have a time."""
    found: list[Point] = []
    samples_without_timestamp = 0
    for text, value in given:
        if value is None:
            continue
        moment = clock.read(text, what)
        if moment is None:
            samples_without_timestamp += 1
        else:
            found.append(Point(moment, value * factor))
    return Usable(found, samples_without_timestamp)


def plain(found: Sequence[Point], _: Span, unit: str) -> Iterator[Sample]:
    """Each value at its moment."""
    for point in found:
        moment = point.moment
        yield Sample(moment.at, None, point.value, unit, moment.offset, moment.extra)


def grown(found: Sequence[Point], span: Span, unit: str) -> Iterator[Sample]:
    """What a running total grew by since the value before, which is when an interval begins.

    The total counts from the beginning of the object, so the first value belongs to the time since. If that is not
    before it, it belongs to the instant before it: neither is it lost then, nor counted twice. A total that falls has
    begun again.
    """
    since, before = span.start.at if span.start else None, 0.0
    for point in _in_order(found):
        moment, value = point.moment, point.value
        at = moment.at
        start = since if since is not None and since < at else at - INSTANT
        yield Sample(start, at, value - before if value >= before else value, unit, moment.offset, moment.extra)
        since, before = at, value


def stages(found: Sequence[Point], span: Span, unit: str) -> Iterator[Sample]:
    """Stages of sleep, each until the next begins, the last one until the end.

    Their numbers are Junction's; where that is not all that Terra says, `extra` has Terra's `level`.
    """
    ordered = _in_order(found)
    ends: list[datetime | None] = [after.moment.at for _, after in pairwise(ordered)]
    ends.append(span.end.at if ordered and span.end and span.end.at > ordered[-1].moment.at else None)
    for point, end in zip(ordered, ends, strict=False):
        moment, level, extra = point.moment, point.value, point.moment.extra
        if level not in STAGES or level in INEXACT_STAGES:
            extra = msgspec.json.encode({"level": level} | ({"is_floating": True} if extra else {}))
        yield Sample(moment.at, end, float(STAGES.get(int(level), -1)), unit, moment.offset, extra)


def _in_order(found: Sequence[Point]) -> list[Point]:
    """By time; of a moment that stands twice, the value that stands last."""
    last = {point.moment.at: point for point in found}
    return [last[at] for at in sorted(last)]


FORMS: Mapping[str, Callable[[Sequence[Point], Span, str], Iterator[Sample]]] = {
    "plain": plain,
    "running total": grown,
    "stages": stages,
}
