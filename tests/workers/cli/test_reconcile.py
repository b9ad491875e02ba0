"""`headrace reconcile` and `headrace refresh`: what is asked, printed and refused, against the simulated provider."""

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, event, rows
from tests.support.backfills import forget_pauses
from workers.cli import reconcile as commands
from workers.cli.main import main
from workers.fetch.http import Client
from workers.fetch.rate_limits import Throttle, pauses
from workers.simulator.conditions import Pull, State
from workers.simulator.events import supplied
from workers.simulator.server import API_KEY, Simulator

Run = Callable[..., Result]
COLUMNS = {"user_id", "provider", "resource", "whose", "why", "from", "to", "requests"}


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    """Two people with three days of history."""
    with Simulator(2, 3) as simulator:
        yield simulator


@pytest.fixture
def run(  # noqa: PLR0917
    simulator: Simulator,
    settings: Settings,
    broker_url: str,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Run]:
    """A command within this process, on the test's own connections; only of sleep and activity."""
    monkeypatch.chdir(tmp_path)
    for name in [setting.metadata["name"] for setting in fields(Settings)]:
        monkeypatch.delenv(name, raising=False)
    environment = {
        "DATABASE_URL": settings.need_database().replace("+psycopg", ""),
        "BROKER_URL": broker_url,
        "JUNCTION_API_KEY": API_KEY,
        "JUNCTION_BASE_URL": simulator.url,
        "HEADRACE_RESOURCES": "sleep,activity",
    }
    clients: list[Client] = []

    def client(*given: Any) -> Client:
        clients.append(Client(*given))
        return clients[-1]

    monkeypatch.setattr(commands, "make_engine", lambda *_: engine)
    monkeypatch.setattr("workers.fetch.client.Client", client)

    def invoke(*words: str, **more: str) -> Result:
        done = CliRunner().invoke(main, words, env=environment | more)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    yield invoke
    for one in clients:
        one.close()


def refused(done: Result) -> str:
    """The one line that says why; nothing else is printed."""
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def opened(engine: Engine) -> set[tuple[str, str, str, str]]:
    """The backfills that there are."""
    query = "SELECT user_id, provider, resource, requested_by FROM headrace.backfills"
    return {(row["user_id"], row["provider"], row["resource"], row["requested_by"]) for row in rows(engine, query)}


def expected(simulator: Simulator) -> set[tuple[str, str, str]]:
    """Whatever the simulated people have of sleep and activity."""
    return {
        (user.user_id, connection.provider.slug, resource.name)
        for user in simulator.world.members
        for connection in user.connections
        for resource in supplied(connection)
        if resource.name in ("sleep", "activity")
    }


def connected(simulator: Simulator, engine: Engine, settings: Settings) -> None:
    """Makes known who is connected with what."""
    bodies = [
        event("provider.connection.created", user.user_id, {"provider": {"slug": one.provider.slug}}, user.user_id)
        for user in simulator.world.members
        for one in user.connections
    ]
    apply(engine, settings, *map(delivery, bodies))


# reconcile


def test_what_is_missing_is_shown_and_fetched(
    run: Run, simulator: Simulator, engine: Engine, settings: Settings
) -> None:
    """Breaks if an operator is not told what is missing, or nothing is done about it."""
    done = run("reconcile")
    assert (done.exit_code, done.stderr) == (0, "")
    whose = expected(simulator)
    assert opened(engine) == {(*one, "reconcile") for one in whose}
    *table, summary = done.stdout.splitlines()
    text = "\n".join(table)
    for user_id, provider, resource in whose:
        assert any(all(part in line for part in (user_id, provider, resource)) for line in table)
    assert "pulled, and never announced to us" in text
    assert f"{simulator.world.start:%Y-%m-%d} 00:00" in text
    connections = sum(len(user.connections) for user in simulator.world.members)
    assert summary == (
        f"{len(whose) + connections} gaps: {len(whose) + connections} ours. Being fetched, with about {len(whose)} "
        f"requests. {connections} connections were corrected."
    )
    known = {(row["user_id"], row["provider"]) for row in rows(engine, "SELECT * FROM health.connections")}
    assert known == {(user.user_id, c.provider.slug) for user in simulator.world.members for c in user.connections}


