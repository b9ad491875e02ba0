"""Answers that are late, and requests that should not have been sent."""

from tests.support.drill import made
from workers.verify.drill.limits import max_response, rate_limit_violations
from workers.verify.drill.load import Response


def test_an_endpoint_that_is_frozen_is_not_slow() -> None:
    """Breaks if what the drill itself does to the endpoint counts as slowness of it, or slowness does not count."""
    answers = [Response(0, 1, 202), Response(10, 16, 202), Response(20, 27, 503), Response(30, 90, 0)]
    assert max_response(answers, []) == (7, 7)
    assert max_response(answers, [made("web", "freeze", 21, 3), made("broker", "freeze", 11, 3)]) == (6, 7)
    assert max_response(answers, [made("web", "freeze", 26, 3)]) == (6, 7)
    assert max_response(answers, [made("web", "freeze", 20, 4), made("web", "freeze", 21, 5)]) == (6, 7)
    assert max_response(answers[2:], [made("web", "freeze", 20, 4), made("web", "freeze", 21, 5)]) == (1, 7)
    assert max_response(answers, [made("web", "kill", 21)]) == (7, 7)


def test_a_request_within_a_silence_is_seen() -> None:
    """Breaks if the count of such requests is 0 whatever was asked, or what a strike explains is counted as ours."""
    asked = [99.0, 100.0, 101.0, 103.0]
    assert rate_limit_violations([(100.0, 102.0)], asked, []) == (1, 0)
    assert rate_limit_violations([(100.0, 102.0)], asked, [made("web", "kill", 100)]) == (1, 0)
    assert rate_limit_violations([(100.0, 102.0)], asked, [made("backfill", "kill", 100)]) == (0, 1)
    assert rate_limit_violations([(100.0, 102.0)], asked, [made("backfill", "freeze", 90, 5)]) == (1, 0)
