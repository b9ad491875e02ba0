"""The fault injector: kills, freezes and restarts processes of one stack by a plan."""

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event as Flag

import psutil

from workers.local.temporary import Stack
from workers.verify.drill.plan import PlannedFault

HAVE_CHILDREN = ("web", "postgres")
# At SIGTERM PostgreSQL waits until the last client has disconnected, and Headrace's clients stay connected.
RESTART_SIGNALS = {"postgres": signal.SIGINT}


@dataclass(frozen=True)
class Injected:
    """A fault that was injected, or skipped because the group had no process (`pid` is None)."""

    fault: PlannedFault
    began: float  # unix seconds
    pid: int | None
    whom: str

    @property
    def ended(self) -> float:
        """The time from which the process could continue or be restarted."""
        return self.began + (self.fault.seconds if self.fault.kind == "freeze" else 0.0)

    def __str__(self) -> str:
        """One line of the log."""
        seconds = f" for {self.fault.seconds:.1f} s" if self.fault.kind == "freeze" else ""
        whom = self.whom if self.pid is None else f"{self.whom} (pid {self.pid})"
        return f"{self.fault.at:6.1f} s  {self.fault.kind}{seconds}: {whom}"


class FaultInjector:
    """Injects the faults of a plan into the processes of one stack and of no other."""

    def __init__(self, stack: Stack, faults: Sequence[PlannedFault], on_progress: Callable[[Injected], None]) -> None:
        self.made: list[Injected] = []
        self._stack, self._faults, self._notify = stack, faults, on_progress
        self._frozen: list[tuple[float, psutil.Process]] = []

    @property
    def injected(self) -> list[Injected]:
        """The injected faults, without skipped ones."""
        return [one for one in self.made if one.pid is not None]

    def run(self, stop: Flag) -> None:
        """Injects all faults, each at its time. At the end, even after an error, every process is resumed."""
        began = time.monotonic()
        try:
            for fault in self._faults:
                if not self._wait(began + fault.at, stop):
                    return
                self._inject(fault)
            self._wait(max((until for until, _ in self._frozen), default=0.0), stop)
        finally:
            self._thaw(float("inf"))

    def _wait(self, until: float, stop: Flag) -> bool:
        while (now := time.monotonic()) < until:
            self._thaw(now)
            if stop.wait(min(0.05, until - now)):
                return False
        return True

    def _thaw(self, now: float) -> None:
        for until, process in list(self._frozen):
            if until <= now:
                self._frozen.remove((until, process))
                if process not in (other for _, other in self._frozen):  # unless a second freeze holds it
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.resume()

    def _inject(self, fault: PlannedFault) -> None:
        made = Injected(fault, time.time(), None, f"{fault.group}: no process")
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself just now
            if victim := self._victim(fault):
                process, whom = victim
                self._signal(fault, process, is_main=whom == fault.group)
                made = Injected(fault, time.time(), process.pid, whom)
        self.made.append(made)
        self._notify(made)

    def _signal(self, fault: PlannedFault, process: psutil.Process, *, is_main: bool) -> None:
        # psutil compares start times, so a process that has reused the pid is not affected.
        if fault.kind == "kill":
            process.kill()
        elif fault.kind == "restart":
            process.send_signal(RESTART_SIGNALS.get(fault.group, signal.SIGTERM) if is_main else signal.SIGTERM)
        else:
            process.suspend()
            self._frozen.append((time.monotonic() + fault.seconds, process))

    def _victim(self, fault: PlannedFault) -> tuple[psutil.Process, str] | None:
        """A process of the group; in half of the cases a child of one, if the group has children."""
        mains = self._mains(fault.group)
        if fault.group in HAVE_CHILDREN and fault.choice >= 0.5:
            children = [child for main in mains for child in main.children(recursive=True)]
            if children:
                return children[int((fault.choice * 2 - 1) * len(children))], f"{fault.group}, a child process"
        return (mains[int(fault.choice * len(mains))], fault.group) if mains else None

    def _mains(self, group: str) -> list[psutil.Process]:
        found = []
        for pid in self._stack.info()["processes"].get(group, []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                # stack.json may be outdated, and another program may have reused the pid.
                if process.ppid() == self._stack.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found
