"""Several cases in one test: every case runs, and the test lists each failed case."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from app.errors import Unprocessable

# Bodies that are not a JSON object, or an empty object.
MALFORMED = [b"", b"x", b"[]", b"1", b"null", b'"canary"', b"{", b"{}", b"\xff", b"\xef\xbb\xbf{}", b"[" * 100_000]


def malformed(name: str) -> list[bytes]:
    """MALFORMED, and bodies whose event type, in the field `name`, is no string or is followed by deep nesting."""
    values = (b"null", b"1", b'"\xff"', b'{"canary":1}', b'"x","data":' + b"[" * 100_000)
    return MALFORMED + [b'{"%s":%s}' % (name.encode(), value) for value in values]


def refusal(read: Callable[..., Any], *arguments: Any) -> str:
    """The message of the Unprocessable that `read` raises. Asserts that it does not quote "canary", the input."""
    with pytest.raises(Unprocessable) as raised:
        read(*arguments)
    assert raised.value.__cause__ is None
    assert "canary" not in str(raised.value)
    return str(raised.value)


class Failures(dict[str, str]):
    """The failed cases and their messages. A test of several cases ends with `assert failures == {}`."""

    @contextmanager
    def of(self, *case: Any) -> Iterator[None]:
        """Records a failed assertion of the block instead of raising it."""
        try:
            yield
        except (AssertionError, pytest.fail.Exception) as failed:
            self[", ".join(one if isinstance(one, str) else repr(one) for one in case)] = str(failed)


def each(*cases: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Turns a function and its cases into one test. A tuple is a case with several arguments."""

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
