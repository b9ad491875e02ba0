"""`headrace audit`: actions and their subjects are recorded, without health data."""

import json
import os
import pwd
from typing import Any

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, rows, workout
from tests.support.cli import Headrace, error_line

SINCE = ("audit", "--since", "2026-01-01")
CANARY = "canary-3b1c"


def recorded(headrace: Headrace, *more: str) -> list[dict[str, Any]]:
    return list(json.loads(headrace(*SINCE, "--json", *more).stdout))


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        (("backfill", "start", "--user", "u1", "--since", "2026-01-01", "--resource", "sleep"), "u1"),
        (("backfill", "cancel", "--user", "u1", "--yes"), "u1"),
        (("backfill", "pause", "--user", "u1"), "u1"),
        (("dead", "replay"), "dead letters"),
        (("dead", "drop", "--all", "--yes"), "dead letters"),
        (("replay", "--since", "2026-01-01"), "deliveries"),
        (("erase", "--user", "u1", "--yes"), "u1"),
        (("retract", "--user", "u1", "--resource", "workouts", "--id", "w1", "--yes"), "u1"),
        (("explain", "--user", "u1", "--resource", "workouts", "--id", "w1"), "u1"),
    ],
    ids=lambda given: "-".join(given[:2]) if isinstance(given, tuple) else "",
)
def test_actions_are_recorded(
    headrace: Headrace, settings: Settings, engine: Engine, words: tuple[str, ...], subject: str
) -> None:
    apply(engine, settings, delivery(workout("u1", title=CANARY)), delivery(CANARY.encode()))
    assert headrace(*words).exit_code in (0, 1)
    (found, *_) = recorded(headrace, "--subject", subject)
    assert found["action"] in (" ".join(words[:2]), words[0])
    assert found["operator"] == "headrace"  # the login in the database of the tests
    assert found["os_user"] == pwd.getpwuid(os.getuid()).pw_name
    assert CANARY not in headrace(*SINCE).stdout


@pytest.mark.parametrize(
    "words",
    [
        ("backfill", "start", "--user", "u1", "--since", "2026-01-01", "--dry-run"),
        ("erase", "--user", "u1", "--dry-run"),
        ("replay", "--since", "2026-01-01", "--dry-run"),
        ("retention", "--dry-run"),
        ("dead", "list"),
    ],
    ids="-".join,
)
def test_read_only_commands_are_not_recorded(
    headrace: Headrace, settings: Settings, engine: Engine, words: tuple[str, ...]
) -> None:
    apply(engine, settings, delivery(workout("u1")))
    assert headrace(*words).exit_code == 0
    assert recorded(headrace) == []
    assert headrace(*SINCE).stdout == "no actions\n"


def test_reading_the_body_of_a_dead_letter_is_recorded(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    apply(engine, settings, delivery(workout("u1", id=None)))
    (dead_letter,) = rows(engine, "SELECT id FROM headrace.dead_letters")
    assert headrace("dead", "show", str(dead_letter["id"])).exit_code == 0
    assert recorded(headrace) == []
    headrace("dead", "show", str(dead_letter["id"]), "--body")
    assert [(one["action"], one["subject"]) for one in recorded(headrace)] == [("dead show", "u1")]


def test_a_subject_may_be_any_id_of_a_user(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if a name that every other command accepts finds no action."""
    apply(engine, settings, delivery(workout("u1") | {"client_user_id": "member-1"}))
    headrace("explain", "--user", "member-1", "--resource", "workouts", "--id", "w1")
    headrace("zone", "--user", "member-1", "Europe/Paris")
    for name in ("u1", "member-1"):
        assert [one["action"] for one in recorded(headrace, "--subject", name)] == ["explain", "zone set"]
    unknown = headrace(*SINCE, "--subject", "membr-1")
    assert error_line(unknown, 4).endswith("nor the subject of an action; did you mean member-1?")
