"""What a drill is asked to be, and the strikes that follow from its seed."""

from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

FaultKind = Literal["kill", "freeze", "restart"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
GROUPS = ("web", "live", "backfill", "maintenance", "beat", "flower", "broker", "postgres")
ROUND = (*GROUPS, "web", "live", "broker", "postgres")  # in any order, before anybody has another turn
PAUSE, FREEZE = (1.5, 4.5), (1.0, 6.0)  # seconds between strikes, and of a freeze: from, to
CALM_SECONDS, CALM_SHARE = 20.0, 0.3  # how much of the time, at its end, nothing is struck


@dataclass(frozen=True)
class Options:
    """What a drill is asked to be."""

    seconds: float
    seed: int
    rate: float
    visibility_seconds: int


@dataclass(frozen=True)
class PlannedFault:
    """What is done to whom, `at` so many seconds after the beginning. `choice` picks one of the group's processes."""

    at: float
    kind: FaultKind
    group: str
    choice: float
    seconds: float  # of a freeze


def plan(seed: int, seconds: float) -> list[PlannedFault]:
    """The strikes of a drill of so many seconds. The same seed makes the same; a longer drill makes more."""
    dice, end = Random(seed), seconds - min(CALM_SECONDS, CALM_SHARE * seconds)  # noqa: S311 - repeatable on purpose
    faults: list[PlannedFault] = []
    turns: list[str] = []
    at = dice.uniform(*PAUSE)
    while at < end:
        turns = turns or dice.sample(ROUND, len(ROUND))
        faults.append(PlannedFault(at, dice.choice(FAULT_KINDS), turns.pop(), dice.random(), dice.uniform(*FREEZE)))
        at += dice.uniform(*PAUSE)
    return faults
