"""Counters, such as steps: at each instant the best-ranked source that covers it wins."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import NamedTuple

from workers.daily.model import MINUTE, DayEvidence, DaySample, DayValue, Summary, split_at_midnight

Interval = tuple[int, int]


class Piece(NamedTuple):
    """A part of a sample, on one local day."""

    sample: DaySample
    day: int
    start: int
    stop: int


@dataclass(slots=True)
class _CounterDay:
    evidence: DayEvidence = field(default_factory=DayEvidence)
    shares: dict[int, list[float]] = field(default_factory=dict)  # of the values, by source
    covered: list[Interval] = field(default_factory=list)


def counter_days(
    metric: str, samples: Iterable[DaySample], summaries: Iterable[Summary] = (), unit: str | None = None
) -> list[DayValue]:
    """The sum of each local day.

    A sample that loses part of its time to a better source loses the same part of its value, and is divided in
    proportion at local midnight. Samples of one source are not compared with each other. Where the best source of a
    day has only a summary, the day is the summary's. `unit` is None if the samples contain it; of samples in several
    units, those in the unit of the best source's first one count.
    """
    days = _compared(samples)
    said = _by_day(summaries)
    found = [_day(metric, day, one, said.get(day, {}), unit) for day, one in days.items()]
    found += [_of_summary(metric, day, one, None, unit) for day, one in said.items() if day not in days]
    return [one for one in found if one is not None]


def _compared(samples: Iterable[DaySample]) -> dict[int, _CounterDay]:
    samples = list(samples)
    days: dict[int, _CounterDay] = {}
    for sample in samples:
        for number, _, _ in split_at_midnight(sample.start, sample.stop, sample.offset):
            days.setdefault(number, _CounterDay()).evidence.see(sample)
    for sample, number, start, stop in won(samples):
        day = days[number]
        if not day.evidence.has_unit(sample):
            continue
        length = sample.stop - sample.start
        share = sample.value * (stop - start) / length if length else sample.value
        day.shares.setdefault(sample.source, []).append(share)
        day.evidence.zone = max(day.evidence.zone, sample.zone)
        day.covered.append((start, stop))
    return days


def won(samples: Iterable[DaySample]) -> Iterator[Piece]:
    """The parts of samples that no better source covers, divided at local midnight."""
    by_source: dict[int, list[DaySample]] = {}
    for sample in samples:
        by_source.setdefault(sample.source, []).append(sample)
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


def _by_day(summaries: Iterable[Summary]) -> dict[int, dict[int, list[Summary]]]:
    found: dict[int, dict[int, list[Summary]]] = {}
    for one in summaries:
        found.setdefault(one.day, {}).setdefault(one.source, []).append(one)
    return found


def _day(
    metric: str, day: int, found: _CounterDay, said: Mapping[int, list[Summary]], unit: str | None
) -> DayValue | None:
    best = min(found.evidence.present | said.keys())
    if best not in found.evidence.present:
        return _of_summary(metric, day, said, found.evidence, unit)
    if not found.shares:
        return None
    sums = {source: fsum(shares) for source, shares in found.shares.items()}
    evidence = found.evidence
    return DayValue(
        day=day,
        metric=metric,
        value=fsum(share for shares in found.shares.values() for share in shares),
        unit=unit or evidence.unit,
        source=min(sums, key=lambda source: (-sums[source], source)),
        sources=len(sums),
        covered_minutes=round(sum(stop - start for start, stop in union(found.covered)) / MINUTE),
        zone=evidence.zone,
        users=frozenset(evidence.users).union(one.user_id for ones in said.values() for one in ones),
        samples=evidence.samples + len(said),
        summary_value=said[best][0].value if best in said else None,
    )


def _of_summary(
    metric: str, day: int, said: Mapping[int, list[Summary]], evidence: DayEvidence | None, unit: str | None
) -> DayValue:
    best = min(said)
    value = said[best][0].value
    users = frozenset(evidence.users if evidence else ()).union(one.user_id for ones in said.values() for one in ones)
    return DayValue(
        day=day,
        metric=metric,
        value=value,
        unit=unit or (evidence.unit if evidence else ""),
        source=best,
        sources=1,
        covered_minutes=None,
        zone=0,
        users=users,
        samples=(evidence.samples if evidence else 0) + len(said),
        summary_value=value,
        method="summary",
    )
