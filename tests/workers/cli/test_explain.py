"""`headrace explain`: the origin of a value, competing deliveries, and no values unless requested."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import START, apply, delivery, event, heartrate, rows, workout
from tests.support.backfills import announce, notice, settle
from tests.support.cli import Headrace
from tests.support.database import run
from tests.support.deliveries import received
from tests.support.provider import FIRST, Provider, heartrates
from tests.support.reconnections import EVENTS, ride, terra

MINUTE = timedelta(minutes=1)
WORKOUT = ("--user", "u1", "--resource", "workouts", "--id", "w1")
SAMPLE = ("--user", "u1", "--resource", "heartrate", "--at", START.isoformat())
SECRET = 87.654321


def ran(minute: int, distance: float = 8000.5, **changes: Any) -> Delivery:
    """A version of one workout, updated in that minute; its message_id contains the minute."""
    at = START + minute * MINUTE
    body = workout("u1", updated_at=at.isoformat(), distance=distance, **changes)
    return delivery(body, at, name=f"msg_{minute}")


def beat(minute: int, value: float, **source: Any) -> Delivery:
    """A version of one heart rate, sent in that minute."""
    return delivery(heartrate("u1", {0: value, 1: 60}, **source), START + minute * MINUTE)


def asked(headrace: Headrace, words: Sequence[str], **environment: str) -> dict[str, Any]:
    done = headrace("explain", *words, "--json", **environment)
    assert done.exit_code == 0, done.stderr
    return dict(json.loads(done.stdout))


def verdicts(answer: dict[str, Any]) -> dict[str, str]:
    return {one["message_id"]: one["verdict"] for one in answer["deliveries"]}


def test_the_newest_version_wins_in_any_order(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    for one in (ran(2, 2.0), ran(1, 1.0), ran(3, 3.0)):
        apply(engine, settings, one)
    apply(engine, settings, delivery(workout("u1", "w2"), name="msg_other"), delivery(workout("u2"), name="msg_u2"))
    answer = asked(headrace, WORKOUT)
    assert verdicts(answer) == {"msg_1": "older", "msg_2": "older", "msg_3": "won"}
    assert [one["outcome"] for one in answer["deliveries"]] == ["stale", "applied", "applied"]
    assert answer["deliveries"][0]["differs"] == ["distance", "updated_at"]
    assert "because delivery msg_3 contained it" in answer["why"][0]
    assert "2 older" in answer["why"][0]
    (row,) = rows(engine, "SELECT version, origin, stored_at FROM health.workouts WHERE user_id = 'u1' AND id = 'w1'")
    assert answer["stored"][0]["version"] == row["version"].isoformat()
    assert (answer["stored"][0]["origin"], answer["stored"][0]["stored_at"]) == (
        "webhook",
        row["stored_at"].isoformat(),
    )


def test_a_sample_is_identified_by_time_and_series(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    first, again, other = beat(1, 60), beat(2, 61), beat(3, 90, provider="oura")
    beside = delivery(heartrate("u1", {7: 77}), START)
    apply(engine, settings, first, again, other, beside)
    answer = asked(headrace, SAMPLE)
    assert verdicts(answer) == {first.message_id: "older", again.message_id: "won", other.message_id: "won"}
    assert [row["provider"] for row in answer["stored"]] == ["garmin", "oura"]
    assert again.message_id in answer["why"][0]
    assert other.message_id in answer["why"][1]
    assert other.message_id not in answer["why"][0]


def test_a_repetition_is_distinguished_from_the_first_write(
    headrace: Headrace, settings: Settings, engine: Engine
) -> None:
    first, again = beat(1, 60), beat(2, 60)
    for one in (first, again):
        apply(engine, settings, one)
    answer = asked(headrace, SAMPLE)
    assert verdicts(answer) == {first.message_id: "same", again.message_id: "won"}
    assert [one["wrote"] for one in answer["deliveries"]] == [True, False]
    assert f"delivery {first.message_id} first wrote" in answer["why"][0]


def test_a_tie_is_reported(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    low, high = beat(1, 60), beat(1, 61)
    apply(engine, settings, low, high)
    assert verdicts(asked(headrace, SAMPLE)) == {low.message_id: "outranked", high.message_id: "won"}


def test_ignored_and_dead_deliveries_are_shown(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    apply(engine, replace(settings, resources=("sleep",)), ran(1))
    apply(engine, replace(settings, resources=("sleep",)), ran(2))
    bury(engine, "msg_2")
    answer = asked(headrace, WORKOUT)
    assert verdicts(answer) == {"msg_1": "ignored", "msg_2": "dead"}
    assert answer["stored"] == []
    assert "nothing is stored" in answer["why"][0]


def test_a_rejected_delivery_of_another_aggregator_is_shown(
    headrace: Headrace, settings: Settings, engine: Engine
) -> None:
    """Breaks if an operator cannot see that another aggregator tried to change a value."""
    apply(engine, settings, ran(1))
    assert apply(engine, settings, terra(2, ride("u1", "w1", "forged"))) == {"dead": 1}
    answer = asked(headrace, WORKOUT)
    assert verdicts(answer) == {"msg_1": "won", "trace-2": "dead"}
    assert answer["stored"][0]["provider"] == "garmin"


def test_expired_deliveries_are_reported(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    apply(engine, settings, ran(1), delivery(heartrate("u1", {0: 60}), name="msg_beats"))
    run(engine, "DELETE FROM headrace.archive")
    answer = asked(headrace, WORKOUT)
    assert [one["message_id"] for one in answer["applied_with_it_and_not_kept"]] == ["msg_1"]
    assert answer["why"][0].endswith("stored with delivery msg_1, which is not archived and cannot be opened")
    age = "now() - interval '32 days'"
    run(engine, "DELETE FROM headrace.deliveries", f"UPDATE headrace.users SET first_seen = {age}")
    run(engine, f"UPDATE headrace.workouts SET stored_at = {age}")
    assert asked(headrace, WORKOUT)["why"][0].endswith("its delivery is no longer kept")


def test_only_a_retention_that_has_begun_is_mentioned(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if a new deployment is said to have lost the deliveries before its first one."""
    apply(engine, settings, ran(1))
    assert asked(headrace, WORKOUT)["kept_since"] is None
    assert headrace("explain", *WORKOUT).stdout.endswith("\n1 archived deliveries read\n")
    assert asked(headrace, WORKOUT, HEADRACE_KEEP_DAYS="0")["kept_since"] is not None
    run(engine, "UPDATE headrace.users SET first_seen = now() - interval '32 days'")
    assert "UTC are no longer archived (HEADRACE_KEEP_DAYS)" in headrace("explain", *WORKOUT).stdout
    (row,) = rows(engine, "SELECT received_at FROM headrace.archive")
    assert asked(headrace, WORKOUT)["kept_since"] == row["received_at"].isoformat()


