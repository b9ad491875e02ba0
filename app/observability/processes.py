"""Checks whether a process of this machine is alive."""

import os


def process_alive(pid: int) -> bool:
    """Also true for a process of another user, which cannot be signalled."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
