"""The arithmetic of the benchmark: percentiles, the slope of memory, and the targets."""

import pytest

from tests.bench.results import (
    ELSEWHERE,
    GENERATOR,
    Backfill,
    ConcurrentBackfill,
    Floors,
    Live,
    PipelineRun,
    Plan,
    ReplayResult,
    Results,
    times,
)
from tests.bench.soak import slope
from tests.bench.verdict import REFERENCE_FLOOR, Target, targets

SOME = times([0.001])


def pipeline_run(committed: float, *, missing: int = 0, p99: float = 10.0) -> PipelineRun:
    """A load with this rate of committed events."""
    answer = times([p99 / 1000] * 10)
    return PipelineRun(
        "workouts", 32, 100, committed, committed, missing, 0, answer, {"endpoint": 50, GENERATOR: 9}, 2, 3
    )


def results(*, speed: float = 1.0) -> Results:
    """Results with floors only, of a machine with this speed relative to the reference."""
    verified = speed * REFERENCE_FLOOR
    floors = Floors(2 * verified, SOME, verified, SOME, 1, {50: 1}, {50: 1}, 1, {1: 1})
    return Results(Plan(), cores=2, floors=floors)


def target(of: Results, name: str) -> Target:
    """The target with this name."""
    (found,) = (one for one in targets(of) if one.name == name)
    return found


def test_percentiles_are_in_milliseconds_and_within_the_range() -> None:
    """Breaks if a p99 is computed from the wrong end, or from unsorted times."""
    found = times([number / 1000 for number in range(100, 0, -1)])
    assert (found.p50, found.p99, found.count) == (51, 100, 100)
    assert times([0.005]).p99 == 5


def test_the_cost_of_an_event_is_that_of_the_stack() -> None:
    """Breaks if the CPU of the load generator or of other processes counts as cost."""
    found = PipelineRun(
        "workouts", 1, 1, 1, 1, 0, 0, SOME, {"endpoint": 5, "broker": 2, GENERATOR: 9, ELSEWHERE: 90}, 1, 1
    )
    assert found.cost_us == 7


@pytest.mark.parametrize(("committed", "speed", "share", "scaled"), [(6600, 1, 1, 1), (3300, 0.5, 0.5, 1)])
def test_a_rate_is_judged_absolutely_and_scaled(committed: float, speed: float, share: float, scaled: float) -> None:
    """Breaks if the absolute share is scaled to the machine, or the scaled share is not."""
    of = results(speed=speed)
    of.live = Live([pipeline_run(100), pipeline_run(committed)], 1, pipeline_run(1), SOME, SOME)
    assert target(of, "workouts committed").share == share
    assert target(of, "workouts committed").scaled_share == scaled


def test_a_lost_row_fails_the_rate() -> None:
    """Breaks if a run that lost events reaches a target."""
    of = results()
    of.live = Live([pipeline_run(100, missing=1), pipeline_run(9000)], 1, pipeline_run(1), SOME, SOME)
    assert target(of, "workouts committed").share == 0
    assert "MISSING" in target(of, "workouts committed").remark


@pytest.mark.parametrize(("p99", "is_reached"), [(24.0, True), (26.0, False)])
def test_a_p99_is_below_the_target_or_not(p99: float, is_reached: bool) -> None:
    """Breaks if the comparison of response times is inverted."""
    of = results()
    of.live = Live([pipeline_run(1)], 1, pipeline_run(1, p99=p99), SOME, SOME)
    assert (target(of, "response, p99").share >= 1) == is_reached


@pytest.mark.parametrize(("during", "is_reached"), [(0.019, True), (0.021, False)])
def test_a_backfill_may_double_the_latency_of_live_events(during: float, is_reached: bool) -> None:
    """Breaks if isolation is not judged by the ratio of the latencies."""
    of = results()
    probed = ConcurrentBackfill(1, times([0.01]), times([during]))
    of.backfill = Backfill(1, 0, 1, probed, probed, {})
    for name in ("without a rate limit", "at the default rate"):
        assert (target(of, f"live p99 during a backfill {name}").share >= 1) == is_reached


@pytest.mark.parametrize(("after", "is_same", "share"), [(10, True, 1), (11, True, 0), (10, False, 0)])
def test_a_replay_changes_nothing(after: int, is_same: bool, share: float) -> None:
    """Breaks if a replay that enlarged a table or changed a view reaches the target."""
    of = results()
    of.replay = [ReplayResult("workouts", 1, 100, 200, 10, after, is_same)]
    assert target(of, "tables after replay of workouts").share == share
    assert target(of, "replay of stored workouts").share == 1


def test_memory_is_judged_after_the_warm_up() -> None:
    """Breaks if memory that is allocated once at the beginning counts as a leak."""
    assert slope([float(second) for second in range(100)], [0.0] * 10 + [50.0] * 90) == pytest.approx(0)
    assert slope([float(second) for second in range(100)], [second / 60 for second in range(100)]) == pytest.approx(1)
