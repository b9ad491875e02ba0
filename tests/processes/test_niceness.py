"""Scheduling priorities: the niceness of each lane's process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.broker.lanes import LANES
from app.config.settings import Settings
from tests.support import of_worker
from workers.local.niceness import NICE

AUTOGROUP = Path("/proc/self/autogroup")
pytestmark = pytest.mark.processes
SCRIPT = (
    "import os, pathlib; from workers.local.niceness import lower_priority; "
    "{before}; lower_priority({lane!r}); print(os.nice(0)); {then}"
)
PRINT_SESSION = f"print(pathlib.Path({str(AUTOGROUP)!r}).read_text())"


def reported_niceness(lane: str, *, before: str = "", then: str = "", is_leader: bool = True) -> list[str]:
    """The niceness that a process reports after it lowered its priority."""
    code = SCRIPT.format(lane=lane, before=before or "pass", then=then or "pass")
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, start_new_session=is_leader, stdout=subprocess.PIPE, check=True, timeout=30).stdout
    return output.decode().split("\n")


def test_every_lane_has_a_niceness() -> None:
    """Breaks if a new lane has no niceness, or the backfill lane does not have the lowest priority."""
    assert NICE.keys() == set(LANES)
    assert 0 < NICE["live"] < NICE["backfill"] == max(NICE.values())


@pytest.mark.parametrize("lane", LANES)
def test_a_worker_has_a_lower_priority_than_the_endpoint(lane: str) -> None:
    """Breaks if the worker of a lane gets as much CPU as the endpoint."""
    assert reported_niceness(lane)[0] == str(NICE[lane])


def test_a_lower_priority_is_kept() -> None:
    """Breaks if a worker raises a lower priority that an operator has set, or fails because raising it is forbidden."""
    assert reported_niceness("live", before="os.nice(12)")[0] == "12"


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel schedules by process, not by session")
def test_the_session_of_a_worker_has_a_lower_priority_too() -> None:
    """Breaks if only the process is niced: where Linux schedules by session, that has no effect."""
    assert reported_niceness("backfill", then=PRINT_SESSION)[1].endswith(f"nice {NICE['backfill']}")


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel schedules by process, not by session")
def test_the_session_of_another_program_is_unchanged() -> None:
    """Breaks if a worker that an operator starts in a terminal slows down the other programs of that terminal."""
    before = AUTOGROUP.read_text().strip()
    assert reported_niceness("backfill", then=PRINT_SESSION, is_leader=False)[1] == before


def test_the_processes_of_postgresql_share_the_niceness_of_background_work(settings: Settings) -> None:
    """Breaks if queries of the lane `derive` take the CPU from live events, or another process is niced."""
    code = """
import os
os.nice(7)
from app.config.settings import load
from app.scheduling import share_niceness
from workers.store.engine import make_background
connection = make_background(load(), "headrace-derive").connect().connection
pid = connection.dbapi_connection.info.backend_pid
share_niceness(os.getppid(), 1)
print(os.getpriority(os.PRIO_PROCESS, pid) - os.nice(0), os.getpriority(os.PRIO_PROCESS, os.getppid()))
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=of_worker(settings), capture_output=True, text=True, check=True, timeout=30)
    assert found.stdout.split() == ["0", str(os.nice(0))]
