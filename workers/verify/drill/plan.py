"""The options of a drill, and the faults that follow from its seed."""

from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

FaultKind = Literal["kill", "freeze", "restart"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
GROUPS = ("web", "live", "backfill", "maintenance", "notify", "derive", "beat", "flower", "broker", "postgres")
ROUND = (*GROUPS, "web", "live", "broker", "postgres")  # the groups of one round, shuffled
PAUSE, FREEZE = (1.5, 4.5), (1.0, 6.0)  # seconds between faults, and of a freeze: from, to
CALM_SECONDS, CALM_SHARE = 20.0, 0.3  # no faults at the end: for this time or this share, whichever is less


@dataclass(frozen=True)
class Options:
    """The options of a drill."""

    seconds: float
    seed: int
    rate: float
    visibility_seconds: int


@dataclass(frozen=True)
class PlannedFault:
    """A fault `at` seconds after the beginning. `choice`, from 0 to 1, selects one of the group's processes."""

    at: float
    kind: FaultKind
    group: str
    choice: float
    seconds: float  # of a freeze


def plan(seed: int, seconds: float) -> list[PlannedFault]:
    """The faults of a drill of this length. The same seed gives the same faults; a longer drill adds more."""
    rng, end = Random(seed), seconds - min(CALM_SECONDS, CALM_SHARE * seconds)  # noqa: S311 - repeatable on purpose
    faults: list[PlannedFault] = []
    turns: list[str] = []
    at = rng.uniform(*PAUSE)
    while at < end:
        turns = turns or rng.sample(ROUND, len(ROUND))
        faults.append(PlannedFault(at, rng.choice(FAULT_KINDS), turns.pop(), rng.random(), rng.uniform(*FREEZE)))
        at += rng.uniform(*PAUSE)
    return faults
