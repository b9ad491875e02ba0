"""Waiting as long as there is progress."""

import time


class Patience:
    """Ends after `idle` seconds without progress, and in any case after `most` seconds.

    A fixed deadline fails on a busy machine, where the same work takes several times as long.
    """

    def __init__(self, idle: float, most: float) -> None:
        self._idle, self._most = idle, most
        self._began = self._moved = time.monotonic()
        self._before: tuple[object, ...] = ()

    @property
    def waited(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds until the end if there is no more progress."""
        now = time.monotonic()
        return max(0.0, min(self._moved + self._idle, self._began + self._most) - now)

    def ends(self, *state: object) -> bool:
        """Whether to give up. Any change of `state` since the previous call is progress."""
        if state != self._before:
            self._before, self._moved = state, time.monotonic()
        return self.left == 0.0
