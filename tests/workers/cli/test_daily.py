"""`headrace priorities`, `zone`, `derive` and `explain --daily`."""

import json
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, event, rows, workout
from tests.support.cli import error_line
from workers.daily.derive import Deriver
from workers.daily.priorities import set_list, set_zone
from workers.operate.erase import Eraser
from workers.store.engine import transaction

NOON = "2026-03-14T12:00:00+00:00"
ONE = "2026-03-14T13:00:00+00:00"


@pytest.fixture
def stored(engine: Engine, settings: Settings) -> None:
    """Steps of a watch and a phone in the same hour, and two workouts; their days are computed."""
    for source, steps in ({"provider": "garmin", "type": "watch"}, 500), ({"provider": "oura", "type": "ring"}, 400):
        sample = {
            "timestamp": NOON,
            "start": NOON,
            "end": ONE,
            "value": steps,
            "unit": "count",
            "timezone_offset": 3600,
        }
        data = {"source": source, "data": [sample]}
        apply(engine, settings, delivery(event("daily.data.steps.created", "u1", data), datetime.now(UTC)))
    ring = {"source": {"provider": "oura", "type": "ring"}}
    apply(engine, settings, delivery(workout("u1", "w1")), delivery(workout("u1", "w2", **ring)))
    Deriver(engine, settings).rebuild(None, lambda *_: None)


def steps(engine: Engine) -> list[float]:
    return [row["value"] for row in rows(engine, "SELECT value FROM health.daily WHERE metric = 'steps'")]


@pytest.mark.usefixtures("stored")
def test_priorities_are_set_listed_and_reset(engine: Engine, settings: Settings, headrace) -> None:
    """Breaks if a list is stored for another person or resource, is not audited, or days do not follow it."""
    assert headrace("priorities", "list", "--json").stdout == "[]\n"
    done = headrace("priorities", "set", "--user", "u1", "--resource", "steps", "Oura/ring", "garmin/*")
    about = "set the priorities for steps of member-1: oura/ring, garmin/*"
    assert done.stdout == f"{about}. Workers compute the days again\n"
    headrace("priorities", "set", "*/phone")
    listed = json.loads(headrace("priorities", "list", "--json").stdout)
    assert [(one["user"], one["resource"], one["sources"]) for one in listed] == [
        (None, "*", ["*/phone"]),
        ("member-1", "steps", ["oura/ring", "garmin/*"]),
    ]
    shown = rows(engine, "SELECT client_user_id, resource, rank, provider, source_type FROM health.source_priorities")
    assert {tuple(row.values()) for row in shown} == {
        (None, "*", 1, "*", "phone"),
        ("member-1", "steps", 1, "oura", "ring"),
        ("member-1", "steps", 2, "garmin", "*"),
    }
    deriver = Deriver(engine, settings)
    deriver.run(lambda: False)
    assert steps(engine) == [400]
    assert "nothing was changed" in headrace("priorities", "set", "*/phone").stdout
    assert headrace("priorities", "reset", "--user", "member-1").stdout.endswith("member-1 for steps\n")
    deriver.run(lambda: False)
    assert steps(engine) == [500]
    assert headrace("priorities", "reset").exit_code == 0
    assert error_line(headrace("priorities", "reset"), 4) == "headrace: no priorities are set for everyone"
    actions = rows(
        engine, "SELECT action, subject FROM headrace.audit WHERE action LIKE 'priorities%' ORDER BY id LIMIT 2"
    )
    assert actions == [
        {"action": "priorities set", "subject": "member-1"},
        {"action": "priorities set", "subject": "*"},
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resource", "step", "oura/ring"], "unknown resource step; did you mean steps, sleep?"),
        (["--resource", "note", "oura/ring"], "no day is computed from note; headrace priorities apply to: "),
        (["oure/ring"], "unknown provider oure; did you mean oura?"),
        (["oura/rings"], "unknown source type rings; did you mean ring?"),
        (["oura"], "oura is not a source; write PROVIDER/SOURCE_TYPE, such as oura/ring, garmin/* or */watch"),
    ],
)
def test_what_cannot_exist_is_an_error(engine: Engine, headrace, words: list[str], message: str) -> None:
    """Breaks if a typing error is stored as a list that never applies."""
    assert error_line(headrace("priorities", "set", *words), 4).startswith(f"headrace: {message}")
    assert rows(engine, "SELECT 1 FROM headrace.daily_priorities") == []


def test_a_list_can_be_set_before_the_first_data(engine: Engine, headrace) -> None:
    """Breaks if an application cannot set priorities when it creates a person."""
    done = headrace("priorities", "set", "--user", "new-member", "oura/ring")
    assert done.exit_code == 0
    assert "no data of new-member is stored yet" in done.stderr
    assert rows(engine, "SELECT person FROM headrace.daily_priorities") == [{"person": "new-member"}]


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("words", [("priorities", "list"), ("priorities", "reset"), ("zone",), ("zone", "--reset")])
def test_an_unknown_person_has_nothing_to_show_or_reset(headrace, words: tuple[str, ...]) -> None:
    """Breaks if a typing error in a name is answered as if nothing were set for the person."""
    assert error_line(headrace(*words, "--user", "membr-1"), 4).endswith("unknown user membr-1; did you mean member-1?")


@pytest.mark.usefixtures("stored")
def test_an_erased_person_gets_no_rows_again(engine: Engine, settings: Settings, headrace) -> None:
    """Breaks if a command stores something of a person after the erasure, or takes the name as a new one."""
    Eraser(engine, settings).erase("u1", lambda _: None)
    for words in (("zone", "--user", "u1", "Europe/Paris"), ("priorities", "set", "--user", "u1", "oura/ring")):
        assert error_line(headrace(*words)) == "headrace: u1 was erased"
    assert rows(engine, "SELECT 1 FROM headrace.daily_zones UNION SELECT 1 FROM headrace.daily_priorities") == []


