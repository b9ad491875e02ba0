"""A full disk: `headrace up` holds on, answers 503, and continues without an operator once there is space."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest

from tests.support import until, workout
from tests.support.stack import Stack

pytestmark = pytest.mark.stack
FULL_SECONDS = 12.0  # PostgreSQL and Valkey die and are restarted several times meanwhile
STORED = "SELECT user_id FROM health.workouts"


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 300 MB."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        command = ("mount", "-t", "tmpfs", "-o", "size=300m,mode=755", "tmpfs", name)
        if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
            pytest.skip("needs root, and permission to mount, for a small file system")
        try:
            yield Path(name)
        finally:
            subprocess.run(("umount", "--lazy", name), check=True)


def fill(file: Path) -> None:
    """Writes until there is no space."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as opened:
        while opened.write(b"\0" * 4096):
            pass


def write_wal(url: str) -> None:
    """Begins WAL files of 16 MB each: without space, PostgreSQL ends with a PANIC."""
    with psycopg.connect(url, autocommit=True) as connection:
        for _ in range(20):
            connection.execute("SELECT pg_switch_wal()")
            connection.execute("SELECT pg_logical_emit_message(false, 'full', 'disk')")


def test_a_full_disk_is_survived(small_disk: Path) -> None:
    """Breaks if a full disk ends `up`, kills the endpoint, or loses a delivery that was answered 202."""
    stack, accepted = Stack(small_disk), set[str]()

    def status(user_id: str) -> int:
        try:
            code = stack.post(workout(user_id, title="x" * 1000)).status_code
        except httpx.TransportError:
            return 0
        if code == 202:
            accepted.add(user_id)
        return code

    try:
        stack.start()
        assert [status(f"before-{number}") for number in range(5)] == [202] * 5
        url = stack.info["database_url"]
        fill(small_disk / "ballast")
        with pytest.raises(psycopg.OperationalError):
            write_wal(url)
        until_full, codes = time.monotonic() + FULL_SECONDS, list[int]()
        while time.monotonic() < until_full:
            fill(small_disk / f"ballast-{len(codes)}")  # what Valkey's truncation has freed
            codes.append(status(f"full-{len(codes)}"))
            time.sleep(0.2)
        assert set(codes) <= {202, 503}
        assert codes.count(503) > len(codes) / 2
        assert stack.process is not None
        assert stack.process.poll() is None, stack.output.read_text()
        for file in small_disk.glob("ballast*"):
            file.unlink()
        until(lambda: status("after") == 202)
        until(lambda: accepted <= {user_id for (user_id,) in stack.rows(STORED)}, 120)
        until(lambda: all(psutil.pid_exists(pid) for pids in stack.info["processes"].values() for pid in pids))
        assert not list(stack.data.glob(".stack.json*"))
        assert stack.end(signal.SIGTERM) == 0
        assert "Traceback" not in stack.output.read_text()
    finally:
        if stack.process is not None and stack.process.poll() is None:
            stack.end(signal.SIGTERM)


def test_a_start_on_a_full_disk_waits_for_space(small_disk: Path, tmp_path: Path) -> None:
    """Breaks if `up` ends when the disk is full already, or does not start once there is space."""
    stack, ballast = Stack(tmp_path), small_disk / "ballast"
    stack.data = small_disk / "data"
    fill(ballast)
    process = stack.launch()
    try:
        until(lambda: "is full" in stack.output.read_text())
        assert process.poll() is None
        ballast.unlink()
        until(lambda: stack.file.exists() or process.poll() is not None, 120)
        assert stack.file.exists(), stack.output.read_text()
        assert stack.end(signal.SIGTERM) == 0
    finally:
        process.kill()
        process.wait()
