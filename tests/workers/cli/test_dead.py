"""`headrace dead` and `headrace replay`: what is printed, refused and done, and that no value of a body gets out."""

import base64
import json
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit, urlunsplit

import msgspec
import psycopg
import pytest
from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import ENCRYPTION_KEY, apply, delivery, heartrate, rows, workout
from tests.support.cli import Headrace
from tests.support.deliveries import OTHER_KEY, connection_event, received, sealed_with_another_key
from tests.support.servers import Servers
from workers.ingest.apply import Applier
from workers.store import dead_letters, digests
from workers.store.engine import make_engine

NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
SINCE = ("--since", "2026-03-14T12:00:00Z")
UNTIL = ("--until", "2026-03-15T12:00:00Z")
SESAME = "sesame"


def an_hour_ago() -> str:
    """The beginning of a window in which whatever a test sends has come."""
    return (datetime.now(UTC) - HOUR).isoformat()


def keys(*given: bytes) -> dict[str, str]:
    """The environment of an operator who has these keys."""
    return {"HEADRACE_ENCRYPTION_KEY": ",".join(base64.b64encode(key).decode() for key in given)}


@pytest.fixture
def run(headrace: Headrace, engine: Engine) -> Headrace:
    """A command within this process, against a database without records."""
    return headrace


@pytest.fixture
def letters(engine: Engine, settings: Settings) -> dict[str, int]:
    """Three letters, by what is wrong with them: two bodies, one of which another key opens, and a value."""
    sent = {
        "rubbish": delivery(SESAME.encode()),
        "sealed": sealed_with_another_key(workout("u1", "w1", title=SESAME)),
        "refused": delivery(workout("u2", "w2", title=f"{SESAME}\u0000")),
    }
    apply(engine, settings, *sent.values())
    numbers = {letter.message_id: letter.id for letter in dead_letters.listed(engine)}
    return {what: numbers[one.message_id] for what, one in sent.items()}


def left(engine: Engine) -> set[int]:
    """The numbers of the letters there are."""
    return {letter.id for letter in dead_letters.listed(engine)}


# dead list


def test_letters_are_listed(run: Headrace, letters: dict[str, int]) -> None:
    """Breaks if an operator cannot see what is dead, when it died and why."""
    done = run("dead", "list")
    assert (done.exit_code, done.stderr) == (0, "")
    for number in letters.values():
        assert f" {number} " in done.stdout
    for words in ("not a Junction event", "sealed with a key", "PostgreSQL refuses it", "msg_", "attempts"):
        assert words in done.stdout
    assert SESAME not in done.stdout


def test_a_list_can_be_read_by_programs(run: Headrace, engine: Engine, letters: dict[str, int]) -> None:
    """Breaks if --json is no JSON, leaves a field out, or holds a body."""
    found = json.loads(run("dead", "list", "--json").stdout)
    assert {row["id"] for row in found} == set(letters.values())
    assert set(found[0]) == {field.name for field in fields(dead_letters.DeadLetter)}
    assert all(row["aggregator"] == "junction" and row["attempts"] == 1 for row in found)
    assert all(datetime.fromisoformat(row["died_at"]) for row in found)
    assert SESAME not in json.dumps(found)
    assert base64.b64encode(SESAME.encode()).decode() not in json.dumps(found)


def test_filters_and_limits(run: Headrace, letters: dict[str, int]) -> None:
    """Breaks if a filter is not heeded, or the limit cuts off the newest."""

    def listed(*words: str) -> list[int]:
        return [row["id"] for row in json.loads(run("dead", "list", "--json", *words).stdout)]

    assert listed("--reason", "junction EVENT") == [letters["rubbish"]]
    assert listed(str(letters["sealed"]), str(letters["refused"])) == sorted(
        (letters["sealed"], letters["refused"]), reverse=True
    )
    assert listed("--limit", "1") == [max(letters.values())]
    assert listed("--reason", "nobody") == []


def test_no_letters_are_said_so(run: Headrace) -> None:
    """Breaks if an empty list looks like a failure, or is no list for a program."""
    assert run("dead", "list").stdout == "no dead letters\n"
    assert json.loads(run("dead", "list", "--json").stdout) == []


# dead show


