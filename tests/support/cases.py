"""Many cases in one test. Every case runs, and the test lists all that failed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from app.errors import Unprocessable

# Bodies that are no JSON object, or an empty one.
MALFORMED = [b"", b"x", b"[]", b"1", b"null", b'"canary"', b"{", b"{}", b"\xff", b"\xef\xbb\xbf{}", b"[" * 100_000]


def malformed(name: str) -> list[bytes]:
    """Bodies of events whose type, under this name, is absent or no text."""
    values = (b"null", b"1", b'"\xff"', b'{"canary":1}', b'"x","data":' + b"[" * 100_000)
    return MALFORMED + [b'{"%s":%s}' % (name.encode(), value) for value in values]


def refusal(read: Callable[..., Any], *arguments: Any) -> str:
    """The message of an Unprocessable. It quotes no value of the input: "canary" stands for one."""
    with pytest.raises(Unprocessable) as refused:
        read(*arguments)
    assert refused.value.__cause__ is None
    assert "canary" not in str(refused.value)
    return str(refused.value)


class Failures(dict[str, str]):
    """The failed cases and their messages. A test of many cases ends with `assert failures == {}`."""

    @contextmanager
    def of(self, *case: Any) -> Iterator[None]:
        """Records a failure within the block, and continues."""
        try:
            yield
        except (AssertionError, pytest.fail.Exception) as failed:
            self[", ".join(one if isinstance(one, str) else repr(one) for one in case)] = str(failed)


def each(*cases: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Makes one test of a function and its cases. A case that is a tuple holds several arguments."""

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        def run() -> None:
            failures = Failures()
            for case in cases:
                arguments = case if isinstance(case, tuple) else (case,)
                with failures.of(*arguments):
                    test(*arguments)
            assert failures == {}

        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return run

    return decorate
