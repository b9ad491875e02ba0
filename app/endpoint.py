"""Granian, and the folder in which its processes count together, which goes with it: `python -m app.endpoint`."""

import os
import shutil
import tempfile
from pathlib import Path

from granian.cli import entrypoint

from app.config import inherited

PREFIX, FOLDER = "headrace-metrics-", "PROMETHEUS_MULTIPROC_DIR"


def make_folder() -> str:
    """A folder for the process that this one becomes, which keeps its pid. Those of processes that were killed go."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        pid = left.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")


def main() -> None:
    """Serves until it is told to end. A folder that was given stays."""
    try:
        entrypoint()  # type: ignore[no-untyped-call]
    finally:
        folder = Path(inherited().get(FOLDER, ""))
        if folder.name.startswith(f"{PREFIX}{os.getpid()}-"):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
