"""Granian, and the folder in which its processes count together, which goes with it: `python -m app.web`."""

import os
import shutil
import tempfile
from pathlib import Path

from granian.cli import entrypoint

from app.config.settings import process_environment

FOLDER_PREFIX, METRICS_FOLDER = "headrace-metrics-", "PROMETHEUS_MULTIPROC_DIR"


def make_folder() -> str:
    """A folder for the process that this one becomes, which keeps its pid. Those of processes that were killed go."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*-*"):
        pid = left.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-")


def main() -> None:
    """Serves until it is told to end. A folder that was given stays."""
    try:
        entrypoint()  # type: ignore[no-untyped-call]
    finally:
        folder = Path(process_environment().get(METRICS_FOLDER, ""))
        if folder.name.startswith(f"{FOLDER_PREFIX}{os.getpid()}-"):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
