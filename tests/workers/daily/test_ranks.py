"""The order of sources, and the offset of samples that have none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.daily.model import DataSource
from workers.daily.offsets import OffsetTimeline
from workers.daily.ranks import Entry, in_order

WATCH, PHONE = DataSource("apple_health_kit", "watch"), DataSource("apple_health_kit", "phone")
RING, GARMIN, TERRA = DataSource("oura", "ring"), DataSource("garmin", "watch"), DataSource("garmin", "daily")
ALL = [PHONE, TERRA, RING, GARMIN, WATCH]


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ([], [WATCH, GARMIN, RING, PHONE, TERRA]),
        ([[("oura", "ring")]], [RING, WATCH, GARMIN, PHONE, TERRA]),
        ([[("apple_health_kit", "*")]], [WATCH, PHONE, GARMIN, RING, TERRA]),
        ([[("*", "phone"), ("garmin", "*")]], [PHONE, GARMIN, TERRA, WATCH, RING]),
        ([[("oura", "ring")], [("*", "phone"), ("oura", "ring")]], [RING, PHONE, WATCH, GARMIN, TERRA]),
        ([[], [("garmin", "daily")]], [TERRA, WATCH, GARMIN, RING, PHONE]),
        ([[("*", "ring"), ("*", "*")]], [RING, WATCH, GARMIN, PHONE, TERRA]),
    ],
)
def test_the_first_list_with_an_entry_ranks_a_source(lists: list[list[Entry]], expected: list[DataSource]) -> None:
    """Breaks if a later list outranks an earlier one, or sources that no list names do not come last by their type."""
    assert in_order(ALL, lists) == expected


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([-36000, 0, 3600, 20700])), max_size=10), st.integers(-5, 45)
)
def test_the_nearest_offset(points: list[tuple[int, int]], moment: int) -> None:
    """Breaks if another point than the nearest one decides: of two the earlier, at one moment the smaller offset."""
    expected = min(points, key=lambda one: (abs(one[0] - moment), *one), default=None)
    assert OffsetTimeline(points).nearest(moment) == (expected and expected[1])


def test_an_impossible_offset_is_no_offset() -> None:
    """Breaks if an offset in milliseconds moves samples by years."""
    assert OffsetTimeline([(0, 3_600_000), (9, 7200)]).nearest(0) == 7200
