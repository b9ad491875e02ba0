"""`headrace reconcile` and `headrace refresh`, against the simulated Junction."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.errors import TryLater
from tests.support import apply, delivery, event, rows
from tests.support.backfills import forget_pauses
from tests.support.cli import error_line, invoke
from workers.aggregators.junction import introspection
from workers.cli.deployment import Deployment
from workers.fetch.http import Client
from workers.fetch.rate_limits import Throttle, pauses
from workers.reconcile import reconciler, runs
from workers.reconcile.terra import JOB
from workers.simulator.conditions import Pull, State
from workers.simulator.events import supplied
from workers.simulator.server import API_KEY, Simulator
from workers.store import jobs

Run = Callable[..., Result]
COLUMNS = {"user_id", "provider", "resource", "whose", "why", "from", "to", "requests"}


@pytest.fixture
def run(
    simulator: Simulator, settings: Settings, broker_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    """Runs a command in this process, with the test's engine, for sleep and activity only.

    The user that `--user` names is stored first, except `nobody`.
    """
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

    def run(*words: str, **more: str) -> Result:
        known = [value for name, value in pairwise(words) if name == "--user" and value != "nobody"]
        with engine.begin() as connection:
            for name in known:
                connection.execute(
                    text("INSERT INTO headrace.users VALUES (:name) ON CONFLICT DO NOTHING"), {"name": name}
                )
        return invoke(*words, **environment | more)

    monkeypatch.setattr(Deployment, "engine", engine)
    for module in ("workers.fetch.client", "workers.reconcile.comparisons"):
        monkeypatch.setattr(f"{module}.Client", client)
    yield run
    for one in clients:
        one.close()


def opened(engine: Engine) -> set[tuple[str, str, str, str]]:
    query = "SELECT user_id, provider, resource, requested_by FROM headrace.backfills"
    return {(row["user_id"], row["provider"], row["resource"], row["requested_by"]) for row in rows(engine, query)}


def expected(simulator: Simulator) -> set[tuple[str, str, str]]:
    """The simulated users' data of sleep and activity."""
    return {
        (user.user_id, connection.provider.slug, resource.name)
        for user in simulator.world.members
        for connection in user.connections
        for resource in supplied(connection)
        if resource.name in ("sleep", "activity")
    }


def connected(simulator: Simulator, engine: Engine, settings: Settings) -> None:
    """Stores the connections of the simulated users."""
    bodies = [
        event("provider.connection.created", user.user_id, {"provider": {"slug": one.provider.slug}}, user.user_id)
        for user in simulator.world.members
        for one in user.connections
    ]
    apply(engine, settings, *map(delivery, bodies))


# reconcile


def test_gaps_are_listed_and_fetched(run: Run, simulator: Simulator, engine: Engine, settings: Settings) -> None:
    done = run("reconcile")
    assert (done.exit_code, done.stderr) == (0, "")
    whose = expected(simulator)
    assert opened(engine) == {(*one, "reconcile") for one in whose}
    *table, summary = done.stdout.splitlines()
    text = "\n".join(table)
    for user_id, provider, resource in whose:
        assert any(all(part in line for part in (user_id, provider, resource)) for line in table)
    assert "pulled by the aggregator, but no event announced it" in text
    assert f"{simulator.world.start:%Y-%m-%d} 00:00" in text
    connections = sum(len(user.connections) for user in simulator.world.members)
    assert summary == (
        f"{len(whose) + connections} gaps: {len(whose) + connections} ours. Fetching them with about {len(whose)} "
        f"requests. Corrected {connections} connections."
    )
    known = {(row["user_id"], row["provider"]) for row in rows(engine, "SELECT * FROM health.connections")}
    assert known == {(user.user_id, c.provider.slug) for user in simulator.world.members for c in user.connections}


def test_a_dry_run_changes_nothing(run: Run, simulator: Simulator, engine: Engine) -> None:
    done = run("reconcile", "--dry-run")
    assert (done.exit_code, done.stderr) == (0, "")
    connections = sum(len(user.connections) for user in simulator.world.members)
    assert f"Would fetch them with about {len(expected(simulator))} requests." in done.stdout
    assert f"Would correct {connections} connections." in done.stdout
    for table in ("backfills", "users", "connections", "gaps", "jobs"):
        assert rows(engine, f"SELECT 1 FROM headrace.{table}") == [], table


