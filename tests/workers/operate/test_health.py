"""Problems, and the commands that help."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.support.cases import Failures
from workers.broker_admin import Lane
from workers.cli.main import COMMANDS
from workers.daily.queue import FailedDays
from workers.operate.health import SENDER_RETRY_WINDOW, Away, Endpoint, Status, problems, retry_window_left

HOUR = timedelta(hours=1)
WEB = Endpoint("http://web", None, {"202": 5}, {"stale": 1})
DEAD_LETTERS = {"reason": "not JSON", "dead_letters": 7, "last_hour": 2}
FAILED = {"status": "failed", "backfills": 9, "last_day": 1, "chunks_done": 0, "chunks_total": 9, "records": 0}
GAPS = {"whose": "ours", "gaps": 4, "people": 2, "since": "2026-03-14 06:30:00+00"}
DOWN = Away("BROKER_URL", "BROKER_URL: the broker cannot be reached (TimeoutError)")


REFUSED = {"origin": "webhooks", "items": 40, "last_hour": 3, "reason": "no timestamp"}


def paused(because_of: str, seconds: int, kind: str = "asked", **changes: Any) -> dict[str, Any]:
    row = {"account": "junction", "because_of": because_of, "seconds_left": seconds, "kind": kind}
    return row | {"key": "1f2e3d4c", "is_own_key": True} | changes


def subscription(**changes: Any) -> dict[str, Any]:
    row = {"name": "app", "status": "active", "reason": "", "failures": 0, "last_error": ""}
    return row | {"failing": None, "late": timedelta()} | changes


def failing(count: int, **changes: Any) -> dict[str, Any]:
    row = {"account": "junction", "because_of": "status 502", "failures": count}
    return row | {"key": "1f2e3d4c", "is_own_key": True} | changes


def test_every_problem_names_a_command() -> None:
    failures = Failures()
    for what, message in (
        ({"away": (DOWN,)}, ["BROKER_URL: the broker", "check"]),
        ({"endpoint": replace(WEB, why_not="the broker cannot be reached")}, ["answered 503: the broker", "check"]),
        (
            {"lanes": [Lane("live", 3, timedelta(minutes=3))]},
            ["3 messages queued", "live", "3 min", "worker --lane live"],
        ),
        (
            {"lanes": [Lane("live", 0, None, unacked=1, unacked_for=timedelta(minutes=7))]},
            ["a message of lane live has not been acknowledged for 7 min -> read the workers' logs"],
        ),
        (
            {
                "lanes": [
                    Lane("live", 0, None, retrying=2, retries=5, retrying_for=timedelta(minutes=2), retry_reason="why")
                ]
            },
            ["2 messages of lane live are retried for 2 min: why -> headrace check"],
        ),
        ({"swept": timedelta(minutes=5)}, ["the sweep has not run for 5 min", "headrace beat"]),
        ({"idle": 138}, ["138 backfills are due", "no API key", "worker --lane backfill"]),
        (
            {"subscriptions": [subscription(status="paused", reason="410")]},
            ["subscription app is paused: 410 -> headrace subscriptions resume app"],
        ),
        (
            {"subscriptions": [subscription(failures=9, last_error="status 500", failing=timedelta(minutes=7))]},
            ["subscription app fails for 7 min: status 500 -> headrace subscriptions test app"],
        ),
        (
            {"subscriptions": [subscription(late=timedelta(minutes=7))]},
            ["notifications of subscription app are 7 min late -> headrace worker --lane notify"],
        ),
        (
            {"subscriptions": [subscription(reason="changes were dropped")]},
            ["subscription app: changes were dropped -> headrace subscriptions resume app"],
        ),
        (
            {"days_failed": [FailedDays("sleep", "unexpected OverflowError at _day:9", 2)]},
            ["days of sleep of 2 people cannot be computed: unexpected OverflowError", "headrace derive rebuild"],
        ),
        ({"lost_deliveries": 3}, ["3 deliveries lost: Junction gave up", "headrace reconcile"]),
        ({"crashed_deliveries": 2}, ["crashed while processing 2 deliveries", "logs"]),
        ({"pauses": [paused("status 401: go away", 30, "key_refused")]}, ["401: go away", "JUNCTION_API_KEY"]),
        ({"pauses": [paused("status 429", 600)]}, ["junction is paused for 10 min (status 429)"]),
        ({"dead_letters": [DEAD_LETTERS]}, ["2 dead letters in the last hour: not JSON", "headrace dead list"]),
        ({"failures": [failing(3)]}, ["Junction does not answer: status 502, 3 times in a row", "headrace check"]),
        ({"failures": [failing(9, account="terra", is_own_key=None)]}, ["Terra does not answer", "(key 1f2e3d4c)"]),
        (
            {"pauses": [paused("status 401: no", 9, "key_refused", is_own_key=False)]},
            ["junction: status 401: no (key 1f2e3d4c, not the one in this shell) -> compare the workers'"],
        ),
        (
            {"pauses": [paused("status 429", n * 100, account=f"terra/t{n}") for n in range(1, 4)]},
            ["terra is paused for 3 users, for up to 5 min (status 429)"],
        ),
        (
            {"refused_items": [REFUSED | {"last_hour": 1, "reason": "other"}, REFUSED]},
            ["4 items refused in the last hour: no timestamp -> headrace dead list"],
        ),
        ({"backfills": [FAILED]}, ["1 backfills failed", "headrace backfill list --status failed"]),
        ({"gaps": [GAPS]}, ["4 gaps to fill", "2026-03-14 06:30", "headrace reconcile"]),
    ):
        with failures.of(what, message):
            (fault,) = problems(Status(**what))
            assert all(part in f"{fault.what} -> {fault.do}" for part in message)
    assert failures == {}


def test_normal_conditions_are_no_problem() -> None:
    failures = Failures()
    for what in (
        {},
        {"lanes": [Lane("live", 500, timedelta(seconds=20)), Lane("backfill", 400, HOUR)]},  # history may wait
        {"lanes": [Lane("live", 0, None, unacked=9, unacked_for=timedelta(minutes=4), retrying=3, retries=4)]},
        {"swept": timedelta(seconds=9), "endpoint": WEB},
        {"pauses": [paused("status 429", 20)]},
        {"pauses": [paused("status 429", 20)], "idle": 138},  # which is why
        {"failures": [failing(2)]},
        {"refused_items": [REFUSED | {"last_hour": 0}]},
        {"dead_letters": [DEAD_LETTERS | {"last_hour": 0}]},
        {"backfills": [FAILED | {"last_day": 0}, FAILED | {"status": "running"}]},
        {"gaps": [GAPS | {"whose": "provider"}]},
        {"connections_in_error": [{"user_id": "u", "provider": "oura", "since": None, "error": "expired"}]},
    ):
        with failures.of(what):
            assert list(problems(Status(**what))) == []
    assert failures == {}


def test_rejected_webhooks_are_reported_while_they_continue() -> None:
    before = Status(endpoint=WEB)
    now = Status(endpoint=replace(WEB, answers={"202": 5, "413": 2}, refused={"stale": 4, "signature": 1}))
    message = {fault.what: fault.do for fault in problems(now, before)}
    assert message["3 webhooks rejected just now: signature stale"].startswith("timedatectl")
    assert message["1 webhooks rejected just now: signature signature"] == "headrace check"
    assert message["2 webhooks rejected just now: body too large"] == "raise HEADRACE_MAX_BODY_BYTES"
    assert list(problems(now, now)) == []
    assert list(problems(now)) == []


def test_the_retry_window_starts_at_the_last_accepted_delivery() -> None:
    assert retry_window_left(Status(away=(DOWN,))) == {}
    left = retry_window_left(Status(since_last_delivery={"junction": 2 * HOUR, "terra": 14 * HOUR, "unknown": HOUR}))
    assert left == {
        "junction": SENDER_RETRY_WINDOW["junction"] - 2 * HOUR,
        "terra": SENDER_RETRY_WINDOW["terra"] - 14 * HOUR,
    }
    assert SENDER_RETRY_WINDOW["terra"].total_seconds() < sum(30 * 2**retry for retry in range(10))
    assert SENDER_RETRY_WINDOW["junction"].total_seconds() < 5 + 300 + 1800 + 2 * 3600 + 5 * 3600 + 2 * 36_000


def test_the_commands_that_are_named_exist() -> None:
    everything = Status(
        away=(DOWN,),
        lanes=[Lane("live", 1, HOUR), Lane("download", 1, HOUR)],
        swept=HOUR,
        idle=1,
        dead_letters=[DEAD_LETTERS],
        backfills=[FAILED],
        gaps=[GAPS],
    )
    typed = [fault.do for fault in problems(everything) if fault.do.startswith("headrace ")]
    assert len(typed) == 8
    for command in ", ".join(typed).split(", "):
        assert command.split()[1] in COMMANDS


@pytest.mark.parametrize(
    ("away", "is_outage"),
    [
        (Away("BROKER_URL", "the broker cannot be reached"), True),
        (Away("DATABASE_URL", "the lane is BROKER_URL: fine"), False),
        (Away("REDIS_URL", "REDIS_URL: cannot be reached"), False),
    ],
)
def test_an_outage_is_recognised_by_the_setting(away: Away, *, is_outage: bool) -> None:
    """The wording of an error must not matter."""
    assert Status(away=(away,)).is_outage is is_outage


def test_a_pause_is_judged_by_its_kind() -> None:
    """The wording of a reason must not matter."""
    assert [fault.do for fault in problems(Status(pauses=[paused("no", 9, "key_refused")]))] == ["set JUNCTION_API_KEY"]
    assert list(problems(Status(pauses=[paused("status 429: refused", 9)]))) == []


def test_a_problem_names_its_lane() -> None:
    lanes = [Lane("live", 3, HOUR), Lane("download", 0, None)]
    found = {
        fault.what.split()[-1]: fault.lane
        for fault in problems(Status(lanes=lanes, crashed_deliveries=2, backfills=[FAILED]))
    }
    assert sorted(found.values()) == ["", "", "live"]


def test_another_key_does_not_hide_that_no_worker_fetches() -> None:
    """Breaks if a wrong key in an operator's shell hides that no worker runs."""
    foreign = paused("status 401", 200, "key_refused", is_own_key=False)
    assert any("no worker fetches" in one.what for one in problems(Status(idle=5, pauses=[foreign])))
    assert not any("no worker" in one.what for one in problems(Status(idle=5, pauses=[foreign | {"is_own_key": None}])))


def test_one_outage_has_one_reason() -> None:
    """Breaks if the broker's error is printed for the broker and again for the endpoint."""
    endpoint = replace(WEB, why_not="the broker cannot be reached")
    assert [one.what for one in problems(Status(away=(DOWN,), endpoint=endpoint))] == [
        DOWN.why,
        "webhooks are answered 503",
    ]
