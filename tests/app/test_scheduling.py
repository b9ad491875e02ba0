"""Time slices, as the kernel reports them."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCHEDULER = Path("/proc/self/sched")
KERNEL = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
SHOW = """
import os
print([line.split()[-1] for line in open('/proc/self/sched') if 'slice' in line], os.nice(0), os.sched_getscheduler(0))
"""
PROGRAM = """
import os, subprocess, sys
from app.scheduling import preempt_others
{before}
preempt_others()
exec({show!r})
subprocess.run([sys.executable, "-c", {show!r}])
"""


def shown(before: str = "pass") -> list[str]:
    command = [sys.executable, "-c", PROGRAM.format(before=before, show=SHOW)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(
    KERNEL < (6, 12) or not SCHEDULER.exists() or "slice" not in SCHEDULER.read_text(),
    reason="this kernel has no time slices of processes, or does not show them",
)
def test_a_process_and_its_children_get_the_shortest_slice() -> None:
    """Breaks if the endpoint waits for the slice of a worker, or changes its niceness."""
    assert set(shown("os.nice(3)")) == {f"['100000'] {os.nice(0) + 3} 0"}


def test_another_policy_is_kept() -> None:
    """Breaks if an operator's policy, such as SCHED_BATCH, is replaced."""
    (own, child) = shown("os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))")
    assert own == child
    assert own.endswith(str(os.SCHED_BATCH))
