"""`headrace erase`: output, confirmation and errors; nothing changes before it is confirmed."""

import json
from typing import Any

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, heartrate, rows, workout
from tests.support.backfills import announce, notice
from tests.support.cli import Headrace
from workers.cli import output


@pytest.fixture
def people(engine: Engine, settings: Settings) -> None:
    """Two users with the same client_user_id; one has rows in every table."""
    apply(engine, settings, delivery(workout("u1")), delivery(heartrate("u1", dict.fromkeys(range(12), 60))))
    apply(engine, settings, delivery(workout("u2", "w2")))
    announce(engine, settings, notice("u1"))


def everything(engine: Engine) -> list[Any]:
    """All rows, with their physical position, of the tables that an erasure changes."""
    tables = ("users", "workouts", "samples", "series", "backfills", "chunks", "archive", "deliveries", "audit")
    return [rows(engine, f"SELECT ctid::text, xmin::text, t::text FROM headrace.{table} t") for table in tables]


COUNTS = {"backfills": 1, "chunks": 1, "deliveries": 3, "archive": 3, "samples": 12, "series": 1, "workouts": 1}


@pytest.mark.usefixtures("people")
def test_the_receipt_lists_removed_and_remaining_data(headrace: Headrace, engine: Engine) -> None:
    done = headrace("erase", "--user", "u1")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("erased u1, 20")
    for table, count in COUNTS.items():
        assert any(line.split()[:2] == [table, str(count)] for line in lines), table
    for words in ("tombstone of 20", "recorded as ignored", "DELETE /v2/user/", "backups", "not erased: u2"):
        assert words in done.stdout
    assert "member-1" not in done.stdout
    assert rows(engine, "SELECT user_id FROM health.workouts") == [{"user_id": "u2"}]


@pytest.mark.usefixtures("people")
def test_the_receipt_as_json_is_complete(headrace: Headrace) -> None:
    receipt = json.loads(headrace("erase", "--user", "u1", "--json").stdout)
    assert (receipt["user_id"], receipt["before"], receipt["removed"]) == ("u1", "known", COUNTS)
    assert (receipt["unread"], receipt["others"]) == (0, ["u2"])
    assert receipt["erased_at"] <= receipt["finished_at"]
    assert "ignored" in receipt["tombstone"]
    assert len(receipt["not_removed"]) == 3
    again = json.loads(headrace("erase", "--user", "u1", "--json").stdout)
    assert (again["before"], again["removed"], again["erased_at"]) == ("erased", {}, receipt["erased_at"])


@pytest.mark.usefixtures("people")
def test_a_dry_run_changes_nothing(headrace: Headrace, engine: Engine) -> None:
    before = everything(engine)
    assert json.loads(headrace("erase", "--user", "u1", "--dry-run", "--json").stdout) == COUNTS
    message = headrace("erase", "--user", "u1", "--dry-run").stdout
    assert "rows of u1:" in message
    assert "samples" in message
    assert "nothing" in headrace("erase", "--user", "u9", "--dry-run").stdout
    assert everything(engine) == before


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize(("answer", "goes"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_on_a_terminal_it_asks_for_confirmation(
    headrace: Headrace, engine: Engine, monkeypatch: pytest.MonkeyPatch, answer: str, *, goes: bool
) -> None:
    monkeypatch.setattr(output, "can_answer", lambda: True)
    before = everything(engine)
    done = headrace("erase", "--user", "u1", answer=answer)
    assert "delete u1 and 22 rows permanently?" in done.stdout
    assert (done.exit_code == 0) == goes
    assert (everything(engine) == before) != goes


@pytest.mark.usefixtures("people")
def test_yes_skips_the_confirmation(headrace: Headrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "can_answer", lambda: True)
    done = headrace("erase", "--user", "u1", "--yes")
    assert (done.exit_code, "permanently?" in done.stdout) == (0, False)


@pytest.mark.usefixtures("people")
def test_a_client_user_id_is_refused(headrace: Headrace, engine: Engine) -> None:
    """A tombstone under it would block no event."""
    before = everything(engine)
    done = headrace("erase", "--user", "member-1")
    assert done.exit_code == 1
    assert done.stderr == "Error: several users have the client_user_id member-1: u1, u2; use one of these user_ids\n"
    assert everything(engine) == before


def test_an_unknown_user_gets_a_tombstone(headrace: Headrace, engine: Engine) -> None:
    """Their first event may already be queued."""
    done = headrace("erase", "--user", "u9")
    assert done.exit_code == 0
    assert "the user was unknown; a tombstone now blocks" in done.stdout
    (row,) = rows(engine, "SELECT user_id, erased_at IS NOT NULL AS erased FROM health.users")
    assert row == {"user_id": "u9", "erased": True}


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize(
    "words", [("backfill", "start", "--user", "u1", "--since", "2026-01-01"), ("refresh", "--user", "u1")]
)
def test_an_erased_user_is_not_fetched_again(headrace: Headrace, broker_url: str, words: tuple[str, ...]) -> None:
    headrace("erase", "--user", "u1")
    done = headrace(
        *words, BROKER_URL=broker_url, JUNCTION_API_KEY="sk_us_tests", JUNCTION_BASE_URL="http://127.0.0.1:1"
    )
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: u1 was erased, and is not ")
