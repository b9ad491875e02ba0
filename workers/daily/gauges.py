"""Gauges, such as the heart rate, and values of which the last one of a day counts, such as the weight."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import fsum

from workers.daily.model import MINUTE, DaySample, DayValue, local_day, unit_of


def gauge_days(metric: str, samples: Sequence[DaySample], unit: str | None = None) -> list[DayValue]:
    """The average, minimum and maximum of each local day, as `metric` with the suffixes _avg, _min and _max.

    In each minute of UTC the best-ranked source with a sample wins. The average is the mean of the minutes' means, so
    that a source that measures more often in one hour than in another does not shift it. Of samples in several units,
    those in the unit of the best source's first one count.
    """
    best = best_by_minute(samples)
    return [value for day, here in by_day(samples).items() for value in _values(metric, day, here, best, unit)]


def _values(
    metric: str, day: int, here: Sequence[DaySample], best: Mapping[int, int], unit: str | None
) -> list[DayValue]:
    units = ("", unit_of(here))
    counted = [one for one in here if best[one.start // MINUTE] == one.source and one.unit in units]
    if not counted:
        return []
    minutes: dict[int, list[float]] = defaultdict(list)
    for one in counted:
        minutes[one.start // MINUTE].append(one.value)
    means = [fsum(values) / len(values) for values in minutes.values()]
    won = Counter(best[minute] for minute in minutes)
    every = [one.value for one in counted]
    zone = max(one.zone for one in counted)
    users = frozenset(one.user_id for one in here)
    named = {"avg": fsum(means) / len(means), "min": min(every), "max": max(every)}
    return [
        DayValue(
            day=day,
            metric=f"{metric}_{name}",
            value=value,
            unit=unit or units[1],
            source=min(won, key=lambda source: (-won[source], source)),
            sources=len(won),
            covered_minutes=len(minutes),
            zone=zone,
            users=users,
            samples=len(here),
        )
        for name, value in named.items()
    ]


def best_by_minute(samples: Iterable[DaySample]) -> dict[int, int]:
    """The source that wins each minute of UTC, counted since 1970: the best-ranked one with a sample."""
    best: dict[int, int] = {}
    for source, start, *_ in samples:
        minute = start // MINUTE
        if best.setdefault(minute, source) > source:
            best[minute] = source
    return best


def last_of(samples: Iterable[DaySample]) -> DaySample:
    """The last sample of the best-ranked source. Of two at one moment the larger value counts."""
    return max(samples, key=lambda one: (-one.source, one.start, one.value, one.unit))


def last_days(metric: str, samples: Iterable[DaySample], unit: str | None = None) -> list[DayValue]:
    """The last sample of each local day, as `last_of` finds it."""
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
        for day, here in by_day(samples).items()
        for last in (last_of(here),)
    ]


def by_day(samples: Iterable[DaySample]) -> dict[int, list[DaySample]]:
    """The samples of each local day."""
    days: dict[int, list[DaySample]] = defaultdict(list)
    for one in samples:
        days[local_day(one.start, one.offset)].append(one)
    return days
