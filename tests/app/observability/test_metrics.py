"""Metrics: summed over processes, live gauges without dead processes, no files left over."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

import pytest

from app.observability import metrics
from app.web import __main__
from tests.support import JUNCTION_SECRET, ROOT, until
from tests.support.cases import Failures
from workers.local.ports import free_port

COUNT = """
import sys
from app.observability import metrics
metrics.ANSWERS.labels("junction", "202").inc(3)
metrics.show(metrics.LANE_MESSAGES, {"live": float(sys.argv[1])})
metrics.CIRCUIT_OPEN.set(1)
metrics.LAST_PUBLISH.labels("junction").set(float(sys.argv[1]))
print("counted", flush=True)
sys.stdin.read()
"""
SHOW = "from app.observability import metrics; print(metrics.exposition().decode())"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that writes its metrics to the folder."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), metrics.METRICS_FOLDER: str(folder)}


def shown(folder: Path) -> set[str]:
    """The exposition of another process of the machine."""
    command = (sys.executable, "-c", SHOW)
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.splitlines())


def test_processes_count_together_and_the_dead_hold_no_lane(tmp_path: Path) -> None:
    """Breaks if the counters of processes are not added, or a killed worker's queue depth is still exposed.

    The counters of dead processes must remain: Prometheus reads a decreasing counter as a reset.
    """
    processes = []
    for depth in ("7", "5"):
        command = (sys.executable, "-c", COUNT, depth)
        process = subprocess.Popen(
            command, env=environment(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "counted\n"
        processes.append(process)
    counted = 'headrace_answers_total{aggregator="junction",status="202"} 6.0'
    both = shown(tmp_path)
    assert {counted, 'headrace_lane_messages{lane="live"} 5.0', "headrace_circuit_open 2.0"} <= both
    assert 'headrace_last_publish_timestamp_seconds{aggregator="junction"} 7.0' in both
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    none = shown(tmp_path)
    assert {counted, "headrace_circuit_open 0.0"} <= none
    assert not any(line.startswith("headrace_lane_messages{") for line in none)


def test_a_finished_pause_is_zero() -> None:
    """Breaks if a pause that is over is still exposed."""
    metrics.show(metrics.PAUSED, {"junction": 30})
    metrics.show(metrics.PAUSED, {"terra": 10})
    lines = metrics.exposition().decode().splitlines()
    assert 'headrace_account_paused_seconds{aggregator="junction"} 0.0' in lines
    assert 'headrace_account_paused_seconds{aggregator="terra"} 10.0' in lines


def test_a_status_is_one_of_a_few() -> None:
    """Breaks if every status is a series of its own, or 429 is not."""
    failures = Failures()
    for status, name in ((200, "2xx"), (429, "429"), (404, "4xx"), (503, "5xx"), (0, "none"), (1, "none")):
        with failures.of(status, name):
            assert metrics.status_class(status) == name
    assert failures == {}


def test_it_can_be_asked_for_at_a_port(caplog: pytest.LogCaptureFixture) -> None:
    """Breaks if a worker exposes no metrics, or stops because the port is in use."""
    port = free_port()
    metrics.serve("127.0.0.1", port)
    assert b"headrace_outcomes_total" in urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read()
    metrics.serve("127.0.0.1", port)
    assert f"HEADRACE_METRICS_PORT: {port} on 127.0.0.1 cannot be used" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_endpoint_leaves_no_folder_behind(
    broker_url: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if `headrace web` leaves its folder in /tmp: at the stop, or after a kill at the next start."""
    port = free_port()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "BROKER_URL": broker_url, "TMPDIR": str(tmp_path)}
    known |= {"JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET, "HEADRACE_PORT": str(free_port())}
    known |= {"HEADRACE_WEB_PROCESSES": "1", "HEADRACE_OPERATIONS_PORT": str(port)}
    process = subprocess.Popen((sys.executable, "-m", "workers.cli", "web"), env=known, start_new_session=True)

    def answers() -> bool:
        try:
            return bool(urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read())
        except OSError:
            return False

    try:
        until(answers)
        (folder,) = tmp_path.glob(f"{__main__.FOLDER_PREFIX}*")
        assert any(folder.glob("*.db"))
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)  # alone, its children would live on
        process.wait(30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if number == signal.SIGKILL:
        Path(__main__.make_folder()).rmdir()
    assert not folder.exists()
