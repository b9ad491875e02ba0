"""Workouts in a closed loop, then at 80 % of the committed rate: responses, rows and CPU."""

import time

from sqlalchemy import text

from tests.bench.passage import people, run_pipeline
from tests.bench.probe import Probe
from tests.bench.results import Live, PipelineRun, Plan
from tests.bench.stack import Stack, running_stack

SHARE = 0.8
DAYS_PENDING = text("""
SELECT EXISTS (SELECT FROM headrace.daily_queue) OR (SELECT newest FROM headrace.feed) > (
    SELECT position FROM headrace.daily_feed)""")
WARM_SECONDS = 1.0


def measure(plan: Plan) -> Live:
    """Measures on a separate stack."""
    with running_stack(plan.workers) as stack:
        warm(stack)
        closed = [run_pipeline(stack, "workouts", connections=n, seconds=plan.seconds) for n in plan.connections]
        best = max(closed, key=lambda one: one.committed)
        rate = SHARE * best.committed
        _wait_for_days(stack)
        with Probe(stack, plan.probes, days=True) as probe:
            paced = run_pipeline(stack, "workouts", connections=best.connections, seconds=plan.seconds, rate=rate)
        return Live(closed, rate, paced, probe.to_row, probe.to_day)


def _wait_for_days(stack: Stack) -> None:
    """Returns when the days of earlier loads are computed."""
    with stack.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        while connection.scalar(DAYS_PENDING):
            time.sleep(0.5)


def samples(plan: Plan) -> PipelineRun:
    """Events of 1,000 samples each, on a separate stack."""
    with running_stack(plan.workers) as stack:
        warm(stack)
        return run_pipeline(stack, "heartrate", connections=32, seconds=plan.seconds, users=people())


def scaling(plan: Plan, limit: int = 4) -> dict[int, PipelineRun]:
    """Workouts with 1 to `limit` worker processes, each on a separate stack."""
    found = {}
    for workers in range(1, limit + 1):
        with running_stack(workers) as stack:
            warm(stack)
            found[workers] = run_pipeline(stack, "workouts", connections=32, seconds=plan.seconds)
    return found


def highest(stack: Stack, plan: Plan) -> float:
    """Workouts committed a second in a closed loop with 32 connections."""
    return run_pipeline(stack, "workouts", connections=32, seconds=plan.seconds).committed


def warm(stack: Stack) -> None:
    """Warms up connections, caches and query plans, which slow down the first events."""
    run_pipeline(stack, "workouts", connections=8, seconds=WARM_SECONDS)
