"""The provider of a drill: its people, its faults, and when it wants to be asked nothing."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from math import ceil, floor

from workers.simulator import Simulator
from workers.simulator.faults import Fault
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


def make_simulator(options: Options, on_fault: Callable[[Fault], None] | None = None) -> Simulator:
    """The provider of a drill. It makes no fault yet; `on_fault` is told of each that it makes."""
    until = datetime.now(UTC) + PROVIDER_SLOWNESS + timedelta(seconds=options.seconds)
    people = min(ceil(options.seconds / 60 * PEOPLE_PER_MINUTE), MAX_PEOPLE)
    return Simulator(people, DAYS, options.seed, until=until, page_size=PAGE_SIZE, on_fault=on_fault)


class PauseRecorder:
    """When the provider wants to be asked nothing: from each of its refusals, for as long as that asks for."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def note(self, fault: Fault) -> None:
        """A fault that is made now."""
        if fault.kind in ("429", "503"):
            now = time.time()
            self.found.append((now, now + pause_of(fault, now)))


def pause_of(fault: Fault, now: float) -> float:
    """The seconds that a refusal asks for; a date has whole seconds only."""
    if fault.retry_after is None:
        return MIN_PAUSE
    return floor(now + ceil(fault.retry_after)) - now if fault.as_date else fault.retry_after