def test_as_json_it_is_complete(run: Run, simulator: Simulator, engine: Engine) -> None:
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
    run("reconcile")
    done = run("reconcile")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "2 users compared: nothing is missing\n"


def test_user_limits_the_comparison(run: Run, simulator: Simulator, engine: Engine) -> None:
    first, second = simulator.world.members
    run("reconcile", "--user", first.user_id)
    assert {one[0] for one in opened(engine)} == {first.user_id}
    assert not any(second.user_id in f"{one['path']}{one['query']}" for one in simulator.requests)
    assert "unknown user nobody" in error_line(run("reconcile", "--user", "nobody"), 4)


def test_all_compares_every_user_of_a_client_user_id(simulator: Simulator, run: Run, engine: Engine) -> None:
    """Breaks if only one of a person's user_ids is compared, or one is chosen without being asked for."""
    names = {one.user_id for one in simulator.world.members}
    query = text("INSERT INTO headrace.users (user_id, client_user_id) VALUES (:user, 'team')")
    with engine.begin() as connection:
        connection.execute(query, [{"user": name} for name in names])
    words = ("reconcile", "--user=team")  # the fixture stores a user for `--user NAME`
    assert error_line(run(*words)).endswith("or --all for all of them")
    assert opened(engine) == set()
    assert run(*words, "--all").exit_code == 0
    assert {one[0] for one in opened(engine)} == names
    assert {row["subject"] for row in rows(engine, "SELECT subject FROM headrace.audit")} == names


def test_the_responsible_party_is_shown(run: Run, simulator: Simulator, engine: Engine, settings: Settings) -> None:
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


def test_since_excludes_older_data(run: Run, simulator: Simulator, engine: Engine) -> None:
    for user in simulator.world.members:
        simulator.conditions.put_pull(Pull("not_pulled", user.user_id))
    late = json.loads(run("reconcile", "--json", "--dry-run", "--since", "2100-01-01").stdout)
    assert {one["whose"] for one in late if one["resource"] != "connection"} == {"provider"}
    every = json.loads(run("reconcile", "--json", "--dry-run").stdout)
    assert {one["whose"] for one in every if one["resource"] != "connection"} == {"provider", "ours"}


