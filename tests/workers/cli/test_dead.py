"""`headrace dead` and `headrace replay`: options, output and errors; no output contains a value of a body."""

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
from tests.support.cli import Headrace, error_line
from tests.support.deliveries import OTHER_KEY, connection_event, received, sealed_with_another_key
from tests.support.poison import eleven, fault, run_tries
from tests.support.servers import Servers
from workers.cli import output
from workers.ingest.apply import Applier
from workers.store import dead_letters, schema
from workers.store.engine import make_engine, make_writer

NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
SINCE = ("--since", "2026-03-14T12:00:00Z")
UNTIL = ("--until", "2026-03-15T12:00:00Z")
SESAME = "sesame"


def an_hour_ago() -> str:
    return (datetime.now(UTC) - HOUR).isoformat()


def keys(*given: bytes) -> dict[str, str]:
    """The environment with these encryption keys."""
    return {"HEADRACE_ENCRYPTION_KEY": ",".join(base64.b64encode(key).decode() for key in given)}


@pytest.fixture
def ids(engine: Engine, settings: Settings) -> dict[str, int]:
    """Three dead letters by their cause: invalid JSON, sealed with another key, and a workout without an id."""
    sent = {
        "rubbish": delivery(SESAME.encode()),
        "sealed": sealed_with_another_key(workout("u1", "w1", title=SESAME)),
        "refused": delivery(workout("u2", id=None, title=SESAME)),
    }
    apply(engine, settings, *sent.values())
    numbers = {one.message_id: one.id for one in dead_letters.listed(engine)}
    return {what: numbers[one.message_id] for what, one in sent.items()}


def left(engine: Engine) -> set[int]:
    return {one.id for one in dead_letters.listed(engine)}


# dead list


def test_dead_letters_are_listed(headrace: Headrace, ids: dict[str, int]) -> None:
    done = headrace("dead", "list")
    assert (done.exit_code, done.stderr) == (0, "")
    for number in ids.values():
        assert f" {number} " in done.stdout
    for words in ("not a Junction event", "sealed with a key", "expected an id", "msg_", "attempts", "u2"):
        assert words in done.stdout
    assert SESAME not in done.stdout


def test_the_list_as_json_is_complete(headrace: Headrace, engine: Engine, ids: dict[str, int]) -> None:
    found = json.loads(headrace("dead", "list", "--json").stdout)
    assert {row["id"] for row in found} == set(ids.values())
    assert set(found[0]) == {field.name for field in fields(dead_letters.DeadLetter)}
    assert all(row["aggregator"] == "junction" and row["attempts"] == 1 for row in found)
    assert all(datetime.fromisoformat(row["died_at"]) for row in found)
    assert SESAME not in json.dumps(found)
    assert base64.b64encode(SESAME.encode()).decode() not in json.dumps(found)


def test_filters_and_limits(headrace: Headrace, ids: dict[str, int]) -> None:
    def listed(*words: str) -> list[int]:
        return [row["id"] for row in json.loads(headrace("dead", "list", "--json", *words).stdout)]

    assert listed("--reason", "junction EVENT") == [ids["rubbish"]]
    assert listed(str(ids["sealed"]), str(ids["refused"])) == sorted((ids["sealed"], ids["refused"]), reverse=True)
    assert listed("--limit", "1") == [max(ids.values())]
    assert listed("--reason", "nobody") == []


def test_an_empty_list(headrace: Headrace) -> None:
    assert headrace("dead", "list").stdout == "no dead letters\n"
    assert json.loads(headrace("dead", "list", "--json").stdout) == []


# dead show


def test_show_omits_the_body(headrace: Headrace, ids: dict[str, int]) -> None:
    for number in ids.values():
        done = headrace("dead", "show", str(number))
        assert done.exit_code == 0
        assert f"id           {number}" in done.stdout
        assert "reason" in done.stdout
        as_json = headrace("dead", "show", str(number), "--json")
        assert json.loads(as_json.stdout)["id"] == number
        assert SESAME not in done.output + as_json.output


