"""CPU scheduling: gives precedence to processes that others wait for."""

import contextlib
import ctypes
import os
import platform
import struct
import time
from pathlib import Path

# Since 6.12, Linux lets a process choose its time slice, and a process that wakes preempts one with a longer slice
# (sched_setattr(2); kernel documentation, "EEVDF Scheduler"). The shortest slice is 0.1 ms, the default 1.4 ms on two
# cores. Older kernels ignore the slice. Python and glibc before 2.41 have no function for this system call.
SLICE_NANOSECONDS = 100_000
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
ATTRIBUTES = struct.Struct("=IIQiIQQQII")  # struct sched_attr: size, policy, flags, nice, priority, runtime ...
ATTEMPTS, PAUSE_SECONDS = 50, 0.1


def preempt_others() -> None:
    """Lets this process and its children run as soon as they wake, if the kernel supports that.

    The share of the CPU and the niceness stay the same. With 8 connections on two cores, 1.2 times as many events were
    committed as with the default slice (record 0082).
    """
    number = SCHED_SETATTR.get(platform.machine())
    if number is None or not hasattr(os, "sched_getscheduler") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    wanted = ATTRIBUTES.pack(ATTRIBUTES.size, os.SCHED_OTHER, 0, niceness, 0, SLICE_NANOSECONDS, 0, 0, 0, 0)
    ctypes.CDLL(None).syscall(number, 0, wanted, 0)  # a sandbox may forbid it


def set_session_niceness(pid: int, niceness: int) -> None:
    """Sets the niceness of the session that a process leads.

    If Linux schedules by session (sched(7), "The autogroup feature"; most machines without containers do), the niceness
    of a process only counts within its session. Measured with two busy processes on one core: with niceness 10 of the
    process alone, each gets half of the CPU; with that of its session too, it gets a tenth. Retries, because the kernel
    accepts only one change per 0.1 s from users other than root.
    """
    autogroup = Path("/proc", str(pid), "autogroup")
    for _ in range(ATTEMPTS):
        try:
            autogroup.write_text(str(niceness))
        except BlockingIOError:
            time.sleep(PAUSE_SECONDS)
        except OSError:
            return
        else:
            return


def share_niceness(pid: int, port: int) -> None:
    """Gives the PostgreSQL process that serves a connection from this local port the niceness of this process.

    Only if PostgreSQL runs on this machine and the operating system permits it. The process is identified by its title,
    in which PostgreSQL shows the port (update_process_title).
    """
    with contextlib.suppress(OSError):
        title = Path("/proc", str(pid), "cmdline").read_bytes()
        if title.startswith(b"postgres: ") and b"(%d)" % port in title:
            os.setpriority(os.PRIO_PROCESS, pid, os.nice(0))
            set_session_niceness(pid, os.nice(0))
