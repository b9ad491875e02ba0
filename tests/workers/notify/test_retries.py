"""The pauses of retries: quick at first, growing, and bounded."""

from workers.fetch.webhooks import PostResult
from workers.notify.retries import MAX_ASKED, MAX_BREAK, MAX_PAUSE, OPEN_AFTER, RETRY_DAYS, endpoint_pause, retry_pause
from workers.notify.sender import state_after

REFUSED, ACCEPTED = PostResult(500, "status 500"), PostResult(204)


def test_the_first_retries_are_quick_and_the_last_follow_for_three_days() -> None:
    """Breaks if a short fault delays a notification for long, or if an outage causes hundreds of attempts."""
    for _ in range(100):
        pauses = [retry_pause(attempts) for attempts in range(1, 100)]
        assert 1 <= pauses[0] <= 2
        assert sum(pauses[:4]) <= 30
        assert max(pauses) <= MAX_PAUSE
        spent, attempts = 0.0, 1
        while spent < RETRY_DAYS * 86_400:
            spent += pauses[attempts - 1]
            attempts += 1
        assert 25 < attempts < 60


def test_an_endpoint_pauses_only_after_several_failures() -> None:
    """Breaks if one refusal stops a subscriber's other notifications, or pauses grow without limit."""
    assert [endpoint_pause(failures) for failures in range(OPEN_AFTER)] == [0.0] * OPEN_AFTER
    assert 2 <= endpoint_pause(OPEN_AFTER) <= 4
    assert MAX_BREAK / 2 <= endpoint_pause(1000) <= MAX_BREAK


def test_retry_after_is_followed_within_a_limit() -> None:
    """Breaks if a subscriber that asks for time gets requests, or can stop its notifications for days."""
    assert endpoint_pause(1, 30.0) == 30.0
    assert endpoint_pause(1, 10.0**6) == MAX_ASKED


def test_one_success_ends_a_row_of_failures() -> None:
    """Breaks if a notification that is always refused holds back all others of its subscriber."""
    assert state_after([REFUSED, ACCEPTED, REFUSED], 3).failures == 0
    assert state_after([REFUSED, REFUSED], 3).failures == 2
    assert state_after([ACCEPTED], OPEN_AFTER).recovered
    assert not state_after([ACCEPTED], OPEN_AFTER - 1).recovered
    assert state_after([ACCEPTED, PostResult(410, "status 410")], 0).gone
