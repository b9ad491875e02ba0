"""The planned faults of a drill."""

import pytest

from workers.verify.drill.plan import FAULT_KINDS, GROUPS, plan


def test_the_same_seed_plans_the_same_faults() -> None:
    """Breaks if a failed drill cannot be repeated, or a longer one begins with other faults."""
    assert plan(3, 120) == plan(3, 120)
    assert plan(3, 240)[: len(plan(3, 120))] == plan(3, 120)
    assert plan(4, 120) != plan(3, 120)


@pytest.mark.parametrize(("seconds", "calm"), [(15.0, 4.5), (120.0, 20.0)])
def test_the_end_is_calm(seconds: float, calm: float) -> None:
    """Breaks if a fault is injected shortly before the report."""
    assert all(0 < one.at < seconds - calm for seed in range(20) for one in plan(seed, seconds))


def test_every_group_gets_every_kind_of_fault() -> None:
    made = {(one.group, one.kind) for one in plan(1, 3600)}
    assert made == {(group, kind) for group in GROUPS for kind in FAULT_KINDS}
