"""`python -P -m app.web`: granian and the temporary directory of its processes' metrics."""

import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.errors import FatalError
from granian.http import HTTP1Settings
from granian.log import LogLevels

from app.config.settings import Settings, load, process_environment
from app.observability import gc
from app.observability.metrics import METRICS_FOLDER

FOLDER_PREFIX = "headrace-metrics-"
MODULE, FACTORY = "app.web.app", "from_environment"


def make_folder() -> str:
    """A metrics directory, named after the pid, which survives exec. Removes those of processes that were killed."""
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
    """Runs granian, with one event loop per process."""
    server = Granian(
        f"{MODULE}:{FACTORY}",
        interface=Interfaces.RSGI,
        http=HTTPModes.http1,
        websockets=False,
        address=settings.host,
        port=settings.port,
        workers=settings.web_processes,
        http1_settings=HTTP1Settings(header_read_timeout=10_000),
        backlog=2048,
        log_level=LogLevels.warning,
        respawn_failed_workers=True,
        workers_kill_timeout=10,
        factory=True,
    )
    server.serve(target_loader=application, wrap_loader=False)


def main() -> None:
    """Serves until a signal stops it. Removes the metrics directory, unless the operator has set it."""
    try:
        serve(load())
    except FatalError:  # already logged by granian
        sys.exit(1)
    finally:
        folder = Path(process_environment().get(METRICS_FOLDER, ""))
        if folder.name.startswith(f"{FOLDER_PREFIX}{os.getpid()}-"):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
