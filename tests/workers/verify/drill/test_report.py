"""The report: whether a drill was passed."""

from dataclasses import replace
from typing import Any

from tests.support.drill import LEDGER, made, totals
from workers.verify.drill.report import Report


def report(**changes: Any) -> Report:
    """The report of a drill that was passed, but for the changes."""
    return replace(
        Report(
            seed=1,
            totals=totals(),
            faults=[made("web", "kill", 1.0)],
            statuses={202: 5, 503: 1},
            max_response=0.5,
            max_response_with_freezes=6.0,
            never_taken=0,
            settled_after=30.0,
            backfills={"complete": 1},
            provider_requests=10,
            provider_refused=1,
            rate_limit_violations=0,
            excused=0,
        ),
        **changes,
    )


def test_a_drill_is_passed_or_not() -> None:
    """Breaks if a drill ends with 0 whatever it found."""
    assert report().holds
    assert report().faults_by()["web"] == {"kill": 1, "freeze": 0, "restart": 0}
    assert not report(totals=totals(ledger=LEDGER[1:])).holds
    assert not report(max_response=5.1).holds
    assert not report(settled_after=None).holds
    assert not report(never_taken=1).holds
