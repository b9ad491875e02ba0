"""Checks whether a process of this machine is alive."""

import os


def process_alive(pid: int) -> bool:
    """True also for a process of another user, to which no signal can be sent."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
