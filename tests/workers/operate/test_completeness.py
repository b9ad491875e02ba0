"""Days without data that were never fetched."""

from datetime import UTC, date, datetime
from typing import Any

from tests.support.cases import Failures
from workers.operate.completeness import holes
from workers.store.coverage import Fetched, ResourceKey

KEY = ResourceKey("u1", "garmin", "sleep")
MONDAY = date(2026, 3, 2).toordinal()


def window(start: int, end: int, *, made: int, state: Any = "done") -> Fetched:
    """A fetched window, in days after Monday."""
    days = [datetime.fromordinal(MONDAY + n).replace(tzinfo=UTC) for n in (start, end, made)]
    return Fetched(days[0], days[1], "reconcile", state, days[2], days[2])


def test_only_days_that_were_not_fetched_since_are_missing() -> None:
    failures = Failures()
    for days, asked, missing in (
        ({0, 1, 3}, [], [2]),
        ({0, 1, 3}, [window(2, 2, made=5)], []),  # asked for since, and there was nothing
        ({0, 1, 3}, [window(2, 2, made=2)], [2]),  # on the day itself, which was not over
        ({0, 1, 3}, [window(2, 2, made=5, state="open")], [2]),
        ({0, 1, 3}, [window(0, 1, made=5)], [2]),
        ({0, 5, 9}, [], []),  # too rare to miss
        ({4}, [], []),
        (set(), [], []),
    ):
        with failures.of(days, asked, missing):
            found = [
                one.toordinal() - MONDAY
                for hole in holes({KEY: {MONDAY + n for n in days}}, {KEY: asked})
                for one in hole.days
            ]
            assert found == missing
    assert failures == {}
