"""Gauges, such as the heart rate, and values of which the last one of a day counts, such as the weight."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import fsum

from workers.daily.model import MINUTE, DayEvidence, DaySample, DayValue, local_day


@dataclass(slots=True)
class _GaugeDay:
    evidence: DayEvidence = field(default_factory=DayEvidence)
    minutes: dict[int, list[float]] = field(default_factory=dict)  # the values that won
    won: dict[int, int] = field(default_factory=dict)  # minutes by source


def gauge_days(metric: str, samples: Iterable[DaySample], unit: str | None = None) -> list[DayValue]:
    """The average, minimum and maximum of each local day, as `metric` with the suffixes _avg, _min and _max.

    In each minute of UTC the best-ranked source with a sample wins. The average is the mean of the minutes' means, so
    that a source that measures more often in one hour than in another does not shift it. Of samples in several units,
    those in the unit of the best source's first one count.
    """
    samples = list(samples)
    days: dict[int, _GaugeDay] = defaultdict(_GaugeDay)
    for sample in samples:
        days[local_day(sample.start, sample.offset)].evidence.see(sample)
    for sample in best_of_minutes(samples):
        minute = sample.start // MINUTE
        day = days[local_day(sample.start, sample.offset)]
        if day.evidence.has_unit(sample):
            if minute not in day.minutes:
                day.won[sample.source] = day.won.get(sample.source, 0) + 1
            day.minutes.setdefault(minute, []).append(sample.value)
            day.evidence.zone = max(day.evidence.zone, sample.zone)
    return [value for day, one in days.items() if one.minutes for value in _values(metric, day, one, unit)]


def _values(metric: str, day: int, found: _GaugeDay, unit: str | None) -> list[DayValue]:
    means = [fsum(values) / len(values) for values in found.minutes.values()]
    every = [value for values in found.minutes.values() for value in values]
    named = {"avg": fsum(means) / len(means), "min": min(every), "max": max(every)}
    evidence = found.evidence
    return [
        DayValue(
            day=day,
            metric=f"{metric}_{name}",
            value=value,
            unit=unit or evidence.unit,
            source=min(found.won, key=lambda source: (-found.won[source], source)),
            sources=len(found.won),
            covered_minutes=len(found.minutes),
            zone=evidence.zone,
            users=frozenset(evidence.users),
            samples=evidence.samples,
        )
        for name, value in named.items()
    ]


def best_of_minutes(samples: Sequence[DaySample]) -> Iterator[DaySample]:
    """The samples that win: in each minute of UTC those of the best-ranked source."""
    best: dict[int, int] = {}
    for one in samples:
        minute = one.start // MINUTE
        best[minute] = min(one.source, best.get(minute, one.source))
    return (one for one in samples if best[one.start // MINUTE] == one.source)


def last_of(samples: Iterable[DaySample]) -> DaySample:
    """The last sample of the best-ranked source. Of two at one moment the larger value counts."""
    return max(samples, key=lambda one: (-one.source, one.start, one.value, one.unit))


def last_days(metric: str, samples: Iterable[DaySample], unit: str | None = None) -> list[DayValue]:
    """The last sample of each local day, as `last_of` finds it."""
    days: dict[int, list[DaySample]] = defaultdict(list)
    for sample in samples:
        days[local_day(sample.start, sample.offset)].append(sample)
    return [
        DayValue(
            day=day,
            metric=metric,
            value=last.value,
            unit=unit or last.unit,
            source=last.source,
            sources=1,
            covered_minutes=None,
            zone=last.zone,
            users=frozenset(one.user_id for one in here),
            samples=len(here),
        )
        for day, here in days.items()
        for last in (last_of(here),)
    ]
