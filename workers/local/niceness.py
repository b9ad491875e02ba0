"""CPU priorities: the endpoint first, then live events, then history."""

import contextlib
import os
import time
from pathlib import Path

# Senders wait for the endpoint, and users for the live lane; history can wait. The endpoint, the broker and PostgreSQL
# keep 0. With 5 for the live lane, its rows were up to twice as late (p99) when all cores were busy, and the
# endpoint's responses were no faster.
NICE = {"live": 2, "download": 2, "notify": 2, "maintenance": 10, "derive": 10, "backfill": 15}
AUTOGROUP = Path("/proc/self/autogroup")
ATTEMPTS, PAUSE_SECONDS = 50, 0.1


def lower_priority(lane: str) -> None:
    """Lowers this process's priority to that of its lane; a lower priority stays.

    Where Linux schedules by session (sched(7), "The autogroup feature", on most machines without containers), niceness
    only counts within a session. So a session of this process's own gets the same niceness. Measured with two busy
    processes on one core: niceness 10 alone leaves each half of the CPU; with the session's, this one gets a tenth.
    """
    with contextlib.suppress(OSError):  # optional: a sandbox may forbid it
        os.nice(max(0, NICE[lane] - os.nice(0)))
    if AUTOGROUP.exists() and os.getsid(0) == os.getpid():
        _set_session_niceness(NICE[lane])


def _set_session_niceness(niceness: int) -> None:
    """Retries, because the kernel accepts only one change per 0.1 s from all users but root."""
    for _ in range(ATTEMPTS):
        try:
            AUTOGROUP.write_text(str(niceness))
        except BlockingIOError:
            time.sleep(PAUSE_SECONDS)
        except OSError:
            return
        else:
            return
