"""Memory and deaths of the processes of a stack during an attack."""

import contextlib
import threading
from collections import defaultdict
from dataclasses import dataclass

import psutil

from app.broker.lanes import LANES
from tests.bench.attacks.target import Target
from tests.bench.processes import MB

PERIOD_SECONDS = 0.5


@dataclass(frozen=True)
class Resident:
    """Resident memory in MB: the largest process of a group before and after the attack, and at its peak."""

    before: float
    peak: float
    after: float


def processes(target: Target) -> list[tuple[str, psutil.Process]]:
    """The processes of the endpoint ("web") and of all lanes ("workers")."""
    found = []
    for name, pids in target.pids().items():
        if name == "web" or name in LANES:
            for pid in pids:
                with contextlib.suppress(psutil.NoSuchProcess):
                    first = psutil.Process(pid)
                    group = "web" if name == "web" else "workers"
                    found += [(group, one) for one in (first, *first.children(recursive=True))]
    return found


def resident(target: Target) -> tuple[dict[str, float], set[int]]:
    """The resident memory of the largest process by group, in MB, and the pids of all processes."""
    found: defaultdict[str, float] = defaultdict(float)
    alive = set[int]()
    for group, process in processes(target):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[group] = max(found[group], process.memory_info().rss / MB)
            alive.add(process.pid)
    return dict(found), alive


class Watch:
    """Samples `resident` until `stop`, and counts processes that have ended."""

    def __init__(self, target: Target) -> None:
        self._target, self._over = target, threading.Event()
        self._peak: defaultdict[str, float] = defaultdict(float)
        self._known, self.deaths = set[int](), 0
        self._before = self._sample()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> dict[str, Resident]:
        """Stops; returns the memory by group."""
        self._over.set()
        self._thread.join()
        after = self._sample()
        return {group: Resident(mb, self._peak[group], after.get(group, 0)) for group, mb in self._before.items()}

    def _run(self) -> None:
        while not self._over.wait(PERIOD_SECONDS):
            self._sample()

    def _sample(self) -> dict[str, float]:
        found, alive = resident(self._target)
        self.deaths += len(self._known - alive)
        self._known = alive
        for group, mb in found.items():
            self._peak[group] = max(self._peak[group], mb)
        return found
