"""The measured systems: a separate `headrace up`, its servers only, or a bare Flask route for comparison."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from sqlalchemy import Engine

from app.config.settings import load
from workers.local import embedded_postgres, embedded_valkey
from workers.local.ports import free_port
from workers.local.supervisor import Pids, running
from workers.store.engine import make_engine
from workers.store.migrate import migrate

START_SECONDS, STOP_SECONDS = 120, 60


@dataclass(frozen=True)
class Stack:
    """A complete stack: the URL and secret of its endpoint, its database, metrics and processes."""

    url: str
    secret: str
    database_url: str
    engine: Engine
    metrics_url: str
    up: int  # the pid of `headrace up`
    pids: Pids  # of the processes that it has started, by group
    ready_seconds: float  # from the start of `headrace up` in a new folder until stack.json existed


@contextlib.contextmanager
def running_stack(workers: int, environment: Mapping[str, str] | None = None) -> Iterator[Stack]:
    """A ready stack, which is stopped after the block."""
    with running_up("--workers", str(workers), environment=environment) as info:
        engine = make_engine(load({"DATABASE_URL": info["database_url"]}), "headrace-bench")
        yield Stack(
            url=f"{info['web']}/webhooks/junction",
            secret=info["junction_webhook_secret"],
            database_url=info["database_url"],
            engine=engine,
            metrics_url=f"{info['operations']}/metrics",
            up=info["up"],
            pids=info["processes"],
            ready_seconds=info["ready_seconds"],
        )
        engine.dispose()


@contextlib.contextmanager
def running_up(*options: str, environment: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The content of stack.json of a complete stack, which stops after the block.

    It also has the path of this `file`, the pid of `headrace up` and the `ready_seconds` from its start.
    """
    with _folder() as folder:
        # Free ports: web servers set SO_REUSEPORT, so another stack could respond on the default one, or take it first.
        command = [sys.executable, "-m", "workers.cli", "up", "--data-dir", str(folder / "data")]
        command += ["--port", str(free_port()), "--parent", str(os.getpid()), *options]
        began = time.monotonic()
        with (folder / "output").open("wb") as output:
            given = {"HEADRACE_OPERATIONS_PORT": str(free_port())} | dict(environment or {})
            process = subprocess.Popen(command, env=os.environ | given, stdout=output, stderr=output)
        try:
            file = folder / "data" / "stack.json"
            info = _wait(process, file, folder / "output")
            yield info | {"file": str(file), "up": process.pid, "ready_seconds": time.monotonic() - began}
        finally:
            process.send_signal(signal.SIGTERM)
            _wait_or_kill(process)


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    """Waits for `headrace up`. Under attack it may not end by itself; the kernel then ends its children with it."""
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    folder.chmod(0o755)  # as root, the user of PostgreSQL must be able to enter it
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], stack: Path, output: Path) -> dict[str, Any]:
    deadline = time.time() + START_SECONDS
    while not stack.exists():
        if process.poll() is not None or time.time() > deadline:
            raise RuntimeError(f"the stack did not start: {output.read_text()[-500:]}")
        time.sleep(0.1)
    return dict(json.loads(stack.read_text()))


@contextlib.contextmanager
def running_servers() -> Iterator[tuple[str, str]]:
    """The URLs of a migrated PostgreSQL and a Valkey, configured as in a stack but idle."""
    with _folder() as folder:
        postgres, database_url = embedded_postgres.postgres(folder / "postgres", "bench", folder / "postgres.log")
        valkey, broker_url = embedded_valkey.valkey(folder / "broker", "bench", folder / "broker.log")
        with running(postgres), running(valkey):
            engine = make_engine(load({"DATABASE_URL": database_url}), "headrace-bench")
            migrate(engine)
            engine.dispose()
            yield database_url, broker_url


@contextlib.contextmanager
def running_floor(target: str, secret: str) -> Iterator[str]:
    """The URL of an application of floors.py, on the web server of the endpoint with as many processes."""
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
