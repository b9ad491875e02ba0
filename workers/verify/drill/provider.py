"""The simulated provider of a drill: its users, its faults, and the pauses that it asks for."""

import time
from datetime import UTC, datetime, timedelta
from math import ceil, floor

from workers.simulator import Simulator
from workers.simulator.faults import Fault
from workers.verify.drill.plan import Options

USERS_PER_MINUTE, MAX_USERS = 1.5, 6
DAYS, PAGE_SIZE = 5, 250  # of history, and samples per page
PROVIDER_SLOWNESS = timedelta(minutes=30)  # places the simulated present after the drill, so that it does not move
MIN_PAUSE = 0.5  # seconds, of a refusal without Retry-After
FAULTS = (
    *(Fault(kind, share=0.004, retry_after=1) for kind in ("429", "503")),
    *(Fault(kind, share=0.004, retry_after=2, as_date=True) for kind in ("429", "503")),
    *(Fault(kind, share=0.004) for kind in ("429", "503")),
    *(Fault(kind, share=0.01) for kind in ("500", "truncated")),
    Fault("expired_cursor", share=0.05),
    Fault("short_page", share=0.05),
    Fault("slow", share=0.01, seconds=0.5),
)
Pause = tuple[float, float]  # begin and end in unix seconds


def make_simulator(options: Options, pauses: list[Pause]) -> Simulator:
    """The provider of a drill, without faults yet. It appends the pauses that it asks for with 429 and 503."""

    def record(fault: Fault) -> None:
        if fault.kind in ("429", "503"):
            now = time.time()
            pauses.append((now, now + pause_of(fault, now)))

    until = datetime.now(UTC) + PROVIDER_SLOWNESS + timedelta(seconds=options.seconds)
    users = min(ceil(options.seconds / 60 * USERS_PER_MINUTE), MAX_USERS)
    return Simulator(users, DAYS, options.seed, until=until, page_size=PAGE_SIZE, on_fault=record)


def pause_of(fault: Fault, now: float) -> float:
    """The seconds that a refusal asks for; a date is in whole seconds."""
    if fault.retry_after is None:
        return MIN_PAUSE
    return floor(now + ceil(fault.retry_after)) - now if fault.as_date else fault.retry_after
