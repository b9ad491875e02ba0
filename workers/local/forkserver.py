"""The fork server: it imports the workers' libraries once and forks each worker, so that they share this memory.

A worker that is started as a command uses 64 MB of its own, 55 MB of them for libraries, and imports these in 0.9 s of
CPU.

Secrets: the fork server has none in its environment and memory, so that a child has only its own. The supervisor passes
a child's environment in a file in memory, which only the child reads. /proc/PID/environ of Flower, beat and the workers
has no key.

The supervisor becomes the parent of each child: the fork server forks twice, and the kernel gives the orphan to the
supervisor (PR_SET_CHILD_SUBREAPER). So the workers survive the death of the fork server.
"""

import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from app.commands import own
from app.config.settings import replace_environment
from app.observability import gc
from workers.local.supervisor import Process, Program, die_with_parent

FORK_SECONDS = 10.0  # then the program is started as a command instead
POLL_SECONDS = 0.1
ADOPTION_SECONDS = 0.001  # between two checks whether the supervisor is the parent yet
# The modules that a worker, beat and the migration import before they are ready.
MODULES = (
    *("workers.cli.main", "workers.cli.worker", "workers.celery.app", "celery.apps.worker", "celery.apps.beat"),
    *("celery.worker.consumer", "celery.concurrency.solo", "celery.beat", "sqlalchemy.dialects.postgresql.psycopg"),
    *("celery.worker.components", "celery.worker.autoscale", "celery.worker.strategy", "celery.backends.base"),
    *("celery.app.log", "celery.app.control", "celery.app.events", "celery.fixups.django"),
    *("redis", "app.broker.redis_celery", "app.broker.redis_transport", "psycopg", "encodings.idna"),
)
TITLE_BYTES = 160  # room for the command line of a child


class ForkedProcess:
    """A child that the fork server has started. It has the methods of Popen that the supervisor needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        """The exit status, negative after a signal."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


class ForkServer:
    """The supervisor's side."""

    def __init__(self, environment: Mapping[str, str], log: Path, ready_file: Path) -> None:
        """`environment` must have no secrets."""
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs, self._ready_file = theirs, ready_file
        arguments = (str(theirs.fileno()), str(ready_file), " " * TITLE_BYTES)
        self.program = Program(
            group="forkserver",
            name="forkserver",
            command=own("workers.local.forkserver", *arguments),
            environment=environment,
            log=log,
            ready=ready_file.exists,
            before_start=lambda: ready_file.unlink(missing_ok=True),
            pass_fds=(theirs.fileno(),),
        )

    def fork(self, program: Program, log: int) -> Process | None:
        """Starts `program.command`, which is a result of `own`. None if the fork server does not run or answer."""
        if not self._is_running():
            return None
        reading, writing = os.pipe()
        request = os.memfd_create("headrace-request")
        try:
            with os.fdopen(os.dup(request), "w", encoding="utf-8") as file:
                json.dump([program.command, dict(program.environment), int(program.stop_signal)], file)
            try:
                socket.send_fds(self._ours, [b"\0"], [request, log, writing], socket.MSG_DONTWAIT)
            finally:
                os.close(writing)
            return self._read_pid(reading)
        except OSError:
            return None
        finally:
            os.close(request)
            os.close(reading)  # a child that is started later finds the pipe closed, and ends

    def _read_pid(self, reading: int) -> Process | None:
        deadline = time.monotonic() + FORK_SECONDS
        while time.monotonic() < deadline and self._is_running():
            if select.select([reading], [], [], POLL_SECONDS)[0]:
                answer = os.read(reading, 20)
                return ForkedProcess(int(answer)) if answer else None
        return None

    def _is_running(self) -> bool:
        with contextlib.suppress(FileNotFoundError, ValueError, ChildProcessError):
            pid = int(self._ready_file.read_text())
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        return False


def main() -> None:
    """Imports the libraries and forks until the supervisor ends. Each child continues here with its own command."""
    supervisor = os.getppid()
    connection, ready_file = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    with gc.paused():
        for name in MODULES:
            import_module(name)
    gc.freeze()
    new = ready_file.with_suffix(".new")
    new.write_text(str(os.getpid()))
    new.replace(ready_file)
    if module := _serve(connection, supervisor):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _serve(connection: socket.socket, supervisor: int) -> str:
    """Returns the module to run in each child, and "" in the fork server when the supervisor has ended."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1, 3)
        if not message:
            return ""
        if not (child := os.fork()):
            between = os.getpid()
            if os.fork():
                os._exit(0)
            connection.close()
            while os.getppid() == between:
                time.sleep(ADOPTION_SECONDS)
            return _begin(supervisor, *files)
        for file in files:
            os.close(file)
        os.waitpid(child, 0)


def _begin(supervisor: int, request: int, log: int, reply: int) -> str:
    """Makes this process the program of the request, `python -P -m module arguments ...`. Returns the module."""
    os.setsid()
    os.lseek(request, 0, os.SEEK_SET)
    with os.fdopen(request, encoding="utf-8") as file:
        command, environment, stop_signal = json.load(file)
    die_with_parent(supervisor, signal.Signals(stop_signal))()
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    replace_environment(environment)
    *_, module = python = own(command[len(own("")) - 1])
    sys.argv[1:] = command[len(python) :]
    _set_title(command)
    try:
        os.write(reply, str(os.getpid()).encode())
    except BrokenPipeError:  # the supervisor has started another process instead
        os._exit(0)
    os.close(reply)
    return module


def _set_title(command: list[str]) -> None:
    """Replaces the command line that `ps` shows, which was the fork server's. The new one must not be longer."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
    title = "\0".join(command).encode()[: end - begin - 1]
    if begin:
        ctypes.memmove(begin, title.ljust(end - begin, b"\0"), end - begin)


if __name__ == "__main__":
    main()
