"""Waiting as long as there is progress."""

import pytest

from tests.support.patience import Clock, install
from workers.local.patience import Patience


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return install(monkeypatch, Clock())


def test_progress_extends_the_deadline(clock: Clock) -> None:
    """Breaks if a busy machine, which is slow but not stuck, is given up."""
    patience = Patience(idle=10, most=100)
    for done in range(9):
        clock.now += 9
        assert not patience.ends(done)
    assert (patience.waited, patience.left) == (81, 10)


def test_standing_still_ends_it(clock: Clock) -> None:
    """Breaks if waiting for work that is stuck goes on."""
    patience = Patience(idle=10, most=100)
    assert not patience.ends("a", 1)
    clock.now += 9
    assert (patience.ends("a", 1), patience.left) == (False, 1)
    clock.now += 1
    assert patience.ends("a", 1)


def test_it_ends_in_any_case(clock: Clock) -> None:
    """Breaks if work that never ends, but always moves, is waited for without a limit."""
    patience = Patience(idle=10, most=100)
    ended = []
    for done in range(20):
        clock.now += 6
        ended.append(patience.ends(done))
    assert ended.index(True) == 16  # after 17 steps, 102 s
