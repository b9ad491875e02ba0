"""What days are computed from, as it is read from stored rows."""

from datetime import date
from math import inf, nan
from typing import cast

import pytest
from sqlalchemy import Connection

from workers.daily.compute import samples_of
from workers.daily.queue import Stretch
from workers.daily.read import Inputs, StoredSamples, usable


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
    one.samples = [StoredSamples(0, "u1", [0], [0], [None], [0], ["mmHg"], [{"systolic": 10**400, "diastolic": 80}])]
    read = samples_of(cast("Connection", None), one, {})  # every sample has an offset
    found = {metric: [sample.value for sample in mine] for metric, mine in read.items()}
    assert found == {"blood_pressure_systolic": [], "blood_pressure_diastolic": [80.0]}
