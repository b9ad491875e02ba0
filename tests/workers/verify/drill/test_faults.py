"""The fault injector, on processes of the test."""

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
    """A stack whose supervisor is the test."""
    (tmp_path / "data").mkdir()
    return Stack(tmp_path, os.getpid())


@pytest.fixture
def process() -> Iterator[psutil.Process]:
    """A child process, which has a child."""
    with subprocess.Popen(PARENT) as started:
        found = psutil.Process(started.pid)
        while not found.children():
            time.sleep(0.01)
        yield found
        for one in (*found.children(), found) if found.is_running() else ():
            one.resume()
            one.kill()


def fault(stack: Stack, pid: int, group: str = "live", **how: Any) -> Injected:
    """The result of one fault in a group with this process."""
    (stack.data / "stack.json").write_text(json.dumps({"processes": {group: [pid]}}))
    one = PlannedFault(**({"at": 0.0, "kind": "kill", "group": group, "choice": 0.0, "seconds": 0.2} | how))
    injector = FaultInjector(stack, [one], lambda _: None)
    injector.run(Flag())
    return injector.made[0]


def test_a_process_of_the_stack_is_killed(stack: Stack, process: psutil.Process) -> None:
    child = process.children()[0]
    assert fault(stack, process.pid).pid == process.pid
    assert process.wait(5) == -9
    child.kill()


def test_half_of_the_faults_meet_a_child(stack: Stack, process: psutil.Process) -> None:
    """Breaks if the web server's children, which serve the requests, never get a fault."""
    child = process.children()[0]
    made = fault(stack, process.pid, "web", choice=0.7)
    assert (made.pid, made.whom) == (child.pid, "web, a child process")
    assert process.wait(5) == 0


def test_nothing_stays_frozen(stack: Stack, process: psutil.Process) -> None:
    """Breaks if a freeze has no effect, or an interrupted drill leaves a frozen process."""
    states, stop = [], Flag()

    def freeze_seen(_: Injected) -> None:
        time.sleep(0.05)
        states.append(process.status())
        stop.set()

    (stack.data / "stack.json").write_text(json.dumps({"processes": {"live": [process.pid]}}))
    FaultInjector(stack, [PlannedFault(0.0, "freeze", "live", 0.0, 60.0)], freeze_seen).run(stop)
    assert states == [psutil.STATUS_STOPPED]
    assert process.status() != psutil.STATUS_STOPPED


def test_a_foreign_process_gets_no_fault(stack: Stack, process: psutil.Process) -> None:
    """Breaks if a fault meets a program that has reused a pid of stack.json."""
    grandchild = process.children()[0]
    made = fault(stack, grandchild.pid)
    assert made.pid is None
    assert str(made).endswith("live: no process")
    assert grandchild.is_running()


def test_a_group_outside_the_stack_gets_no_fault(stack: Stack, process: psutil.Process) -> None:
    """Breaks if a drill with the operator's own broker fails, or injects the fault elsewhere."""
    (stack.data / "stack.json").write_text(json.dumps({"processes": {"live": [process.pid]}}))
    injector = FaultInjector(stack, [PlannedFault(0.0, "kill", "broker", 0.0, 1.0)], lambda _: None)
    injector.run(Flag())
    assert injector.injected == []
    assert process.is_running()
