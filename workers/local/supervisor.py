"""Starts programs in stages, restarts those that die, and stops them without leaving a process behind.

Why no library: honcho stops everything when one program dies and restarts nothing; supervisord and circus restart, but
are daemons with configuration files and control sockets, and their children survive a SIGKILL of the daemon. Here the
kernel signals every program when its supervisor dies (PR_SET_PDEATHSIG), and the supervisor adopts the orphans of a
dead program (PR_SET_CHILD_SUBREAPER). There are no threads: the death signal fires when the *thread* that started the
child ends, so everything happens in the main thread, which polls ten times a second.
"""

import contextlib
import ctypes
import logging
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psutil

from app.errors import HeadraceError
from workers.fetch.backoff import backoff
from workers.local.patience import Patience

POLL_SECONDS = 0.1
START_SECONDS, MAX_START_SECONDS = 60.0, 600.0  # without progress, and in total
PROGRESS_SECONDS = 1.0  # of CPU time; a program that only waits for another one uses less
DEATHS_WHILE_STARTING = 5
MIN_RESTART_PAUSE, MAX_RESTART_PAUSE = 0.1, 5.0
STEADY_SECONDS = 10.0

_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = ctypes.CDLL(None).prctl if _LINUX else None
_log = logging.getLogger(__name__)

Pids = dict[str, list[int]]


class NotStarted(HeadraceError):
    """A program did not become ready. The text names its log file instead of quoting it: a log may hold secrets."""


@dataclass(frozen=True)
class Program:
    """`name` is unique; `group` is the key of its pid in stack.json."""

    group: str
    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    log: Path
    ready: Callable[[], bool]
    user: int | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 20.0
    cwd: Path | None = None
    before_start: Callable[[], None] = lambda: None
    pass_fds: tuple[int, ...] = ()


def _die_with_parent(parent: int, death_signal: signal.Signals) -> Callable[[], None] | None:
    """The function to run between fork and exec. CPython calls it after changing the user, which clears the setting."""
    prctl = _prctl
    if prctl is None:
        return None

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)

    return tie