def test_a_dry_run_only_tells(run: Run, simulator: Simulator, engine: Engine) -> None:
    """Breaks if looking for what is missing changes anything, or says that it did."""
    done = run("reconcile", "--dry-run")
    assert (done.exit_code, done.stderr) == (0, "")
    connections = sum(len(user.connections) for user in simulator.world.members)
    assert f"To be fetched, with about {len(expected(simulator))} requests." in done.stdout
    assert f"{connections} connections to be corrected." in done.stdout
    for table in ("backfills", "users", "connections", "gaps", "jobs"):
        assert rows(engine, f"SELECT 1 FROM headrace.{table}") == [], table


def test_as_json_it_is_complete(run: Run, simulator: Simulator, engine: Engine) -> None:
    """Breaks if a program cannot read what is missing, or anything else stands on standard output."""
    done = run("reconcile", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert all(set(one) == COLUMNS for one in found)
    gaps = [one for one in found if one["resource"] != "connection"]
    assert {(one["user_id"], one["provider"], one["resource"]) for one in gaps} == expected(simulator)
    for one in gaps:
        assert (one["whose"], one["requests"]) == ("ours", 1)
        assert one["from"] <= simulator.world.start.isoformat() < one["to"]
    others = [one for one in found if one["resource"] == "connection"]
    assert {(one["from"], one["to"], one["requests"]) for one in others} == {(None, None, 0)}
    again = json.loads(run("reconcile", "--json").stdout)
    assert again == []


def test_nothing_missing_is_one_line(run: Run, simulator: Simulator, engine: Engine) -> None:
    """Breaks if all is well and the operator cannot tell, or the people are counted wrongly."""
    run("reconcile")
    done = run("reconcile")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "2 people compared: nothing is missing\n"


def test_one_person_may_be_compared(run: Run, simulator: Simulator, engine: Engine) -> None:
    """Breaks if --user compares everybody, or nobody."""
    first, second = simulator.world.members
    run("reconcile", "--user", first.user_id)
    assert {one[0] for one in opened(engine)} == {first.user_id}
    assert not any(second.user_id in f"{one['path']}{one['query']}" for one in simulator.requests)
    assert "nothing is missing" in run("reconcile", "--user", "nobody").stdout


def test_whose_turn_it_is_is_told(run: Run, simulator: Simulator, engine: Engine, settings: Settings) -> None:
    """Breaks if an operator cannot tell what Headrace mends from what only others can."""
    connected(simulator, engine, settings)
    first, second = simulator.world.members
    simulator.conditions.put_pull(Pull("in_progress", first.user_id, resource="sleep"))
    simulator.conditions.put_pull(Pull("failure", second.user_id, resource="activity"))
    done = run("reconcile")
    turns = {(one[0], one[1], one[2]) for one in expected(simulator)}
    pulling = sum(user == first.user_id and name == "sleep" for user, _, name in turns)
    failed = sum(user == second.user_id and name == "activity" for user, _, name in turns)
    assert f"{pulling} Junction's" in done.stdout
    assert f"{failed} the provider's" in done.stdout
    assert "still pulling" in done.stdout
    assert "non_retriable_error" in done.stdout


def test_since_leaves_out_what_is_older(run: Run, simulator: Simulator, engine: Engine) -> None:
    """Breaks if --since is passed over."""
    for user in simulator.world.members:
        simulator.conditions.put_pull(Pull("not_pulled", user.user_id))
    late = json.loads(run("reconcile", "--json", "--dry-run", "--since", "2100-01-01").stdout)
    assert {one["whose"] for one in late if one["resource"] != "connection"} == {"provider"}
    every = json.loads(run("reconcile", "--json", "--dry-run").stdout)
    assert {one["whose"] for one in every if one["resource"] != "connection"} == {"provider", "ours"}


def test_a_wrong_since_is_told(run: Run) -> None:
    """Breaks if a typing error compares everything."""
    done = run("reconcile", "--since", "lately")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "'lately' is neither a day" in done.stderr


@pytest.mark.parametrize("word", ["reconcile", "refresh"])
def test_a_refused_key_is_told(run: Run, settings: Settings, broker_url: str, word: str) -> None:
    """Breaks if an operator whose key is wrong waits five minutes to learn nothing."""
    words = (word, "--user", "u1")
    line = refused(run(*words, JUNCTION_API_KEY="sk_us_sesame"))
    assert "401" in line
    assert "sesame" not in line
    if word == "reconcile":
        assert "the API key is refused" in line
        again = refused(run("reconcile", JUNCTION_API_KEY="sk_us_sesame"))
        assert "the API key is refused" in again


WRONG: list[tuple[dict[str, str], str]] = [
    ({"JUNCTION_API_KEY": ""}, "JUNCTION_API_KEY: not set"),
    ({"JUNCTION_API_KEY": "", "JUNCTION_BASE_URL": ""}, "JUNCTION_API_KEY"),
    ({"JUNCTION_API_KEY": "sesame", "JUNCTION_BASE_URL": ""}, "JUNCTION_BASE_URL: not set"),
    ({"DATABASE_URL": "", "BROKER_URL": ""}, "no stack runs in"),
    ({"BROKER_URL": "redis://:sesame@127.0.0.1:1/0"}, "REDIS_URL: cannot be reached"),
    ({"HEADRACE_REQUEST_RATE": "sesame"}, "HEADRACE_REQUEST_RATE: not usable"),
]


@pytest.mark.parametrize("word", ["reconcile", "refresh"])
def test_an_error_is_one_line(run: Run, word: str) -> None:
    """Breaks if a setting that is missing or wrong ends in a traceback, or shows its value."""
    for environment, told in WRONG:
        line = refused(run(word, "--user", "u1", **environment))
        assert line.startswith("headrace: ")
        assert told in line
        assert "sesame" not in line


def test_a_refusal_is_one_line(run: Run, simulator: Simulator) -> None:
    """Breaks if Junction refuses the question and the operator meets a traceback, or waits."""
    simulator.faults.add("422", where="introspect")
    line = refused(run("reconcile"))
    assert line == "headrace: Junction answers /v2/introspect/historical_pull with status 422"


def test_a_short_silence_is_waited_for(  # noqa: PLR0917
    run: Run, simulator: Simulator, settings: Settings, broker_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a reconciliation gives up because Junction was busy for a minute, or does not wait as long as told."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        forget_pauses(settings)

    monkeypatch.setattr(commands, "time", SimpleNamespace(sleep=sleep))
    simulator.faults.add("429", times=1, retry_after=60)
    done = run("reconcile", "--dry-run", "--json")
    assert (done.exit_code, len(json.loads(done.stdout)) > 0) == (0, True)
    assert [round(seconds) for seconds in slept if seconds] == [60]
    simulator.faults.add("503", times=1, retry_after=600)
    line = refused(run("reconcile", "--dry-run", "--json"))
    assert line == "Error: Junction cannot be asked for 600 s: status 503"


# refresh


def test_a_refresh_tells_what_came_of_it(run: Run, simulator: Simulator) -> None:
    """Breaks if nobody can see which of a person's providers were asked."""
    user = simulator.world.members[0]
    broken = user.connections[0].provider.slug
    done = run("refresh", "--user", user.user_id)
    assert (done.exit_code, done.stderr) == (0, "")
    first, under_way, failed = done.stdout.splitlines()
    assert first.startswith("done       ")
    assert f"{broken}/sleep" in first
    assert (under_way, failed) == ("under way  -", "failed     -")
    simulator.conditions.put_state(State("error", user.user_id, broken))
    done = run("refresh", "--user", user.user_id)
    assert done.exit_code == 0
    assert f"{broken}/sleep" in done.stdout.splitlines()[2]
    assert [(one["method"], one["path"]) for one in simulator.requests] == [
        ("POST", f"/v2/user/refresh/{user.user_id}")
    ] * 2


def test_a_refresh_as_json(run: Run, simulator: Simulator) -> None:
    """Breaks if a program cannot read what came of a refresh."""
    user = simulator.world.members[0]
    said = json.loads(run("refresh", "--user", user.user_id, "--json").stdout)
    assert set(said) == {"done", "under_way", "failed", "error"}
    assert (said["under_way"], said["failed"], said["error"]) == ([], [], None)
    slugs = {connection.provider.slug for connection in user.connections}
    assert {one.partition("/")[0] for one in said["done"]} == slugs


def test_whoever_is_not_connected_is_told(run: Run, simulator: Simulator) -> None:
    """Breaks if a refresh of nothing looks like one that went well."""
    user = simulator.world.members[0]
    simulator.conditions.put_state(State("deregistered", user.user_id))
    assert refused(run("refresh", "--user", user.user_id)) == "Error: Junction says: user has no connected sources"
    done = run("refresh", "--user", user.user_id, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"] == "user has no connected sources"
    assert "status 404" in refused(run("refresh", "--user", "nobody"))


def test_eight_in_an_hour_are_enough(run: Run, simulator: Simulator) -> None:
    """Breaks if Junction has to refuse what it has said it would, or one person's refreshes are another's."""
    first, second = simulator.world.members
    for _ in range(8):
        assert run("refresh", "--user", first.user_id).exit_code == 0
    line = refused(run("refresh", "--user", first.user_id))
    told, _, seconds = line.removesuffix(" s").rpartition(" in ")
    assert told == f"Error: {first.user_id} was refreshed 8 times this hour;"
    assert 3500 < int(seconds) <= 3601
    assert len(simulator.requests) == 8
    assert run("refresh", "--user", second.user_id).exit_code == 0


def test_a_silent_account_is_not_refreshed(run: Run, simulator: Simulator, settings: Settings, broker_url: str) -> None:
    """Breaks if a refresh is sent while Junction wants to be left alone, or costs one of the eight."""
    user = simulator.world.members[0]
    Throttle(settings).pause("junction", 60, "status 429")
    for _ in range(9):
        line = refused(run("refresh", "--user", user.user_id))
    assert "`headrace status` says why" in line
    assert (simulator.requests, [one.reason for one in pauses(settings)]) == ([], ["status 429"])
    forget_pauses(settings)
    assert run("refresh", "--user", user.user_id).exit_code == 0


@pytest.mark.parametrize("kind", ["429", "500", "truncated"])
def test_a_refresh_that_failed_is_told(run: Run, simulator: Simulator, kind: Any) -> None:
    """Breaks if a refresh that did not happen ends well, or with a traceback."""
    simulator.faults.add(kind)
    line = refused(run("refresh", "--user", simulator.world.members[0].user_id))
    assert ("cannot be reached" if kind == "truncated" else kind) in line


@pytest.mark.parametrize("word", ["reconcile", "refresh"])
def test_help_tells_what_it_does(word: str) -> None:
    """Breaks if a command, or one of its options, is not explained."""
    shown = CliRunner().invoke(main, [word, "--help"], env={"COLUMNS": "200"}).stdout
    about, _, options = shown.partition("Options:")
    assert len(about.split("\n\n")[1].strip()) > 20
    assert {"--user", "--json", "--data-dir"} <= set(options.replace(",", " ").split())


def test_a_refresh_needs_a_person(run: Run) -> None:
    """Breaks if a refresh without a name asks for everybody."""
    done = run("refresh")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--user" in done.stderr
