"""CPU seconds and memory of the processes of a stack, by stage or by group."""

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

import psutil

from tests.bench.results import ELSEWHERE, GENERATOR, Pss
from tests.bench.stack import Stack

STAGES = {"web": "endpoint", "broker": "broker", "live": "live workers", "postgres": "PostgreSQL"}
OTHERS = "other stack processes"
SUPERVISOR = "supervisor"  # the group of `headrace up` itself
MB = 2**20


def groups(first: int, listed: Mapping[str, Iterable[int]], parents: Iterable[tuple[int, int]]) -> dict[int, str]:
    """The group of each process: that of its nearest ancestor in stack.json, otherwise SUPERVISOR.

    `first` is the pid of `headrace up`. `parents` are pairs of a pid and its parent's pid, parents before children.
    """
    found = {first: SUPERVISOR} | {pid: group for group, pids in listed.items() for pid in pids}
    for pid, parent in parents:
        found.setdefault(pid, found.get(parent, SUPERVISOR))
    return found


def processes(stack: Stack) -> list[tuple[str, psutil.Process]]:
    """The current processes of the stack, each with its group."""
    first = psutil.Process(stack.up)
    tree = [first, *first.children(recursive=True)]
    group_of = groups(stack.up, stack.pids, ((process.pid, _parent(process)) for process in tree[1:]))
    return [(group_of[process.pid], process) for process in tree]


def _parent(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.NoSuchProcess:  # has just ended
        return 0


def pss(stack: Stack) -> dict[str, Pss]:
    """The current memory of each group. PSS counts a page that several processes share once."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for group, process in processes(stack):
        try:
            info = process.memory_full_info()  # reads smaps_rollup
        except psutil.NoSuchProcess:  # a PostgreSQL backend that has just ended
            continue
        found[group].append(info.pss)
    return {group: Pss(len(sizes), sum(sizes) / MB) for group, sizes in found.items()}


def resident_mb(stack: Stack, group: str) -> float:
    """The sum of the resident memory of a group; shared pages count for each process."""
    return float(sum(process.memory_info().rss for name, process in processes(stack) if name == group)) / MB


class Cpu:
    """CPU seconds since construction."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._began, self._busy, self._own = stack, _by_group(stack), _busy(), time.process_time()

    def by_group(self) -> dict[str, float]:
        """The CPU seconds of each group of the stack until now."""
        return {group: seconds - self._began.get(group, 0.0) for group, seconds in _by_group(self._stack).items()}

    def by_stage(self, generator: float) -> dict[str, float]:
        """The CPU seconds by stage until now; `generator` is the CPU time that the load generator measured itself.

        This process, which polls for rows, counts as GENERATOR, and processes outside this run as ELSEWHERE.
        """
        spent: defaultdict[str, float] = defaultdict(float)
        for group, seconds in self.by_group().items():
            spent[STAGES.get(group, OTHERS)] += seconds
        spent[GENERATOR] = generator + time.process_time() - self._own
        spent[ELSEWHERE] = max(_busy() - self._busy - sum(spent.values()), 0.0)
        return dict(spent)


def _by_group(stack: Stack) -> dict[str, float]:
    found: defaultdict[str, float] = defaultdict(float)
    for group, process in processes(stack):
        found[group] += _process_seconds(process)
    return found


def cpu_seconds(first: psutil.Process) -> float:
    """CPU seconds of a process and its descendants."""
    return sum(_process_seconds(process) for process in [first, *first.children(recursive=True)])


def _process_seconds(process: psutil.Process) -> float:
    """CPU seconds of a process and of its ended children."""
    try:
        spent = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(spent.user + spent.system + spent.children_user + spent.children_system)


def _busy() -> float:
    """The busy CPU seconds of all cores of this machine."""
    spent = psutil.cpu_times()
    return float(sum(spent) - spent.idle - getattr(spent, "iowait", 0.0) - getattr(spent, "guest", 0.0))


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
