"""A clock for tests of code that waits as long as there is progress."""

from collections.abc import Callable, Iterable, Iterator

import pytest

from workers.local import patience


class Clock:
    """Stands in for the module `time`. Each sleep lasts `step` seconds, and takes the next of the `actions`."""

    def __init__(self, step: float = 0.0, actions: Iterable[Callable[[], object]] = ()) -> None:
        self.now, self._step = 1000.0, step
        self._actions: Iterator[Callable[[], object]] = iter(actions)
        self.sleeps = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.now += self._step
        self.sleeps += 1
        if action := next(self._actions, None):
            action()


def install(monkeypatch: pytest.MonkeyPatch, clock: Clock, *users: object) -> Clock:
    """Makes Patience, and the modules that use it, read this clock. Other code keeps the real one."""
    for module in (patience, *users):
        monkeypatch.setattr(module, "time", clock)
    return clock
