"""What a drill tells: how far it is, and in the end what it found."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from workers.drill.account import Account
from workers.drill.plan import GROUPS, KINDS
from workers.drill.striker import Made

LONGEST_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Moment:
    """How far a drill is."""

    phase: Literal["load", "settling", "counting"]
    seconds: float  # since the beginning of the phase
    left: float  # at most
    acked: int
    settled: int
    applied: int  # of the settled
    strikes: int
    backfills_open: int


@dataclass(frozen=True)
class Report:
    """What a drill found."""

    seed: int
    account: Account
    strikes: list[Made]
    statuses: dict[int, int]  # answers of the endpoint; 0: no answer
    longest_answer: float  # without the time for which the drill itself froze the endpoint
    longest_with_freezes: float
    never_taken: int
    settled_after: float | None  # seconds after the last strike; None if not everything did
    backfills: dict[str, int]
    provider_requests: int
    provider_refused: int
    trespasses: int  # requests within a silence
    excused: int  # as above, but whoever should have known was struck

    @property
    def holds(self) -> bool:
        """Whether the drill was passed."""
        in_time = self.longest_answer <= LONGEST_ANSWER_SECONDS and self.settled_after is not None
        return self.account.holds and in_time and not self.never_taken

    def strikes_by(self) -> dict[str, dict[str, int]]:
        """How often each group was struck how."""
        counts = Counter((one.strike.group, one.strike.kind) for one in self.strikes if one.pid is not None)
        return {group: {kind: counts[group, kind] for kind in KINDS} for group in GROUPS}
