"""The data directory of a stack: files that only their owner can read, and waiting for space on a full disk."""

import contextlib
import json
import logging
import os
import pwd
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.errors import Misconfigured

MIN_FREE_BYTES = 64 * 1024 * 1024  # a new PostgreSQL cluster takes 40 MB, and its first WAL file 16 MB
POLL_SECONDS = 1.0
_log = logging.getLogger(__name__)


def write_secret(file: Path, text: str, owner: pwd.struct_passwd | None = None) -> None:
    """Writes atomically, with mode 0600 from the beginning."""
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(text)
            if owner is not None:
                os.fchown(opened.fileno(), owner.pw_uid, owner.pw_gid)
            opened.flush()
            os.fsync(opened.fileno())
        new.replace(file)
    except OSError:  # for example a full disk
        new.unlink(missing_ok=True)
        raise


def user_name(uid: int) -> str:
    """`user NAME`, or `user UID` for a user without a name on this machine."""
    with contextlib.suppress(KeyError):
        return f"user {pwd.getpwuid(uid).pw_name}"
    return f"user {uid}"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; {} if the file does not exist. Raises Misconfigured."""
    try:
        return dict(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise Misconfigured(f"{file} belongs to another user; run this as the user of `headrace up`") from None
    except ValueError:
        raise Misconfigured(f"{file} is not valid JSON; restore it from a backup") from None


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
