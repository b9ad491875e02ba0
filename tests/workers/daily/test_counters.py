"""Counters: compared with a simulation that walks through time minute by minute."""

from collections import Counter, defaultdict
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given

from tests.support.daily import CHANGES, Clock, in_one_unit, sample, timed_samples, wall_date
from workers.daily.counters import counter_days
from workers.daily.model import MINUTE, DaySample, Summary, as_date, as_day, as_moment

NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)
PARIS = Clock("Europe/Paris")
DAY = as_day(NOON.date())


def simulated(samples: list[DaySample]) -> dict[date, Fraction]:
    """The sums by walking through every minute. Samples begin and end at whole minutes."""
    best: dict[int, int] = {}  # the source that covers each minute
    for one in samples:
        for now in range(one.start, one.stop, MINUTE):
            best[now] = min(one.source, best.get(now, one.source))
    total: dict[date, Fraction] = defaultdict(Fraction)
    counted = in_one_unit([(day, one) for one in samples for day in dates_of(one)])
    for one in samples:
        length = max(one.stop - one.start, MINUTE)
        moments = range(one.start, one.start + length, MINUTE)
        won = Counter(wall_date(now, one.offset) for now in moments if best.get(now, one.source) >= one.source)
        for day in [day for day, other in counted if other is one]:
            total[day] += Fraction(int(one.value) * won[day] * MINUTE, length)
    return total


def dates_of(one: DaySample) -> list[date]:
    first, last = (wall_date(moment, one.offset) for moment in (one.start, max(one.start, one.stop - MINUTE)))
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


def values(samples: list[DaySample]) -> dict[date, float]:
    return {as_date(one.day): one.value for one in counter_days("steps", samples)}


@given(timed_samples())
def test_a_day_is_what_the_walk_through_time_finds(samples: list[DaySample]) -> None:
    """Breaks if a part of a sample is lost, counted twice, or put on the wrong side of a local midnight."""
    expected = {day: float(value) for day, value in simulated(samples).items()}
    found = values(samples)
    assert found.keys() >= {day for day, value in expected.items() if value}
    assert found == pytest.approx({day: expected.get(day, 0.0) for day in found})


@given(timed_samples())
def test_the_order_of_samples_does_not_matter(samples: list[DaySample]) -> None:
    """Breaks if a rebuild, which reads samples in another order, ends in other values."""
    assert sorted(counter_days("steps", samples), key=repr) == sorted(counter_days("steps", samples[::-1]), key=repr)


@pytest.mark.parametrize(("zone", "place", "hours"), [(zone, n, n) for zone in CHANGES for n in (0, 1)])
def test_a_day_with_a_clock_change_has_23_or_25_hours(zone: str, place: int, hours: int) -> None:
    """Breaks if a local day has 24 hours although its clock was changed. Half an hour on Lord Howe Island."""
    clock, around = Clock(zone), datetime(*CHANGES[zone][place], tzinfo=UTC)
    start = around - timedelta(days=2)
    samples = [sample(clock, start + timedelta(minutes=30 * n), 30, 1) for n in range(4 * 48)]
    day = wall_date(as_moment(around - timedelta(minutes=1)), samples[0].offset)
    change = 2 * (clock.offset(around + timedelta(hours=1)) - clock.offset(around - timedelta(hours=1))) / 3600
    assert values(samples)[day] == 48 - change
    assert abs(change) == (1 if zone == "Australia/Lord_Howe" else 2)
    assert hours in (0, 1)


def test_hours_in_which_the_best_source_lay_on_its_charger_are_those_of_the_next_one() -> None:
    """Breaks if the watch's day replaces the phone's, instead of each instant's best source."""
    watch = [sample(PARIS, NOON + timedelta(hours=n), 60, 100, 0) for n in (0, 3)]
    phone = [sample(PARIS, NOON + timedelta(hours=n), 60, 70, 1) for n in range(4)]
    (day,) = counter_days("steps", [*watch, *phone])
    assert (day.value, day.source, day.sources, day.covered_minutes) == (2 * 100 + 2 * 70, 0, 2, 240)
    assert day.samples == 6


def test_a_sample_that_loses_a_third_of_its_time_loses_a_third_of_its_value() -> None:
    """Breaks if a sample that a better source covers in part counts wholly or not at all."""
    watch = sample(PARIS, NOON + timedelta(minutes=40), 60, 500, 0)
    assert counter_days("steps", [watch, sample(PARIS, NOON, 60, 90, 1)])[0].value == 560


def test_a_sample_without_length_counts_unless_a_better_source_covers_it() -> None:
    """Breaks if such a sample is lost, or is counted in addition to a better source; the end is not covered."""
    watch = sample(PARIS, NOON, 60, 500, 0)
    points = [sample(PARIS, NOON + timedelta(minutes=n), 0, 7, 1) for n in (-1, 0, 59, 60)]
    assert counter_days("steps", [watch, *points])[0].value == 500 + 14
    assert counter_days("steps", [watch._replace(source=1), points[1]._replace(source=0)])[0].value == 507


def test_samples_of_one_source_are_added() -> None:
    """Breaks if samples of one source hide each other: a provider may divide a value by sport."""
    assert counter_days("steps", [sample(PARIS, NOON, 60, 5), sample(PARIS, NOON, 60, 6)])[0].value == 11


def test_samples_in_another_unit_than_the_best_sources_are_not_added() -> None:
    """Breaks if liters and milliliters are added; without a unit of its own a sample counts."""
    watch, phone = (sample(PARIS, NOON + timedelta(hours=n), 60, 2 - n, n)._replace(unit="L") for n in (0, 1))
    other = sample(PARIS, NOON + timedelta(hours=2), 60, 750, 1)._replace(unit="ml")
    unknown = sample(PARIS, NOON + timedelta(hours=3), 60, 3, 1)._replace(unit="")
    (day,) = counter_days("water", [other, unknown, phone, watch])
    assert (day.value, day.unit, day.covered_minutes, day.samples) == (6, "L", 180, 4)


def test_the_summary_of_the_best_source_is_the_day_if_it_has_no_samples() -> None:
    """Breaks if a ring that delivers only summaries loses against the phone's samples, or a worse one's wins."""
    phone = sample(PARIS, NOON, 60, 90, 1)
    (day,) = counter_days("steps", [phone], [Summary(0, DAY, 8000, "u2")])
    assert (day.value, day.method, day.source, day.summary_value) == (8000, "summary", 0, 8000)
    assert day.users == {"u1", "u2"}
    (day,) = counter_days("steps", [phone], [Summary(1, DAY, 95, "u1"), Summary(2, DAY, 70, "u1")])
    assert (day.value, day.method, day.source, day.summary_value) == (90, "samples", 1, 95)
    (day,) = counter_days("steps", [phone], [Summary(2, DAY, 70, "u1")])
    assert (day.value, day.summary_value) == (90, None)
    (day,) = counter_days("steps", [], [Summary(2, DAY, 70, "u1")], "count")
    assert (day.value, day.method, day.unit) == (70, "summary", "count")
