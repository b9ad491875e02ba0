"""The strikes of a drill, from its seed."""

import pytest

from workers.verify.drill.plan import FAULT_KINDS, GROUPS, plan


def test_the_same_seed_strikes_the_same() -> None:
    """Breaks if a drill that failed cannot be repeated, or a longer one begins otherwise."""
    assert plan(3, 120) == plan(3, 120)
    assert plan(3, 240)[: len(plan(3, 120))] == plan(3, 120)
    assert plan(4, 120) != plan(3, 120)


@pytest.mark.parametrize(("seconds", "calm"), [(15.0, 4.5), (120.0, 20.0)])
def test_the_end_is_calm(seconds: float, calm: float) -> None:
    """Breaks if something is struck when the account is about to be made."""
    assert all(0 < one.at < seconds - calm for seed in range(20) for one in plan(seed, seconds))


def test_everything_is_struck_in_every_way() -> None:
    """Breaks if a group or a way of striking is left out."""
    made = {(one.group, one.kind) for one in plan(1, 3600)}
    assert made == {(group, kind) for group in GROUPS for kind in FAULT_KINDS}
