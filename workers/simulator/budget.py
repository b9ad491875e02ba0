"""A moving-window limit with a cost per request and an exact wait.

`limits` (MovingWindowRateLimiter with MemoryStorage) does not fit: it refuses a request that is sent exactly after the
wait, it waits only until the oldest entry expires even if the cost needs more room, and it starts timer threads.
"""

from collections import deque
from itertools import accumulate
from math import ceil
from threading import Lock
from time import monotonic


class Budget:
    """At most `limit` per key within any `seconds`. Safe to use from several threads."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit, self._seconds = limit, seconds
        self._spent: dict[str, deque[tuple[float, int]]] = {}
        self._lock = Lock()

    def spend(self, key: str, cost: int = 1) -> int:
        """Spends `cost` (at most the limit) and returns 0, or returns the seconds until that is possible."""
        now = monotonic()
        with self._lock:
            spent = self._recent(key, now)
            excess = sum(each for _, each in spent) + cost - self._limit
            if excess <= 0:
                spent.append((now, cost))
                return 0
            freed = zip(spent, accumulate(each for _, each in spent), strict=True)
            return next(ceil(at + self._seconds - now) for (at, _), total in freed if total >= excess)

    def left(self, key: str) -> int:
        """The amount that can be spent now."""
        with self._lock:
            return self._limit - sum(each for _, each in self._recent(key, monotonic()))

    def _recent(self, key: str, now: float) -> deque[tuple[float, int]]:
        spent = self._spent.setdefault(key, deque())
        while spent and spent[0][0] <= now - self._seconds:
            spent.popleft()
        return spent
