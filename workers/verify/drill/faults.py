"""The striker: kills, freezes and restarts processes of one stack, as planned."""

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
POLITE = {"postgres": signal.SIGINT}  # at SIGTERM it waits until the last client has gone, which none of ours does


@dataclass(frozen=True)
class Injected:
    """A strike that was made, or missed because there was nobody: unix seconds, whom it met and how long it lasted."""

    fault: PlannedFault
    began: float
    pid: int | None
    whom: str

    @property
    def ended(self) -> float:
        """When whoever was struck could go on, or be started again."""
        return self.began + (self.fault.seconds if self.fault.kind == "freeze" else 0.0)

    def __str__(self) -> str:
        """One line of the log."""
        seconds = f" for {self.fault.seconds:.1f} s" if self.fault.kind == "freeze" else ""
        whom = self.whom if self.pid is None else f"{self.whom} (pid {self.pid})"
        return f"{self.fault.at:6.1f} s  {self.fault.kind}{seconds}: {whom}"


class FaultInjector:
    """Makes the strikes of a plan on the processes of one stack and on no others."""

    def __init__(self, stack: Stack, faults: Sequence[PlannedFault], on_progress: Callable[[Injected], None]) -> None:
        self.made: list[Injected] = []
        self._stack, self._faults, self._notify = stack, faults, on_progress
        self._frozen: list[tuple[float, psutil.Process]] = []

    @property
    def injected(self) -> list[Injected]:
        """Without those that met nobody."""
        return [one for one in self.made if one.pid is not None]

    def run(self, stop: Flag) -> None:
        """Makes them all, each at its time. Whatever happens, nothing stays frozen."""
        began = time.monotonic()
        try:
            for fault in self._faults:
                if not self._wait(began + fault.at, stop):
                    return
                self._make(fault)
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
                if process not in (other for _, other in self._frozen):  # it may be frozen twice
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.resume()

    def _make(self, fault: PlannedFault) -> None:
        made = Injected(fault, time.time(), None, f"{fault.group}: nobody there")
        with contextlib.suppress(psutil.NoSuchProcess):  # it died by itself, in this very moment
            if victim := self._victim(fault):
                process, whom = victim
                self._do(fault, process, whom == fault.group)
                made = Injected(fault, time.time(), process.pid, whom)
        self.made.append(made)
        self._notify(made)

    def _do(self, fault: PlannedFault, process: psutil.Process, is_main: bool) -> None:  # noqa: FBT001
        # psutil compares the time at which it began: a number that was given to somebody else is not struck.
        if fault.kind == "kill":
            process.kill()
        elif fault.kind == "restart":
            process.send_signal(POLITE.get(fault.group, signal.SIGTERM) if is_main else signal.SIGTERM)
        else:
            process.suspend()
            self._frozen.append((time.monotonic() + fault.seconds, process))

    def _victim(self, fault: PlannedFault) -> tuple[psutil.Process, str] | None:
        """A process of the group, or half of the time, where it has any, a child of one."""
        mains = self._mains(fault.group)
        if fault.group in HAVE_CHILDREN and fault.choice >= 0.5:
            children = [child for main in mains for child in main.children(recursive=True)]
            if children:
                return children[int((fault.choice * 2 - 1) * len(children))], f"{fault.group}, a child of it"
        return (mains[int(fault.choice * len(mains))], fault.group) if mains else None

    def _mains(self, group: str) -> list[psutil.Process]:
        found = []
        for pid in self._stack.info()["processes"].get(group, []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                # stack.json may be a moment old, and the number somebody else's by now.
                if process.ppid() == self._stack.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found
