"""Memory of the endpoint over minutes at 80 % of what the machine commits: does it stay where it is?"""

import time
from statistics import linear_regression
from threading import Event, Thread

from tests.bench.live import SHARE, highest, warm
from tests.bench.passage import through
from tests.bench.processes import resident_mb
from tests.bench.results import Plan, Soak
from tests.bench.stack import Stack, running_stack

A_LOAD_SECONDS = 60.0  # requests are signed beforehand, and a signature is good for five minutes
WARM_SHARE = 0.1


def measure(plan: Plan) -> Soak:
    """On a stack of its own, minute after minute, with a few seconds between in which the next requests are signed."""
    with running_stack(plan.workers) as stack:
        warm(stack)
        rate = SHARE * highest(stack, plan)
        watch = Watch(stack)
        deadline = time.monotonic() + plan.minutes * 60
        while (left := deadline - time.monotonic()) > 1:
            through(stack, "workouts", connections=32, seconds=min(A_LOAD_SECONDS, left), rate=rate)
        seconds, mb = watch.stop()
    return Soak(rate, seconds, mb, slope(seconds, mb))


class Watch:
    """Looks once a second, from when it is made until it is stopped."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._over, self._began = stack, Event(), time.monotonic()
        self._found: list[tuple[float, float]] = []
        self._thread = Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(1):
            self._found.append((time.monotonic() - self._began, resident_mb(self._stack, "web")))

    def stop(self) -> tuple[list[float], list[float]]:
        """The seconds, and what there was in each."""
        self._over.set()
        self._thread.join()
        return [at for at, _ in self._found], [mb for _, mb in self._found]


def slope(seconds: list[float], mb: list[float]) -> float:
    """MB a minute, once it is warm."""
    first = int(len(seconds) * WARM_SHARE)
    return linear_regression(seconds[first:], mb[first:]).slope * 60