def test_backfills_of_other_providers_are_left_out(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if a value of Garmin is said to have been requested from Oura."""
    apply(engine, settings, ran(1))
    window = {"start_date": "2026-03-01", "end_date": "2026-03-31", "is_final": True}
    events = [
        event("historical.data.workouts.created", "u1", window | {"provider": name}) for name in ("oura", "garmin")
    ]
    numbers = announce(engine, settings, *map(delivery, events))
    run(
        engine,
        "UPDATE headrace.backfills SET started_at = now() - interval '1 hour'",
        "UPDATE headrace.workouts SET origin = 'backfill'",
    )
    assert [one["provider"] for one in asked(headrace, WORKOUT)["backfills"]] == ["garmin"]
    run(engine, "DELETE FROM headrace.archive")
    assert f"fetched from the provider by backfill {numbers[1]};" in asked(headrace, WORKOUT)["why"][0]


def test_a_fetched_value_names_its_backfill(
    headrace: Headrace, settings: Settings, engine: Engine, broker_url: str
) -> None:
    announce(engine, settings, notice("u1"))
    at = FIRST + timedelta(hours=1)
    settle(engine, Provider(heartrates([at])).fetcher(engine, replace(settings, redis_url=broker_url)))
    words = ("--user", "u1", "--resource", "heartrate", "--at", at.isoformat())
    answer = asked(headrace, words)
    (number,) = (one["id"] for one in answer["backfills"])
    assert f"was fetched from the provider by backfill {number}" in answer["why"][0]
    assert answer["stored"][0]["origin"] == "backfill"


def test_deliveries_of_a_former_user_id_are_read(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    apply(engine, settings, *EVENTS)
    answer = asked(headrace, ("--user", "new", "--resource", "workouts", "--id", "r1"))
    assert answer["former_user_ids"] == ["old"]
    assert verdicts(answer) == {"trace-1": "older", "trace-5": "won"}


def test_a_record_is_found_by_its_day(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    apply(engine, settings, ran(1))
    assert asked(headrace, ("--user", "member-1", "--resource", "workouts", "--at", "2026-03-14"))["id"] == "w1"
    apply(engine, settings, delivery(workout("u1", "w2")))
    done = headrace("explain", "--user", "u1", "--resource", "workouts", "--at", "2026-03-14")
    assert (done.exit_code, done.stderr) == (1, "Error: several records on 2026-03-14: w1, w2; use --id\n")


def bury(engine: Engine, message_id: str) -> None:
    """Makes an archived delivery a dead letter, as after three crashes."""
    columns = "aggregator, message_id, event_type, user_id, received_at, sealed"
    run(
        engine,
        f"""INSERT INTO headrace.dead_letters ({columns}, reason) SELECT {columns}, 'the worker crashed'
        FROM headrace.archive WHERE message_id = '{message_id}'""",
        f"DELETE FROM headrace.archive WHERE message_id = '{message_id}'",
        f"UPDATE headrace.deliveries SET outcome = 'dead' WHERE message_id = '{message_id}'",
    )


def shown(headrace: Headrace, words: Sequence[str]) -> list[Result]:
    """As text and as JSON."""
    return [headrace("explain", *words), headrace("explain", *words, "--json")]


@pytest.mark.parametrize("words", [WORKOUT, SAMPLE])
def test_values_are_shown_only_on_request(
    headrace: Headrace, settings: Settings, engine: Engine, words: tuple[str, ...]
) -> None:
    apply(engine, settings, ran(1, SECRET), beat(1, SECRET))
    apply(engine, settings, ran(2, SECRET + 1), beat(2, SECRET + 1))
    for done in shown(headrace, words):
        assert "654321" not in done.stdout
    for done in shown(headrace, (*words, "--values")):
        assert str(SECRET + 1) in done.stdout
        assert str(SECRET) in done.stdout  # of what lost


def test_every_use_is_recorded(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    apply(engine, settings, ran(1))
    headrace("explain", *WORKOUT, "--values")
    (row,) = rows(engine, "SELECT action, subject, detail FROM headrace.audit")
    assert (row["action"], row["subject"], row["detail"]["id"], row["detail"]["values"]) == (
        "explain",
        "u1",
        "w1",
        True,
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--user u9 --resource workouts --id w1", 4, "unknown user u9"),
        ("--user u1 --resource workouts --id w-1", 4, "no workouts w-1 of u1 is stored; did you mean w1?"),
        ("--user u1 --resource sleep --id w1", 4, "no sleep w1 of u1 is stored, and no archived delivery contains it"),
        ("--user u1 --resource heartrate --at 2020-01-01", 4, "no sample of heartrate at 2020-01-01"),
        ("--user u1 --resource workouts --at 2020-01-01", 4, "no record of workouts is stored for 2020-01-01"),
        ("--user u1 --resource heartrate --id w1", 1, "heartrate is a timeseries, whose samples have"),
        ("--user u1 --resource workouts", 2, "either --id for a record or --at for a time"),
    ],
)
def test_questions_without_an_answer_are_refused(
    headrace: Headrace, settings: Settings, engine: Engine, words: str, *, code: int, message: str
) -> None:
    """Breaks if a typing error is answered as if the value had never been delivered."""
    apply(engine, settings, ran(1))
    done = headrace("explain", *words.split())
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr


def test_an_erased_user_is_reported(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    apply(engine, settings, ran(1))
    done = headrace("erase", "--user", "u1", "--yes")
    assert done.exit_code == 0, done.stderr
    assert "the user was erased on 20" in asked(headrace, WORKOUT)["why"][0]


def test_archived_deliveries_of_several_days_are_read(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    now = datetime.now(UTC)
    for days in (0, 1, 5):
        one = received(ran(10 - days), now - timedelta(days=days))
        apply(engine, settings, one)
    assert set(verdicts(asked(headrace, WORKOUT))) == {"msg_10", "msg_9", "msg_5"}
