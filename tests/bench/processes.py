"""CPU seconds and memory of a stack's processes, by stage."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator

import psutil

from tests.bench.results import ELSEWHERE, GENERATOR, Memory
from tests.bench.stack import Stack

STAGES = {"web": "endpoint", "broker": "broker", "live": "live workers", "postgres": "PostgreSQL"}
OTHERS = "others of the stack"
MB = 2**20


def _main(stack: Stack) -> Iterator[tuple[str, psutil.Process]]:
    """The first process of everything that the stack runs, with its stage."""
    for group, pids in stack.pids.items():
        for pid in pids:
            yield STAGES.get(group, OTHERS), psutil.Process(pid)


def _whole(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def memory(stack: Stack) -> dict[str, Memory]:
    """What the processes of each stage have now."""
    found: dict[str, list[tuple[int, int]]] = {}
    for stage, first in _main(stack):
        for process in _whole(first):
            try:
                info = process.memory_full_info()
            except psutil.NoSuchProcess:  # a backend of PostgreSQL that has just ended
                continue
            found.setdefault(stage, []).append((info.rss, getattr(info, "pss", info.uss)))
    return {
        stage: Memory(len(sizes), max(rss for rss, _ in sizes) / MB, sum(pss for _, pss in sizes) / MB)
        for stage, sizes in found.items()
    }


def resident_mb(stack: Stack, group: str) -> float:
    """What the processes of a group have in memory together; what they share counts for each."""
    firsts = (psutil.Process(pid) for pid in stack.pids[group])
    return float(sum(process.memory_info().rss for first in firsts for process in _whole(first))) / MB


class Cpu:
    """CPU seconds by stage since it was made. Of the machine's whole work, what is nobody's of us is `ELSEWHERE`."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._began, self._busy = stack, self._now(stack), _busy()

    def spent(self, generator: float) -> dict[str, float]:
        """Until now; `generator` is what the process of the load generator says of itself."""
        spent = {stage: seconds - self._began[stage] for stage, seconds in self._now(self._stack).items()}
        spent[GENERATOR] = spent.get(GENERATOR, 0.0) + generator
        spent[ELSEWHERE] = max(_busy() - self._busy - sum(spent.values()), 0.0)
        return spent

    @staticmethod
    def _now(stack: Stack) -> dict[str, float]:
        found: defaultdict[str, float] = defaultdict(float)
        for stage, first in _main(stack):
            found[stage] += _seconds(first)
        found[GENERATOR] += time.process_time()  # which is this process: it looks for rows
        return found


def _seconds(first: psutil.Process) -> float:
    """Of a process and all below it. What has ended below it counts as its parent's."""
    total = 0.0
    for process in _whole(first):
        try:
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def _busy() -> float:
    """Seconds in which a core of this machine did something."""
    spent = psutil.cpu_times()
    return float(sum(spent) - spent.idle - getattr(spent, "iowait", 0.0) - getattr(spent, "guest", 0.0))


def cores() -> int:
    """How many this program may use."""
    return len(os.sched_getaffinity(0))
