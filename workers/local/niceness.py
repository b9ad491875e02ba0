"""Who goes first when there is too little CPU: the endpoint, then what has just come, then history."""

import contextlib
import os
import time
from pathlib import Path

# A sender waits for the endpoint, and somebody looking at today's data for the live lane; nobody waits for history.
# The endpoint, the broker and PostgreSQL keep 0. With 5 for the live lane its rows were up to twice as late (p99) when
# all cores are full, and the answers no sooner.
NICE = {"live": 2, "download": 2, "maintenance": 10, "backfill": 15}
AUTOGROUP = Path("/proc/self/autogroup")
ATTEMPTS, PAUSE_SECONDS = 50, 0.1


def lower_priority(lane: str) -> None:
    """Lowers this process's priority to that of its lane. One that is lower already stays as it is.

    Where Linux weighs sessions (sched(7), "The autogroup feature", as on most machines without containers), it looks
    at the niceness of processes only within one, so the session is told as well, if it is this process's own: measured
    with two that spin on one core, niceness 10 alone leaves both with half of it, together with the session's a tenth.
    """
    with contextlib.suppress(OSError):  # a sandbox may forbid it: this is a favour, not a need
        os.nice(max(0, NICE[lane] - os.nice(0)))
    if AUTOGROUP.exists() and os.getsid(0) == os.getpid():
        _set_session_niceness(NICE[lane])


def _set_session_niceness(niceness: int) -> None:
    """The kernel takes one such change in a tenth of a second, of all who are not root."""
    for _ in range(ATTEMPTS):
        try:
            AUTOGROUP.write_text(str(niceness))
        except BlockingIOError:
            time.sleep(PAUSE_SECONDS)
        except OSError:
            return
        else:
            return
