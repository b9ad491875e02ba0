"""The provider of a drill: its people, its faults, and when it wants to be asked nothing."""

import time
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from math import ceil, floor
from typing import Any

from workers.simulator import Simulator
from workers.simulator.faults import Fault, Faults
from workers.verify.drill.plan import Options

PEOPLE_PER_MINUTE, MAX_PEOPLE = 1.5, 6
DAYS, PAGE_SIZE = 5, 250  # of everybody's history, and samples on a page of it
PROVIDER_SLOWNESS = timedelta(minutes=30)  # the simulated present, which must not move while it is compared
MIN_PAUSE = 0.5  # of a refusal that names no time
FAULTS = (
    *(Fault(kind, share=0.004, retry_after=1) for kind in ("429", "503")),
    *(Fault(kind, share=0.004, retry_after=2, as_date=True) for kind in ("429", "503")),
    *(Fault(kind, share=0.004) for kind in ("429", "503")),
    *(Fault(kind, share=0.01) for kind in ("500", "truncated")),
    Fault("expired_cursor", share=0.05),
    Fault("short_page", share=0.05),
    Fault("slow", share=0.01, seconds=0.5),
)


def make_simulator(options: Options) -> Simulator:
    """The provider of a drill. It makes no fault yet."""
    until = datetime.now(UTC) + PROVIDER_SLOWNESS + timedelta(seconds=options.seconds)
    people = min(ceil(options.seconds / 60 * PEOPLE_PER_MINUTE), MAX_PEOPLE)
    return Simulator(people, DAYS, options.seed, until=until, page_size=PAGE_SIZE)


class PauseRecorder:
    """When the provider wants to be asked nothing: from each of its refusals, for as long as that asks for."""

    def __init__(self, faults: Faults) -> None:
        self.found: list[tuple[float, float]] = []
        self._pick = faults.pick
        faults.pick = self._noting  # type: ignore[method-assign]

    def _noting(self, path: str, possible: Collection[Any] = ()) -> Fault | None:
        fault, now = self._pick(path, possible), time.time()
        if fault and fault.kind in ("429", "503"):
            self.found.append((now, now + pause_of(fault, now)))
        return fault


def pause_of(fault: Fault, now: float) -> float:
    """The seconds that a refusal asks for; a date has whole seconds only."""
    if fault.retry_after is None:
        return MIN_PAUSE
    return floor(now + ceil(fault.retry_after)) - now if fault.as_date else fault.retry_after