def test_a_run_that_ends_in_an_outage_is_audited(
    run: Run, simulator: Simulator, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if backfills were opened, and the audit log does not name who opened them."""
    real, calls = runs.next_step, iter(range(100))

    def away(*given: Any) -> Any:
        if next(calls):
            raise TryLater("PostgreSQL is away")
        return replace(real(*given), opened=(1, 2))

    monkeypatch.setattr(runs, "next_step", away)
    assert run("reconcile", "--user", simulator.world.members[0].user_id).exit_code != 0
    (entry,) = rows(engine, "SELECT detail FROM headrace.audit WHERE action = 'reconcile'")
    assert entry["detail"]["opened"] == 2


@pytest.mark.parametrize("word", ["reconcile", "refresh"])
def test_a_rejected_api_key_is_reported(run: Run, settings: Settings, broker_url: str, word: str) -> None:
    """The command must not wait for the end of the pause."""
    words = (word, "--user", "u1")
    line = error_line(run(*words, JUNCTION_API_KEY="sk_us_sesame"))
    assert "401" in line
    assert "sesame" not in line
    if word == "reconcile":
        assert "the API key is refused" in line
        again = error_line(run("reconcile", JUNCTION_API_KEY="sk_us_sesame"))
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
    for environment, message in WRONG:
        line = error_line(run(word, "--user", "u1", **environment))
        assert line.startswith("headrace: ")
        assert message in line
        assert "sesame" not in line


def test_a_rejected_request_is_one_line(run: Run, simulator: Simulator) -> None:
    simulator.faults.add("422", where="introspect")
    line = error_line(run("reconcile"))
    assert line == "headrace: Junction answers /v2/introspect/historical_pull with status 422"


def test_a_short_pause_is_awaited(  # noqa: PLR0917
    run: Run, simulator: Simulator, settings: Settings, broker_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        forget_pauses(settings)

    monkeypatch.setattr(runs, "time", SimpleNamespace(sleep=sleep))
    simulator.faults.add("429", times=1, retry_after=60)
    done = run("reconcile", "--dry-run", "--json")
    assert (done.exit_code, len(json.loads(done.stdout)) > 0) == (0, True)
    assert [round(seconds) for seconds in slept if seconds] == [60]
    simulator.faults.add("503", times=1, retry_after=600)
    line = error_line(run("reconcile", "--dry-run", "--json"))
    assert line == "Error: Junction is paused for 600 s: status 503"


def test_entries_that_could_not_be_read_are_counted(
    run: Run, simulator: Simulator, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if the command says that nothing is missing while it could not read all of Junction's answer."""
    run("reconcile")
    original = introspection.read_pulls

    def with_null(body: bytes) -> Any:
        document = json.loads(body)
        return original(json.dumps(document | {"data": [*document["data"], None]}).encode())

    monkeypatch.setitem(reconciler.LISTINGS, "pulls", (introspection.pulls_request, with_null))  # type: ignore[arg-type]
    done = run("reconcile", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, [])
    assert done.stderr == "1 entries of Junction's introspection could not be read\n"


# Terra


TERRA = ("TERRA_BASE_URL", "TERRA_API_KEY", "TERRA_DEV_ID", "TERRA_ADMIN_BASE_URL", "TERRA_ADMIN_TOKEN")


def terra(simulator: Simulator, **changes: str) -> dict[str, str]:
    """The settings of a deployment with Terra only."""
    return {name: simulator.environment[name] for name in TERRA} | {"JUNCTION_API_KEY": ""} | changes


def test_terra_is_compared_with_its_token(run: Run, simulator: Simulator, engine: Engine) -> None:
    """Breaks if Terra's data is not compared, or its windows are opened with each run."""
    done = run("reconcile", **terra(simulator))
    assert (done.exit_code, done.stderr) == (0, "")
    assert "newer data than is stored" in done.stdout
    found = opened(engine)
    assert {user for user, *_ in found} == {one.user_id for one in simulator.terra.accounts()}
    assert {resource for _, _, resource, _ in found} == {"sleep", "activity"}
    count = len(simulator.terra.accounts())
    assert run("reconcile", **terra(simulator)).stdout == f"{count} users compared: nothing is missing\n"
    assert opened(engine) == found
    assert rows(engine, "SELECT 1 FROM headrace.jobs WHERE lease_until > now()") == []
    assert simulator.environment["TERRA_ADMIN_TOKEN"] not in done.output


def test_both_aggregators_are_compared(run: Run, simulator: Simulator, engine: Engine) -> None:
    """Breaks if the second aggregator is left out, or the users of one are asked for at the other."""
    both = terra(simulator, JUNCTION_API_KEY=API_KEY)
    run("reconcile", **both)
    junction_user, terra_user = simulator.world.members[0].user_id, simulator.terra.accounts()[0].user_id
    users = {user for user, *_ in opened(engine)}
    assert {junction_user, terra_user} < users
    before = len(simulator.requests)
    run("reconcile", "--user", terra_user, **both)
    assert all(one["path"].startswith("/v3/admin") for one in simulator.requests[before:])
    before = len(simulator.requests)
    run("reconcile", "--user", junction_user, **both)
    assert not any(one["path"].startswith("/v3/admin") for one in simulator.requests[before:])
    line = error_line(run("reconcile", "--user", terra_user))
    assert line == f"Error: {terra_user} is a user of Terra, which needs TERRA_ADMIN_TOKEN"


def test_a_refused_token_does_not_prevent_the_other_comparison(run: Run, simulator: Simulator, engine: Engine) -> None:
    """Breaks if a refused token hides Junction's gaps, or is tried again at once."""
    done = run("reconcile", **terra(simulator, JUNCTION_API_KEY=API_KEY, TERRA_ADMIN_TOKEN="terra_at_sesame"))
    assert done.exit_code == 1
    assert "pulled by the aggregator, but no event announced it" in done.stdout
    line = done.stderr.splitlines()[-1]
    assert line.endswith("(status 401, unauthorized: simulated); set TERRA_ADMIN_TOKEN")
    assert "sesame" not in done.output
    assert rows(engine, "SELECT 1 FROM headrace.jobs WHERE name = 'terra-token'") == []
    assert sum(one["path"] == "/v3/admin/me" for one in simulator.requests) == 1


def test_only_one_process_compares_with_terra(run: Run, simulator: Simulator, engine: Engine) -> None:
    """Breaks if a command sends requests while a worker does, with the same token."""
    jobs.ensure_job(engine, JOB, 3600)
    assert jobs.hold(engine, JOB)
    line = error_line(run("reconcile", **terra(simulator)))
    assert line == "headrace: a worker or another command is comparing with Terra; try again when it has ended"
    assert simulator.requests == []


# refresh


def test_refresh_lists_its_results(run: Run, simulator: Simulator) -> None:
    user = simulator.world.members[0]
    broken = user.connections[0].provider.slug
    done = run("refresh", "--user", user.user_id)
    assert (done.exit_code, done.stderr) == (0, "")
    first, under_way, failed = done.stdout.splitlines()
    assert first.startswith("done        ")
    assert f"{broken}/sleep" in first
    assert (under_way, failed) == ("in progress -", "failed      -")
    simulator.conditions.put_state(State("error", user.user_id, broken))
    done = run("refresh", "--user", user.user_id)
    assert done.exit_code == 0
    assert f"{broken}/sleep" in done.stdout.splitlines()[2]
    assert [(one["method"], one["path"]) for one in simulator.requests] == [
        ("POST", f"/v2/user/refresh/{user.user_id}")
    ] * 2


def test_refresh_as_json(run: Run, simulator: Simulator) -> None:
    user = simulator.world.members[0]
    result = json.loads(run("refresh", "--user", user.user_id, "--json").stdout)
    assert set(result) == {"done", "under_way", "failed", "error"}
    assert (result["under_way"], result["failed"], result["error"]) == ([], [], None)
    slugs = {connection.provider.slug for connection in user.connections}
    assert {one.partition("/")[0] for one in result["done"]} == slugs


def test_refresh_of_a_user_without_connections_is_an_error(run: Run, simulator: Simulator) -> None:
    user = simulator.world.members[0]
    simulator.conditions.put_state(State("deregistered", user.user_id))
    assert (
        error_line(run("refresh", "--user", user.user_id)) == "Error: Junction reports: user has no connected sources"
    )
    done = run("refresh", "--user", user.user_id, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"] == "user has no connected sources"
    assert "status 404" in error_line(run("refresh", "--user", "unknown-to-junction"))
    assert "unknown user nobody" in error_line(run("refresh", "--user", "nobody"), 4)


def test_refresh_is_limited_to_eight_per_hour_and_user(run: Run, simulator: Simulator) -> None:
    first, second = simulator.world.members
    for _ in range(8):
        assert run("refresh", "--user", first.user_id).exit_code == 0
    line = error_line(run("refresh", "--user", first.user_id))
    message, _, seconds = line.removesuffix(" s").rpartition(" in ")
    assert message == f"Error: {first.user_id} was refreshed 8 times this hour; try again"
    assert 3500 < int(seconds) <= 3601
    assert len(simulator.requests) == 8
    assert run("refresh", "--user", second.user_id).exit_code == 0


def test_a_paused_account_is_not_refreshed(run: Run, simulator: Simulator, settings: Settings, broker_url: str) -> None:
    user = simulator.world.members[0]
    Throttle(replace(settings, junction_api_key=API_KEY)).pause("junction", 60, "status 429")
    for _ in range(9):
        line = error_line(run("refresh", "--user", user.user_id))
    assert "headrace status shows why" in line
    assert (simulator.requests, [one.reason for one in pauses(settings)]) == ([], ["status 429"])
    forget_pauses(settings)
    assert run("refresh", "--user", user.user_id).exit_code == 0


@pytest.mark.parametrize("kind", ["429", "500", "truncated"])
def test_a_failed_refresh_is_an_error(run: Run, simulator: Simulator, kind: Any) -> None:
    simulator.faults.add(kind)
    line = error_line(run("refresh", "--user", simulator.world.members[0].user_id))
    assert ("cannot be reached" if kind == "truncated" else kind) in line
