"""A temporary `headrace up`, for the demo and the drill."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.commands import own
from app.config.settings import process_environment
from workers.local.ports import free_port
from workers.local.supervisor import NotStarted

MAX_START_SECONDS = 1800.0  # `headrace up` itself waits as long as its programs run


@dataclass
class Stack:
    """A running stack. Its folder is deleted at the end unless `keep` is set."""

    folder: Path
    pid: int  # of `headrace up`, the ancestor of all processes of the stack
    keep: bool = False

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def info(self) -> dict[str, Any]:
        """The current stack.json; a restarted process has a new pid in it. Raises NotStarted."""
        try:
            return dict(json.loads((self.data / "stack.json").read_bytes()))
        except FileNotFoundError:
            raise NotStarted(f"the stack has stopped unexpectedly; see {self.folder / 'up.log'}") from None


@contextlib.contextmanager
def running_stack(name: str, environment: Mapping[str, str], workers: int = 2) -> Iterator[Stack]:
    """A ready stack, stopped at the end of the block, or when this process is killed. Raises NotStarted.

    The folder is kept after any error, because it holds the logs.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"headrace-{name}-"))
    folder.chmod(0o755)  # as root, PostgreSQL's own user must be able to enter
    data, parent = ("--data-dir", str(folder / "data")), ("--parent", str(os.getpid()))
    command = own("workers.cli", "up", *data, *parent, "--workers", str(workers))
    # Not the ports of the operator's own stack, which may be running, nor defaults, which two stacks that start at the
    # same time could choose.
    ports = {"HEADRACE_PORT": ""} | {f"HEADRACE_{name}_PORT": str(free_port()) for name in ("FLOWER", "OPERATIONS")}
    with (folder / "up.log").open("wb") as log:
        # In its own session: Ctrl-C reaches this process only, which then stops the stack.
        process = subprocess.Popen(
            command,
            env=process_environment() | ports | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    stack = Stack(folder, process.pid)
    try:
        _wait_ready(process, stack)
        yield stack
    except Exception:
        stack.keep = True
        raise
    finally:
        process.terminate()
        process.wait()
        if not stack.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _wait_ready(process: subprocess.Popen[bytes], stack: Stack) -> None:
    deadline = time.monotonic() + MAX_START_SECONDS
    while not (stack.data / "stack.json").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            lines = (stack.folder / "up.log").read_text().strip().splitlines() or ["no output"]
            raise NotStarted(f"the stack did not start: {lines[-1]}; the logs are kept in {stack.folder}")
        time.sleep(0.1)
