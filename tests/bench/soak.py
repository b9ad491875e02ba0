"""Growth of the memory of the endpoint over minutes at 80 % of the highest committed rate."""

import time
from statistics import linear_regression
from threading import Event, Thread

from tests.bench.live import SHARE, highest, warm
from tests.bench.passage import run_pipeline
from tests.bench.processes import resident_mb
from tests.bench.results import Plan, Soak
from tests.bench.stack import Stack, running_stack

LOAD_SECONDS = 60.0  # requests are signed in advance, and a signature is valid for five minutes
WARM_SHARE = 0.1


def measure(plan: Plan) -> Soak:
    """Measures on a separate stack, in loads of a minute with pauses of seconds to sign the next requests."""
    with running_stack(plan.workers) as stack:
        warm(stack)
        rate = SHARE * highest(stack, plan)
        sampler = MemorySampler(stack)
        deadline = time.monotonic() + plan.minutes * 60
        while (left := deadline - time.monotonic()) > 1:
            run_pipeline(stack, "workouts", connections=32, seconds=min(LOAD_SECONDS, left), rate=rate)
        seconds, mb = sampler.stop()
    return Soak(rate, seconds, mb, slope(seconds, mb))


class MemorySampler:
    """Samples the memory once a second, from construction until `stop`."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._over, self._began = stack, Event(), time.monotonic()
        self._found: list[tuple[float, float]] = []
        self._thread = Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.wait(1):
            self._found.append((time.monotonic() - self._began, resident_mb(self._stack, "web")))

    def stop(self) -> tuple[list[float], list[float]]:
        """Stops; returns the seconds since the start and the MB at each."""
        self._over.set()
        self._thread.join()
        return [at for at, _ in self._found], [mb for _, mb in self._found]


def slope(seconds: list[float], mb: list[float]) -> float:
    """MB a minute, without the warm-up."""
    first = int(len(seconds) * WARM_SHARE)
    return linear_regression(seconds[first:], mb[first:]).slope * 60
