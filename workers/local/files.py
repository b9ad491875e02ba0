"""Files that only their owner may read."""

import json
import os
import pwd
import secrets
from pathlib import Path
from typing import Any

from app.errors import Misconfigured


def write_secret(file: Path, text: str, owner: pwd.struct_passwd | None = None) -> None:
    """Writes a file that only its owner may read: whole or not at all, and never readable in between."""
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
        opened.write(text)
        if owner is not None:
            os.fchown(opened.fileno(), owner.pw_uid, owner.pw_gid)
        opened.flush()
        os.fsync(opened.fileno())
    new.replace(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of ours; empty if there is no such file."""
    try:
        return dict(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise Misconfigured(f"{file} belongs to somebody else; run this as the user who ran `headrace up`") from None
    except ValueError:
        raise Misconfigured(f"{file} is damaged; bring it back from a copy") from None
