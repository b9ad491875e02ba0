"""What is told to be wrong, and what to type about it."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.support.cases import Failures
from workers.broker_admin import Lane
from workers.cli.main import COMMANDS
from workers.operate.health import SENDER_RETRY_WINDOW, Away, Endpoint, Problem, Status, problems, retry_window_left

HOUR = timedelta(hours=1)
WEB = Endpoint("http://web", None, {"202": 5}, {"stale": 1})
LETTERS = {"reason": "not JSON", "letters": 7, "last_hour": 2}
FAILED = {"status": "failed", "backfills": 9, "last_day": 1, "chunks_done": 0, "chunks_total": 9, "records": 0}
GAPS = {"whose": "ours", "gaps": 4, "people": 2, "since": "2026-03-14 06:30:00+00"}
DOWN = Away("BROKER_URL", "BROKER_URL: the broker cannot be reached (TimeoutError)")


def silence(because_of: str, seconds: int, kind: str = "asked") -> dict[str, Any]:
    """An account that is left alone."""
    return {"account": "junction", "because_of": because_of, "seconds_left": seconds, "kind": kind}


def test_a_fault_is_told_with_what_to_type() -> None:
    """Breaks if somebody on call is told that all is well, or left alone with what is not."""
    failures = Failures()
    for what, told in (
        ({"away": (DOWN,)}, ["BROKER_URL: the broker", "check"]),
        ({"endpoint": replace(WEB, why_not="the broker cannot be reached")}, ["nothing is taken", "check"]),
        (
            {"lanes": [Lane("live", 3, timedelta(minutes=3))]},
            ["3 messages wait", "live", "3 min", "worker --lane live"],
        ),
        ({"swept": timedelta(minutes=5)}, ["work that is due for 5 min", "headrace beat"]),
        ({"idle": 138}, ["138 backfills wait", "no API key", "worker --lane backfill"]),
        ({"crashed_deliveries": 2}, ["died with 2 deliveries", "logs"]),
        ({"pauses": [silence("status 401: go away", 30, "key_refused")]}, ["401: go away", "JUNCTION_API_KEY"]),
        ({"pauses": [silence("status 429", 600)]}, ["left alone for 10 min: status 429"]),
        ({"dead_letters": [LETTERS]}, ["2 dead letters within the hour: not JSON", "headrace dead list"]),
        ({"backfills": [FAILED]}, ["1 backfills failed", "headrace backfill list --status failed"]),
        ({"gaps": [GAPS]}, ["4 gaps that are ours", "2026-03-14 06:30", "headrace reconcile"]),
    ):
        with failures.of(what, told):
            (fault,) = problems(Status(**what))
            assert all(part in f"{fault.what} -> {fault.do}" for part in told)
    assert failures == {}


def test_what_is_usual_is_healthy() -> None:
    """Breaks if the page cries wolf about what passes by itself, is over, or is somebody else's turn."""
    failures = Failures()
    for what in (
        {},
        {"lanes": [Lane("live", 500, timedelta(seconds=20)), Lane("backfill", 400, HOUR)]},  # history may wait
        {"swept": timedelta(seconds=9), "endpoint": WEB},
        {"pauses": [silence("status 429", 20)]},
        {"pauses": [silence("status 429", 20)], "idle": 138},  # which is why
        {"dead_letters": [LETTERS | {"last_hour": 0}]},
        {"backfills": [FAILED | {"last_day": 0}, FAILED | {"status": "running"}]},
        {"gaps": [GAPS | {"whose": "provider"}]},
        {"connections_in_error": [{"user_id": "u", "provider": "oura", "since": None, "error": "expired"}]},
    ):
        with failures.of(what):
            assert list(problems(Status(**what))) == []
    assert failures == {}


def test_what_is_refused_is_told_while_it_is() -> None:
    """Breaks if a wrong secret or clock goes unseen, or is told for ever after it was mended."""
    before = Status(endpoint=WEB)
    now = Status(endpoint=replace(WEB, answers={"202": 5, "413": 2}, refused={"stale": 4, "signature": 1}))
    told = {fault.what: fault.do for fault in problems(now, before)}
    assert told["3 webhooks refused just now: signature stale"] == "is this machine's clock right? timedatectl"
    assert told["1 webhooks refused just now: signature signature"] == "headrace check"
    assert told["2 webhooks refused just now: too large"] == "set HEADRACE_MAX_BODY_BYTES"
    assert list(problems(now, now)) == []
    assert list(problems(now)) == []


def test_what_senders_have_left_is_counted_from_what_was_taken_last() -> None:
    """Breaks if an operator believes to have more time than there is, or is frightened without an outage."""
    assert retry_window_left(Status(away=(DOWN,))) == {}
    left = retry_window_left(Status(since_last_delivery={"junction": 2 * HOUR, "terra": 30 * HOUR, "unknown": HOUR}))
    assert left == {"junction": SENDER_RETRY_WINDOW["junction"] - 2 * HOUR, "terra": -6 * HOUR}
    assert SENDER_RETRY_WINDOW["junction"].total_seconds() < 5 + 300 + 1800 + 2 * 3600 + 5 * 3600 + 2 * 36_000


def test_the_commands_that_are_named_exist() -> None:
    """Breaks if the page tells to type what there is not."""
    everything = Status(
        away=(DOWN,),
        lanes=[Lane("live", 1, HOUR), Lane("download", 1, HOUR)],
        swept=HOUR,
        idle=1,
        dead_letters=[LETTERS],
        backfills=[FAILED],
        gaps=[GAPS],
    )
    typed = [fault.do for fault in problems(everything) if fault.do.startswith("headrace ")]
    assert len(typed) == 8
    for command in ", ".join(typed).split(", "):
        assert command.split()[1] in COMMANDS
    assert Problem("a", "b") == Problem("a", "b")


@pytest.mark.parametrize(
    ("away", "is_outage"),
    [
        (Away("BROKER_URL", "the broker cannot be reached"), True),
        (Away("DATABASE_URL", "the lane is BROKER_URL: fine"), False),
        (Away("REDIS_URL", "REDIS_URL: cannot be reached"), False),
    ],
)
def test_an_outage_is_told_by_the_setting(away: Away, *, is_outage: bool) -> None:
    """Breaks if another wording of an error hides, or invents, that senders cannot get rid of their events."""
    assert Status(away=(away,)).is_outage is is_outage


def test_a_silence_is_judged_by_its_kind() -> None:
    """Breaks if another wording of a reason hides a refused key, or makes one of a provider's refusal."""
    assert [fault.do for fault in problems(Status(pauses=[silence("no", 9, "key_refused")]))] == [
        "set JUNCTION_API_KEY"
    ]
    assert list(problems(Status(pauses=[silence("status 429: refused", 9)]))) == []


def test_a_fault_names_its_lane() -> None:
    """Breaks if the page marks a lane because its name is part of a word in some fault."""
    lanes = [Lane("live", 3, HOUR), Lane("download", 0, None)]
    found = {
        fault.what.split()[-1]: fault.lane
        for fault in problems(Status(lanes=lanes, crashed_deliveries=2, backfills=[FAILED]))
    }
    assert sorted(found.values()) == ["", "", "live"]
