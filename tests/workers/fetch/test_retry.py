"""The decision after each response, as tables."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from tests.support.cases import Failures
from workers.fetch.retry import (
    FIRST_PAUSE,
    MAX_ATTEMPTS,
    MAX_RETRY_AFTER,
    NO_ANSWER,
    UNAUTHORIZED_PAUSE,
    UNREADABLE,
    Decision,
    decide,
    retry_after,
)

NOW = datetime(2026, 3, 14, 6, 30, 0, 250_000, tzinfo=UTC)
AGAIN = [NO_ANSWER, UNREADABLE, 201, 204, 206, 301, 302, 307, 308, 408, 409, 425, 500, 501, 502, 520, 522, 529, 599]
FAIL = [402, 405, 406, 411, 412, 414, 415, 418, 421, 423, 424, 426, 428, 431, 451, 499]


def of(status: int, attempts: int = 0, *, has_cursor: bool = False, **headers: str) -> Decision:
    """The decision at NOW."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return decide(status, named, attempts=attempts, now=NOW, has_cursor=has_cursor)


def test_every_status_has_its_decision() -> None:
    """Breaks if a temporary error ends a backfill, or a permanent one is retried without end."""
    failures = Failures()
    for has_cursor in (False, True):
        for status, what, counts in (
            (200, "use", True),
            (401, "pause", False),
            (403, "pause", False),
            (404, "not_found", True),
            (413, "split", True),
            (422, "reject", True),
            (429, "pause", True),
            (503, "pause", True),
            (504, "split", True),
            *((status, "retry", True) for status in AGAIN),
            *((status, "fail", True) for status in FAIL),
        ):
            with failures.of(has_cursor, status, what, counts):
                decision = of(status, has_cursor=has_cursor)
                assert decision.action == what
                if what not in ("use", "not_found", "fail", "reject"):
                    assert decision.counts is counts
                    assert decision.seconds > 0
    assert failures == {}


@pytest.mark.parametrize(
    ("status", "has_cursor", "what"),
    [(400, False, "fail"), (400, True, "restart"), (410, False, "fail"), (410, True, "restart")],
)
def test_an_expired_cursor_restarts_the_slice(status: int, what: str, *, has_cursor: bool) -> None:
    """Breaks if an expired cursor ends a backfill, or a request that is wrong is repeated."""
    assert of(status, has_cursor=has_cursor).action == what


def test_a_lasting_error_fails_in_the_end() -> None:
    """Breaks if a history that can never be read is requested forever, or fails too early."""
    failures = Failures()
    for status in (NO_ANSWER, UNREADABLE, 302, 408, 409, 413, 425, 500, 502, 504, 599):
        for attempts, fails in ((0, False), (MAX_ATTEMPTS - 2, False), (MAX_ATTEMPTS - 1, True), (10**6, True)):
            with failures.of(status, attempts, fails):
                assert (of(status, attempts).action == "fail") is fails
    assert failures == {}


@pytest.mark.parametrize("status", [401, 403, 429, 503])
def test_a_pause_never_fails(status: int) -> None:
    """Breaks if a night of rate limits, or a key that is replaced late, fails the backfill."""
    assert of(status, 10**6).action == "pause"
    assert of(status, 10**6, has_cursor=True).action == "pause"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_tried_again_rarely(status: int) -> None:
    """Breaks if a wrong key causes many requests, or counts as failed attempts."""
    assert of(status, retry_after="1") == of(status, 7, retry_after="1")
    assert (of(status).seconds, of(status).counts) == (UNAUTHORIZED_PAUSE, False)
    assert "key" in of(status).reason


def test_retry_after_is_kept_to_the_second() -> None:
    """Breaks if workers retry earlier than Retry-After says, or the wait counts as a failed attempt."""
    failures = Failures()
    for status in (429, 503):
        for value, seconds in (("0", 0.1), ("7", 7.1), ("120", 120.1), ("999999999", 21_600)):
            with failures.of(status, value, seconds):
                decision = of(status, 11, retry_after=value)
                assert (decision.seconds, decision.counts) == (pytest.approx(seconds), False)
    assert failures == {}


