"""Other processes: whether they live, and their memory."""

import contextlib
from pathlib import Path

import psutil


def memory_of(pid: int) -> bytes:
    """The writable memory of a process, with that which it shares with others since a fork."""
    found = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, rights, *_ = line.split()
            begin, _, end = place.partition("-")
            if rights.startswith("rw"):
                with contextlib.suppress(OSError):
                    memory.seek(int(begin, 16))
                    found.append(memory.read(int(end, 16) - int(begin, 16)))
    return b"".join(found)


def lives(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
