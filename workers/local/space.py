"""Waiting for space on a full disk."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

MIN_FREE_BYTES = 64 * 1024 * 1024  # a new PostgreSQL cluster takes 40 MB, and its first WAL file 16 MB
POLL_SECONDS = 1.0
_log = logging.getLogger(__name__)


def free_bytes(folder: Path) -> int:
    """The free space of the folder's file system; MIN_FREE_BYTES if it has no size, such as /proc."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else MIN_FREE_BYTES


def wait_for_space(
    folder: Path, free: Callable[[Path], int] = free_bytes, pause: Callable[[float], None] = time.sleep
) -> None:
    """Returns once the file system of the folder, which may not exist yet, has space.

    If `headrace up` ended, a service manager would start it again and again, and give up after some attempts.
    """
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    is_waiting = False
    while (left := free(existing)) < MIN_FREE_BYTES:
        if not is_waiting:
            left_mb, needed_mb = left // 2**20, MIN_FREE_BYTES // 2**20
            _log.warning("the disk of %s is full: %d MB are free; waiting for %d MB", existing, left_mb, needed_mb)
        is_waiting = True
        pause(POLL_SECONDS)
    if is_waiting:
        _log.warning("the disk of %s has space; starting", existing)
