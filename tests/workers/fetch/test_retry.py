"""What happens after each answer of a provider, as tables."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from workers.fetch.retry import (
    FIRST_PAUSE,
    MAX_ATTEMPTS,
    MAX_PAUSE,
    MAX_RETRY_AFTER,
    NO_ANSWER,
    NOT_JSON,
    UNAUTHORIZED_PAUSE,
    Decision,
    backoff,
    decide,
    retry_after,
)

NOW = datetime(2026, 3, 14, 6, 30, 0, 250_000, tzinfo=UTC)
AGAIN = [NO_ANSWER, NOT_JSON, 201, 204, 206, 301, 302, 307, 308, 408, 409, 425, 500, 501, 502, 520, 522, 529, 599]
FAIL = [402, 405, 406, 411, 412, 414, 415, 418, 421, 423, 424, 426, 428, 431, 451, 499]


def of(status: int, attempts: int = 0, *, has_cursor: bool = False, **headers: str) -> Decision:
    """What is decided at NOW."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return decide(status, named, attempts=attempts, now=NOW, has_cursor=has_cursor)


@pytest.mark.parametrize("has_cursor", [False, True])
@pytest.mark.parametrize(
    ("status", "what", "counts"),
    [
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
    ],
)
def test_every_status_has_its_decision(status: int, what: str, *, counts: bool, has_cursor: bool) -> None:
    """Breaks if an answer that may pass ends a history, or one that cannot is asked for again and again."""
    decision = of(status, has_cursor=has_cursor)
    assert decision.action == what
    if what not in ("use", "not_found", "fail", "reject"):
        assert decision.counts is counts
        assert decision.seconds > 0


@pytest.mark.parametrize(
    ("status", "has_cursor", "what"),
    [(400, False, "fail"), (400, True, "restart"), (410, False, "fail"), (410, True, "restart")],
)
def test_a_cursor_that_is_no_longer_good_begins_the_slice_again(status: int, what: str, *, has_cursor: bool) -> None:
    """Breaks if an expired cursor ends a history, or a request that is wrong by itself is repeated."""
    assert of(status, has_cursor=has_cursor).action == what


@pytest.mark.parametrize("status", [NO_ANSWER, NOT_JSON, 302, 408, 409, 413, 425, 500, 502, 504, 599])
@pytest.mark.parametrize(
    ("attempts", "fails"), [(0, False), (MAX_ATTEMPTS - 2, False), (MAX_ATTEMPTS - 1, True), (10**6, True)]
)
def test_what_does_not_pass_fails_in_the_end(status: int, attempts: int, *, fails: bool) -> None:
    """Breaks if a history that can never be read is asked for for ever, or is given up too early."""
    assert (of(status, attempts).action == "fail") is fails


@pytest.mark.parametrize("status", [401, 403, 429, 503])
def test_a_silence_never_fails(status: int) -> None:
    """Breaks if a night of rate limits, or a key that is mended late, costs the history."""
    assert of(status, 10**6).action == "pause"
    assert of(status, 10**6, has_cursor=True).action == "pause"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_tried_again_rarely(status: int) -> None:
    """Breaks if a wrong key hammers the provider, or burns attempts of a request that is not at fault."""
    assert of(status, retry_after="1") == of(status, 7, retry_after="1")
    assert (of(status).seconds, of(status).counts) == (UNAUTHORIZED_PAUSE, False)
    assert "key" in of(status).reason


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("value", "seconds"), [("0", 0.1), ("7", 7.1), ("120", 120.1), ("999999999", 21_600)])
def test_a_silence_that_is_asked_for_is_kept_to_the_second(status: int, value: str, seconds: float) -> None:
    """Breaks if workers come back earlier than the provider says, or if doing as told burns an attempt."""
    decision = of(status, 11, retry_after=value)
    assert (decision.seconds, decision.counts) == (pytest.approx(seconds), False)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("value", ["soon", "", "-5", "1.5"])
def test_a_silence_without_a_length_grows(status: int, value: str) -> None:
    """Breaks if a Retry-After that cannot be read is taken for none at all, or for an order."""
    for attempts, longest in ((0, 1), (5, 32), (30, 900)):
        decision = of(status, attempts, retry_after=value)
        assert longest / 2 <= decision.seconds <= longest
        assert decision.counts


def test_other_answers_do_not_obey_a_retry_after() -> None:
    """Breaks if a proxy's error page can put a history to sleep for hours."""
    assert of(500, retry_after="3600").seconds <= FIRST_PAUSE


@pytest.mark.parametrize("status", [*AGAIN, *FAIL, 401, 403, 404, 413, 429, 503, 504])
def test_a_reason_says_what_came(status: int) -> None:
    """Breaks if `headrace status` cannot tell why a history stands still."""
    expected = {NO_ANSWER: "no answer", NOT_JSON: "no JSON"}.get(status, str(status))
    assert expected in of(status).reason
    assert expected in of(status, 99).reason


def at(**later: float) -> str:
    """An HTTP date so much after NOW."""
    return format_datetime(NOW.replace(microsecond=0) + timedelta(**later), usegmt=True)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
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
    ],
)
def test_both_forms_of_retry_after_are_read(value: str, low: float, high: float) -> None:
    """Breaks if a number or a date is misread: too early is told off again, too late holds up history."""
    found = retry_after(value, NOW)
    assert found is not None
    assert low <= found <= high


@pytest.mark.parametrize(
    "value",
    [
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
    ],
)
def test_a_retry_after_that_cannot_be_read_is_none(value: str | None) -> None:
    """Breaks if a strange header raises, or is taken for an instruction."""
    assert retry_after(value, NOW) is None


@pytest.mark.parametrize(
    "zone",
    [
        "+9999",
        pytest.param("+99999999999999999999"),
        pytest.param("-99999999999999999999"),
    ],
)
def test_a_date_with_an_absurd_zone_does_not_raise(zone: str) -> None:
    """Breaks if a header that no calendar can hold ends the turn of every backfill."""
    found = retry_after(f"Sat, 14 Mar 2026 06:31:00 {zone}", NOW)
    assert found is None or 0 <= found <= MAX_RETRY_AFTER


@pytest.mark.parametrize(
    ("attempts", "longest"), [(0, 1), (1, 2), (2, 4), (5, 32), (9, 512), (10, 900), (11, 900), (21, 900), (10**9, 900)]
)
def test_pauses_double_up_to_a_quarter_of_an_hour(attempts: int, longest: float) -> None:
    """Breaks if workers come back all at once, hammer what is down, or are away for hours."""
    pauses = [backoff(attempts) for _ in range(300)]
    assert FIRST_PAUSE / 2 <= longest / 2 <= min(pauses) < max(pauses) <= longest <= MAX_PAUSE
    assert max(pauses) - min(pauses) > longest / 4


@pytest.mark.parametrize("status", [*AGAIN, *FAIL, 401, 403, 404, 413, 429, 503, 504])
def test_a_refused_key_is_told_by_a_field(status: int) -> None:
    """Breaks if whoever tells the operator has to read it out of the reason."""
    assert of(status).key_refused is (status in (401, 403))
