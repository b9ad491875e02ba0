"""CPU priorities: the endpoint first, then live events, then history."""

import contextlib
import os

from app.scheduling import set_session_niceness

# Senders wait for the endpoint, and users for the live lane; history can wait. The endpoint, the broker and PostgreSQL
# keep 0; PostgreSQL's processes that serve the lane `derive` get its niceness (workers/store/engine.py). With 5 for the
# live lane, its rows were up to twice as late (p99) when all cores were busy, and the endpoint's responses were no
# faster.
NICE = {"live": 2, "download": 2, "notify": 2, "maintenance": 10, "derive": 10, "backfill": 15}


def lower_priority(lane: str) -> None:
    """Lowers the priority of this process and its session to that of its lane. A lower priority stays."""
    with contextlib.suppress(OSError):  # optional: a sandbox may forbid it
        os.nice(max(0, NICE[lane] - os.nice(0)))
    if os.getsid(0) == os.getpid():
        set_session_niceness(os.getpid(), NICE[lane])
