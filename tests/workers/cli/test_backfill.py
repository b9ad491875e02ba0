"""`headrace backfill`: what an operator types, sees, and gets wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import ROOT, apply, delivery, event, rows
from tests.support.backfills import announce, notice, settle
from tests.support.cases import Failures
from tests.support.provider import Provider, daily, heartrates
from workers.cli import backfill as commands
from workers.cli import options
from workers.cli.main import main
from workers.store.backfill_admin import Backfill, BackfillPlan, Chunk, Filter, listed

SINCE = ("--since", "2026-01-01", "--until", "2026-02-24")  # 54 days
USER = "8a7f2c04-5c49-4a0b-9d4e-7b7f3f1d2c11"
Run = Callable[..., Result]


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may read history, and as fast as it likes."""
    return replace(settings, broker_url=broker_url, junction_api_key="sk_us_tests", request_rate="1000000/second")


@pytest.fixture
def environment(settings: Settings, broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of a deployment; none of those that whoever runs the tests may have set."""
    monkeypatch.chdir(tmp_path)
    for name in [*(one.metadata["name"] for one in fields(Settings)), "COLUMNS"]:
        monkeypatch.delenv(name, raising=False)
    url = settings.need_database().replace("+psycopg", "")
    return {"DATABASE_URL": url, "BROKER_URL": broker_url, "JUNCTION_API_KEY": "sk_us_tests"}


@pytest.fixture
def run(environment: dict[str, str], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`headrace backfill` within this process, on the test's own connections."""
    monkeypatch.setattr(commands, "make_engine", lambda *_: engine)

    def invoke(*words: object, **more: str) -> Result:
        done = CliRunner().invoke(main, ["backfill", *map(str, words)], env=environment | more)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return invoke


def refused(done: Result) -> str:
    """The one line that says why; nothing else is printed."""
    assert done.exit_code == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def known(engine: Engine, settings: Settings, user: str, *providers: str, client: str = "member-1") -> None:
    """Makes a person known, with connections."""
    bodies = [
        event("provider.connection.created", user, {"provider": {"slug": name}}, client) for name in providers or ["x"]
    ]
    apply(engine, settings, *map(delivery, bodies))


def put(engine: Engine, number: int, state: str) -> None:
    """Puts a backfill in a state."""
    times = ", started_at = now(), finished_at = now()" if state in ("complete", "failed", "cancelled") else ""
    with engine.begin() as connection:
        query = f"UPDATE headrace.backfills SET status = :state{times} WHERE id = :id"
        connection.execute(text(query), {"state": state, "id": number})


def states(engine: Engine) -> dict[int, str]:
    """Every backfill's status."""
    return {one.id: one.status for one in listed(engine, Filter(), 1000)}


def nothing_there(engine: Engine) -> bool:
    """Whether nothing was written."""
    return rows(engine, "SELECT 1 FROM headrace.backfills UNION ALL SELECT 1 FROM headrace.users") == []


# start


def test_start_opens_what_workers_take_up(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if what is started is not what was asked for."""
    known(engine, settings, "u1", "garmin", "oura")
    done = run("start", "--user", "u1", "--provider", "Garmin", "--resource", "sleep", "--resource", "steps", *SINCE)
    assert (done.exit_code, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == "started 2 backfills: at least 4 requests, 0 s at 50/second (HEADRACE_REQUEST_RATE)"
    assert "headrace backfill list --user u1 --watch" in second
    found = {(one.resource, one.provider, one.requested_by, one.status) for one in listed(engine, Filter())}
    assert found == {(name, "garmin", "operator", "pending") for name in ("sleep", "steps")}
    for one in listed(engine, Filter()):
        assert (one.window_start, one.window_end) == (
            datetime(2026, 1, 1, tzinfo=UTC),
            datetime(2026, 2, 24, tzinfo=UTC),
        )
        assert (one.user_id, one.chunks, one.is_final_seen) == ("u1", 1, True)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_writes_nothing(run: Run, engine: Engine, *, as_json: bool) -> None:
    """Breaks if asking what something costs starts it, or makes somebody known."""
    words = ("start", "--user", "u1", "--resource", "heartrate", "--dry-run", *SINCE)
    done = run(*words, *(["--json"] if as_json else []))
    assert done.exit_code == 0
    assert nothing_there(engine)
    assert done.stderr == "nobody called u1 is known yet; taken as a user_id\n"
    if as_json:
        (plan,) = json.loads(done.stdout)
        assert plan["id"] is None
    else:
        assert "would start 1 backfills: at least 3 requests" in done.stdout
        assert "any" in done.stdout
        assert "at least 3" in done.stdout
        assert "2026-01-01 00:00" in done.stdout


def test_start_as_json_is_complete(run: Run, engine: Engine) -> None:
    """Breaks if a program that starts backfills cannot tell which, or what they will cost."""
    done = run("start", "--user", "u1", "--resource", "heartrate", "--resource", "profile", "--json", *SINCE)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert [set(one) for one in found] == [{"id", *(one.name for one in fields(BackfillPlan))}] * 2
    assert {one["id"] for one in found} == set(states(engine))
    window = {"since": "2026-01-01T00:00:00+00:00", "until": "2026-02-24T00:00:00+00:00"}
    whose = {"aggregator": "junction", "user_id": "u1", "provider": ""}
    about = [{**whose, "resource": name, **window} for name in ("heartrate", "profile")]
    cost = [{"requests": 3, "is_measured": False}, {"requests": 1, "is_measured": True}]
    assert [{k: v for k, v in one.items() if k != "id"} for one in found] == [
        {**one, **of} for one, of in zip(about, cost, strict=True)
    ]


def test_whoever_is_known_from_terra_is_fetched_there(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if Junction is asked for the history of a person of Terra's, or Terra for what it does not have."""
    body = {"type": "auth", "status": "success", "user": {"user_id": "t1", "provider": "OURA", "reference_id": "m1"}}
    apply(engine, settings, delivery(body, aggregator="terra"))
    done = run("start", "--user", "t1", "--json", *SINCE)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert {one["aggregator"] for one in found} == {"terra"}
    assert {one["resource"] for one in found} == {one.name for one in catalogue().values() if one.terra}
    assert "glucose" in run("start", "--user", "t1", "--resource", "glucose", *SINCE).output


def test_what_is_known_makes_the_cost_a_measure(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if "at least" is said of what was measured, or "about" of what was not."""
    announce(engine, settings, notice("u9", days=(0, 54)))
    settle(engine, Provider(heartrates(daily(60), 1)).fetcher(engine, settings))
    told = run(
        "start", "--user", "u1", "--resource", "heartrate", "--dry-run", *SINCE, HEADRACE_REQUEST_RATE="1/minute"
    )
    assert "would start 1 backfills: about 55 requests, 55 min at 1/minute (HEADRACE_REQUEST_RATE)" in told.stdout
    both = run("start", "--user", "u1", "--resource", "heartrate", "--resource", "steps", "--dry-run", *SINCE)
    assert "at least 58 requests" in both.stdout


def test_everything_of_every_connection_is_the_default(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if --user alone leaves something out, or asks for what the aggregator has given up."""
    known(engine, settings, "u1", "garmin", "oura")
    found = json.loads(run("start", "--user", "u1", "--json", *SINCE).stdout)
    names = {name for name, one in catalogue().items() if one.has_history}
    assert {(one["provider"], one["resource"]) for one in found} == {
        (provider, name) for provider in ("garmin", "oura") for name in names
    }
    assert len(states(engine)) == len(found) == 2 * len(names)


def test_a_client_user_id_names_a_person(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if an operator has to look up Junction's id for their own."""
    known(engine, settings, "u1", "garmin", client="member-7")
    done = run("start", "--user", "member-7", "--resource", "sleep", "--json", *SINCE)
    assert (done.exit_code, done.stderr) == (0, "")
    assert [(one["user_id"], one["provider"]) for one in json.loads(done.stdout)] == [("u1", "garmin")]


def test_a_name_of_several_is_refused(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if the history of the wrong one of two people is fetched."""
    known(engine, settings, "u1", client="team")
    known(engine, settings, "u2", client="team")
    line = refused(run("start", "--user", "team", "--resource", "sleep", *SINCE))
    assert "team is several" in line
    assert all(user in line for user in ("u1", "u2"))
    assert states(engine) == {}


def test_a_user_id_goes_before_a_client_user_id(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if somebody's user_id cannot be used because it is how somebody else is called."""
    known(engine, settings, "u1", client="u2")
    known(engine, settings, "u2", client="u1")
    (found,) = json.loads(run("start", "--user", "u2", "--resource", "sleep", "--json", *SINCE).stdout)
    assert found["user_id"] == "u2"


@pytest.mark.parametrize("name", ["u1", "member-1"])
def test_whoever_was_erased_is_refused(run: Run, engine: Engine, settings: Settings, name: str) -> None:
    """Breaks if a person who was erased is fetched again."""
    known(engine, settings, "u1")
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.users SET erased_at = now()"))
    assert "u1 was erased" in refused(run("start", "--user", name, "--resource", "sleep", *SINCE))
    assert states(engine) == {}


MISTAKES = {
    "'yesterday' is neither a day (2026-03-14) nor a moment": ["--since", "yesterday"],
    "'' is neither a day": ["--since", ""],
    "'2026-02-30' is neither a day": ["--since", "2026-02-30"],
    "'14.3.2026' is neither a day": ["--since", "2026-01-01", "--until", "14.3.2026"],
    "'heartrat' is no resource; did you mean heartrate": ["--since", "2026-01-01", "--resource", "heartrat"],
    "did you mean workouts, sleep, heartrate?": ["--since", "2026-01-01", "--resource", "zzz"],
    "Missing option '--since'": [],
}


def test_a_word_that_cannot_be_read_is_told(run: Run, engine: Engine) -> None:
    """Breaks if a typing error starts something else than was meant, or leaves the operator to guess."""
    for told, words in MISTAKES.items():
        done = run("start", "--user", "u1", *words)
        assert (done.exit_code, done.stdout) == (2, ""), words
        assert told in done.stderr.splitlines()[-1]
    assert nothing_there(engine)


NOTHINGS = (
    ("--since", "2026-01-02", "--until", "2026-01-01"),
    ("--since", "2026-01-01", "--until", "2026-01-01"),
    ("--since", "2026-01-01T02:00:00+02:00", "--until", "2026-01-01"),
    ("--since", "2100-01-01"),
    ("--since", "2100-01-01", "--until", "2100-01-02"),
)


def test_a_window_of_nothing_is_refused(run: Run, engine: Engine) -> None:
    """Breaks if a window that is turned round, empty or in the future is fetched."""
    for words in NOTHINGS:
        assert "is not before --until" in refused(run("start", "--user", "u1", "--resource", "sleep", *words))
    assert nothing_there(engine)


@pytest.mark.parametrize("until", [[], ["--until", "2100-01-01"]])
def test_a_window_ends_now_at_the_latest(run: Run, engine: Engine, until: list[str]) -> None:
    """Breaks if days to come are counted, paid for or taken for fetched."""
    before = datetime.now(UTC)
    since = (before - timedelta(days=10)).date().isoformat()
    (found,) = json.loads(
        run("start", "--user", "u1", "--resource", "heartrate", "--json", "--since", since, *until).stdout
    )
    assert before <= datetime.fromisoformat(found["until"]) <= datetime.now(UTC)
    assert found["requests"] == 1


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("2026-01-01", "2026-01-01T00:00:00+00:00"),
        ("2026-01-01T06:30:00", "2026-01-01T06:30:00+00:00"),
        ("2026-01-01T06:30:00Z", "2026-01-01T06:30:00+00:00"),
        ("2026-01-01T06:30:00+02:00", "2026-01-01T06:30:00+02:00"),
    ],
)
def test_a_moment_without_an_offset_is_utc(given: str, taken: str) -> None:
    """Breaks if a day means another one on another machine."""
    assert options.Moment().convert(given, None, None).isoformat() == taken


def test_the_first_day_there_is_can_be_fetched(run: Run, engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if "from the beginning" starts a backfill that no worker can go on with."""
    done = run("start", "--user", "u1", "--resource", "sleep", "--since", "0001-01-01")
    assert done.exit_code in (0, 1, 2)
    if done.exit_code == 0:
        settle(engine, Provider(heartrates([])).fetcher(engine, settings), 1)


def test_what_is_left_out_cannot_be_started(run: Run, engine: Engine) -> None:
    """Breaks if what the settings leave out is fetched, or a start of nothing is called one."""
    words = ("start", "--user", "u1", "--resource", "sleep", *SINCE)
    told = "HEADRACE_RESOURCES and HEADRACE_PROVIDERS leave out all of that"
    assert told in refused_after_warning(run(*words, HEADRACE_RESOURCES="steps"))
    assert told in refused_after_warning(run(*words, "--provider", "oura", HEADRACE_PROVIDERS="garmin"))
    assert nothing_there(engine)


def refused_after_warning(done: Result) -> str:
    """The line that says why, after the one about a person whom nobody knows."""
    assert (done.exit_code, done.stdout) == (1, "")
    _, line = done.stderr.splitlines()
    return line


# list and show


@pytest.fixture
def four(engine: Engine, settings: Settings) -> list[int]:
    """A backfill in each of four states: u1's workouts and sleep, u2's workouts and sleep."""
    notices = [notice(user, name) for user in ("u1", "u2") for name in ("workouts", "sleep")]
    numbers = announce(engine, settings, *notices)
    for number, state in zip(numbers, ("running", "paused", "failed", "pending"), strict=True):
        put(engine, number, state)
    return numbers


LOOKS: list[tuple[list[str], list[int]]] = [
    ([], [0, 1, 3, 2]),
    (["--user", "u2"], [3, 2]),
    (["--resource", "sleep"], [1, 3]),
    (["--provider", "oura"], []),
    (["--status", "failed", "--status", "paused"], [1, 2]),
    (["--limit", "2"], [0, 1]),
    (["--user", "u1", "--status", "pending"], []),
]


def test_list_shows_what_is_wanted(run: Run, four: list[int]) -> None:
    """Breaks if what an operator looks for is not shown, or hidden among the rest."""
    for words, found in LOOKS:
        done = run("list", "--json", *words)
        assert (done.exit_code, done.stderr) == (0, "")
        assert [four.index(one["id"]) for one in json.loads(done.stdout)] == found, words
        table = run("list", *words).stdout
        assert ("no backfills" in table) == (not found)
        lines = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
        assert lines == [str(four[n]) for n in found]


def test_list_takes_numbers(run: Run, four: list[int]) -> None:
    """Breaks if one backfill cannot be looked at, or numbers and filters do not go together."""
    picked = json.loads(run("list", "--json", four[1], four[2], 404).stdout)
    assert [one["id"] for one in picked] == [four[1], four[2]]
    assert json.loads(run("list", "--json", four[1], "--user", "u2").stdout) == []


def test_list_as_json_is_complete(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if a program sees less of a backfill than a person does."""
    announce(engine, settings, notice(days=(0, 54)))
    settle(engine, Provider(heartrates(daily(60))).fetcher(engine, settings))
    (one,) = json.loads(run("list", "--json").stdout)
    assert set(one) == {field.name for field in fields(Backfill)} | {"rate", "left"}
    assert (one["status"], one["share"], one["records"], one["left"]) == ("complete", 1.0, 55, None)
    assert datetime.fromisoformat(one["finished_at"]) >= datetime.fromisoformat(one["started_at"])
    assert one["rate"] > 0


def test_list_says_how_far_and_how_long(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if a person cannot see progress, rate, the time left or the error."""
    (number,) = announce(engine, settings, notice(USER, days=(0, 54)))
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.chunks SET slice_end = slice_end - interval '42 days'"))
        change = "status = 'running', started_at = now() - interval '6 hours', records = 21600000, error = 'status 500'"
        connection.execute(text(f"UPDATE headrace.backfills SET {change}"))
    table = run("list").stdout
    for part in (USER, "garmin", "heartrate", "notice", "running", "75%", "21,600,000", "1,000", "status 500"):
        assert part in table, part
    assert "2 h" in table or "1 h 59 min" in table
    assert str(number) in table


def test_a_long_error_leaves_the_ids_whole(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if an id cannot be copied because a long error has squeezed it."""
    announce(engine, settings, notice(USER, resource="body_temperature_delta"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.backfills SET error = repeat('refused because of it ', 30)"))
    table = run("list").stdout
    assert USER in table
    assert "body_temperature_delta" in table


@pytest.mark.parametrize("error", ["[invalid_grant] expired", "no [/path]", "a :warning: b"])
def test_an_error_is_shown_as_it_is(run: Run, engine: Engine, settings: Settings, error: str) -> None:
    """Breaks if brackets in a text from elsewhere vanish, or end the command with a traceback."""
    announce(engine, settings, notice())
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.backfills SET error = :error"), {"error": error})
    assert error in run("list").stdout


def test_an_empty_list_says_so(run: Run) -> None:
    """Breaks if nothing at all looks like a failure."""
    assert (run("list").stdout, json.loads(run("list", "--json").stdout)) == ("no backfills\n", [])


def test_a_list_of_what_there_cannot_be_is_told(run: Run) -> None:
    """Breaks if a typing error looks like an empty list."""
    for words in (["--status", "ready"], ["--limit", "0"], ["one"], ["--resource", "slep"]):
        done = run("list", *words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "Error: " in done.stderr.splitlines()[-1]


def test_show_tells_every_chunk(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if an operator cannot see where within a history it stands."""
    number, _ = announce(engine, settings, notice(days=(0, 26), final=False), notice(days=(30, 56), name="msg_newest"))
    with engine.begin() as connection:
        amid = "cursor = 'c', pages = 6, restarts = 2, slice_end = '2026-02-10 12:30'"
        connection.execute(text(f"UPDATE headrace.chunks SET {amid} WHERE message_id = 'msg_newest'"))
    whole = json.loads(run("show", number, "--json").stdout)
    assert set(whole) == {field.name for field in fields(Backfill)} | {"rate", "left", "chunks"}
    newest, oldest = whole["chunks"]
    assert set(newest) == set(Chunk._fields)
    assert (newest["message_id"], newest["amid"], newest["pages"], newest["restarts"]) == ("msg_newest", True, 6, 2)
    assert (newest["is_final"], oldest["is_final"], oldest["amid"]) == (True, False, False)
    assert newest["slice_end"] == "2026-02-10T12:30:00+00:00"
    table = run("show", number).stdout
    for part in ("2026-01-31 00:00", "2026-02-10 12:30", "msg_newest", " 7 ", "2026-01-01 00:00", "fetched back to"):
        assert part in table, part
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.chunks SET status = 'done', cursor = NULL"))
    assert run("show", number).stdout.count("2025-12-31") == 0
    assert run("show", number).stdout.count("│ done") == 2


def test_show_of_nothing_is_told(run: Run) -> None:
    """Breaks if a number that was mistyped shows an empty page and ends well."""
    assert refused(run("show", 404)) == ("Error: there is no backfill 404; headrace backfill list shows what there is")
    assert refused(run("show", 404, "--json")).startswith("Error: there is no backfill 404")
    assert run("show").exit_code == run("show", "one").exit_code == 2


# pause, resume and cancel


def test_by_number(run: Run, engine: Engine, four: list[int]) -> None:
    """Breaks if an operator cannot stop one backfill and go on with it."""
    for word, number, told, state in [
        ("pause", four[0], "paused 1 of 1\n", "paused"),
        ("resume", four[0], "resumed 1 of 1\n", "pending"),
        ("resume", four[2], "resumed 1 of 1\n", "running"),
        ("cancel", four[2], "cancelled 1 of 1\n", "cancelled"),
        ("resume", four[2], "resumed 1 of 1\n", "running"),
    ]:
        before = states(engine)
        done = run(word, number)
        assert (done.exit_code, done.stdout, done.stderr) == (0, told, ""), word
        assert states(engine) == before | {number: state}


@pytest.mark.parametrize(
    ("words", "told", "after"),
    [
        (("pause", "--user", "u2"), "paused 1 of 1\n", {3: "paused"}),
        (("pause", "--resource", "workouts"), "paused 1 of 1\n", {0: "paused"}),
        (("pause", "--provider", "garmin"), "paused 2 of 2\n", {0: "paused", 3: "paused"}),
        (("resume", "--provider", "garmin"), "resumed 2 of 2\n", {1: "pending", 2: "running"}),
        (("resume", "--user", "u1", "--resource", "workouts"), "resumed 0 of 0\n", {}),
        (("cancel", "--user", "u1"), "cancelled 2 of 2\n", {0: "cancelled", 1: "cancelled"}),
        (("cancel", "--provider", "oura"), "cancelled 0 of 0\n", {}),
    ],
)
def test_by_filter(  # noqa: PLR0917
    run: Run, engine: Engine, four: list[int], words: tuple[str, ...], told: str, after: dict[int, str]
) -> None:
    """Breaks if stopping one person stops others, or goes on with what is over for good."""
    before = states(engine)
    done = run(*words)
    assert (done.exit_code, done.stdout, done.stderr) == (0, told, "")
    assert states(engine) == before | {four[n]: state for n, state in after.items()}


@pytest.mark.parametrize("word", ["pause", "resume", "cancel"])
def test_without_a_word_nothing_is_stopped(run: Run, engine: Engine, four: list[int], word: str) -> None:
    """Breaks if a command that was sent too early stops everything."""
    before = states(engine)
    done = run(word)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "say which" in done.stderr
    assert states(engine) == before


def test_what_stays_is_told(run: Run, engine: Engine, four: list[int]) -> None:
    """Breaks if a backfill that could not be paused is taken for paused."""
    done = run("pause", *four)
    assert (done.exit_code, done.stdout) == (0, "paused 2 of 4\n")
    assert sorted(done.stderr.splitlines()) == sorted(
        [f"backfill {four[1]} is paused, and stays so", f"backfill {four[2]} is failed, and stays so"]
    )
    again = run("pause", four[2])
    assert (again.exit_code, again.stdout) == (1, "paused 0 of 1\n")
    assert again.stderr == f"backfill {four[2]} is failed, and stays so\n"


def test_two_of_a_kind_are_not_resumed(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if two pulls of the same history run side by side, or nobody says why one does not."""
    numbers = []
    for _ in range(2):
        numbers += announce(engine, settings, notice())
        put(engine, numbers[-1], "failed")
    done = run("resume", "--user", "u1")
    assert (done.exit_code, done.stdout) == (0, "resumed 1 of 2\n")
    assert done.stderr == f"backfill {numbers[0]} is failed, and stays so\n"
    assert states(engine) == {numbers[0]: "failed", numbers[1]: "running"}


@pytest.mark.parametrize("word", ["pause", "resume", "cancel"])
def test_a_number_that_is_not_there_is_told(run: Run, four: list[int], word: str) -> None:
    """Breaks if an operator who has mistyped a number is told nothing about it."""
    done = run(word, 404)
    assert done.exit_code == 1
    assert "404" in done.stderr


@pytest.mark.parametrize("word", ["pause", "cancel"])
def test_numbers_and_filters_go_together(run: Run, engine: Engine, four: list[int], word: str) -> None:
    """Breaks if a backfill of somebody else is stopped because its number was among those named."""
    before = states(engine)
    run(word, four[0], four[3], "--user", "u2")
    assert states(engine)[four[0]] == before[four[0]]
    assert states(engine)[four[3]] != before[four[3]]


# As a process


def test_as_a_process(environment: dict[str, str], engine: Engine) -> None:
    """Breaks if the command works only where its parts are at hand."""
    command = (sys.executable, "-m", "workers.cli", "backfill")
    start = ("start", "--user", "u1", "--resource", "sleep", "--json", *SINCE)
    around = environment | {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}

    def process(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            (*command, *words), env=around | more, capture_output=True, text=True, timeout=60, check=False
        )

    done = process(*start)
    assert done.returncode == 0
    (one,) = json.loads(done.stdout)
    assert states(engine) == {one["id"]: "pending"}
    sesame = "postgresql://u:sesame@127.0.0.1:1/d"
    away = process("list", DATABASE_URL=sesame)
    assert (away.returncode, away.stdout, away.stderr) == (1, "", "headrace: PostgreSQL: OperationalError\n")


@pytest.mark.parametrize(
    "words", [("start", "--user", "u1", *SINCE), ("list",), ("show", "1"), ("pause", "1"), ("resume", "1")]
)
def test_without_a_stack_it_is_told(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if an operator in the wrong folder meets a traceback."""
    monkeypatch.chdir(tmp_path)
    for one in fields(Settings):
        monkeypatch.delenv(one.metadata["name"], raising=False)
    line = refused(CliRunner().invoke(main, ["backfill", *words]))
    assert line.startswith("headrace: no stack runs in ")


def test_help_tells_what_it_does() -> None:
    """Breaks if a command, or one of its options, is not explained."""
    failures = Failures()
    for word in ("start", "list", "show", "pause", "resume", "cancel"):
        with failures.of(word):
            shown = CliRunner().invoke(main, ["backfill", word, "--help"], env={"COLUMNS": "200"}).stdout
            about, _, options = shown.partition("Options:")
            assert len(about.split("\n\n")[1].strip()) > 20
            assert "Returns" not in about
            assert "--data-dir" in options
            for line in options.splitlines():
                if line.strip().startswith("--"):
                    assert len(line.strip().split("  ", 1)[-1].strip()) > 5, line
    assert failures == {}


def test_the_help_of_a_command_is_its_own() -> None:
    """Breaks if the help is a piece of some function's docstring, and changes when that is reworded."""

    def do(_engine: Engine, _ids: object) -> list[int]:
        """Does something. Returns nothing."""
        return []

    commands._command("spare", do, "did", (), "Its meaning.")
    assert commands.backfill.commands.pop("spare").help == "Its meaning."
    assert "what was fetched stays" in (commands.backfill.commands["cancel"].help or "")
