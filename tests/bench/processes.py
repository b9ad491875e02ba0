"""CPU seconds and memory of the processes of a stack, by stage."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator

import psutil

from tests.bench.results import ELSEWHERE, GENERATOR, Memory
from tests.bench.stack import Stack

STAGES = {"web": "endpoint", "broker": "broker", "live": "live workers", "postgres": "PostgreSQL"}
OTHERS = "other stack processes"
MB = 2**20


def _main(stack: Stack) -> Iterator[tuple[str, psutil.Process]]:
    """The main processes of the stack, each with its stage."""
    for group, pids in stack.pids.items():
        for pid in pids:
            yield STAGES.get(group, OTHERS), psutil.Process(pid)


def _process_tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def memory(stack: Stack) -> dict[str, Memory]:
    """The current memory of the processes of each stage."""
    found: dict[str, list[tuple[int, int]]] = {}
    for stage, first in _main(stack):
        for process in _process_tree(first):
            try:
                info = process.memory_full_info()
            except psutil.NoSuchProcess:  # a PostgreSQL backend that has just ended
                continue
            found.setdefault(stage, []).append((info.rss, getattr(info, "pss", info.uss)))
    return {
        stage: Memory(len(sizes), max(rss for rss, _ in sizes) / MB, sum(pss for _, pss in sizes) / MB)
        for stage, sizes in found.items()
    }


def resident_mb(stack: Stack, group: str) -> float:
    """The sum of the resident memory of a group; shared pages count for each process."""
    firsts = (psutil.Process(pid) for pid in stack.pids[group])
    return float(sum(process.memory_info().rss for first in firsts for process in _process_tree(first))) / MB


class Cpu:
    """CPU seconds by stage since construction. CPU of processes outside this run is `ELSEWHERE`."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._began, self._busy = stack, self._now(stack), _busy()

    def spent(self, generator: float) -> dict[str, float]:
        """The CPU seconds by stage until now; `generator` is the CPU time that the load generator measured itself."""
        spent = {stage: seconds - self._began[stage] for stage, seconds in self._now(self._stack).items()}
        spent[GENERATOR] = spent.get(GENERATOR, 0.0) + generator
        spent[ELSEWHERE] = max(_busy() - self._busy - sum(spent.values()), 0.0)
        return spent

    @staticmethod
    def _now(stack: Stack) -> dict[str, float]:
        found: defaultdict[str, float] = defaultdict(float)
        for stage, first in _main(stack):
            found[stage] += cpu_seconds(first)
        found[GENERATOR] += time.process_time()  # this process, which polls for rows
        return found


def cpu_seconds(first: psutil.Process) -> float:
    """CPU seconds of a process and its descendants. Ended children count for their parents."""
    total = 0.0
    for process in _process_tree(first):
        try:
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def _busy() -> float:
    """The busy CPU seconds of all cores of this machine."""
    spent = psutil.cpu_times()
    return float(sum(spent) - spent.idle - getattr(spent, "iowait", 0.0) - getattr(spent, "guest", 0.0))


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
