"""The command line of a Python process of Headrace's own, and how a process becomes such a one."""

import os
import sys
from collections.abc import Mapping
from typing import NoReturn

from app.config.settings import process_environment


def own(module: str, *arguments: str) -> tuple[str, ...]:
    """`python -P -m` with a module of ours.

    Without -P the current directory is first on the path, and modules of the same name in it run instead of ours.
    """
    return (sys.executable, "-P", "-m", module, *arguments)


def become(command: tuple[str, ...], more: Mapping[str, str]) -> NoReturn:
    """Runs a command in this process, with more variables in its environment. No parent stays that swallows signals."""
    os.execve(command[0], command, process_environment() | dict(more))  # noqa: S606 - a program of ours, no shell
