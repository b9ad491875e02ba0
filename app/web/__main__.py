"""`python -P -m app.web`: granian, the process of the operations port, and the temporary directory of the metrics."""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.errors import FatalError
from granian.http import HTTP1Settings
from granian.log import LogLevels

from app.commands import own
from app.config.settings import Settings, load, process_environment
from app.observability import gc
from app.observability.metrics import METRICS_FOLDER
from app.scheduling import preempt_others
from app.web.limits import connections_per_process, raise_file_limit

FOLDER_PREFIX = "headrace-metrics-"
MODULE, FACTORY = "app.web.app", "from_environment"
# Hyper's limit for the first byte of a connection, for complete headers, and between two requests (measured).
HEADER_MILLISECONDS = 5_000
# Larger headers get a 431. Terra may send two signature headers of 8 KiB. Each connection can hold this much: granian's
# default of 400 kB let 1,000 connections take 400 MB.
MAX_HEADER_BYTES = 32 * 1024
BACKLOG = 2048
RESTART_SECONDS = 1.0  # until an operations process that has ended is started again


def make_folder() -> str:
    """A metrics directory named after the pid, which exec keeps. Removes the directories of killed processes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-")


def application() -> Any:
    """The application of one process. Granian's own loader would put the current directory first on the path."""
    with gc.paused():
        return getattr(importlib.import_module(MODULE), FACTORY)()


def serve(settings: Settings) -> None:
    """Runs granian, with one event loop per process. Raises Misconfigured."""
    connections = connections_per_process(settings)
    raise_file_limit(connections)
    preempt_others()
    server = Granian(
        f"{MODULE}:{FACTORY}",
        interface=Interfaces.RSGI,
        http=HTTPModes.http1,
        websockets=False,
        address=settings.host,
        port=settings.port,
        workers=settings.web_processes,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_MILLISECONDS, max_buffer_size=MAX_HEADER_BYTES),
        backlog=BACKLOG,
        backpressure=connections,
        log_level=LogLevels.warning,
        respawn_failed_workers=True,
        workers_kill_timeout=10,
        factory=True,
    )
    server.serve(target_loader=application, wrap_loader=False)


@contextlib.contextmanager
def operations(settings: Settings) -> Iterator[None]:
    """Runs the operations process until the block ends, unless HEADRACE_OPERATIONS_PORT is 0.

    It starts before granian forks: a fork within Popen would inherit the pipe on which Popen waits for the exec, and
    the watcher would wait until the web process ends.
    """
    if not settings.operations_port:
        yield
        return
    stopping, process = threading.Event(), _start_operations()
    watcher = threading.Thread(target=_keep_running, args=(process, stopping), name="operations", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopping.set()
        watcher.join()


def _start_operations() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(own("app.web.operations"))


def _keep_running(process: "subprocess.Popen[bytes]", stopping: threading.Event) -> None:
    while not stopping.wait(RESTART_SECONDS):
        if process.poll() is not None:
            process = _start_operations()
    process.kill()  # the process has no state to save
    process.wait()


def main() -> None:
    """Serves until a signal stops it. Removes the metrics directory, unless the operator has set it."""
    try:
        settings = load()
        with operations(settings):
            serve(settings)
    except FatalError:  # already logged by granian
        sys.exit(1)
    finally:
        folder = Path(process_environment().get(METRICS_FOLDER, ""))
        if folder.name.startswith(f"{FOLDER_PREFIX}{os.getpid()}-"):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