def test_one_letter_is_shown_without_its_body(run: Headrace, letters: dict[str, int]) -> None:
    """Breaks if health data is on the screen of somebody who only asked why."""
    for number in letters.values():
        done = run("dead", "show", str(number))
        assert done.exit_code == 0
        assert f"id            {number}" in done.stdout
        assert "reason" in done.stdout
        as_json = run("dead", "show", str(number), "--json")
        assert json.loads(as_json.stdout)["id"] == number
        assert SESAME not in done.output + as_json.output


def test_a_body_is_opened_with_the_key_and_only_if_wanted(run: Headrace, letters: dict[str, int]) -> None:
    """Breaks if what is wrong with a body cannot be found out, or without the key it can."""
    done = run("dead", "show", str(letters["rubbish"]), "--body")
    assert (done.exit_code, done.stdout_bytes) == (0, SESAME.encode() + b"\n")
    opened = run("dead", "show", str(letters["refused"]), "--body")
    assert json.loads(opened.stdout)["data"]["title"] == f"{SESAME}\u0000"
    for environment in ({}, keys(OTHER_KEY), {"HEADRACE_ENCRYPTION_KEY": ""}):
        number = letters["sealed" if environment == {} else "rubbish"]
        done = run("dead", "show", str(number), "--body", **environment)
        assert (done.exit_code, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert "HEADRACE_ENCRYPTION_KEY does not hold" in line
    assert SESAME in run("dead", "show", str(letters["sealed"]), "--body", **keys(OTHER_KEY)).stdout


def test_a_letter_that_is_not_there(run: Headrace, letters: dict[str, int]) -> None:
    """Breaks if a wrong number is a traceback, or a success."""
    done = run("dead", "show", str(max(letters.values()) + 1))
    assert (done.exit_code, done.stdout) == (1, "")
    assert "headrace dead list" in done.stderr
    assert run("dead", "show", "x").exit_code == 2


# dead replay


def test_what_can_be_applied_leaves_the_list(run: Headrace, engine: Engine, letters: dict[str, int]) -> None:
    """Breaks if a replay is a success while letters are dead still, or does not say how many."""
    done = run("dead", "replay", **keys(ENCRYPTION_KEY, OTHER_KEY))
    assert done.stdout == "3 applied again: 1 applied, 2 dead\n"
    assert (done.exit_code, done.stderr) == (1, "2 are dead still; headrace dead list says why\n")
    assert left(engine) == {letters["rubbish"], letters["refused"]}
    assert rows(engine, "SELECT user_id, origin FROM health.workouts") == [{"user_id": "u1", "origin": "replay"}]


def test_only_the_chosen_letters_are_applied(run: Headrace, engine: Engine, letters: dict[str, int]) -> None:
    """Breaks if a filter of a replay is not heeded."""
    for words in ([str(letters["sealed"])], ["--reason", "no such thing"], [str(letters["rubbish"] + 10**6)]):
        done = run("dead", "replay", *words, "--json")
        found = json.loads(done.stdout)
        assert found == ({"dead": 1} if words == [str(letters["sealed"])] else {})
        assert done.exit_code == (1 if found else 0)
    done = run("dead", "replay", "--reason", "sealed with a key", "--json", **keys(ENCRYPTION_KEY, OTHER_KEY))
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"applied": 1})
    assert run("dead", "replay", "--reason", "nobody").stdout == "0 applied again: nothing to do\n"
    assert left(engine) == {letters["rubbish"], letters["refused"]}


# dead drop


@pytest.mark.parametrize("words", [(), ("--yes",)])
def test_nothing_is_dropped_without_saying_which(
    run: Headrace, engine: Engine, letters: dict[str, int], words: tuple[str, ...]
) -> None:
    """Breaks if a slip of the hand throws away everything."""
    done = run("dead", "drop", *words)
    assert done.exit_code == 2
    assert "--all" in done.stderr
    assert left(engine) == set(letters.values())


