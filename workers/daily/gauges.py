"""Gauges, such as the heart rate, and values of which the last one of a day counts, such as the weight."""

from collections.abc import Iterable
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
    best: dict[int, int] = {}
    days: dict[int, _GaugeDay] = {}
    for sample in samples:
        minute = sample.start // MINUTE
        if sample.source < best.get(minute, sample.source + 1):
            best[minute] = sample.source
        days.setdefault(local_day(sample.start, sample.offset), _GaugeDay()).evidence.see(sample)
    for sample in samples:
        minute = sample.start // MINUTE
        day = days[local_day(sample.start, sample.offset)]
        if best[minute] == sample.source and day.evidence.has_unit(sample):
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


def last_days(metric: str, samples: Iterable[DaySample], unit: str | None = None) -> list[DayValue]:
    """The last sample of the best-ranked source of each local day. Of two at one moment the larger value counts."""
    days: dict[int, list[DaySample]] = {}
    for sample in samples:
        days.setdefault(local_day(sample.start, sample.offset), []).append(sample)
    found = []
    for day, here in days.items():
        last = max(here, key=lambda one: (-one.source, one.start, one.value, one.unit))
        found.append(
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
        )
    return found
