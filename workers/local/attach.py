"""Finds the stack that runs in a data directory."""

import fcntl
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.config.settings import Settings, load
from app.errors import Misconfigured
from workers.local.files import read_json
from workers.local.secrets import GENERATED_SECRETS, SECRETS

STACK, LOCK = "stack.json", "lock"
COMPLETED = (
    *("database_url", "broker_url", "redis_url", "flower_auth"),
    *("junction_webhook_secrets", "terra_signing_secrets", "encryption_keys"),
)


def attach(settings: Settings, data_dir: Path, *, broker: bool = True) -> Settings:
    """Completes missing settings from the stack that runs in the folder. Raises Misconfigured if none runs there."""
    wanted_broker = broker and not (settings.broker_url or settings.redis_url)
    if settings.database_url and not wanted_broker:
        return settings
    stack, kept = _running_stack(data_dir.absolute()), read_json(data_dir / SECRETS)
    values = {variable: kept[name] for name, variable, _ in GENERATED_SECRETS if variable and name in kept}
    values |= {variable: stack[name] for name, variable, _ in GENERATED_SECRETS if variable and name in stack}
    values["DATABASE_URL"] = stack["database_url"]
    if wanted_broker:
        values |= {"BROKER_URL": stack["broker_url"], "REDIS_URL": stack.get("redis_url", "")}
    found = load(values)
    return replace(settings, **{name: getattr(found, name) for name in COMPLETED if not getattr(settings, name)})


def operations_of(settings: Settings, data_dir: Path) -> str | None:
    """The URL of the running stack's operations port; None without one, or if DATABASE_URL selects another stack."""
    return None if settings.database_url else _running_stack(data_dir.absolute()).get("operations") or None


def _running_stack(data_dir: Path) -> dict[str, Any]:
    stack = read_json(data_dir / STACK)
    if not stack or not _is_locked(data_dir):
        raise Misconfigured(
            f"no stack runs in {data_dir}; start one with `headrace up --data-dir {shlex.quote(str(data_dir))}`, "
            "or set DATABASE_URL and BROKER_URL"
        )
    return stack


def try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(data_dir: Path) -> bool:
    """Whether a stack runs there. A killed stack leaves its files, but not the lock."""
    try:
        lock = os.open(data_dir / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except PermissionError:
        raise Misconfigured(
            f"{data_dir / LOCK} belongs to another user; run this as the user of `headrace up`"
        ) from None
    try:
        return not try_lock(lock)
    finally:
        os.close(lock)
