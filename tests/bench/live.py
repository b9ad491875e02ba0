"""Workouts as fast as they are answered, then at 80 % of what was committed: answers, rows, CPU and memory."""

from tests.bench.passage import people, through
from tests.bench.probe import Probe
from tests.bench.processes import memory
from tests.bench.results import Live, Passage, Plan
from tests.bench.stack import Stack, running_stack

SHARE = 0.8
WARM_SECONDS = 1.0


def measure(plan: Plan) -> Live:
    """On a stack of its own."""
    with running_stack(plan.workers) as stack:
        warm(stack)
        closed = [through(stack, "workouts", connections=n, seconds=plan.seconds) for n in plan.connections]
        best = max(closed, key=lambda one: one.committed)
        rate = SHARE * best.committed
        with Probe(stack, plan.probes) as probe:
            paced = through(stack, "workouts", connections=best.connections, seconds=plan.seconds, rate=rate)
        return Live(closed, rate, paced, probe.to_row, memory(stack))


def samples(plan: Plan) -> Passage:
    """Events of a thousand samples each, on a stack of its own."""
    with running_stack(plan.workers) as stack:
        warm(stack)
        return through(stack, "heartrate", connections=32, seconds=plan.seconds, users=people())


def scaling(plan: Plan, limit: int = 4) -> dict[int, Passage]:
    """Workouts with one worker process and with more, each on a stack of its own."""
    found = {}
    for workers in range(1, limit + 1):
        with running_stack(workers) as stack:
            warm(stack)
            found[workers] = through(stack, "workouts", connections=32, seconds=plan.seconds)
    return found


def highest(stack: Stack, plan: Plan) -> float:
    """Workouts committed a second, as fast as 32 connections are answered."""
    return through(stack, "workouts", connections=32, seconds=plan.seconds).committed


def warm(stack: Stack) -> None:
    """Whoever is first pays for connections, caches and plans."""
    through(stack, "workouts", connections=8, seconds=WARM_SECONDS)
