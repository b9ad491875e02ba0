"""Scheduling priorities: the niceness of each lane's process."""

import subprocess
import sys

import pytest

from app.broker.lanes import LANES
from workers.local.niceness import AUTOGROUP, NICE

pytestmark = pytest.mark.processes
SHOWS = (
    "import os, pathlib; from workers.local.niceness import lower_priority; "
    "{before}; lower_priority({lane!r}); print(os.nice(0)); {then}"
)
SESSION = f"print(pathlib.Path({str(AUTOGROUP)!r}).read_text())"


def shown(lane: str, *, before: str = "", then: str = "", is_leader: bool = True) -> list[str]:
    """The niceness that a process reports after it lowered its priority."""
    code = SHOWS.format(lane=lane, before=before or "pass", then=then or "pass")
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, start_new_session=is_leader, stdout=subprocess.PIPE, check=True, timeout=30).stdout
    return output.decode().split("\n")


def test_every_lane_has_its_place() -> None:
    """Breaks if a new lane has no priority, or history has a higher priority than live events."""
    assert NICE.keys() == set(LANES)
    assert 0 < NICE["live"] < NICE["backfill"] == max(NICE.values())


@pytest.mark.parametrize("lane", LANES)
def test_a_process_gives_way(lane: str) -> None:
    """Breaks if a lane gets as much CPU as the endpoint."""
    assert shown(lane)[0] == str(NICE[lane])


def test_who_is_lower_stays_so() -> None:
    """Breaks if a worker raises the lower priority that an operator has set, or fails because it may not."""
    assert shown("live", before="os.nice(12)")[0] == "12"


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel weighs processes, not sessions")
def test_the_session_gives_way_too() -> None:
    """Breaks where Linux schedules by session: there, the niceness of a process alone has no effect."""
    assert shown("backfill", then=SESSION)[1].endswith(f"nice {NICE['backfill']}")


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel weighs processes, not sessions")
def test_somebody_elses_session_is_left_alone() -> None:
    """Breaks if a worker in an operator's terminal slows down the other programs of that terminal."""
    before = AUTOGROUP.read_text().strip()
    assert shown("backfill", then=SESSION, is_leader=False)[1] == before