def test_a_body_is_decrypted_on_request(headrace: Headrace, ids: dict[str, int]) -> None:
    done = headrace("dead", "show", str(ids["rubbish"]), "--body")
    assert (done.exit_code, done.stdout_bytes) == (0, SESAME.encode() + b"\n")
    opened = headrace("dead", "show", str(ids["refused"]), "--body")
    assert json.loads(opened.stdout)["data"]["title"] == SESAME
    for environment in ({}, keys(OTHER_KEY), {"HEADRACE_ENCRYPTION_KEY": ""}):
        number = ids["sealed" if environment == {} else "rubbish"]
        done = headrace("dead", "show", str(number), "--body", **environment)
        assert (done.exit_code, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert "HEADRACE_ENCRYPTION_KEY does not hold" in line
    assert SESAME in headrace("dead", "show", str(ids["sealed"]), "--body", **keys(OTHER_KEY)).stdout


def test_an_unknown_id_is_an_error(headrace: Headrace, engine: Engine, ids: dict[str, int]) -> None:
    """Breaks if the other dead letters are dropped although one id is a typing error."""
    unknown = max(ids.values()) * 1000
    assert f"no dead letter {unknown}" in error_line(headrace("dead", "show", str(unknown)), 4)
    for words in (("list",), ("replay",), ("drop", "--yes")):
        line = error_line(headrace("dead", *words, *map(str, ids.values()), str(unknown)), 4)
        assert line.startswith(f"headrace: no dead letter {unknown}")
    assert error_line(headrace("dead", "show", "77777"), 4).endswith("headrace dead list shows all")
    assert left(engine) == set(ids.values())
    assert headrace("dead", "show", "x").exit_code == 2


# dead replay


def test_applied_dead_letters_leave_the_list(headrace: Headrace, engine: Engine, ids: dict[str, int]) -> None:
    done = headrace("dead", "replay", **keys(ENCRYPTION_KEY, OTHER_KEY))
    assert done.stdout == "3 applied again: 1 applied, 2 dead\n"
    assert (done.exit_code, done.stderr) == (1, "2 failed again; headrace dead list shows why\n")
    assert left(engine) == {ids["rubbish"], ids["refused"]}
    assert rows(engine, "SELECT user_id, origin FROM health.workouts") == [{"user_id": "u1", "origin": "replay"}]


def test_only_selected_dead_letters_are_applied(headrace: Headrace, engine: Engine, ids: dict[str, int]) -> None:
    for words in ([str(ids["sealed"])], ["--reason", "no such thing"]):
        done = headrace("dead", "replay", *words, "--json")
        found = json.loads(done.stdout)
        assert found == ({"dead": 1} if words == [str(ids["sealed"])] else {})
        assert done.exit_code == (1 if found else 0)
    done = headrace("dead", "replay", "--reason", "sealed with a key", "--json", **keys(ENCRYPTION_KEY, OTHER_KEY))
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"applied": 1})
    assert headrace("dead", "replay", "--reason", "nobody").stdout == "0 applied again: nothing to do\n"
    assert left(engine) == {ids["rubbish"], ids["refused"]}


def test_a_replay_has_the_time_that_is_asked_for(headrace: Headrace, engine: Engine, settings: Settings) -> None:
    """Breaks if a delivery whose statements take longer than the workers' limit can never be applied."""
    with fault(engine, "PERFORM pg_sleep(1.5)"):
        own = make_writer(settings, session={"statement_timeout": "100ms"})
        run_tries(Applier(own, settings), eleven())
        own.dispose()
        (number,) = left(engine)
        failed = headrace("dead", "replay", str(number), "--timeout", "1s")
        assert (failed.exit_code, left(engine)) == (1, {number})
        assert "after 1s" in dead_letters.listed(engine)[0].reason
        assert headrace("dead", "replay", str(number), "--timeout", "1m").exit_code == 0
    assert left(engine) == set()


@pytest.mark.parametrize("value", ["0s", "10", "-1m", "1.5h", "10min", "soon"])
def test_a_timeout_is_a_duration(headrace: Headrace, value: str) -> None:
    done = headrace("dead", "replay", f"--timeout={value}")
    assert done.exit_code == 2
    assert "is not a duration such as 90s, 10m or 2h" in done.stderr


# dead drop


