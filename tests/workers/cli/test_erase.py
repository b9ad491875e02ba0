"""`headrace erase`: output, confirmation and errors; nothing changes before it is confirmed."""

import json
import re
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, heartrate, rows, until, workout
from tests.support.backfills import announce, notice
from tests.support.cli import Headrace, error_line
from tests.support.database import run
from tests.support.reconnections import EVENTS
from workers.cli import output
from workers.store.roles import writer_statements


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
COUNTS |= {"outbox": 2}


@pytest.mark.usefixtures("people")
def test_the_receipt_lists_removed_and_remaining_data(headrace: Headrace, engine: Engine) -> None:
    done = headrace("erase", "--user", "u1", "--yes")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("erased u1, 20")
    for table, count in COUNTS.items():
        assert any(line.split()[:2] == [table, str(count)] for line in lines), table
    for words in (
        *("tombstone of 20", "recorded as ignored", "DELETE /v2/user/", "backups", "replicas", "not erased: u2"),
        *("write-ahead log (WAL)", "free space", "VACUUM: `headrace erase --user ... --vacuum` runs it now"),
    ):
        assert words in done.stdout
    assert "member-1" not in done.stdout
    assert rows(engine, "SELECT user_id FROM health.workouts") == [{"user_id": "u2"}]


DELETED_ROWS = """
SELECT sum(pg_stat_get_dead_tuples(oid)) AS n FROM pg_class
WHERE relname = ANY(ARRAY['workouts', 'series']) OR relname LIKE 'samples%'"""


@pytest.mark.usefixtures("people")
def test_vacuum_removes_the_deleted_rows(headrace: Headrace, engine: Engine) -> None:
    """Breaks if `--vacuum` leaves deleted rows in PostgreSQL's files, or a timeout would end it in a large table."""
    done = headrace("erase", "--user", "u1", "--yes")
    assert done.exit_code == 0
    until(lambda: rows(engine, DELETED_ROWS)[0]["n"] > 0)
    done = headrace("erase", "--user", "u1", "--yes", "--vacuum")
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.search(r"vacuumed \d{2} tables", done.stdout)
    assert "runs it now" not in done.stdout
    assert "write-ahead log (WAL)" in done.stdout
    until(lambda: rows(engine, DELETED_ROWS)[0]["n"] == 0)
    assert rows(engine, "SHOW statement_timeout") == [{"statement_timeout": "45s"}]


@pytest.mark.usefixtures("people")
def test_vacuum_without_the_right_says_so(headrace: Headrace, engine: Engine, settings: Settings) -> None:
    """Breaks if the receipt reports a VACUUM that PostgreSQL skipped: it only warns a login that is not the owner."""
    login = "erase_without_maintain"
    run(engine, f"CREATE ROLE {login} LOGIN PASSWORD 'tests'", *writer_statements(login))
    try:
        url = urlsplit(settings.need_database())
        url = url._replace(netloc=f"{login}:tests@{url.hostname}:{url.port}")
        done = headrace("erase", "--user", "u1", "--yes", "--vacuum", "--json", DATABASE_URL=url.geturl())
        receipt = json.loads(done.stdout)
        assert receipt["vacuumed"] == []
        assert {"users", "workouts", "samples", "archive"} <= set(receipt["not_vacuumed"])
        assert any("--vacuum" in one for one in receipt["not_removed"])
        run(engine, f"GRANT MAINTAIN ON ALL TABLES IN SCHEMA headrace TO {login}")
        done = headrace("erase", "--user", "u1", "--yes", "--vacuum", "--json", DATABASE_URL=url.geturl())
        assert json.loads(done.stdout)["not_vacuumed"] == []
    finally:
        run(engine, f"DROP OWNED BY {login}", f"DROP ROLE {login}")


@pytest.mark.usefixtures("people")
def test_the_receipt_as_json_is_complete(headrace: Headrace) -> None:
    receipt = json.loads(headrace("erase", "--user", "u1", "--yes", "--json").stdout)
    assert (receipt["user_id"], receipt["before"], receipt["removed"]) == ("u1", "known", COUNTS)
    assert (receipt["unread"], receipt["others"]) == (0, ["u2"])
    assert receipt["erased_at"] <= receipt["finished_at"]
    assert "ignored" in receipt["tombstone"]
    assert (len(receipt["not_removed"]), receipt["vacuumed"], receipt["not_vacuumed"]) == (6, [], [])
    again = json.loads(headrace("erase", "--user", "u1", "--yes", "--json").stdout)
    assert (again["before"], again["removed"], again["erased_at"]) == ("erased", {}, receipt["erased_at"])


