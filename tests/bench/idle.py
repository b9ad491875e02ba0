"""A stack without load: the time until it is ready, and the memory and CPU of its processes."""

import time

from tests.bench.processes import Cpu, pss
from tests.bench.results import Idle, Plan
from tests.bench.stack import running_stack

SETTLE_SECONDS = 10  # after the start, processes finish their first tasks


def measure(plan: Plan) -> Idle:
    """Measures on a separate stack. A group's CPU is in percent of one core."""
    with running_stack(plan.workers) as stack:
        time.sleep(SETTLE_SECONDS)
        cpu, began = Cpu(stack), time.monotonic()
        time.sleep(plan.idle)
        spent, seconds = cpu.by_group(), time.monotonic() - began
        percent = {group: used / seconds * 100 for group, used in spent.items()}
        return Idle(stack.ready_seconds, seconds, pss(stack), percent)
