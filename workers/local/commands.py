"""Command lines of Headrace's own Python processes."""

import os
import sys
from collections.abc import Mapping
from typing import NoReturn

from app.config.settings import process_environment


def own(module: str, *arguments: str) -> tuple[str, ...]:
    """`python -P -m module`. Without -P, modules in the current directory would shadow ours."""
    return (sys.executable, "-P", "-m", module, *arguments)


def become(command: tuple[str, ...], more: Mapping[str, str]) -> NoReturn:
    """Replaces this process by a command, so that no parent process intercepts signals."""
    os.execve(command[0], command, process_environment() | dict(more))  # noqa: S606 - our own program, without a shell