def _spawn(program: Program) -> subprocess.Popen[bytes]:
    program.before_start()
    program.log.parent.mkdir(parents=True, exist_ok=True)
    as_user: dict[str, Any] = {}
    if program.user is not None:
        as_user = {"user": program.user, "group": pwd.getpwuid(program.user).pw_gid, "extra_groups": []}
    log = os.open(program.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        # The death signal is the stop signal, not SIGKILL, so that a program can stop its own children.
        return subprocess.Popen(
            program.command,
            env=dict(program.environment),
            cwd=program.cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=program.pass_fds,
            preexec_fn=_die_with_parent(os.getpid(), program.stop_signal),  # noqa: PLW1509 - there are no threads here
            **as_user,
        )
    finally:
        os.close(log)


class _Slot:
    """A program, its process if it runs, and its number of consecutive deaths."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.process: subprocess.Popen[bytes] | None = None
        self.deaths = 0
        self.began = self.due = time.monotonic()

    def launch(self) -> None:
        self.began = time.monotonic()
        try:
            self.process = _spawn(self.program)
        except OSError as error:
            self.count_death()
            _log.error("%s could not be started: %s", self.program.name, error)

    def count_death(self) -> float:
        """Schedules the restart, and returns the seconds until then."""
        now = time.monotonic()
        self.deaths = 1 if now - self.began > STEADY_SECONDS else self.deaths + 1
        pause = backoff(self.deaths - 1, base=MIN_RESTART_PAUSE, limit=MAX_RESTART_PAUSE)
        self.due = now + pause
        return pause

    def has_ended(self) -> bool:
        """Whether the main process has ended. It stays a zombie, so that its pid is not reused for another group."""
        if self.process is None or self.process.returncode is not None:
            return True
        try:
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def is_ready(self) -> bool:
        return not self.has_ended() and self.program.ready()

    def cpu_seconds(self) -> float:
        """The CPU time that the main process has used; 0 if it does not run."""
        try:
            times = psutil.Process(self.process.pid).cpu_times() if self.process else None
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system if times else 0.0

    def signal(self, number: signal.Signals, *, group: bool) -> None:
        if self.process is not None and (group or self.process.returncode is None):
            # macOS raises PermissionError for a group of zombies.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                (os.killpg if group else os.kill)(self.process.pid, number)

    def reap(self) -> int:
        """Kills the rest of the group, reaps the zombie and returns the exit status."""
        if self.process is None:
            return 0
        self.signal(signal.SIGKILL, group=True)
        status = self.process.wait()
        self.process = None
        return status


class Supervisor:
    """Keeps programs running. With `whole_process` it also handles this process's signals and adopts orphans.

    With `parent`, the death of that process counts as a signal.
    """

    def __init__(self, *, whole_process: bool = True, parent: int | None = None) -> None:
        self._whole_process, self._parent = whole_process, parent
        self._stages: list[list[_Slot]] = []
        self._signals = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if self._whole_process:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._count_signal)
            if _prctl is not None:
                _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _count_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def _must_stop(self) -> bool:
        return self._signals > 0 or self._parent not in (None, os.getppid())

    def _raise_on_signal(self) -> None:
        if self._must_stop():
            raise KeyboardInterrupt

    def pids(self) -> Pids:
        """The main processes by group, in starting order."""
        found: Pids = {}
        for slot in self._slots():
            pids = found.setdefault(slot.program.group, [])
            if slot.process is not None:
                pids.append(slot.process.pid)
        return found

    def process(self, name: str) -> subprocess.Popen[bytes]:
        return next(slot.process for slot in self._slots() if slot.program.name == name and slot.process is not None)

    def start(self, programs: Sequence[Program]) -> None:
        """Starts one stage and waits until all of it is ready. Raises NotStarted, and KeyboardInterrupt on a signal.

        A busy machine only delays the start: the waiting ends after START_SECONDS without progress.
        """
        stage = [_Slot(program) for program in programs]
        self._stages.append(stage)
        waiting, patience = stage, Patience(START_SECONDS, MAX_START_SECONDS)
        while waiting:
            self._raise_on_signal()
            self._restart_dead()
            waiting = [slot for slot in waiting if not slot.is_ready()]
            for slot in waiting:
                if slot.deaths >= DEATHS_WHILE_STARTING:
                    raise NotStarted(f"{slot.program.name} died {slot.deaths} times at start; see {slot.program.log}")
            if waiting and patience.ends(len(waiting), sum(slot.cpu_seconds() for slot in waiting) // PROGRESS_SECONDS):
                late = waiting[0].program
                raise NotStarted(f"{late.name} was not ready after {patience.waited:.0f} s; see {late.log}")
            if waiting:
                time.sleep(POLL_SECONDS / 2)

    def complete(self, program: Program) -> None:
        """Runs a program to its end. Raises NotStarted if it fails, and KeyboardInterrupt on a signal."""
        slot = _Slot(program)
        self._stages.append([slot])
        slot.launch()
        while not slot.has_ended():
            self._raise_on_signal()
            time.sleep(POLL_SECONDS / 2)
        self._stages.pop()
        if slot.deaths > 0 or slot.reap() != 0:
            raise NotStarted(f"{program.name} failed; see {program.log}")

    def run(self, on_change: Callable[[Pids], bool]) -> None:
        """Restarts programs that die, until a signal. After a change, calls `on_change` until it returns True."""
        has_changed = False
        while not self._must_stop():
            has_changed = self._restart_dead() or has_changed
            if has_changed:
                has_changed = not on_change(self.pids())
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Stops the stages in reverse order, each stage in parallel. A further signal kills the remaining programs."""
        signals = self._signals
        while self._stages:
            began, left = time.monotonic(), self._stages[-1]
            for slot in left:
                slot.signal(signal.SIGCONT, group=True)  # a stopped process handles no signal
                slot.signal(slot.program.stop_signal, group=False)
            while left := [slot for slot in left if not slot.has_ended()]:
                for slot in left:
                    if self._signals > signals or time.monotonic() - began > slot.program.stop_seconds:
                        slot.signal(signal.SIGKILL, group=True)
                time.sleep(POLL_SECONDS / 4)
            for slot in self._stages.pop():
                slot.reap()
            self._reap_all_orphans()

    def _slots(self) -> Iterator[_Slot]:
        return (slot for stage in self._stages for slot in stage)

    def _main_pids(self) -> set[int]:
        return {slot.process.pid for slot in self._slots() if slot.process is not None}

    def _restart_dead(self) -> bool:
        """Reaps dead programs and starts those that are due. Returns whether a pid changed."""
        before = self.pids()
        self._reap_orphans()
        for slot in self._slots():
            if slot.process is None:
                if time.monotonic() >= slot.due:
                    slot.launch()
            elif slot.has_ended():
                pid, status, pause = slot.process.pid, slot.reap(), slot.count_death()
                name = slot.program.name
                _log.warning("%s (pid %d) ended with status %d; restarting it in %.1f s", name, pid, status, pause)
                self._reap_all_orphans()
        return self.pids() != before

    def _reap_orphans(self) -> None:
        """Reaps zombies of adopted processes."""
        if not (self._whole_process and _LINUX):
            return
        ours = self._main_pids()
        with contextlib.suppress(ChildProcessError):
            while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if dead.si_pid in ours:
                    break
                os.waitpid(dead.si_pid, 0)

    def _reap_all_orphans(self) -> None:
        """Kills adopted children: those of a dead program that left its process group, as all of PostgreSQL's do."""
        if not (self._whole_process and _LINUX):
            return
        ours = self._main_pids()
        for child in psutil.Process().children():
            if child.pid not in ours:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
                    child.wait(timeout=5)


@contextlib.contextmanager
def running(program: Program) -> Iterator[subprocess.Popen[bytes]]:
    """One ready program, stopped at the end of the block. It is not restarted if it dies. For tests."""
    with Supervisor(whole_process=False) as supervisor:
        supervisor.start([program])
        yield supervisor.process(program.name)