@pytest.mark.usefixtures("stored")
def test_a_zone_is_shown_set_and_reset(engine: Engine, headrace) -> None:
    """Breaks if a zone that PostgreSQL does not know is stored, or the change is not audited."""
    assert "no zone is set" in headrace("zone", "--user", "u1").stdout
    assert headrace("zone", "--user", "u1", "Europe/Paris").stdout == "member-1: Europe/Paris (set by the operator)\n"
    assert json.loads(headrace("zone", "--user", "u1", "--json").stdout)["zone"] == "Europe/Paris"
    assert error_line(headrace("zone", "--user", "u1", "Europe/Pari"), 4).startswith(
        "headrace: unknown time zone Europe/Pari"
    )
    assert "no zone is set" in headrace("zone", "--user", "u1", "--reset").stdout
    actions = rows(engine, "SELECT action FROM headrace.audit WHERE action LIKE 'zone%' ORDER BY id")
    assert [row["action"] for row in actions] == ["zone set", "zone reset"]


@pytest.mark.usefixtures("stored")
def test_a_rebuild_restores_days_that_were_changed_by_hand(engine: Engine, headrace) -> None:
    """Breaks if a rebuild does not compute every day, or writes days that are right."""
    assert json.loads(headrace("derive", "rebuild", "--json").stdout) == {"user": None, "changed": 0}
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE headrace.days SET value = 1 WHERE metric = 'steps'")
        connection.exec_driver_sql("DELETE FROM headrace.days WHERE metric = 'workouts_count'")
    done = headrace("derive", "rebuild", "--user", "u1")
    assert done.stdout == "rebuilt the days of member-1: 2 values changed\n"
    assert steps(engine) == [500]
    unknown = headrace("derive", "rebuild", "--user", "membr-1")
    assert error_line(unknown, 4) == "headrace: unknown user membr-1; did you mean member-1?"


@pytest.mark.usefixtures("stored")
def test_an_explanation_names_sources_and_what_won(engine: Engine, headrace) -> None:
    """Breaks if the explanation shows another source than the one that won, or values without --values."""
    words = ("explain", "--daily", "--user", "member-1", "--date", "2026-03-14")
    known = json.loads(headrace(*words, "--metric", "steps", "--json").stdout)
    assert [(one["rank"], one["provider"], one["samples"]) for one in known["sources"]] == [
        (1, "garmin", 1),
        (2, "oura", 1),
    ]
    (won,) = known["stretches"]
    assert (won["start"], won["stop"], won["provider"], won["zone_source"]) == (NOON, ONE, "garmin", "sample")
    assert won["offset"] == 3600
    assert [(one["provider"], one["start"], one["is_counted"]) for one in known["samples"]] == [
        ("garmin", NOON, True),
        ("oura", NOON, False),
    ]
    assert not any("value" in row for row in (known["stored"], *known["sources"], *known["samples"]))
    with_values = json.loads(headrace(*words, "--metric", "steps", "--values", "--json").stdout)
    assert with_values["stored"]["value"] == 500
    assert [one["value"] for one in with_values["samples"]] == [500, 400]
    (kept,) = json.loads(headrace(*words, "--metric", "workouts_count", "--json").stdout)["stretches"]
    assert (kept["id"], kept["also"]) == ("w1", ["w2"])
    text = headrace(*words, "--metric", "workouts_count").stdout
    assert "what won (UTC):" in text
    assert "no value is stored" in headrace(*words, "--metric", "heartrate_avg").stdout
    assert error_line(headrace(*words, "--metric", "step"), 4).startswith("headrace: unknown metric step; did you mean")
    assert len(rows(engine, "SELECT 1 FROM headrace.audit WHERE action = 'explain'")) == 5


def test_an_explanation_of_a_summary_names_no_sample_that_won(engine: Engine, settings: Settings, headrace) -> None:
    """Breaks if samples are shown as winners of a day whose value is a summary, or the zone is not named."""
    sample = {"timestamp": NOON, "value": 500, "unit": "count"}
    watch = {"source": {"provider": "garmin", "type": "watch"}, "data": [sample]}
    summary = {"id": "a1", "user_id": "u1", "date": NOON, "calendar_date": "2026-03-14", "steps": 450}
    summary["source"] = {"provider": "oura", "type": "ring"}
    for name, data in (("steps", watch), ("activity", summary)):
        apply(engine, settings, delivery(event(f"daily.data.{name}.created", "u1", data), datetime.now(UTC)))
    with transaction(engine) as connection:
        set_list(connection, "member-1", "*", ["*/ring"])
        set_zone(connection, "member-1", "Europe/Paris")
    Deriver(engine, settings).rebuild(None, lambda *_: None)
    words = ("explain", "--daily", "--user", "member-1", "--date", "2026-03-14", "--metric", "steps", "--values")
    known = json.loads(headrace(*words, "--json").stdout)
    assert (known["stored"]["value"], known["stored"]["method"], known["stretches"]) == (450, "summary", [])
    assert [(one["provider"], one["value"], one["summary_value"]) for one in known["sources"]] == [
        ("oura", None, 450),
        ("garmin", None, None),
    ]
    (one,) = known["samples"]
    assert (one["is_counted"], one["offset"], one["zone_source"]) == (False, 3600, "user")
    assert known["zone"] == "Europe/Paris"
    text = headrace(*words).stdout
    assert "zone: Europe/Paris" in text
    assert "what won" not in text
