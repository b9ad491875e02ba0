"""Keeps the garbage collector away from objects that live as long as the process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Turns collection off during imports: they leave no garbage, and collections are a quarter of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def freeze() -> None:
    """Excludes all existing objects from later collections.

    The libraries are 50,000 objects in the endpoint and 130,000 in a worker. Traversing them cost a fifth of the Python
    time of a request (91 us, 73 without).
    """
    gc.collect()
    gc.freeze()
