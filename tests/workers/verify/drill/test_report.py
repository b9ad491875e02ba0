"""The report of a drill, response times, and requests during a pause."""

from dataclasses import replace
from typing import Any

from tests.support.drill import IDS, LEDGER, ROWS, injected, totals
from workers.verify.drill.load import Response
from workers.verify.drill.report import Report, max_response, rate_limit_violations
from workers.verify.drill.subscriber import SubscriberTotals


def report(**changes: Any) -> Report:
    """The report of a passed drill with these changes."""
    return replace(
        Report(
            seed=1,
            totals=totals(),
            faults=[injected("web", "kill", 1.0)],
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
            followers=[],
            subscriber=SubscriberTotals(accepted=0, refused=0, unanswered=0, forged=0, missing=0),
        ),
        **changes,
    )


def test_a_drill_is_passed_or_not() -> None:
    """Breaks if a drill with errors is passed."""
    assert report().holds
    assert report().faults_by()["web"] == {"kill": 1, "freeze": 0, "restart": 0}
    assert not report(totals=totals(ledger=LEDGER[1:])).holds
    assert not report(max_response=5.1).holds
    assert not report(settled_after=None).holds
    assert not report(never_taken=1).holds


def test_an_unfinished_drill_is_not_a_failed_one() -> None:
    """Breaks if a drill on a busy machine reports a loss, or a real loss is reported as unfinished."""
    rest = totals(ledger=LEDGER[1:], queued={IDS["a"]}, rows=ROWS[1:])  # one delivery is still in the broker
    assert report(totals=rest, settled_after=None).verdict == "unfinished"
    assert report(totals=totals(rows=ROWS[1:]), settled_after=None).verdict == "unfinished"  # of an open backfill
    assert report(settled_after=None).verdict == "unfinished"
    lost = totals(ledger=LEDGER[1:], rows=ROWS[1:])  # neither in the ledger nor in the broker
    for failed in (
        report(totals=lost, settled_after=None),
        report(totals=totals(rows=ROWS[1:])),
        report(never_taken=1),
    ):
        assert failed.verdict == "different"
    assert report(totals=totals(ledger=[*LEDGER, LEDGER[0]]), settled_after=None).verdict == "different"


def test_an_endpoint_that_is_frozen_is_not_slow() -> None:
    """Breaks if a freeze by the drill counts as a slow response, or a slow response does not count."""
    answers = [Response(0, 1, 202), Response(10, 16, 202), Response(20, 27, 503), Response(30, 90, 0)]
    assert max_response(answers, []) == (7, 7)
    assert max_response(answers, [injected("web", "freeze", 21, 3), injected("broker", "freeze", 11, 3)]) == (6, 7)
    assert max_response(answers, [injected("web", "freeze", 26, 3)]) == (6, 7)
    assert max_response(answers, [injected("web", "freeze", 20, 4), injected("web", "freeze", 21, 5)]) == (6, 7)
    assert max_response(answers[2:], [injected("web", "freeze", 20, 4), injected("web", "freeze", 21, 5)]) == (1, 7)
    assert max_response(answers, [injected("web", "kill", 21)]) == (7, 7)


def test_a_request_during_a_pause_is_counted() -> None:
    """Breaks if requests during a pause are not counted, or those that a fault explains are not excused."""
    asked = [99.0, 100.0, 101.0, 103.0]
    assert rate_limit_violations([(100.0, 102.0)], asked, []) == (1, 0)
    assert rate_limit_violations([(100.0, 102.0)], asked, [injected("web", "kill", 100)]) == (1, 0)
    assert rate_limit_violations([(100.0, 102.0)], asked, [injected("backfill", "kill", 100)]) == (0, 1)
    assert rate_limit_violations([(100.0, 102.0)], asked, [injected("backfill", "freeze", 90, 5)]) == (1, 0)
