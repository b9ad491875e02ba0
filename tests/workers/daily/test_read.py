"""What days are computed from, as it is read from stored rows."""

from datetime import UTC, date, datetime, timedelta
from math import inf, nan

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import rows, workout
from tests.workers.daily.test_derive import Derive, activity, samples, store
from workers.daily.queue import Stretch
from workers.daily.read import Inputs, RawSample, parts, usable

NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(7, 7.0), (-0.5, -0.5), (1e290, 1e290), (0, 0.0)]
    + [(one, None) for one in (1e291, -1.7e308, 10**400, -(10**400), inf, -inf, nan, None, "7", [7])],
)
def test_numbers_that_no_sum_can_contain_are_left_out(stored: object, expected: float | None) -> None:
    """Breaks if one number of a faulty device ends the computation of a person's days."""
    assert usable(stored) == expected


def test_a_field_of_a_sample_is_left_out_alone() -> None:
    """Breaks if a systolic value that is too large removes the diastolic one, or raises an error."""
    day = date(2026, 3, 14)
    one = Inputs(Stretch("member-1", "blood_pressure", day, day, "webhook"))
    one.samples = [RawSample(0, 0, 0, None, 0, "mmHg", "u1", {"systolic": 10**400, "diastolic": 80})]
    found = {metric: [value for _, value in mine] for metric, mine in parts(one)}
    assert found == {"blood_pressure_systolic": [], "blood_pressure_diastolic": [80.0]}


def test_days_of_huge_numbers_are_computed_from_the_others(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if samples, summaries or records of a faulty device overflow the sums of a day."""
    second = timedelta(seconds=1)
    rates = [(NOON, 0, 60.0, 0), *((NOON + n * second, 0, 1e308, 0) for n in (1, 2, 3))]
    steps = [(NOON, 60, 1e308, 0), (NOON, 30, 1e308, 0)]
    summary = activity("u1", "2026-03-14", 450, provider="oura", type="ring")
    summary["data"]["distance"] = 1e308
    run = {"distance": 1e308, "calories": 300}
    store(engine, settings, samples("u1", "heartrate", rates), samples("u1", "steps", steps), summary)
    store(engine, settings, workout("u1", "w1", **run), workout("u1", "w2", **run, time_start="2026-03-14T02:00:00Z"))
    derive()
    found = {row["metric"]: row["value"] for row in rows(engine, "SELECT metric, value FROM health.daily")}
    assert {name: found.get(name) for name in ("heartrate_avg", "steps", "workouts_calories")} == {
        "heartrate_avg": 60,
        "steps": 450,
        "workouts_calories": 300,
    }
    assert not {"distance", "workouts_distance"} & found.keys()
