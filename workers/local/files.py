"""Files that only their owner can read."""

import contextlib
import json
import os
import pwd
import secrets
from pathlib import Path
from typing import Any

from app.errors import Misconfigured


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