@pytest.mark.parametrize("words", [(), ("--yes",)])
def test_drop_without_a_selection_is_refused(
    headrace: Headrace, engine: Engine, ids: dict[str, int], words: tuple[str, ...]
) -> None:
    done = headrace("dead", "drop", *words)
    assert done.exit_code == 2
    assert "--all" in done.stderr
    assert left(engine) == set(ids.values())


def test_drop_asks_for_confirmation(
    headrace: Headrace, engine: Engine, ids: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = str(ids["rubbish"])
    refused = headrace("dead", "drop", number, answer="y\n")
    assert (refused.exit_code, "add --yes to confirm" in refused.stderr) == (2, True)
    monkeypatch.setattr(output, "can_answer", lambda: True)
    assert headrace("dead", "drop", number, answer="n\n").exit_code == 1
    assert headrace("dead", "drop", number, answer="").exit_code == 1
    assert left(engine) == set(ids.values())
    done = headrace("dead", "drop", number, answer="y\n")
    assert done.exit_code == 0
    assert "dropped 1\n" in done.stdout
    assert left(engine) == {ids["sealed"], ids["refused"]}


def test_drop_by_reason_and_all(headrace: Headrace, engine: Engine, ids: dict[str, int]) -> None:
    none = headrace("dead", "drop", "--reason", "in other words", "--yes")
    assert (none.exit_code, "headrace dead list" in none.stderr) == (1, True)
    assert headrace("dead", "drop", "--reason", "sealed with", "--yes").stdout == "dropped 1\n"
    assert left(engine) == {ids["rubbish"], ids["refused"]}
    assert headrace("dead", "drop", "--all", "--yes").stdout == "dropped 2\n"
    assert headrace("dead", "drop", "--all", "--yes").stdout == "dropped 0\n"
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
    """Deletes stored rows."""
    with engine.begin() as connection:
        for table in ("workouts", "samples"):
            connection.execute(text(f"DELETE FROM headrace.{table}"))


@pytest.mark.parametrize("order", ["oldest", "newest", "random"])
def test_a_replay_of_intact_data_changes_nothing(
    headrace: Headrace, engine: Engine, kept: list[Delivery], order: str
) -> None:
    before = schema.digests(engine)
    done = headrace("replay", *SINCE, *UNTIL, "--order", order, "--digest")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "5 applied again: 5 duplicate\nno table has changed\n"
    assert schema.digests(engine) == before
    as_json = headrace("replay", *SINCE, *UNTIL, "--order", order, "--digest", "--json")
    assert json.loads(as_json.stdout) == {"duplicate": 5, "changed": []}


def test_a_replay_names_the_tables_that_changed(headrace: Headrace, engine: Engine, kept: list[Delivery]) -> None:
    lose(engine)
    done = headrace("replay", *SINCE, *UNTIL, "--event-type", "daily.data.workouts.*", "--digest")
    assert done.stdout == "3 applied again: 3 applied\nchanged: health.workouts\n"
    found = json.loads(headrace("replay", *SINCE, *UNTIL, "--digest", "--json").stdout)
    assert found == {"applied": 1, "duplicate": 4, "changed": ["health.heartrate"]}
    assert json.loads(headrace("replay", *SINCE, *UNTIL, "--json").stdout) == {"duplicate": 5}


def test_a_dry_run_only_counts(headrace: Headrace, engine: Engine, kept: list[Delivery]) -> None:
    lose(engine)
    done = headrace("replay", *SINCE, *UNTIL, "--dry-run")
    assert (done.exit_code, done.stdout) == (0, "5 archived deliveries match\n")
    part = ("--until", "2026-03-14T14:00:00Z", "--event-type", "*.workouts.*")
    assert headrace("replay", *SINCE, *part, "--dry-run").stdout == "2 archived deliveries match\n"
    assert rows(engine, "SELECT 1 FROM health.workouts") == []
    assert headrace("replay", *SINCE, *part).stdout == "2 applied again: 2 applied\n"


@pytest.mark.parametrize(("words", "count"), [(("--dry-run",), 5), (("--event-type", "daily.data.sleep.*"), 0)])
def test_a_count_as_json(headrace: Headrace, kept: list[Delivery], words: tuple[str, ...], count: int) -> None:
    done = headrace("replay", *SINCE, *UNTIL, "--json", *words)
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"kept": count})


