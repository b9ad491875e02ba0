"""The striker, on processes of the test's own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event as Flag
from typing import Any

import psutil
import pytest

from workers.local.temporary import Stack
from workers.verify.drill.faults import FaultInjector, Injected
from workers.verify.drill.plan import PlannedFault

SLEEPER = (sys.executable, "-c", "import time; time.sleep(60)")
PARENT = (sys.executable, "-c", f"import subprocess; subprocess.Popen({list(SLEEPER)!r}).wait()")


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """A stack whose supervisor are we."""
    (tmp_path / "data").mkdir()
    return Stack(tmp_path, os.getpid())


@pytest.fixture
def process() -> Iterator[psutil.Process]:
    """A child of ours, which has a child."""
    with subprocess.Popen(PARENT) as started:
        found = psutil.Process(started.pid)
        while not found.children():
            time.sleep(0.01)
        yield found
        for one in (*found.children(), found) if found.is_running() else ():
            one.resume()
            one.kill()


def fault(stack: Stack, pid: int, group: str = "live", **how: Any) -> Injected:
    """What came of one strike on a group that has this process."""
    (stack.data / "stack.json").write_text(json.dumps({"processes": {group: [pid]}}))
    one = PlannedFault(**({"at": 0.0, "kind": "kill", "group": group, "choice": 0.0, "seconds": 0.2} | how))
    injector = FaultInjector(stack, [one], lambda _: None)
    injector.run(Flag())
    return injector.made[0]


def test_a_process_of_the_stack_is_killed(stack: Stack, process: psutil.Process) -> None:
    """Breaks if the drill only says that it strikes."""
    child = process.children()[0]
    assert fault(stack, process.pid).pid == process.pid
    assert process.wait(5) == -9
    child.kill()


def test_half_of_the_strikes_meet_a_child(stack: Stack, process: psutil.Process) -> None:
    """Breaks if the processes that answer requests, which are children of the web server, are never struck."""
    child = process.children()[0]
    made = fault(stack, process.pid, "web", choice=0.7)
    assert (made.pid, made.whom) == (child.pid, "web, a child of it")
    assert process.wait(5) == 0


def test_nothing_stays_frozen(stack: Stack, process: psutil.Process) -> None:
    """Breaks if a freeze does not freeze, or whoever ends the drill leaves a process that hears nothing."""
    states, stop = [], Flag()

    def told(_: Injected) -> None:
        time.sleep(0.05)
        states.append(process.status())
        stop.set()

    (stack.data / "stack.json").write_text(json.dumps({"processes": {"live": [process.pid]}}))
    FaultInjector(stack, [PlannedFault(0.0, "freeze", "live", 0.0, 60.0)], told).run(stop)
    assert states == [psutil.STATUS_STOPPED]
    assert process.status() != psutil.STATUS_STOPPED


def test_a_stranger_is_not_struck(stack: Stack, process: psutil.Process) -> None:
    """Breaks if a number that stack.json still has, and somebody else has by now, is struck."""
    grandchild = process.children()[0]
    made = fault(stack, grandchild.pid)
    assert made.pid is None
    assert str(made).endswith("live: nobody there")
    assert grandchild.is_running()


def test_a_group_that_is_not_ours_is_not_struck(stack: Stack, process: psutil.Process) -> None:
    """Breaks if a drill beside the operator's own broker fails or strikes something else."""
    (stack.data / "stack.json").write_text(json.dumps({"processes": {"live": [process.pid]}}))
    injector = FaultInjector(stack, [PlannedFault(0.0, "kill", "broker", 0.0, 1.0)], lambda _: None)
    injector.run(Flag())
    assert injector.injected == []
    assert process.is_running()
