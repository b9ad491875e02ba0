"""A `headrace up` of its own for a benchmark, and a bare Flask route to compare with."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from workers.embedded import free_port

START_SECONDS = 120


@contextlib.contextmanager
def running_stack(*options: str, environment: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """What stack.json says of a complete stack, which ends with the block."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    folder.chmod(0o755)
    # A port of its own: web servers share theirs with each other, so another stack could answer on the usual one.
    command = [sys.executable, "-m", "workers.cli", "up", "--data-dir", str(folder / "data")]
    command += ["--port", str(free_port()), *options]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, env=os.environ | dict(environment or {}), stdout=output, stderr=output)
    try:
        yield _wait(process, folder / "data" / "stack.json", folder / "output")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], stack: Path, output: Path) -> dict[str, Any]:
    deadline = time.time() + START_SECONDS
    while not stack.exists():
        if process.poll() is not None or time.time() > deadline:
            raise RuntimeError(f"the stack did not start: {output.read_text()[-500:]}")
        time.sleep(0.1)
    return dict(json.loads(stack.read_text()))


@contextlib.contextmanager
def running_floor(target: str, secret: str) -> Iterator[str]:
    """The URL of one of floors.py's applications on the web server and with the processes of the endpoint."""
    port = free_port()
    command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--http", "1", "--no-ws", "--workers", "2"]
    command += ["--blocking-threads", "64", "--port", str(port), "--log-level", "error", "--factory"]
    command += [f"tests.bench.floors:{target}"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"JUNCTION_WEBHOOK_SECRET": secret},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.time() + 30
        while True:
            try:
                urlopen(f"{url}/livez", timeout=1).close()
                break
            except OSError:
                if time.time() > deadline:
                    raise
                time.sleep(0.1)
        yield f"{url}/webhooks/junction"
    finally:
        process.terminate()
        process.wait(30)
