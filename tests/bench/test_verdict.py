"""The benchmark's own arithmetic: percentiles, the slope of memory, and when an aim is reached."""

import pytest

from tests.bench.results import (
    ELSEWHERE,
    GENERATOR,
    Backfill,
    Beside,
    Floors,
    Live,
    Passage,
    Plan,
    Replayed,
    Results,
    times,
)
from tests.bench.soak import slope
from tests.bench.verdict import REFERENCE_FLOOR, Aim, aims

SOME = times([0.001])


def passage(committed: float, *, missing: int = 0, p99: float = 10.0) -> Passage:
    """A load that came to so many events a second."""
    answer = times([p99 / 1000] * 10)
    return Passage("workouts", 32, 100, committed, committed, missing, 0, answer, {"endpoint": 50, GENERATOR: 9})


def results(*, speed: float = 1.0) -> Results:
    """Of a machine that is so fast, nothing but its floors."""
    verified = speed * REFERENCE_FLOOR
    floors = Floors(2 * verified, SOME, verified, SOME, 1, {50: 1}, {50: 1}, 1, {1: 1})
    return Results(Plan(), cores=2, floors=floors)


def aim(of: Results, name: str) -> Aim:
    """The aim of that name."""
    (found,) = (one for one in aims(of) if one.name == name)
    return found


def test_percentiles_are_in_milliseconds_and_never_beyond_the_slowest() -> None:
    """Breaks if a p99 is read off the wrong end, or of unsorted times."""
    found = times([number / 1000 for number in range(100, 0, -1)])
    assert (found.p50, found.p99, found.count) == (51, 100, 100)
    assert times([0.005]).p99 == 5


def test_the_cost_of_an_event_is_the_stack_s_alone() -> None:
    """Breaks if the load generator, or whoever else uses the machine, counts as cost."""
    found = Passage("workouts", 1, 1, 1, 1, 0, 0, SOME, {"endpoint": 5, "broker": 2, GENERATOR: 9, ELSEWHERE: 90})
    assert found.cost_us == 7


@pytest.mark.parametrize(("committed", "speed", "share", "scaled"), [(6600, 1, 1, 1), (3300, 0.5, 0.5, 1)])
def test_a_rate_counts_as_it_is_and_as_the_machine_is(
    committed: float, speed: float, share: float, scaled: float
) -> None:
    """Breaks if a slow machine hides behind its slowness, or a fast one shines by it."""
    of = results(speed=speed)
    of.live = Live([passage(100), passage(committed)], 1, passage(1), SOME, {})
    assert aim(of, "workouts committed").share == share
    assert aim(of, "workouts committed").scaled_share == scaled


def test_no_rate_makes_up_for_a_lost_row() -> None:
    """Breaks if a run that lost events passes for a fast one."""
    of = results()
    of.live = Live([passage(100, missing=1), passage(9000)], 1, passage(1), SOME, {})
    assert aim(of, "workouts committed").share == 0
    assert "MISSING" in aim(of, "workouts committed").remark


@pytest.mark.parametrize(("p99", "is_reached"), [(24.0, True), (26.0, False)])
def test_an_answer_is_quick_or_it_is_not(p99: float, is_reached: bool) -> None:
    """Breaks if the comparison is the wrong way round."""
    of = results()
    of.live = Live([passage(1)], 1, passage(1, p99=p99), SOME, {})
    assert (aim(of, "answer, p99").share >= 1) == is_reached


@pytest.mark.parametrize(("beside", "is_reached"), [(0.019, True), (0.021, False)])
def test_history_may_double_the_time_of_a_live_event(beside: float, is_reached: bool) -> None:
    """Breaks if isolation is judged by anything but the ratio."""
    of = results()
    watched = Beside(1, times([0.01]), times([beside]))
    of.backfill = Backfill(1, 0, 1, watched, watched, {})
    for name in ("as fast as it goes", "at the default rate"):
        assert (aim(of, f"live p99 beside a backfill {name}").share >= 1) == is_reached


@pytest.mark.parametrize(("after", "is_same", "share"), [(10, True, 1), (11, True, 0), (10, False, 0)])
def test_a_replay_leaves_everything_as_it_is(after: int, is_same: bool, share: float) -> None:
    """Breaks if a table that grew, or a view that changed, passes."""
    of = results()
    of.replay = [Replayed("workouts", 1, 100, 200, 10, after, is_same)]
    assert aim(of, "tables after replay of workouts").share == share
    assert aim(of, "replay of stored workouts").share == 1


def test_memory_is_judged_once_it_is_warm() -> None:
    """Breaks if what is taken once, at the beginning, counts as a leak."""
    assert slope([float(second) for second in range(100)], [0.0] * 10 + [50.0] * 90) == pytest.approx(0)
    assert slope([float(second) for second in range(100)], [second / 60 for second in range(100)]) == pytest.approx(1)