@pytest.mark.usefixtures("people")
def test_a_dry_run_changes_nothing(headrace: Headrace, engine: Engine) -> None:
    before = everything(engine)
    assert json.loads(headrace("erase", "--user", "u1", "--dry-run", "--json").stdout) == COUNTS
    message = headrace("erase", "--user", "u1", "--dry-run").stdout
    assert "rows of u1:" in message
    assert "samples" in message
    assert "nothing" in headrace("erase", "--user", "u9", "--unknown", "--dry-run").stdout
    every = json.loads(headrace("erase", "--user", "member-1", "--all", "--dry-run", "--json").stdout)
    assert (set(every), every["u1"]) == ({"u1", "u2"}, COUNTS)
    assert everything(engine) == before


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize(("answer", "goes"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_on_a_terminal_it_asks_for_confirmation(
    headrace: Headrace, engine: Engine, monkeypatch: pytest.MonkeyPatch, answer: str, *, goes: bool
) -> None:
    monkeypatch.setattr(output, "can_answer", lambda: True)
    before = everything(engine)
    done = headrace("erase", "--user", "u1", answer=answer)
    assert "delete u1 and 24 rows permanently?" in done.stdout
    assert (done.exit_code == 0) == goes
    assert (everything(engine) == before) != goes


@pytest.mark.usefixtures("people")
def test_yes_skips_the_confirmation(headrace: Headrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "can_answer", lambda: True)
    done = headrace("erase", "--user", "u1", "--yes")
    assert (done.exit_code, "permanently?" in done.stdout) == (0, False)


@pytest.mark.parametrize("words", ["member-1", "U1", "nobody --unknown"])
def test_without_a_terminal_yes_is_required(headrace: Headrace, engine: Engine, settings: Settings, words: str) -> None:
    """Breaks if a script erases a person that it has not named in full because no question could be asked."""
    apply(engine, settings, delivery(workout("u1")))
    before = everything(engine)
    done = headrace("erase", "--user", *words.split(), answer="y\n")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "add --yes to confirm" in done.stderr
    assert everything(engine) == before


@pytest.mark.usefixtures("people")
def test_a_script_may_name_a_user_id_in_full(headrace: Headrace) -> None:
    """Breaks if `headrace erase --user U`, as design 1.2 has it, no longer works without a terminal."""
    assert headrace("erase", "--user", "u1").stdout.startswith("erased u1, 20")


@pytest.mark.usefixtures("people")
def test_an_ambiguous_client_user_id_is_refused(headrace: Headrace, engine: Engine) -> None:
    """The line says whose each user_id is; with --all, both are erased."""
    before = everything(engine)
    words = ("erase", "--user", "member-1", "--yes")
    line = error_line(headrace(*words))
    assert line.startswith("Error: several users match member-1: u1 (garmin, last delivery 20")
    assert "); u2 (no connection, last delivery 20" in line
    assert line.endswith("Use one of these user_ids, or --all for all of them")
    assert everything(engine) == before
    receipts = json.loads(headrace(*words, "--all", "--json").stdout)
    assert [(one["user_id"], one["before"]) for one in receipts] == [("u1", "known"), ("u2", "known")]
    assert rows(engine, "SELECT user_id FROM health.workouts") == []


def test_a_client_user_id_of_one_user_is_resolved(headrace: Headrace, engine: Engine, settings: Settings) -> None:
    """Breaks if the tombstone is created under a name that no event has."""
    apply(engine, settings, delivery(workout("u1")))
    done = headrace("erase", "--user", "member-1", "--yes")
    assert done.stdout.startswith("erased u1, 20")
    assert rows(engine, "SELECT user_id, erased_at IS NOT NULL AS erased FROM health.users") == [
        {"user_id": "u1", "erased": True}
    ]


def test_dead_letters_of_a_former_id_are_deleted(headrace: Headrace, engine: Engine, settings: Settings) -> None:
    """Breaks if sealed data that arrived under the id before a reconnection survives the erasure of the person."""
    apply(engine, settings, *EVENTS)
    columns = "aggregator, message_id, received_at, reason, sealed, item, user_id"
    values = "'terra', 'msg_late', now(), 'no id', '', 'digest', 'old'"
    run(engine, f"INSERT INTO headrace.dead_letters ({columns}) VALUES ({values})")
    counted = json.loads(headrace("erase", "--user", "OLD", "--dry-run", "--json").stdout)
    receipt = json.loads(headrace("erase", "--user", "OLD", "--yes", "--json").stdout)
    assert (receipt["user_id"], receipt["removed"]["dead_letters"], counted["dead_letters"]) == ("new", 1, 1)
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []


@pytest.mark.usefixtures("people")
def test_an_unknown_user_is_refused(headrace: Headrace, engine: Engine) -> None:
    """Breaks if a typing error leaves a tombstone instead of erasing the person who was meant."""
    before = everything(engine)
    line = error_line(headrace("erase", "--user", "membr-1", "--yes"), 4)
    assert line.startswith("headrace: unknown user membr-1; did you mean member-1?")
    assert "--unknown" in line
    assert everything(engine) == before


def test_an_unknown_user_gets_a_tombstone_on_request(headrace: Headrace, engine: Engine) -> None:
    """Their first event may already be queued. Aggregators' UUIDs are stored in lower case."""
    name = "8A7F2C04-5C49-4A0B-9D4E-7B7F3F1D2C11"
    done = headrace("erase", "--user", name, "--unknown", "--yes")
    assert done.exit_code == 0
    assert "the user was unknown; a tombstone now blocks" in done.stdout
    (row,) = rows(engine, "SELECT user_id, erased_at IS NOT NULL AS erased FROM health.users")
    assert row == {"user_id": name.lower(), "erased": True}


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize(
    "words", [("backfill", "start", "--user", "u1", "--since", "2026-01-01"), ("refresh", "--user", "u1")]
)
def test_an_erased_user_is_not_fetched_again(headrace: Headrace, broker_url: str, words: tuple[str, ...]) -> None:
    headrace("erase", "--user", "u1", "--yes")
    done = headrace(
        *words, BROKER_URL=broker_url, JUNCTION_API_KEY="sk_us_tests", JUNCTION_BASE_URL="http://127.0.0.1:1"
    )
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: u1 was erased, and is not ")
