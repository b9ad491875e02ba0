"""Many cases in one test, each of which is tried whatever became of the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Failures(dict[str, str]):
    """The cases that failed, and how: a test of many cases ends with `assert failures == {}`."""

    @contextmanager
    def of(self, *case: Any) -> Iterator[None]:
        """Notes what fails within the block and goes on."""
        try:
            yield
        except (AssertionError, pytest.fail.Exception) as failed:
            self[", ".join(one if isinstance(one, str) else repr(one) for one in case)] = str(failed)
