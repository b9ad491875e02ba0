"""A `headrace up` in a folder of its own, for as long as somebody shows or tries it: the demo and the drill."""

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.config.settings import process_environment
from workers.local.commands import own
from workers.local.supervisor import NotStarted

START_SECONDS = 120


@dataclass
class Stack:
    """A stack that runs. Its folder goes with it, unless somebody wants to `keep` it."""

    folder: Path
    pid: int  # of `headrace up`; everything of the stack descends from it
    keep: bool = False

    @property
    def data(self) -> Path:
        """Its data directory."""
        return self.folder / "data"

    def info(self) -> dict[str, Any]:
        """What stack.json says now: pids change with every process that is started again. Raises NotStarted."""
        try:
            return dict(json.loads((self.data / "stack.json").read_bytes()))
        except FileNotFoundError:
            raise NotStarted(f"the stack has ended by itself; see {self.folder / 'up.log'}") from None


@contextlib.contextmanager
def running_stack(name: str, environment: Mapping[str, str], workers: int = 2) -> Iterator[Stack]:
    """A stack that is ready and ends with the block. Raises NotStarted."""
    folder = Path(tempfile.mkdtemp(prefix=f"headrace-{name}-"))
    folder.chmod(0o755)  # as root, PostgreSQL's own user must get through
    command = own("workers.cli", "up", "--data-dir", str(folder / "data"), "--workers", str(workers))
    with (folder / "up.log").open("wb") as log:
        # A session of its own: Ctrl-C reaches us, and we end it.
        process = subprocess.Popen(
            command,
            env=process_environment() | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    stack = Stack(folder, process.pid)
    try:
        _wait_ready(process, stack)
        yield stack
    finally:
        process.terminate()
        process.wait()
        if not stack.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _wait_ready(process: subprocess.Popen[bytes], stack: Stack) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (stack.data / "stack.json").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            said = (stack.folder / "up.log").read_text().strip().splitlines()
            raise NotStarted(f"the stack did not start: {said[-1] if said else 'it said nothing'}")
        time.sleep(0.1)
