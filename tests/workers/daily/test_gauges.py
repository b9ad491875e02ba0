"""Gauges and last values of a day: compared with a calculation by sorting instead of by tables."""

from datetime import UTC, datetime, timedelta
from itertools import groupby
from statistics import mean

import pytest
from hypothesis import given

from tests.support.daily import Clock, in_one_unit, sample, timed_samples, wall_date
from workers.daily.gauges import gauge_days, last_days
from workers.daily.model import SECOND, DaySample, as_date

NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)
PARIS = Clock("Europe/Paris")


def expected(samples: list[DaySample]) -> dict[tuple[str, object], float]:
    """Average, minimum and maximum by date."""
    winners: list[tuple[object, datetime, float]] = []
    minute = lambda one: datetime.fromtimestamp(one.start // SECOND, UTC).replace(second=0)  # noqa: E731
    dated = in_one_unit([(wall_date(one.start, one.offset), one) for one in samples])
    counted = {id(one) for _, one in dated}
    for at, group in groupby(sorted(samples, key=minute), key=minute):
        here = sorted(group, key=lambda one: one.source)
        here = [one for one in here if one.source == here[0].source and id(one) in counted]
        winners += [(wall_date(one.start, one.offset), at, one.value) for one in here]
    found: dict[tuple[str, object], float] = {}
    winners.sort()
    for day, of_day in groupby(winners, key=lambda one: one[0]):
        rows = list(of_day)
        means = [mean(value for *_, value in of_minute) for _, of_minute in groupby(rows, key=lambda one: one[1])]
        found["hr_avg", day] = mean(means)
        found["hr_min", day], found["hr_max", day] = (f(value for *_, value in rows) for f in (min, max))
    return found


@given(timed_samples(longest=3, most=40))
def test_gauges_are_what_sorting_finds(samples: list[DaySample]) -> None:
    """Breaks if a minute has the samples of two sources, or counts on another local day."""
    days = {(one.metric, as_date(one.day)): one.value for one in gauge_days("hr", samples)}
    assert days == pytest.approx(expected(samples))


def test_a_minute_belongs_to_its_best_source_and_weighs_as_much_as_another() -> None:
    """Breaks if a source that measures every second outweighs one that measures every minute."""
    second = timedelta(seconds=1)
    ring = [sample(PARIS, NOON + n * second, 0, 60, 1) for n in range(60)]
    watch = [sample(PARIS, NOON + n * second, 0, value, 0) for n, value in ((70, 100), (80, 110), (119, 120))]
    worse = [sample(PARIS, NOON + 90 * second, 0, 200, 1)]
    average, low, high = gauge_days("hr", [*ring, *watch, *worse])
    assert (average.value, low.value, high.value) == (85, 60, 120)
    assert (average.covered_minutes, average.sources, average.source, average.samples) == (2, 2, 0, 64)


def test_values_in_another_unit_than_the_best_sources_have_no_part_in_the_average() -> None:
    """Breaks if 5 mmol/L and 90 mg/dL have the average 47.5."""
    given_ = [(5, "mmol/L", 0), (90, "mg/dL", 0), (7, "mmol/L", 1), (6, "", 1)]
    samples = [
        sample(PARIS, NOON + timedelta(hours=n), 0, value, source)._replace(unit=unit)
        for n, (value, unit, source) in enumerate(given_)
    ]
    found = gauge_days("glucose", samples)
    assert [(one.value, one.unit, one.samples) for one in found] == [(n, "mmol/L", 4) for n in (6, 5, 7)]


@given(timed_samples(longest=0, most=30))
def test_the_last_value_is_the_last_of_the_best_source(samples: list[DaySample]) -> None:
    """Breaks if a worse scale or an earlier weighing is shown."""
    for one in last_days("weight", samples):
        here = [s for s in samples if wall_date(s.start, s.offset) == as_date(one.day)]
        best = min(s.source for s in here)
        latest = max(s.start for s in here if s.source == best)
        assert one.value == max(s.value for s in here if (s.source, s.start) == (best, latest))
        assert (one.source, one.samples) == (best, len(here))
