"""HMAC-SHA256 of a whole body, or of a body that is hashed as it arrives."""

import hashlib
import hmac
from collections.abc import Iterable
from typing import NamedTuple


class HmacInput(NamedTuple):
    """A key, and the bytes that are signed in front of the body."""

    key: bytes
    prefix: bytes


class HashedBody:
    """The HMACs of a body that is hashed part by part, one for each input.

    A body of 64 MiB that is hashed at its end blocks a thread for 0.1 s and is copied four times by Svix's library.
    """

    def __init__(self, inputs: Iterable[HmacInput]) -> None:
        self._macs = {one: hmac.new(one.key, one.prefix, hashlib.sha256) for one in inputs}

    def update(self, part: bytes) -> None:
        """Adds the next part of the body."""
        for mac in self._macs.values():
            mac.update(part)

    def digest(self, wanted: HmacInput) -> bytes:
        """The HMAC of the parts so far. Raises KeyError for an input that was not named at the beginning."""
        return self._macs[wanted].digest()


def digest(wanted: HmacInput, body: bytes, hashed: HashedBody | None) -> bytes:
    """The HMAC of a body, taken from `hashed` if the body was hashed as it arrived."""
    return hashed.digest(wanted) if hashed else hmac.digest(wanted.key, wanted.prefix + body, hashlib.sha256)
