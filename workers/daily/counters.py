"""Counters, such as steps: at each instant the best-ranked source that covers it wins."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import NamedTuple

from workers.daily.model import MINUTE, DaySample, DayValue, Summary, split_at_midnight, unit_of

Interval = tuple[int, int]


class Piece(NamedTuple):
    """A part of a sample, on one local day."""

    sample: DaySample
    day: int
    start: int
    stop: int


@dataclass(slots=True)
class _CounterDay:
    compared: list[DaySample] = field(default_factory=list)
    unit: str = ""
    zone: int = 0
    shares: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # of the values, by source
    covered: list[Interval] = field(default_factory=list)
    summaries: dict[int, Summary] = field(default_factory=dict)  # by source


def counter_days(
    metric: str, samples: Iterable[DaySample], summaries: Iterable[Summary] = (), unit: str | None = None
) -> list[DayValue]:
    """The sum of each local day.

    A sample that loses part of its time to a better source loses the same part of its value, and is divided in
    proportion at local midnight. Samples of one source are not compared with each other. Where the best source of a
    day has only a summary, the day is the summary's. `unit` is None if the samples contain it; of samples in several
    units, those in the unit of the best source's first one count.
    """
    samples = list(samples)
    days: dict[int, _CounterDay] = defaultdict(_CounterDay)
    for sample in samples:
        for number, _, _ in split_at_midnight(sample.start, sample.stop, sample.offset):
            days[number].compared.append(sample)
    for day in days.values():
        day.unit = unit_of(day.compared)
    for sample, number, start, stop in won(samples):
        day = days[number]
        if sample.unit not in ("", day.unit):
            continue
        length = sample.stop - sample.start
        day.shares[sample.source].append(sample.value * (stop - start) / length if length else sample.value)
        day.zone = max(day.zone, sample.zone)
        day.covered.append((start, stop))
    for summary in summaries:
        days[summary.day].summaries.setdefault(summary.source, summary)
    return [value for number, day in days.items() if (value := _value(metric, number, day, unit))]


def won(samples: Iterable[DaySample]) -> Iterator[Piece]:
    """The parts of samples that no better source covers, divided at local midnight."""
    by_source: dict[int, list[DaySample]] = defaultdict(list)
    for sample in samples:
        by_source[sample.source].append(sample)
    better: list[Interval] = []  # the time that better sources cover: sorted, without overlaps
    for source in sorted(by_source):
        stops = [stop for _, stop in better]
        for sample in by_source[source]:
            for start, stop in _without(better, stops, sample.start, sample.stop):
                for part in split_at_midnight(start, stop, sample.offset):
                    yield Piece(sample, *part)
        better = union([*better, *((one.start, one.stop) for one in by_source[source])])


def _without(better: Sequence[Interval], stops: Sequence[int], start: int, stop: int) -> Iterator[Interval]:
    """The parts of [start, stop), or the moment, that better sources do not cover."""
    place = bisect_right(stops, start)
    if start == stop and (place == len(better) or start < better[place][0]):
        yield start, stop
    while place < len(better) and better[place][0] < stop:
        if better[place][0] > start:
            yield start, better[place][0]
        start = better[place][1]
        place += 1
    if start < stop:
        yield start, stop


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The time that intervals cover, sorted and without overlaps."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif start < stop:
            found.append((start, stop))
    return found


def _value(metric: str, number: int, day: _CounterDay, unit: str | None) -> DayValue | None:
    summaries, present = day.summaries, {one.source for one in day.compared}
    best = min(present | summaries.keys())
    is_summary = best not in present
    shares = {best: [summaries[best].value]} if is_summary else day.shares
    if not shares:
        return None
    covered = round(sum(stop - start for start, stop in union(day.covered)) / MINUTE)
    return DayValue(
        day=number,
        metric=metric,
        value=fsum(share for of_source in shares.values() for share in of_source),
        unit=unit or day.unit,
        source=min(shares, key=lambda source: (-fsum(shares[source]), source)),
        sources=len(shares),
        covered_minutes=None if is_summary else covered,
        zone=0 if is_summary else day.zone,
        users=frozenset([*(one.user_id for one in day.compared), *(one.user_id for one in summaries.values())]),
        samples=len(day.compared) + len(summaries),
        summary_value=summaries[best].value if best in summaries else None,
        method="summary" if is_summary else "samples",
    )
