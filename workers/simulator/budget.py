"""How much somebody may ask for within any hour, or any other time."""

from collections import deque
from math import ceil
from threading import Lock
from time import monotonic


class Budget:
    """Counts what was spent, for each whose budget it is. Safe to use from several threads."""

    def __init__(self, limit: int, within: float) -> None:
        self._limit = limit
        self._within = within
        self._spent: dict[str, deque[tuple[float, int]]] = {}
        self._lock = Lock()

    def take(self, whose: str, cost: int = 1) -> int:
        """Spends so much, or says in how many seconds that will be possible."""
        now = monotonic()
        with self._lock:
            spent = self._kept(whose, now)
            over = sum(each for _, each in spent) + cost - self._limit
            for at, each in spent:
                if over <= 0:
                    break
                over -= each
                wait = ceil(at + self._within - now)
                if over <= 0:
                    return wait
            spent.append((now, cost))
            return 0

    def left(self, whose: str) -> int:
        """How much may be asked for now."""
        with self._lock:
            return self._limit - sum(each for _, each in self._kept(whose, monotonic()))

    def _kept(self, whose: str, now: float) -> deque[tuple[float, int]]:
        spent = self._spent.setdefault(whose, deque())
        while spent and spent[0][0] <= now - self._within:
            spent.popleft()
        return spent
