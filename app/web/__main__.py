"""Granian, and the folder in which its processes count together, which goes with it: `python -P -m app.web`."""

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
    """A folder for the process that this one becomes, which keeps its pid. Those of processes that were killed go."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*-*"):
        pid = left.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-")


def application() -> Any:
    """The application, made in each of granian's processes. Granian's own loader puts the current directory first."""
    with gc.paused():
        return getattr(importlib.import_module(MODULE), FACTORY)()


def serve(settings: Settings) -> None:
    """Granian with an event loop a process."""
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
    """Serves until it is told to end. A folder that was given stays."""
    try:
        serve(load())
    except FatalError:  # granian has logged it
        sys.exit(1)
    finally:
        folder = Path(process_environment().get(METRICS_FOLDER, ""))
        if folder.name.startswith(f"{FOLDER_PREFIX}{os.getpid()}-"):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
