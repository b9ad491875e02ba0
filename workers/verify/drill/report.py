"""What a drill tells: how far it is, and in the end what it found."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from workers.verify.drill.faults import Injected
from workers.verify.drill.plan import FAULT_KINDS, GROUPS
from workers.verify.drill.totals import Totals

MAX_RESPONSE_SECONDS = 5.0


@dataclass(frozen=True)
class Snapshot:
    """How far a drill is."""

    phase: Literal["load", "settling", "counting"]
    seconds: float  # since the beginning of the phase
    left: float  # at most
    acked: int
    settled: int
    applied: int  # of the settled
    faults: int
    backfills_open: int


@dataclass(frozen=True)
class Report:
    """What a drill found."""

    seed: int
    totals: Totals
    faults: list[Injected]
    statuses: dict[int, int]  # answers of the endpoint; 0: no answer
    max_response: float  # without the time for which the drill itself froze the endpoint
    max_response_with_freezes: float
    never_taken: int
    settled_after: float | None  # seconds after the last strike; None if not everything did
    backfills: dict[str, int]
    provider_requests: int
    provider_refused: int
    rate_limit_violations: int  # requests within a pause
    excused: int  # as above, but whoever should have known was struck

    @property
    def holds(self) -> bool:
        """Whether the drill was passed."""
        in_time = self.max_response <= MAX_RESPONSE_SECONDS and self.settled_after is not None
        return self.totals.holds and in_time and not self.never_taken

    def faults_by(self) -> dict[str, dict[str, int]]:
        """How often each group was struck how."""
        counts = Counter((one.fault.group, one.fault.kind) for one in self.faults if one.pid is not None)
        return {group: {kind: counts[group, kind] for kind in FAULT_KINDS} for group in GROUPS}
