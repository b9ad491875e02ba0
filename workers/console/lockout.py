"""Limits failed logins, by account name, by address and in total. In memory of a fixed size."""

import secrets
import threading
import time
from collections.abc import Callable
from hashlib import blake2b

BUCKETS = 1024  # of names and of addresses each
FREE = {"name": 5, "address": 20, "all": 100}  # failures before the first lock
FIRST_SECONDS, MAX_SECONDS = 30.0, 900.0  # each further failure doubles the lock
FORGET_SECONDS = 900.0  # without a failure


class Lockout:
    """Counts failures in buckets, which are chosen by a keyed hash.

    Known and unknown names are counted alike, so that a lock does not show which names exist. A name can share the
    bucket of another one, and is then locked with it. The key is new in each process, so that an attacker cannot choose
    names for this.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._key, self._lock = clock, secrets.token_bytes(16), threading.Lock()
        self._failures: dict[tuple[str, int], tuple[int, float]] = {}

    def seconds_left(self, name: str, address: str) -> float:
        """The seconds until the next attempt is allowed; 0: now."""
        with self._lock:
            return max(map(self._left, self._buckets(name, address)))

    def fail(self, name: str, address: str) -> None:
        with self._lock:
            for bucket in self._buckets(name, address):
                self._failures[bucket] = self._count(bucket) + 1, self._clock()

    def succeed(self, name: str) -> None:
        """Forgets the failures of a name. Those of its address stay: one known password must not reset the count."""
        with self._lock:
            self._failures.pop(self._bucket("name", name), None)

    def _buckets(self, name: str, address: str) -> tuple[tuple[str, int], ...]:
        return self._bucket("name", name), self._bucket("address", address), ("all", 0)

    def _bucket(self, kind: str, value: str) -> tuple[str, int]:
        digest = blake2b(value.encode(errors="replace"), key=self._key, digest_size=4).digest()
        return kind, int.from_bytes(digest) % BUCKETS

    def _count(self, bucket: tuple[str, int]) -> int:
        count, at = self._failures.get(bucket, (0, 0.0))
        return count if self._clock() - at < FORGET_SECONDS else 0

    def _left(self, bucket: tuple[str, int]) -> float:
        more = self._count(bucket) - FREE[bucket[0]]
        if more < 0:
            return 0.0
        seconds = min(MAX_SECONDS, FIRST_SECONDS * (1 << min(more, 10)))
        return max(0.0, self._failures[bucket][1] + seconds - self._clock())
