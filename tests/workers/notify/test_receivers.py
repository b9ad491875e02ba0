"""The receivers of deploy/docs/notifications.md accept what Headrace sends, and refuse everything else."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import HTTP, ROOT, rows, until
from tests.support.npm import node_modules
from tests.support.receivers import change, commit, subscribe
from workers.local.ports import free_port
from workers.notify.sender import Notifier
from workers.notify.signing import new_secret

PAGE = (ROOT / "deploy/docs/notifications.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The only code block of this language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@contextmanager
def running(folder: Path, url: str, *command: str, **environment: str) -> Iterator[Path]:
    """Runs a receiver until the block ends. Returns the file with its output."""
    log = folder / "log"
    environment["PATH"] = os.environ["PATH"]
    with (
        log.open("wb") as out,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out) as process,
    ):
        try:
            until(lambda: answers(url), 30)
            yield log
        finally:
            process.kill()


def answers(url: str) -> bool:
    try:
        return HTTP.post(url, content=b"{}").status_code == 401  # not signed
    except httpx.HTTPError:
        return False


def deliver(engine: Engine, settings: Settings, url: str, log: Path) -> None:
    """Sends a notification, and sends it again."""
    for _ in range(2):
        Notifier(engine, settings, slice_seconds=1).run()
        assert rows(engine, "SELECT status, last_error FROM headrace.notifications") == [
            {"status": "sent", "last_error": ""}
        ]
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE headrace.notifications SET status = 'pending'")
    text = until(lambda: log.read_text() if "workouts.changed" in log.read_text() else "", 5)
    assert text.count("workouts.changed") == 1
    assert "w1" in text


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    """The secret that the next subscription gets."""
    found = new_secret()
    monkeypatch.setattr("tests.support.receivers.new_secret", lambda: found)
    return found


def test_the_receiver_in_python(engine: Engine, settings: Settings, tmp_path: Path, secret: str) -> None:
    """Breaks if the example is refused, accepts unsigned requests, or processes an id twice."""
    (tmp_path / "receiver.py").write_text(block("python"))
    port = free_port()
    url = f"http://127.0.0.1:{port}/headrace"
    command = (sys.executable, "-m", "flask", "--app", "receiver", "run", "--port", str(port))
    with running(tmp_path, url, *command, SIGNING_SECRET=secret) as log:
        subscribe(engine, url)
        commit(engine, change("w1"))
        deliver(engine, settings, url, log)


def test_the_receiver_in_node(engine: Engine, settings: Settings, tmp_path: Path, secret: str) -> None:
    """Breaks as above. Needs Node.js, and npm for the package standardwebhooks."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    packages = str(node_modules(Path(__file__).parent / "node"))
    (tmp_path / "receiver.js").write_text(block("js"))
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    with running(tmp_path, url, node, "receiver.js", SIGNING_SECRET=secret, PORT=str(port), NODE_PATH=packages) as log:
        subscribe(engine, url)
        commit(engine, change("w1"))
        deliver(engine, settings, url, log)
