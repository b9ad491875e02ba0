"""The progress and the report of a drill, with response times and requests during a pause."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from workers.simulator.sender import NO_ANSWER
from workers.verify.drill.faults import Injected
from workers.verify.drill.followers import FollowerTotals
from workers.verify.drill.load import Response
from workers.verify.drill.plan import FAULT_KINDS, GROUPS
from workers.verify.drill.subscriber import SubscriberTotals
from workers.verify.totals import Totals, Verdict

MAX_RESPONSE_SECONDS = 5.0
TOLERANCE_SECONDS = 0.5  # until every worker knows of a pause


@dataclass(frozen=True)
class Snapshot:
    """The progress of a drill."""

    phase: Literal["load", "settling", "counting"]
    seconds: float  # since the beginning of the phase
    left: float  # at most
    acked: int
    settled: int
    applied: int  # of the settled deliveries
    faults: int
    backfills_open: int


@dataclass(frozen=True)
class Report:
    """The result of a drill."""

    seed: int
    totals: Totals
    faults: list[Injected]
    statuses: dict[int, int]  # the endpoint's responses by status; 0: no response
    max_response: float  # seconds, without the time for which the drill froze the endpoint
    max_response_with_freezes: float
    never_taken: int  # events that the endpoint never accepted
    settled_after: float | None  # seconds after the last fault; None if deliveries or backfills stayed open
    backfills: dict[str, int]
    provider_requests: int
    provider_refused: int
    rate_limit_violations: int  # requests during a pause
    excused: int  # requests during a pause at the time of a fault
    followers: list[FollowerTotals]  # the consumers of the change feed
    subscriber: SubscriberTotals

    @property
    def holds(self) -> bool:
        """Whether the drill was passed."""
        return self.verdict == "proven"

    @property
    def verdict(self) -> Verdict:
        """Whether the drill was passed, failed ("different"), or could not finish."""
        if self.max_response > MAX_RESPONSE_SECONDS or self.never_taken:
            return "different"
        if not self.subscriber.is_exact or not all(one.is_exact for one in self.followers):
            return "different"
        return self.totals.verdict(finished=self.settled_after is not None)

    def faults_by(self) -> dict[str, dict[str, int]]:
        """The number of injected faults by group and kind."""
        counts = Counter((one.fault.group, one.fault.kind) for one in self.faults if one.pid is not None)
        return {group: {kind: counts[group, kind] for kind in FAULT_KINDS} for group in GROUPS}


def max_response(answers: Iterable[Response], injected: Sequence[Injected]) -> tuple[float, float]:
    """The longest response time in seconds: without the time for which the endpoint was frozen, and with it."""
    frozen = [(one.began, one.ended) for one in injected if one.fault.group == "web" and one.fault.kind == "freeze"]
    alone, whole = 0.0, 0.0
    for answer in answers:
        if answer.status != NO_ANSWER:
            seconds = answer.ended - answer.began
            held, reached = 0.0, answer.began
            for began, ended in frozen:  # two freezes may overlap
                until = min(answer.ended, ended)
                held += max(0.0, until - max(reached, began))
                reached = max(reached, until)
            alone, whole = max(alone, seconds - held), max(whole, seconds)
    return alone, whole


def rate_limit_violations(
    pauses: Iterable[tuple[float, float]], asked: Iterable[float], injected: Sequence[Injected]
) -> tuple[int, int]:
    """The number of requests during a pause: unexcused, and excused by a fault in a fetching process or the broker."""
    faults = [one for one in injected if one.fault.group in ("backfill", "maintenance", "broker")]
    found, excused = 0, 0
    asked = sorted(asked)
    for begins, ends in pauses:
        within = sum(begins + TOLERANCE_SECONDS < at < ends for at in asked)
        if any(one.began - TOLERANCE_SECONDS < ends and begins < one.ended + TOLERANCE_SECONDS for one in faults):
            excused += within
        else:
            found += within
    return found, excused
