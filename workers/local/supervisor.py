"""Starts programs in stages, restarts those that die, and stops them without leaving a process behind.

Why no library: honcho stops everything when one program dies and restarts nothing; supervisord and circus restart, but
are daemons with configuration files and control sockets, and their children survive a SIGKILL of the daemon. Here the
kernel signals every program when its supervisor dies (PR_SET_PDEATHSIG), and the supervisor adopts the orphans of a
dead program (PR_SET_CHILD_SUBREAPER). There are no threads: the death signal is sent when the *thread* that started the
child ends, so the main thread does everything, and sleeps until a signal.
"""

import contextlib
import ctypes
import logging
import os
import pwd
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self, TypeAlias

import psutil

from app.errors import HeadraceError
from workers.fetch.backoff import backoff

POLL_SECONDS = 0.1
IDLE_SECONDS = 5.0  # while all programs run: signals, SIGCHLD included, end the pause
PARENT_SECONDS = 1.0  # the same, if the death of `parent` must end everything
REPORT_SECONDS = 10.0  # between two lines that say which programs are not ready
DEATHS_WHILE_STARTING = 5
MIN_RESTART_PAUSE, MAX_RESTART_PAUSE = 0.1, 5.0
STEADY_SECONDS = 10.0

_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = ctypes.CDLL(None).prctl if _LINUX else None
_log = logging.getLogger(__name__)

Pids = dict[str, list[int]]


class NotStarted(HeadraceError):
    """A program did not become ready. The message names the log file instead of quoting it: a log may hold secrets."""


class Process(Protocol):
    """The methods of Popen that the supervisor needs."""

    pid: int
    returncode: int | None

    def wait(self) -> int:
        """The exit status."""


Fork: TypeAlias = "Callable[[Program, int], Process | None]"


@dataclass(frozen=True)
class Program:
    """`name` is unique; `group` is the key of its pid in stack.json.

    `fork` starts the program from the fork server, with the descriptor of its log file. If it is not set or returns
    None, the program is started as a command.
    """

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
    fork: "Fork | None" = None
    before_exec: Callable[[], None] = lambda: None  # called in the new process, unless `fork` started it


def die_with_parent(
    parent: int, death_signal: signal.Signals, then: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """The function to run between fork and exec. CPython calls it after changing the user, which clears the setting."""

    def tie() -> None:
        if _prctl is not None:
            _prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)
        then()

    return tie


def _spawn(program: Program) -> Process:
    program.before_start()
    program.log.parent.mkdir(parents=True, exist_ok=True)
    as_user: dict[str, Any] = {}
    if program.user is not None:
        as_user = {"user": program.user, "group": pwd.getpwuid(program.user).pw_gid, "extra_groups": []}
    log = os.open(program.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        forked = program.fork(program, log) if program.fork else None
        # The death signal is the stop signal, not SIGKILL, so that a program can stop its own children.
        return forked or subprocess.Popen(
            program.command,
            env=dict(program.environment),
            cwd=program.cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=program.pass_fds,
            preexec_fn=die_with_parent(os.getpid(), program.stop_signal, program.before_exec),  # noqa: PLW1509 - no threads
            **as_user,
        )
    finally:
        os.close(log)


class Slot:
    """A program, its process if it runs, and its number of consecutive deaths."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.process: Process | None = None
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
            if _LINUX:  # a tenth of the time of reading /proc
                return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_ZOMBIE)
        except (ChildProcessError, psutil.NoSuchProcess):
            return True

    def is_ready(self) -> bool:
        return not self.has_ended() and self.program.ready()

    def state(self, now: float) -> str:
        """The state that is logged when a start takes long."""
        if self.process is None:
            return f"{self.program.name} (ended {self.deaths} times, see {self.program.log})"
        return f"{self.program.name} (started {now - self.began:.0f} s ago, still starting)"

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
        self._stages: list[list[Slot]] = []
        self._signals = 0
        self._handlers: dict[signal.Signals, Any] = {}
        self._wakeups: tuple[int, int] | None = None  # a pipe that gets a byte for each signal

    def __enter__(self) -> Self:
        if self._whole_process:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._count_signal)
            self._handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
            self._wakeups = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if _LINUX else None
            if self._wakeups is not None:
                signal.set_wakeup_fd(self._wakeups[1], warn_on_full_buffer=False)
            if _prctl is not None:
                _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            if self._wakeups is not None:
                signal.set_wakeup_fd(-1)
                for descriptor in self._wakeups:
                    os.close(descriptor)

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

    def process(self, name: str) -> Process:
        return next(slot.process for slot in self._slots() if slot.program.name == name and slot.process is not None)

    def launch(self, programs: Sequence[Program], *, stage: int) -> Sequence[Slot]:
        """Starts programs and does not wait for them. Stages are stopped in reverse order."""
        slots = [Slot(program) for program in programs]
        while len(self._stages) <= stage:
            self._stages.append([])
        self._stages[stage] += slots
        self._restart_dead()
        return slots

    def wait(self, slots: Sequence[Slot]) -> None:
        """Waits until all these programs are ready. Raises NotStarted, and KeyboardInterrupt on a signal.

        There is no limit while a program runs: on a busy machine a worker of low priority takes minutes.
        """
        reported = time.monotonic()
        while waiting := [slot for slot in slots if not slot.is_ready()]:
            self._raise_on_signal()
            self._restart_dead()
            for slot in waiting:
                if slot.deaths >= DEATHS_WHILE_STARTING:
                    raise NotStarted(f"{slot.program.name} died {slot.deaths} times at start; see {slot.program.log}")
            if (now := time.monotonic()) - reported >= REPORT_SECONDS:
                reported = now
                _log.warning("waiting for %s", ", ".join(slot.state(now) for slot in waiting))
            time.sleep(POLL_SECONDS / 2)

    def start(self, programs: Sequence[Program]) -> None:
        """Starts one stage and waits until all of it is ready. Raises as `wait`."""
        self.wait(self.launch(programs, stage=len(self._stages)))

    def complete(self, program: Program) -> None:
        """Runs a program to its end. Raises NotStarted if it fails, and KeyboardInterrupt on a signal."""
        slot = Slot(program)
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
            is_waiting = has_changed or any(slot.process is None for slot in self._slots())
            self._pause(POLL_SECONDS if is_waiting else IDLE_SECONDS if self._parent is None else PARENT_SECONDS)

    def _pause(self, seconds: float) -> None:
        """Sleeps until a signal, at most `seconds`. Polling ten times a second cost 0.8 % of a core."""
        if self._wakeups is None:
            time.sleep(min(seconds, POLL_SECONDS))
        elif select.select([self._wakeups[0]], [], [], seconds)[0]:
            os.read(self._wakeups[0], 4096)

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

    def _slots(self) -> Iterator[Slot]:
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
        """Kills adopted children of dead programs: they left their process group, as all of PostgreSQL's do."""
        if not (self._whole_process and _LINUX):
            return
        ours = self._main_pids()
        for child in psutil.Process().children():
            if child.pid not in ours:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
                    child.wait(timeout=5)


@contextlib.contextmanager
def running(program: Program) -> Iterator[Process]:
    """One ready program, stopped at the end of the block. It is not restarted if it dies. For tests."""
    with Supervisor(whole_process=False) as supervisor:
        supervisor.start([program])
        yield supervisor.process(program.name)
