"""`headrace retract`: hides a record, whatever arrives later, and shows it again with --undo."""

import json
from dataclasses import replace
from datetime import timedelta

import httpx
import pytest
from sqlalchemy import Engine, text

from app.config.settings import Settings
from tests.support import START, apply, delivery, event, heartrate, rows, workout
from tests.support.backfills import announce, notice, settle
from tests.support.cli import Headrace, error_line
from tests.support.provider import Provider
from workers.cli import output

WORKOUT = ("retract", "--user", "u1", "--resource", "workouts", "--id", "w1")
STREAM = event("daily.data.workout_stream.created", "u1", {"workout_id": "w1", "source": {"provider": "garmin"}})


@pytest.fixture
def two(engine: Engine, settings: Settings) -> None:
    """Two workouts of one user, and one of another user under the same id."""
    apply(engine, settings, *map(delivery, (workout("u1"), workout("u1", "w2"), workout("u2"))))


def shown(engine: Engine, view: str = "workouts") -> list[tuple[str, str]]:
    return [(row["user_id"], row["id"]) for row in rows(engine, f"SELECT user_id, id FROM health.{view} ORDER BY 1, 2")]


@pytest.mark.usefixtures("two")
def test_a_retracted_record_is_hidden_and_restored(headrace: Headrace, engine: Engine) -> None:
    done = headrace(*WORKOUT, "--yes")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "retracted workouts w1 of u1: health.workouts leaves it out\n"
    assert shown(engine) == [("u1", "w2"), ("u2", "w1")]
    assert headrace(*WORKOUT, "--yes").stdout.endswith("leaves it out (it was retracted before)\n")
    restored = json.loads(headrace(*WORKOUT, "--undo", "--json").stdout)
    assert restored == {
        "user_id": "u1",
        "resource": "workouts",
        "id": "w1",
        "is_retracted": False,
        "is_changed": True,
    }
    assert shown(engine) == [("u1", "w1"), ("u1", "w2"), ("u2", "w1")]


@pytest.mark.usefixtures("two")
def test_it_stays_hidden_whatever_arrives(
    headrace: Headrace, engine: Engine, settings: Settings, broker_url: str
) -> None:
    """Breaks if a newer version, a replay, a fetch or retention brings a retracted record back."""
    headrace(*WORKOUT, "--yes")
    later = START + timedelta(days=1)
    apply(engine, settings, delivery(workout("u1", distance=9.0, updated_at=later.isoformat()), later))
    assert headrace("replay", "--since", "2026-01-01").exit_code == 0
    assert shown(engine) == [("u1", "w2"), ("u2", "w1")]
    assert rows(engine, "SELECT distance FROM headrace.workouts WHERE user_id = 'u1' AND id = 'w1'") == [
        {"distance": 9.0}
    ]
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM headrace.workouts"))  # as retention does
    announce(engine, settings, notice("u1", "workouts"))
    page = {"workouts": [workout("u1", name)["data"] for name in ("w1", "w2")]}
    api = Provider(lambda _: httpx.Response(200, json=page))
    settle(engine, api.fetcher(engine, replace(settings, redis_url=broker_url)))
    assert shown(engine) == [("u1", "w2")]


def test_a_stream_is_hidden_with_its_workout(headrace: Headrace, engine: Engine, settings: Settings) -> None:
    apply(engine, settings, delivery(workout("u1")), delivery(STREAM))
    assert shown(engine, "workout_stream") == [("u1", "w1")]
    headrace(*WORKOUT, "--yes")
    assert shown(engine, "workout_stream") == []
    explained = headrace("explain", "--user", "u1", "--resource", "workout_stream", "--id", "w1").stdout
    assert "The stream is hidden with its record of workouts, retracted since 20" in explained
    headrace(*WORKOUT, "--undo")
    headrace("retract", "--user", "u1", "--resource", "workout_stream", "--id", "w1", "--yes")
    assert (shown(engine), shown(engine, "workout_stream")) == ([("u1", "w1")], [])


@pytest.mark.usefixtures("two")
def test_explain_reports_a_retraction(headrace: Headrace) -> None:
    words = ("explain", *WORKOUT[1:])
    assert json.loads(headrace(*words, "--json").stdout)["retracted_at"] is None
    headrace(*WORKOUT, "--yes")
    answer = json.loads(headrace(*words, "--json").stdout)
    assert answer["retracted_at"].startswith("20")
    assert len(answer["stored"]) == 1
    sentence = "the record is retracted since"
    assert sentence in answer["why"][1]
    assert f"`headrace {' '.join(WORKOUT)} --undo` shows it" in answer["why"][1]


@pytest.mark.usefixtures("two")
def test_every_use_is_recorded(headrace: Headrace, engine: Engine) -> None:
    for more in ("--yes", "--yes", "--undo"):
        headrace(*WORKOUT, more)
    found = rows(engine, "SELECT action, subject, detail FROM headrace.audit ORDER BY id")
    assert [(row["action"], row["subject"], row["detail"]["is_changed"]) for row in found] == [
        ("retract", "u1", True),
        ("retract", "u1", False),
        ("retract undo", "u1", True),
    ]
    assert {(row["detail"]["resource"], row["detail"]["id"]) for row in found} == {("workouts", "w1")}


@pytest.mark.usefixtures("two")
def test_what_does_not_exist_is_refused(headrace: Headrace, engine: Engine) -> None:
    apply_to = ("retract", "--user", "u1", "--resource")
    line = error_line(headrace(*apply_to, "sleep", "--id", "w1", "--yes"), 4)
    assert line == "headrace: no sleep w1 of u1 is stored; look up the id in health.sleep"
    line = error_line(headrace(*apply_to, "workouts", "--id", "w-1", "--yes"), 4)
    assert "did you mean w1" in line
    assert "is not retracted" in error_line(headrace(*WORKOUT, "--undo"), 4)
    assert "unknown user u7" in error_line(headrace("retract", "--user", "u7", *WORKOUT[3:], "--yes"), 4)
    done = headrace(*apply_to, "heartrate", "--id", "w1", "--yes")
    assert (done.exit_code, "samples have no id" in done.stderr) == (2, True)
    assert rows(engine, "SELECT 1 FROM headrace.retractions UNION ALL SELECT 1 FROM headrace.audit") == []


@pytest.mark.usefixtures("two")
def test_it_asks_for_confirmation(headrace: Headrace, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    done = headrace(*WORKOUT)
    assert (done.exit_code, done.stdout, "add --yes" in done.stderr) == (2, "", True)
    monkeypatch.setattr(output, "can_answer", lambda: True)
    assert headrace(*WORKOUT, answer="n\n").exit_code == 1
    assert ("u1", "w1") in shown(engine)
    assert "hide workouts w1 of u1?" in headrace(*WORKOUT, answer="y\n").stdout
    assert ("u1", "w1") not in shown(engine)


@pytest.mark.usefixtures("two")
def test_an_erasure_removes_retractions(headrace: Headrace, engine: Engine, settings: Settings) -> None:
    apply(engine, settings, delivery(heartrate("u2", {0: 60})))
    for user in ("u1", "u2"):
        headrace("retract", "--user", user, *WORKOUT[3:], "--yes")
    receipt = json.loads(headrace("erase", "--user", "u1", "--yes", "--json").stdout)
    assert receipt["removed"]["retractions"] == 1
    assert rows(engine, "SELECT user_id FROM headrace.retractions") == [{"user_id": "u2"}]
