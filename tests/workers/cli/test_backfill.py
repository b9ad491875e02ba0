"""`headrace backfill`: options, output and errors."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import Result
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import ROOT, apply, delivery, event, rows, workout
from tests.support.backfills import announce, notice, settle, status
from tests.support.cli import Headrace, error_line, invoke
from tests.support.commit_proxy import commit_proxy
from tests.support.provider import Provider, daily, heartrates
from workers.cli import options, output
from workers.cli.deployment import Deployment
from workers.store import backfill_admin
from workers.store.backfill_admin import Backfill, BackfillPlan, Chunk, Filter, listed

SINCE = ("--since", "2026-01-01", "--until", "2026-02-24")  # 54 days
USER = "8a7f2c04-5c49-4a0b-9d4e-7b7f3f1d2c11"
Run = Callable[..., Result]


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment that fetches history without a rate limit."""
    return replace(settings, broker_url=broker_url, junction_api_key="sk_us_tests", request_rate="1000000/second")


@pytest.fixture
def environment(settings: Settings, broker_url: str) -> dict[str, str]:
    url = settings.need_database().replace("+psycopg", "")
    return {"DATABASE_URL": url, "BROKER_URL": broker_url, "JUNCTION_API_KEY": "sk_us_tests"}


@pytest.fixture
def run(environment: dict[str, str], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `headrace backfill` in this process, with the test's engine."""
    monkeypatch.setattr(Deployment, "engine", engine)
    return lambda *words, **more: invoke("backfill", *words, **environment | more)


def known(engine: Engine, settings: Settings, user: str, *providers: str, client: str = "member-1") -> None:
    """Stores a user with connections."""
    bodies = [
        event("provider.connection.created", user, {"provider": {"slug": name}}, client) for name in providers or ["x"]
    ]
    apply(engine, settings, *map(delivery, bodies))


def put(engine: Engine, number: int, state: str) -> None:
    times = ", started_at = now(), finished_at = now()" if state in ("complete", "failed", "cancelled") else ""
    with engine.begin() as connection:
        query = f"UPDATE headrace.backfills SET status = :state{times} WHERE id = :id"
        connection.execute(text(query), {"state": state, "id": number})


def states(engine: Engine) -> dict[int, str]:
    return {one.id: one.status for one in listed(engine, Filter(), 1000)}


def nothing_there(engine: Engine) -> bool:
    return rows(engine, "SELECT 1 FROM headrace.backfills UNION ALL SELECT 1 FROM headrace.users") == []


# start


def test_start_opens_the_requested_backfills(run: Run, engine: Engine, settings: Settings) -> None:
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
def test_a_dry_run_writes_nothing(run: Run, engine: Engine, settings: Settings, *, as_json: bool) -> None:
    known(engine, settings, "u1", "garmin")
    words = ("start", "--user", "u1", "--resource", "heartrate", "--dry-run", *SINCE)
    done = run(*words, *(["--json"] if as_json else []))
    assert (done.exit_code, done.stderr) == (0, "")
    assert states(engine) == {}
    if as_json:
        (plan,) = json.loads(done.stdout)
        assert plan["id"] is None
    else:
        assert "would start 1 backfills: at least 3 requests" in done.stdout
        assert "garmin" in done.stdout
        assert "at least 3" in done.stdout
        assert "2026-01-01 00:00" in done.stdout


def test_start_as_json_is_complete(run: Run, engine: Engine, settings: Settings) -> None:
    apply(engine, settings, delivery(workout("u1")))
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM headrace.connections"))
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


def test_a_terra_user_is_fetched_from_terra(run: Run, engine: Engine, settings: Settings) -> None:
    body = {"type": "auth", "status": "success", "user": {"user_id": "t1", "provider": "OURA", "reference_id": "m1"}}
    apply(engine, settings, delivery(body, aggregator="terra"))
    done = run("start", "--user", "t1", "--json", *SINCE)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert {one["aggregator"] for one in found} == {"terra"}
    assert {one["resource"] for one in found} == {one.name for one in catalogue().values() if one.terra}
    assert "glucose" in run("start", "--user", "t1", "--resource", "glucose", *SINCE).output


def test_a_user_of_another_aggregator_is_not_fetched(
    run: Run, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if history is requested from an aggregator that does not know the user."""
    body = {"type": "auth", "status": "success", "user": {"user_id": "t1", "provider": "OURA", "reference_id": "m1"}}
    apply(engine, settings, delivery(body, aggregator="terra"))
    before = rows(engine, "SELECT count(*) AS n FROM headrace.backfills")
    # As if the user got an owner between the two queries.
    monkeypatch.setattr(backfill_admin, "aggregator_of", lambda *_: "junction")
    done = run("start", "--user", "t1", "--resource", "sleep", *SINCE)
    assert error_line(done, 4).endswith("t1 belongs to terra; junction has no such user")
    assert rows(engine, "SELECT count(*) AS n FROM headrace.backfills") == before


def test_the_estimate_is_measured_or_a_minimum(run: Run, engine: Engine, settings: Settings) -> None:
    announce(engine, settings, notice("u9", days=(0, 54)))
    settle(engine, Provider(heartrates(daily(60), 1)).fetcher(engine, settings))
    known(engine, settings, "u1", "garmin")
    message = run(
        "start", "--user", "u1", "--resource", "heartrate", "--dry-run", *SINCE, HEADRACE_REQUEST_RATE="1/minute"
    )
    assert "would start 1 backfills: about 55 requests, 55 min at 1/minute (HEADRACE_REQUEST_RATE)" in message.stdout
    both = run("start", "--user", "u1", "--resource", "heartrate", "--resource", "steps", "--dry-run", *SINCE)
    assert "at least 58 requests" in both.stdout


def test_everything_of_every_connection_is_the_default(run: Run, engine: Engine, settings: Settings) -> None:
    known(engine, settings, "u1", "garmin", "oura")
    found = json.loads(run("start", "--user", "u1", "--json", *SINCE).stdout)
    names = {name for name, one in catalogue().items() if one.has_history}
    assert {(one["provider"], one["resource"]) for one in found} == {
        (provider, name) for provider in ("garmin", "oura") for name in names
    }
    assert len(states(engine)) == len(found) == 2 * len(names)


def test_a_client_user_id_is_resolved(run: Run, engine: Engine, settings: Settings) -> None:
    known(engine, settings, "u1", "garmin", client="member-7")
    done = run("start", "--user", "member-7", "--resource", "sleep", "--json", *SINCE)
    assert (done.exit_code, done.stderr) == (0, "")
    assert [(one["user_id"], one["provider"]) for one in json.loads(done.stdout)] == [("u1", "garmin")]


def test_an_ambiguous_client_user_id_is_refused(run: Run, engine: Engine, settings: Settings) -> None:
    known(engine, settings, "u1", "garmin", client="team")
    known(engine, settings, "u2", "oura", client="team")
    words = ("start", "--user", "team", "--resource", "sleep", *SINCE)
    line = error_line(run(*words))
    assert line.startswith("Error: several users match team: u1 (garmin, last delivery ")
    assert "; u2 (oura, last delivery " in line
    assert line.endswith("Use one of these user_ids, or --all for all of them")
    assert states(engine) == {}
    found = json.loads(run(*words, "--all", "--json").stdout)
    assert {(one["user_id"], one["provider"]) for one in found} == {("u1", "garmin"), ("u2", "oura")}
    assert "backfill list --user team --all --watch" in run(*words, "--all").stdout
    assert {one["user_id"] for one in json.loads(run("list", "--user", "team", "--all", "--json").stdout)} == {
        "u1",
        "u2",
    }
    audited = rows(engine, "SELECT DISTINCT subject FROM headrace.audit ORDER BY 1")
    assert [row["subject"] for row in audited] == ["u1", "u2"]


def test_an_unknown_user_is_refused(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if a typing error plans history for a user that does not exist."""
    known(engine, settings, USER, "garmin", client="member-0007")
    words = ("--resource", "sleep", *SINCE)
    line = error_line(run("start", "--user", "membr-0007", *words), 4)
    assert line == "headrace: unknown user membr-0007; did you mean member-0007?"
    line = error_line(run("start", "--user", "somebody", *words, "--dry-run"), 4)
    assert line.startswith("headrace: unknown user somebody; --user accepts a user_id, a client_user_id or")
    assert error_line(run("list", "--user", "membr-0007"), 4).endswith("did you mean member-0007?")
    assert states(engine) == {}
    assert json.loads(run("start", "--user", USER.upper(), *words, "--json").stdout)[0]["user_id"] == USER


def test_an_unknown_provider_is_refused(run: Run, engine: Engine, settings: Settings) -> None:
    """Breaks if a typing error plans history that no provider has; a provider may be newer than this version."""
    known(engine, settings, "u1", "shiny")
    words = ("start", "--user", "u1", "--resource", "sleep", *SINCE)
    line = error_line(run(*words, "--provider", "garmni"), 4)
    assert line.startswith("headrace: unknown provider garmni; did you mean garmin?")
    assert "--new-provider" in line
    for command in ("list", "pause"):
        assert error_line(run(command, "--provider", "Shinny"), 4).endswith("Shinny; did you mean shiny?")
    assert states(engine) == {}
    assert run(*words, "--provider", "Oura", "--provider", "shiny").exit_code == 0
    (found,) = json.loads(run(*words, "--provider", "Novel", "--new-provider", "--json").stdout)
    assert found["provider"] == "novel"


def test_a_user_id_wins_over_a_client_user_id(run: Run, engine: Engine, settings: Settings) -> None:
    known(engine, settings, "u1", client="u2")
    known(engine, settings, "u2", client="u1")
    (found,) = json.loads(run("start", "--user", "u2", "--resource", "sleep", "--json", *SINCE).stdout)
    assert found["user_id"] == "u2"


@pytest.mark.parametrize("name", ["u1", "member-1"])
def test_an_erased_user_is_refused(run: Run, engine: Engine, settings: Settings, name: str) -> None:
    known(engine, settings, "u1")
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.users SET erased_at = now()"))
    assert "u1 was erased" in error_line(run("start", "--user", name, "--resource", "sleep", *SINCE))
    assert states(engine) == {}


MISTAKES = {
    "'yesterday' is neither a day (2026-03-14) nor a time": ["--since", "yesterday"],
    "'' is neither a day": ["--since", ""],
    "'2026-02-30' is neither a day": ["--since", "2026-02-30"],
    "'14.3.2026' is neither a day": ["--since", "2026-01-01", "--until", "14.3.2026"],
    "unknown resource 'heartrat'; did you mean heartrate": ["--since", "2026-01-01", "--resource", "heartrat"],
    "did you mean workouts, sleep, heartrate?": ["--since", "2026-01-01", "--resource", "zzz"],
    "Missing option '--since'": [],
}


def test_invalid_options_are_refused(run: Run, engine: Engine) -> None:
    done = run("list", "--all")
    assert (done.exit_code, "--user is missing" in done.stderr) == (2, True)
    for message, words in MISTAKES.items():
        done = run("start", "--user", "u1", *words)
        assert (done.exit_code, done.stdout) == (2, ""), words
        assert message in done.stderr.splitlines()[-1]
    assert nothing_there(engine)


NOTHINGS = (
    ("--since", "2026-01-02", "--until", "2026-01-01"),
    ("--since", "2026-01-01", "--until", "2026-01-01"),
    ("--since", "2026-01-01T02:00:00+02:00", "--until", "2026-01-01"),
    ("--since", "2100-01-01"),
    ("--since", "2100-01-01", "--until", "2100-01-02"),
)


def test_an_empty_or_future_period_is_refused(run: Run, engine: Engine) -> None:
    for words in NOTHINGS:
        assert "is not before --until" in error_line(run("start", "--user", "u1", "--resource", "sleep", *words))
    assert nothing_there(engine)


@pytest.mark.parametrize("until", [[], ["--until", "2100-01-01"]])
def test_a_period_ends_now_at_the_latest(run: Run, engine: Engine, settings: Settings, until: list[str]) -> None:
    known(engine, settings, "u1", "garmin")
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
    assert options.moment(given).isoformat() == taken


def test_the_earliest_possible_date_is_accepted(run: Run, engine: Engine, settings: Settings, broker_url: str) -> None:
    known(engine, settings, "u1", "garmin")
    done = run("start", "--user", "u1", "--resource", "sleep", "--since", "0001-01-01")
    assert done.exit_code in (0, 1, 2)
    if done.exit_code == 0:
        settle(engine, Provider(heartrates([])).fetcher(engine, settings), 1)


def test_excluded_resources_and_providers_cannot_be_started(run: Run, engine: Engine, settings: Settings) -> None:
    known(engine, settings, "u1", "garmin")
    words = ("start", "--user", "u1", "--resource", "sleep", *SINCE)
    message = "HEADRACE_RESOURCES and HEADRACE_PROVIDERS exclude everything that was requested"
    assert message in error_line(run(*words, HEADRACE_RESOURCES="steps"))
    assert message in error_line(run(*words, "--provider", "oura", HEADRACE_PROVIDERS="garmin"))
    assert states(engine) == {}


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


def test_list_filters(run: Run, four: list[int]) -> None:
    for words, found in LOOKS:
        done = run("list", "--json", *words)
        assert (done.exit_code, done.stderr) == (0, "")
        assert [four.index(one["id"]) for one in json.loads(done.stdout)] == found, words
        table = run("list", *words).stdout
        assert ("no backfills" in table) == (not found)
        lines = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
        assert lines == [str(four[n]) for n in found]


def test_list_accepts_ids(run: Run, four: list[int]) -> None:
    picked = json.loads(run("list", "--json", four[1], four[2]).stdout)
    assert [one["id"] for one in picked] == [four[1], four[2]]
    assert "no backfill 404" in error_line(run("list", "--json", four[1], 404), 4)
    assert json.loads(run("list", "--json", four[1], "--user", "u2").stdout) == []


def test_list_as_json_is_complete(run: Run, engine: Engine, settings: Settings) -> None:
    announce(engine, settings, notice(days=(0, 54)))
    settle(engine, Provider(heartrates(daily(60))).fetcher(engine, settings))
    (one,) = json.loads(run("list", "--json").stdout)
    assert set(one) == {field.name for field in fields(Backfill)} | {"rate", "left"}
    assert (one["status"], one["share"], one["records"], one["left"]) == ("complete", 1.0, 55, None)
    assert datetime.fromisoformat(one["finished_at"]) >= datetime.fromisoformat(one["started_at"])
    assert one["rate"] > 0


def test_list_shows_progress_rate_and_time_left(run: Run, engine: Engine, settings: Settings) -> None:
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


def test_a_long_error_does_not_truncate_ids(run: Run, engine: Engine, settings: Settings) -> None:
    announce(engine, settings, notice(USER, resource="body_temperature_delta"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.backfills SET error = repeat('refused because of it ', 30)"))
    table = run("list").stdout
    assert USER in table
    assert "body_temperature_delta" in table


@pytest.mark.parametrize("error", ["[invalid_grant] expired", "no [/path]", "a :warning: b"])
def test_brackets_in_an_error_are_no_markup(run: Run, engine: Engine, settings: Settings, error: str) -> None:
    announce(engine, settings, notice())
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.backfills SET error = :error"), {"error": error})
    assert error in run("list").stdout


def test_an_empty_list_says_so(run: Run) -> None:
    assert (run("list").stdout, json.loads(run("list", "--json").stdout)) == ("no backfills\n", [])


def test_invalid_filters_are_refused(run: Run) -> None:
    for words in (["--status", "ready"], ["--limit", "0"], ["one"], ["--resource", "slep"]):
        done = run("list", *words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "Error: " in done.stderr.splitlines()[-1]


def test_show_lists_every_chunk(run: Run, engine: Engine, settings: Settings) -> None:
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


def test_show_of_an_unknown_id_is_an_error(run: Run) -> None:
    assert error_line(run("show", 404), 4) == "headrace: no backfill 404; headrace backfill list shows all"
    assert error_line(run("show", 404, "--json"), 4).startswith("headrace: no backfill 404")
    assert run("show").exit_code == run("show", "one").exit_code == 2


# pause, resume and cancel


def test_commands_by_id(run: Run, engine: Engine, four: list[int]) -> None:
    for word, number, message, state in [
        ("pause", four[0], "paused 1 of 1\n", "paused"),
        ("resume", four[0], "resumed 1 of 1\n", "pending"),
        ("resume", four[2], "resumed 1 of 1\n", "running"),
        ("cancel", four[2], "cancelled 1 of 1\n", "cancelled"),
        ("resume", four[2], "resumed 1 of 1\n", "running"),
    ]:
        before = states(engine)
        done = run(word, number, *(["--yes"] if word == "cancel" else []))
        assert (done.exit_code, done.stdout, done.stderr) == (0, message, ""), word
        assert states(engine) == before | {number: state}


@pytest.mark.parametrize(
    ("words", "message", "after"),
    [
        (("pause", "--user", "u2"), "paused 1 of 1\n", {3: "paused"}),
        (("pause", "--resource", "workouts"), "paused 1 of 1\n", {0: "paused"}),
        (("pause", "--provider", "garmin"), "paused 2 of 2\n", {0: "paused", 3: "paused"}),
        (("resume", "--provider", "garmin"), "resumed 2 of 2\n", {1: "pending", 2: "running"}),
        (("resume", "--user", "u1", "--resource", "workouts"), "resumed 0 of 0\n", {}),
        (("cancel", "--user", "u1", "--yes"), "cancelled 2 of 2\n", {0: "cancelled", 1: "cancelled"}),
        (("cancel", "--provider", "oura", "--yes"), "cancelled 0 of 0\n", {}),
    ],
)
def test_commands_by_filter(  # noqa: PLR0917
    run: Run, engine: Engine, four: list[int], words: tuple[str, ...], message: str, after: dict[int, str]
) -> None:
    before = states(engine)
    done = run(*words)
    assert (done.exit_code, done.stdout, done.stderr) == (0, message, "")
    assert states(engine) == before | {four[n]: state for n, state in after.items()}


@pytest.mark.parametrize("word", ["pause", "resume", "cancel"])
def test_commands_without_a_selection_are_refused(run: Run, engine: Engine, four: list[int], word: str) -> None:
    before = states(engine)
    done = run(word)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "select backfills by" in done.stderr
    assert states(engine) == before


def test_unchanged_backfills_are_listed(run: Run, engine: Engine, four: list[int]) -> None:
    done = run("pause", *four)
    assert (done.exit_code, done.stdout) == (0, "paused 2 of 4\n")
    assert sorted(done.stderr.splitlines()) == sorted(
        [f"backfill {four[1]} is paused; unchanged", f"backfill {four[2]} is failed; unchanged"]
    )
    again = run("pause", four[2])
    assert (again.exit_code, again.stdout) == (1, "paused 0 of 1\n")
    assert again.stderr == f"backfill {four[2]} is failed; unchanged\n"


def test_of_two_equal_backfills_one_is_resumed(run: Run, engine: Engine, settings: Settings) -> None:
    numbers = []
    for _ in range(2):
        numbers += announce(engine, settings, notice())
        put(engine, numbers[-1], "failed")
    done = run("resume", "--user", "u1")
    assert (done.exit_code, done.stdout) == (0, "resumed 1 of 2\n")
    assert done.stderr == f"backfill {numbers[0]} is failed; unchanged\n"
    assert states(engine) == {numbers[0]: "failed", numbers[1]: "running"}


@pytest.mark.parametrize("word", ["pause", "resume", "cancel"])
def test_an_unknown_id_is_an_error(run: Run, engine: Engine, four: list[int], word: str) -> None:
    """Breaks if the ids that exist are changed although another one is a typing error."""
    before = states(engine)
    unknown = four[0] * 10
    line = error_line(run(word, *four, unknown, *(["--yes"] if word == "cancel" else [])), 4)
    assert line.startswith(f"headrace: no backfill {unknown}; did you mean ")
    assert states(engine) == before


def test_cancel_asks_for_confirmation(
    run: Run, engine: Engine, four: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = states(engine)
    done = run("cancel", "--provider", "garmin")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "add --yes" in done.stderr
    monkeypatch.setattr(output, "can_answer", lambda: True)
    assert run("cancel", "--provider", "garmin", answer="n\n").exit_code == 1
    assert states(engine) == before
    done = run("cancel", "--provider", "garmin", answer="y\n")
    assert "cancel 3 backfills?" in done.stdout
    assert done.exit_code == 0
    assert states(engine) == dict(zip(four, ("cancelled", "cancelled", "failed", "cancelled"), strict=True))


@pytest.mark.parametrize("word", ["pause", "cancel"])
def test_ids_and_filters_are_combined(run: Run, engine: Engine, four: list[int], word: str) -> None:
    before = states(engine)
    done = run(word, four[0], four[3], "--user", "u2", *(["--yes"] if word == "cancel" else []))
    assert f"backfill {four[0]} does not match the other options" in done.stderr
    assert states(engine)[four[0]] == before[four[0]]
    assert states(engine)[four[3]] != before[four[3]]


# As a process


def test_as_a_process(environment: dict[str, str], engine: Engine, settings: Settings) -> None:
    command = (sys.executable, "-m", "workers.cli", "backfill")
    start = ("start", "--user", "u1", "--resource", "sleep", "--json", *SINCE)
    around = environment | {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}

    known(engine, settings, "u1", "garmin")

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


def test_list_resolves_a_client_user_id(run: Run, engine: Engine, settings: Settings) -> None:
    known(engine, settings, "u1", "garmin", client="member-7")
    run("start", "--user", "u1", "--resource", "sleep", *SINCE)
    assert [one["user_id"] for one in json.loads(run("list", "--user", "member-7", "--json").stdout)] == ["u1"]
    assert run("pause", "--user", "member-7").stdout == "paused 1 of 1\n"


def test_a_backfill_whose_commit_was_interrupted_is_started_once(
    engine: Engine, settings: Settings, headrace: Headrace, database_url: str
) -> None:
    """Breaks if `backfill start` fails although the backfill is started, or starts it twice."""
    apply(engine, settings, delivery(workout("u1")))
    words = ("backfill", "start", "--user", "u1", "--resource", "sleep", "--since", "2026-01-01")
    with commit_proxy(database_url) as proxy:
        proxy.cut(2, "after")  # the first commit ends the lookup of the user
        done = headrace(*words, DATABASE_URL=proxy.url)
    assert (proxy.cuts, done.exit_code) == (1, 0), done.output
    assert status(engine, "u1") == [("pending", 0, 1)]
    assert [row["action"] for row in rows(engine, "SELECT action FROM headrace.audit")] == ["backfill start"]
