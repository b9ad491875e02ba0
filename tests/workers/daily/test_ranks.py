"""The order of sources."""

import pytest

from workers.daily.model import DataSource
from workers.daily.priorities import Entry, in_order

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
