"""The command line of a Python process of Headrace's own."""

import sys


def own(module: str, *arguments: str) -> tuple[str, ...]:
    """`python -P -m` with a module of ours.

    Without -P the current directory is first on the path, and modules of the same name in it run instead of ours.
    """
    return (sys.executable, "-P", "-m", module, *arguments)
