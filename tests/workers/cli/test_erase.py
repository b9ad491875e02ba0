"""`headrace erase`: what is printed, asked and refused, and that nothing is touched before it is meant."""

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
def run(headrace: Headrace, engine: Engine) -> Headrace:
    """A command within this process, against a database without records."""
    return headrace


@pytest.fixture
def people(engine: Engine, settings: Settings) -> None:
    """Two people: one with something of each kind, and one with another user_id for the same member."""
    apply(engine, settings, delivery(workout("u1")), delivery(heartrate("u1", dict.fromkeys(range(12), 60))))
    apply(engine, settings, delivery(workout("u2", "w2")))
    announce(engine, settings, notice("u1"))


def everything(engine: Engine) -> list[Any]:
    """All rows of all tables that an erasure touches, as they are on disk."""
    tables = ("users", "workouts", "samples", "series", "backfills", "chunks", "archive", "deliveries", "audit")
    return [rows(engine, f"SELECT ctid::text, xmin::text, t::text FROM headrace.{table} t") for table in tables]


COUNTS = {"backfills": 1, "chunks": 1, "deliveries": 3, "archive": 3, "samples": 12, "series": 1, "workouts": 1}


@pytest.mark.usefixtures("people")
def test_the_receipt_says_what_went_and_what_it_cannot_reach(run: Headrace, engine: Engine) -> None:
    """Breaks if an operator has nothing to show, or believes that all is done where it is not."""
    done = run("erase", "--user", "u1")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("erased u1, 20")
    for table, count in COUNTS.items():
        assert any(line.split()[:2] == [table, str(count)] for line in lines), table
    for words in ("tombstone of 20", "recorded as ignored", "DELETE /v2/user/", "backups", "there still: u2"):
        assert words in done.stdout
    assert "member-1" not in done.stdout
    assert rows(engine, "SELECT user_id FROM health.workouts") == [{"user_id": "u2"}]


@pytest.mark.usefixtures("people")
def test_the_receipt_can_be_read_by_programs(run: Headrace) -> None:
    """Breaks if --json is no JSON, or lacks what the text says."""
    receipt = json.loads(run("erase", "--user", "u1", "--json").stdout)
    assert (receipt["user_id"], receipt["before"], receipt["removed"]) == ("u1", "known", COUNTS)
    assert (receipt["unread"], receipt["others"]) == (0, ["u2"])
    assert receipt["erased_at"] <= receipt["finished_at"]
    assert "ignored" in receipt["tombstone"]
    assert len(receipt["not_removed"]) == 3
    again = json.loads(run("erase", "--user", "u1", "--json").stdout)
    assert (again["before"], again["removed"], again["erased_at"]) == ("erased", {}, receipt["erased_at"])


@pytest.mark.usefixtures("people")
def test_a_dry_run_touches_nothing(run: Headrace, engine: Engine) -> None:
    """Breaks if whoever only wanted to know has erased somebody, or is told other numbers than the receipt's."""
    before = everything(engine)
    assert json.loads(run("erase", "--user", "u1", "--dry-run", "--json").stdout) == COUNTS
    told = run("erase", "--user", "u1", "--dry-run").stdout
    assert "there is of u1:" in told
    assert "samples" in told
    assert "nothing" in run("erase", "--user", "u9", "--dry-run").stdout
    assert everything(engine) == before


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize(("answer", "goes"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_on_a_terminal_it_asks_first(
    run: Headrace, engine: Engine, monkeypatch: pytest.MonkeyPatch, answer: str, *, goes: bool
) -> None:
    """Breaks if a slip of the finger erases somebody."""
    monkeypatch.setattr(output, "can_answer", lambda: True)
    before = everything(engine)
    done = run("erase", "--user", "u1", answer=answer)
    assert "remove u1 and 22 rows for good?" in done.stdout
    assert (done.exit_code == 0) == goes
    assert (everything(engine) == before) != goes


@pytest.mark.usefixtures("people")
def test_it_can_be_told_not_to_ask(run: Headrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a script that has a terminal hangs."""
    monkeypatch.setattr(output, "can_answer", lambda: True)
    done = run("erase", "--user", "u1", "--yes")
    assert (done.exit_code, "for good?" in done.stdout) == (0, False)


@pytest.mark.usefixtures("people")
def test_a_client_user_id_is_not_taken_for_a_user_id(run: Headrace, engine: Engine) -> None:
    """Breaks if somebody is thought erased, because a tombstone stands under a name that no event has."""
    before = everything(engine)
    done = run("erase", "--user", "member-1")
    assert done.exit_code == 1
    assert done.stderr == "Error: member-1 is no user_id of today; --user is one of u1, u2\n"
    assert everything(engine) == before


def test_whoever_is_not_known_gets_a_tombstone_too(run: Headrace, engine: Engine) -> None:
    """Breaks if somebody whose first event is on its way cannot be erased."""
    done = run("erase", "--user", "u9")
    assert done.exit_code == 0
    assert "nobody of that name was known" in done.stdout
    (row,) = rows(engine, "SELECT user_id, erased_at IS NOT NULL AS erased FROM health.users")
    assert row == {"user_id": "u9", "erased": True}


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize(
    "words", [("backfill", "start", "--user", "u1", "--since", "2026-01-01"), ("refresh", "--user", "u1")]
)
def test_nobody_asks_for_more_of_them(run: Headrace, broker_url: str, words: tuple[str, ...]) -> None:
    """Breaks if an operator's command has a provider asked about somebody who was erased, or fails without a reason."""
    run("erase", "--user", "u1")
    done = run(*words, BROKER_URL=broker_url, JUNCTION_API_KEY="sk_us_tests", JUNCTION_BASE_URL="http://127.0.0.1:1")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: u1 was erased, and is not ")
