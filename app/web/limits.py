"""Limits of a web process: its connections, and the memory of the bodies that it holds."""

import contextlib
import ctypes
import resource
from collections.abc import Callable, Iterator

from app.config.settings import Settings
from app.errors import Misconfigured

# A held connection with 30 kB of headers and a small body of 16 KiB, which no budget counts, costs 104 kB (measured).
# With the default budget for bodies and 90 MiB for the processes, so many fit in the 1 GiB of the files in deploy.
DEFAULT_CONNECTIONS = 6_144
CONNECTION_BYTES = 104 * 1024
RESERVED_FILES = 128  # of a process, for libraries, logs, metrics and the broker
# glibc maps each buffer of this size or more separately, and returns it to the system when it is freed. By default,
# after the first such buffer is freed, glibc raises the threshold, up to 32 MiB, and keeps the memory of smaller
# buffers.
MMAP_THRESHOLD = 128 * 1024
M_MMAP_THRESHOLD = -3  # mallopt(3)


def connections_per_process(settings: Settings) -> int:
    """The connections that one web process accepts. Raises Misconfigured if they exceed the limit of open files.

    A connection costs one open file.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = DEFAULT_CONNECTIONS + RESERVED_FILES if hard == resource.RLIM_INFINITY else hard
    available = max(files - RESERVED_FILES, 1)
    if not settings.max_connections:
        return min(max(DEFAULT_CONNECTIONS // settings.web_processes, 1), available)
    wanted = -(-settings.max_connections // settings.web_processes)
    if wanted > available and hard != resource.RLIM_INFINITY:
        raise Misconfigured(
            f"{wanted} connections per process need a limit of {wanted + RESERVED_FILES} open files, and it is {hard}; "
            "raise it (ulimit -Hn, LimitNOFILE=) or lower the setting",
            setting="HEADRACE_MAX_CONNECTIONS",
        )
    return wanted


def raise_file_limit(connections: int) -> None:
    """Raises the soft limit of open files of this process and its children to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def return_large_buffers() -> None:
    """Makes glibc give the memory of large bodies back to the system. Other C libraries have no such setting."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


class BudgetExceeded(Exception):
    """The bodies in memory have used up their budget."""


class BodyBudget:
    """The memory of the bodies that a process holds, from their first byte until their answer, in bytes.

    Each process has an equal share of the machine's budget, but at least room for one body of maximum size.
    """

    def __init__(self, settings: Settings) -> None:
        self.limit = max(settings.body_memory_bytes // settings.web_processes, settings.max_body_bytes)
        self.used = 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """A function that reserves memory for a part of a body until the end of the block, or raises BudgetExceeded."""
        held = 0

        def reserve(size: int) -> None:
            nonlocal held
            if self.used + size > self.limit:
                raise BudgetExceeded
            self.used += size
            held += size

        try:
            yield reserve
        finally:
            self.used -= held