def test_a_drop_asks_first(run: Headrace, engine: Engine, letters: dict[str, int]) -> None:
    """Breaks if letters are thrown away before anybody has said yes."""
    number = str(letters["rubbish"])
    assert run("dead", "drop", number, answer="n\n").exit_code == 1
    assert run("dead", "drop", number, answer="").exit_code == 1
    assert left(engine) == set(letters.values())
    done = run("dead", "drop", number, answer="y\n")
    assert done.exit_code == 0
    assert "dropped 1\n" in done.stdout
    assert left(engine) == {letters["sealed"], letters["refused"]}


def test_drops_by_reason_and_of_all(run: Headrace, engine: Engine, letters: dict[str, int]) -> None:
    """Breaks if a drop takes more than it was told, or the ledger forgets."""
    none = run("dead", "drop", "--reason", "in other words", "--yes")
    assert (none.exit_code, "headrace dead list" in none.stderr) == (1, True)
    assert run("dead", "drop", "--reason", "sealed with", "--yes").stdout == "dropped 1\n"
    assert left(engine) == {letters["rubbish"], letters["refused"]}
    assert run("dead", "drop", "--all", "--yes").stdout == "dropped 2\n"
    assert run("dead", "drop", "--all").stdout == "dropped 0\n"
    assert left(engine) == set()
    assert rows(engine, "SELECT DISTINCT outcome FROM health.deliveries") == [{"outcome": "dead"}]


# replay


@pytest.fixture
def kept(engine: Engine, settings: Settings) -> list[Delivery]:
    """Five deliveries, an hour apart: three workouts, samples and a connection."""
    bodies = [delivery(workout("u1", f"w{n}", title=SESAME)) for n in range(3)]
    bodies += [delivery(heartrate("u1", {0: 60})), connection_event("u1", NOON)]
    sent = [received(one, NOON + n * HOUR) for n, one in enumerate(bodies)]
    apply(engine, settings, *sent)
    return sent


def lose(engine: Engine) -> None:
    """Takes away what was stored."""
    with engine.begin() as connection:
        for table in ("workouts", "samples"):
            connection.execute(text(f"DELETE FROM headrace.{table}"))


@pytest.mark.parametrize("order", ["oldest", "newest", "random"])
def test_a_replay_changes_nothing_and_says_so(run: Headrace, engine: Engine, kept: list[Delivery], order: str) -> None:
    """Breaks if an operator who replays to be sure changes something, or is not told."""
    before = digests.digests(engine)
    done = run("replay", *SINCE, *UNTIL, "--order", order, "--digest")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "5 applied again: 5 duplicate\nno table has changed\n"
    assert digests.digests(engine) == before
    as_json = run("replay", *SINCE, *UNTIL, "--order", order, "--digest", "--json")
    assert json.loads(as_json.stdout) == {"duplicate": 5, "changed": []}


def test_a_replay_names_the_tables_that_changed(run: Headrace, engine: Engine, kept: list[Delivery]) -> None:
    """Breaks if what a replay has mended cannot be seen."""
    lose(engine)
    done = run("replay", *SINCE, *UNTIL, "--event-type", "daily.data.workouts.*", "--digest")
    assert done.stdout == "3 applied again: 3 applied\nchanged: health.workouts\n"
    found = json.loads(run("replay", *SINCE, *UNTIL, "--digest", "--json").stdout)
    assert found == {"applied": 1, "duplicate": 4, "changed": ["health.heartrate"]}
    assert json.loads(run("replay", *SINCE, *UNTIL, "--json").stdout) == {"duplicate": 5}


def test_a_dry_run_only_counts(run: Headrace, engine: Engine, kept: list[Delivery]) -> None:
    """Breaks if a dry run writes, or counts otherwise than the replay."""
    lose(engine)
    done = run("replay", *SINCE, *UNTIL, "--dry-run")
    assert (done.exit_code, done.stdout) == (0, "5 deliveries are kept of that\n")
    part = ("--until", "2026-03-14T14:00:00Z", "--event-type", "*.workouts.*")
    assert run("replay", *SINCE, *part, "--dry-run").stdout == "2 deliveries are kept of that\n"
    assert rows(engine, "SELECT 1 FROM health.workouts") == []
    assert run("replay", *SINCE, *part).stdout == "2 applied again: 2 applied\n"


