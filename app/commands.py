"""Headrace's own Python processes: their command lines, and whether one is alive."""

import os
import sys
from collections.abc import Collection, Mapping
from typing import NoReturn

from app.config.settings import process_environment


def own(module: str, *arguments: str) -> tuple[str, ...]:
    """`python -P -m module`. Without -P, modules in the current directory would shadow ours."""
    return (sys.executable, "-P", "-m", module, *arguments)


def become(command: tuple[str, ...], more: Mapping[str, str], *, without: Collection[str] = ()) -> NoReturn:
    """Replaces this process by a command, so that no parent process intercepts signals.

    The command gets the environment with the variables in `more`, and without those in `without`.
    """
    environment = {name: value for name, value in process_environment().items() if name not in without}
    os.execve(command[0], command, environment | dict(more))  # noqa: S606 - our own program, without a shell


def process_alive(pid: int) -> bool:
    """Also true for a process of another user, which cannot be signalled."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
