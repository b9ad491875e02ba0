"""`headrace audit`: what operators did stands there, with whom it was about and nothing that was measured."""

import json
from typing import Any

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, rows, workout
from tests.support.cli import Headrace

SINCE = ("audit", "--since", "2026-01-01")
CANARY = "canary-3b1c"


def done(headrace: Headrace, *more: str) -> list[dict[str, Any]]:
    """What is written down."""
    return list(json.loads(headrace(*SINCE, "--json", *more).stdout))


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        (("backfill", "start", "--user", "u1", "--since", "2026-01-01", "--resource", "sleep"), "u1"),
        (("backfill", "cancel", "--user", "u1"), "u1"),
        (("backfill", "pause", "--user", "u1"), "u1"),
        (("dead", "replay"), "dead letters"),
        (("dead", "drop", "--all", "--yes"), "dead letters"),
        (("replay", "--since", "2026-01-01"), "deliveries"),
        (("erase", "--user", "u1"), "u1"),
        (("explain", "--user", "u1", "--resource", "workouts", "--id", "w1"), "u1"),
    ],
    ids=lambda given: "-".join(given[:2]) if isinstance(given, tuple) else "",
)
def test_what_is_done_is_written_down(
    headrace: Headrace, settings: Settings, engine: Engine, words: tuple[str, ...], subject: str
) -> None:
    """Breaks if an operator's deed cannot be found afterwards, or it is told with a measured value."""
    apply(engine, settings, delivery(workout("u1", title=CANARY)), delivery(CANARY.encode()))
    assert headrace(*words).exit_code in (0, 1)
    (found, *_) = done(headrace, "--subject", subject)
    assert found["action"] in (" ".join(words[:2]), words[0])
    assert found["operator"]
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
def test_what_only_looks_at_counts_is_not(
    headrace: Headrace, settings: Settings, engine: Engine, words: tuple[str, ...]
) -> None:
    """Breaks if the deeds are hidden among looks."""
    apply(engine, settings, delivery(workout("u1")))
    assert headrace(*words).exit_code == 0
    assert done(headrace) == []
    assert headrace(*SINCE).stdout == "nothing\n"


def test_looking_into_a_dead_letter_is_written_down(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if somebody reads a body and nobody can tell who."""
    apply(engine, settings, delivery(workout("u1", title="no\u0000good")))
    (letter,) = rows(engine, "SELECT id FROM headrace.dead_letters")
    assert headrace("dead", "show", str(letter["id"])).exit_code == 0
    assert done(headrace) == []
    headrace("dead", "show", str(letter["id"]), "--body")
    assert [(one["action"], one["subject"]) for one in done(headrace)] == [("dead show", "u1")]