@pytest.mark.parametrize("words", [("--dry-run",), ("--event-type", "none")])
def test_a_count_can_be_read_by_programs(run: Headrace, kept: list[Delivery], words: tuple[str, ...]) -> None:
    """Breaks if a program that asks for JSON gets a sentence, where there is nothing to do or nothing is done."""
    done = run("replay", *SINCE, *UNTIL, "--json", *words)
    assert done.exit_code == 0
    json.loads(done.stdout)


def test_nothing_kept_is_no_failure(run: Headrace) -> None:
    """Breaks if a replay of an hour in which nothing came ends with an error."""
    done = run("replay", *SINCE)
    assert (done.exit_code, done.stdout) == (0, "0 deliveries are kept of that\n")


def test_until_is_now_unless_it_is_said(run: Headrace, engine: Engine, settings: Settings) -> None:
    """Breaks if what came today is left out of a replay that has no end."""
    apply(engine, settings, delivery(workout("u1")))
    assert run("replay", "--since", an_hour_ago()).stdout == "1 applied again: 1 duplicate\n"


@pytest.mark.parametrize("words", [(), ("--since", "x"), (*SINCE, "--order", "x"), (*SINCE, "--until", "x")])
def test_what_makes_no_sense_is_refused(run: Headrace, words: tuple[str, ...]) -> None:
    """Breaks if a slip is taken for everything since ever."""
    done = run("replay", *words)
    assert (done.exit_code, done.stdout) == (2, "")


@pytest.fixture
def other(servers: Servers) -> Iterator[str]:
    """The URL of an empty database, which nobody has migrated."""
    where = urlsplit(servers.database_url)
    with psycopg.connect(urlunsplit(where._replace(path="/postgres")), autocommit=True) as connection:
        connection.execute("CREATE DATABASE drilled TEMPLATE template0")
        yield urlunsplit(where._replace(path="/drilled"))
        connection.execute("DROP DATABASE drilled WITH (FORCE)")


def test_a_replay_into_another_database_ends_the_same(
    run: Headrace, engine: Engine, kept: list[Delivery], other: str
) -> None:
    """Breaks if the drill writes to the database in use, or does not fill the empty one."""
    before = digests.digests(engine)
    for order, outcome in (("random", "5 applied"), ("newest", "5 duplicate")):
        done = run("replay", *SINCE, *UNTIL, "--order", order, "--into", other)
        assert (done.exit_code, done.stdout) == (0, f"5 applied again: {outcome}\n")
    there = make_engine(Settings(database_url=other.replace("postgresql", "postgresql+psycopg", 1)))
    try:
        assert digests.digests(there) == before
    finally:
        there.dispose()
    assert {row["origin"] for row in rows(engine, "SELECT origin FROM health.workouts")} == {"webhook"}
    assert "tests" not in done.output


def test_an_address_that_is_none_is_one_line(run: Headrace, kept: list[Delivery]) -> None:
    """Breaks if a wrong --into ends in a traceback, or in the database in use."""
    for address in ("mysql://a/b", "postgresql://user:sesame@127.0.0.1:1/nowhere"):
        done = run("replay", *SINCE, *UNTIL, "--into", address)
        assert (done.exit_code, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert SESAME not in line


# No value of a body


def test_no_value_gets_out(run: Headrace, engine: Engine, settings: Settings, letters: dict[str, int]) -> None:
    """Breaks if any output but that of --body holds a value of what somebody sent."""
    apply(engine, settings, delivery(workout("u9", "w9", title=SESAME)))
    sealed = msgspec.json.encode(workout("u3", "w3", title=SESAME))
    Applier(engine, settings).dead_letter_raw(sealed, "not a message of deliveries")
    commands_of = [
        ("dead", "list"),
        ("dead", "list", "--json"),
        *[("dead", "show", str(number), *more) for number in left(engine) for more in ((), ("--json",))],
        ("dead", "replay"),
        ("dead", "replay", "--json"),
        ("replay", "--since", an_hour_ago(), "--digest"),
        ("replay", "--since", an_hour_ago(), "--json"),
        ("dead", "drop", "--all", "--yes"),
    ]
    done = [run(*words) for words in commands_of]
    assert {one.exit_code for one in done} == {0, 1}
    assert all(one.stdout for one in done)
    assert not [one.output for one in done if SESAME in one.output]