def test_an_event_type_that_cannot_match_is_an_error(headrace: Headrace, kept: list[Delivery]) -> None:
    """Breaks if a typing error ends as a replay that had nothing to do."""
    unknown = headrace("replay", *SINCE, *UNTIL, "--event-type", "daily.data.workout.created")
    line = error_line(unknown, 4)
    assert line.startswith(
        "headrace: unknown event type daily.data.workout.created; did you mean daily.data.workouts.c"
    )
    assert "is not before --until" in headrace("replay", "--since", "2999-01-01").stderr


def test_an_empty_period_is_no_error(headrace: Headrace) -> None:
    done = headrace("replay", *SINCE)
    assert (done.exit_code, done.stdout) == (0, "0 archived deliveries match\n")


def test_until_defaults_to_now(headrace: Headrace, engine: Engine, settings: Settings) -> None:
    apply(engine, settings, delivery(workout("u1")))
    assert headrace("replay", "--since", an_hour_ago()).stdout == "1 applied again: 1 duplicate\n"


@pytest.mark.parametrize("words", [(), ("--since", "x"), (*SINCE, "--order", "x"), (*SINCE, "--until", "x")])
def test_invalid_options_are_refused(headrace: Headrace, words: tuple[str, ...]) -> None:
    done = headrace("replay", *words)
    assert (done.exit_code, done.stdout) == (2, "")


@pytest.fixture
def other(servers: Servers) -> Iterator[str]:
    """The URL of an empty database without a schema, with its password."""
    where = urlsplit(servers.database_url)
    with psycopg.connect(urlunsplit(where._replace(path="/postgres")), autocommit=True) as connection:
        connection.execute("CREATE DATABASE drilled TEMPLATE template0")
        yield urlunsplit(where._replace(path="/drilled"))
        connection.execute("DROP DATABASE drilled WITH (FORCE)")


def test_a_replay_into_another_database_stores_the_same_rows(
    headrace: Headrace, engine: Engine, kept: list[Delivery], other: str
) -> None:
    before = schema.digests(engine)
    for order, outcome in (("random", "5 applied"), ("newest", "5 duplicate")):
        password = str(urlsplit(other).password)
        into = other.replace(f":{password}@", "@")
        done = headrace("replay", *SINCE, *UNTIL, "--order", order, "--into", into, PGPASSWORD=password)
        assert (done.exit_code, done.stdout) == (0, f"5 applied again: {outcome}\n")
    there = make_engine(Settings(database_url=other.replace("postgresql", "postgresql+psycopg", 1)))
    try:
        assert schema.digests(there) == before
    finally:
        there.dispose()
    assert {row["origin"] for row in rows(engine, "SELECT origin FROM health.workouts")} == {"webhook"}
    assert "tests" not in done.output


def test_a_password_on_the_command_line_is_refused(headrace: Headrace, kept: list[Delivery], other: str) -> None:
    """Breaks if the password of a database is readable in the list of processes, or is repeated in the message."""
    password = str(urlsplit(other).password)
    nothing = other.replace(f":{password}@", "@")
    for address in (other, f"{nothing}?password={password}", f"{nothing}?sslmode=disable&password={password}"):
        done = headrace("replay", *SINCE, *UNTIL, "--into", address, PGPASSWORD=password)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "--into must not contain a password" in done.stderr
        assert "set PGPASSWORD" in done.stderr
        assert f"{password}@" not in done.stderr


def test_an_invalid_database_url_is_one_line(headrace: Headrace, kept: list[Delivery]) -> None:
    for address in ("mysql://a/b", "postgresql://user@127.0.0.1:1/nowhere"):
        done = headrace("replay", *SINCE, *UNTIL, "--into", address, PGPASSWORD=SESAME)
        assert (done.exit_code, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert SESAME not in line


# No value of a body


def test_no_output_contains_a_value_of_a_body(
    headrace: Headrace, engine: Engine, settings: Settings, ids: dict[str, int]
) -> None:
    """Except that of --body."""
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
    done = [headrace(*words) for words in commands_of]
    assert {one.exit_code for one in done} == {0, 1}
    assert all(one.stdout for one in done)
    assert not [one.output for one in done if SESAME in one.output]