def test_a_pause_without_retry_after_grows() -> None:
    """Breaks if a Retry-After that cannot be parsed counts as zero, or as a valid one."""
    failures = Failures()
    for status in (429, 503):
        for value in ("soon", "", "-5", "1.5"):
            with failures.of(status, value):
                for attempts, longest in ((0, 1), (5, 32), (30, 900)):
                    decision = of(status, attempts, retry_after=value)
                    assert longest / 2 <= decision.seconds <= longest
                    assert decision.counts
    assert failures == {}


def test_other_answers_do_not_obey_a_retry_after() -> None:
    """Breaks if a proxy's error page can stop a backfill for hours."""
    assert of(500, retry_after="3600").seconds <= FIRST_PAUSE


def test_a_reason_says_what_came() -> None:
    """Breaks if `headrace status` cannot show why a backfill waits."""
    failures = Failures()
    for status in (*AGAIN, *FAIL, 401, 403, 404, 413, 429, 503, 504):
        with failures.of(status):
            expected = {NO_ANSWER: "no answer", UNREADABLE: "cannot be read"}.get(status, str(status))
            assert expected in of(status).reason
            assert expected in of(status, 99).reason
    assert failures == {}


@pytest.mark.parametrize("attempts", [0, 99])
def test_a_reason_names_the_fault_of_a_body(attempts: int) -> None:
    """Breaks if an operator reads that JSON is no JSON, and not which field has another form."""
    decision = decide(UNREADABLE, {}, attempts=attempts, now=NOW, fault="sleep: a page without sleep")
    assert decision.reason.startswith("a response that cannot be read: sleep: a page without sleep")


def at(**later: float) -> str:
    """An HTTP date after NOW."""
    return format_datetime(NOW.replace(microsecond=0) + timedelta(**later), usegmt=True)


def test_both_forms_of_retry_after_are_read() -> None:
    """Breaks if a number or a date is misread: a retry would be refused, or history delayed."""
    failures = Failures()
    for value, low, high in (
        ("0", 0, 0.2),
        ("1", 1, 1.2),
        (" 30 ", 30, 30.2),
        ("0030", 30, 30.2),
        ("21600", 21_600, 21_600),
        ("9" * 400, 21_600, 21_600),
        (at(seconds=10), 9.75, 10.1),
        (at(minutes=-10), 0, 0.2),
        (at(days=-9000), 0, 0.2),
        (at(days=400), 21_600, 21_600),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 21_600, 21_600),
        ("Saturday, 14-Mar-26 06:31:00 GMT", 59.75, 60),  # the two old forms of RFC 9110, 5.6.7
        ("Sat Mar 14 06:31:00 2026", 59.75, 60),
        ("Sat, 14 Mar 2026 07:31:00 +0100", 59.75, 60),
        ("Sat, 14 Mar 2026 06:31:00 -0000", 59.75, 60),
    ):
        with failures.of(value, low, high):
            found = retry_after(value, NOW)
            assert found is not None
            assert low <= found <= high
    assert failures == {}


def test_a_retry_after_that_cannot_be_read_is_none() -> None:
    """Breaks if an invalid header raises, or counts as valid."""
    failures = Failures()
    for value in (
        None,
        "",
        " ",
        "soon",
        "-1",
        "+1",
        "1.5",
        "1e3",
        "inf",
        "nan",
        "0x10",
        "²",
        "30 seconds",
        "30, 60",
        "Sat, 99 Mar 2026 06:31:00 GMT",
        "Sat, 14 Mar 2026 99:31:00 GMT",
        "Sat, 14 Mar 99999 06:31:00 GMT",
        "2026-03-14T06:31:00Z",
        "\x00",
    ):
        with failures.of(value):
            assert retry_after(value, NOW) is None
    assert failures == {}


@pytest.mark.parametrize(
    "zone",
    [
        "+9999",
        pytest.param("+99999999999999999999"),
        pytest.param("-99999999999999999999"),
    ],
)
def test_a_date_with_an_absurd_zone_does_not_raise(zone: str) -> None:
    """Breaks if an invalid date ends the run of every backfill."""
    found = retry_after(f"Sat, 14 Mar 2026 06:31:00 {zone}", NOW)
    assert found is None or 0 <= found <= MAX_RETRY_AFTER


def test_a_refused_key_has_a_field() -> None:
    """Breaks if code has to parse the reason to know that a key is refused."""
    told = {status for status in (*AGAIN, *FAIL, 401, 403, 404, 413, 429, 503, 504) if of(status).key_refused}
    assert told == {401, 403}
