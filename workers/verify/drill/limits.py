"""How the stack behaved meanwhile: how late it answered, and whether it asked a provider that had asked for a pause."""

from collections.abc import Iterable, Sequence

from workers.simulator.sender import NO_ANSWER
from workers.verify.drill.faults import Injected
from workers.verify.drill.load import Response

TOLERANCE_SECONDS = 0.5  # within which every worker knows of a pause


def max_response(answers: Iterable[Response], injected: Sequence[Injected]) -> tuple[float, float]:
    """The seconds of the longest answer: without the time for which the endpoint itself was frozen, and with it."""
    frozen = [(one.began, one.ended) for one in injected if one.fault.group == "web" and one.fault.kind == "freeze"]
    alone, whole = 0.0, 0.0
    for answer in answers:
        if answer.status != NO_ANSWER:
            seconds = answer.ended - answer.began
            held, reached = 0.0, answer.began
            for began, ended in frozen:  # of which two may overlap
                until = min(answer.ended, ended)
                held += max(0.0, until - max(reached, began))
                reached = max(reached, until)
            alone, whole = max(alone, seconds - held), max(whole, seconds)
    return alone, whole


def rate_limit_violations(
    pauses: Iterable[tuple[float, float]], asked: Iterable[float], injected: Sequence[Injected]
) -> tuple[int, int]:
    """Requests within a pause; and those that a strike explains: on who was told of it, or on what tells all."""
    struck = [one for one in injected if one.fault.group in ("backfill", "maintenance", "broker")]
    found, excused = 0, 0
    asked = sorted(asked)
    for begins, ends in pauses:
        within = sum(begins + TOLERANCE_SECONDS < at < ends for at in asked)
        if any(one.began - TOLERANCE_SECONDS < ends and begins < one.ended + TOLERANCE_SECONDS for one in struck):
            excused += within
        else:
            found += within
    return found, excused
