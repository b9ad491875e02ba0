"""`headrace link`: what is asked, printed and refused, against the simulated provider and against strangers."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from app.config.settings import Settings
from workers.cli import link as commands
from workers.cli.main import main
from workers.fetch.http import Client
from workers.simulator.server import API_KEY, Simulator

Run = Callable[..., Result]
KEY = {"JUNCTION_API_KEY": API_KEY}
TERRA = {"TERRA_API_KEY": "terra-key", "TERRA_DEV_ID": "terra-dev"}
URL = "https://widget.test/session/1"


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    """Two people with three days of history."""
    with Simulator(2, 3) as simulator:
        yield simulator


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command within this process, in an environment of its own."""
    monkeypatch.chdir(tmp_path)
    for name in [setting.metadata["name"] for setting in fields(Settings)]:
        monkeypatch.delenv(name, raising=False)

    def invoke(*words: str, **environment: str) -> Result:
        done = CliRunner().invoke(main, ["link", *words], env=environment)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return invoke


@pytest.fixture
def here(simulator: Simulator) -> dict[str, str]:
    """The environment in which the simulated provider is Junction."""
    return KEY | {"JUNCTION_BASE_URL": simulator.url}


def answered(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]) -> list[httpx.Request]:
    """A stranger instead of the aggregator; returns what it is asked, as that comes in."""
    asked: list[httpx.Request] = []

    def note(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answer(request)

    transport = httpx.MockTransport(note)
    monkeypatch.setattr(commands, "Client", lambda url, headers: Client(url, headers, transport))
    return asked


def refused(done: Result, code: int = 1) -> str:
    """The line that says why; nothing is printed on standard output."""
    assert (done.exit_code, done.stdout) == (code, "")
    line = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    return line


# Junction, as the simulated provider has it


def test_a_new_person_gets_a_link_that_connects_them(run: Run, here: dict[str, str], simulator: Simulator) -> None:
    """Breaks if somebody with an account does not get from a key to a connection."""
    done = run("--user", "newcomer/1", "--provider", "Garmin", "--redirect-url", "https://app.test/done", **here)
    assert (done.exit_code, done.stderr) == (0, "")
    user = simulator.world.named("newcomer/1")
    assert user is not None
    first, address, within, *told = done.stdout.splitlines()
    assert first.split() == ["user_id", user.user_id]
    assert within.strip() == "within 10 minutes, as newcomer/1"
    assert [line.strip() for line in told[-2:]] == ["headrace status", f"headrace backfill list --user {user.user_id}"]

    landed = httpx.get(address.split()[1])

    assert (landed.status_code, landed.headers["location"]) == (302, "https://app.test/done")
    joined = simulator.world.user(user.user_id)
    assert joined is not None
    assert [connection.provider.slug for connection in joined.connections] == ["garmin"]
    assert httpx.get(address.split()[1]).status_code == 404


def test_a_person_who_is_there_is_linked_again(run: Run, here: dict[str, str], simulator: Simulator) -> None:
    """Breaks if the same person cannot connect a second provider, or becomes a second person."""
    there = simulator.world.members[0]
    said = json.loads(run("--user", there.client_user_id, "--json", **here).stdout)
    assert said["user_id"] == there.user_id
    assert len(simulator.world.members) == 2
    assert [(one["method"], one["path"], one["status"]) for one in simulator.requests] == [
        ("POST", "/v2/user", 400),
        ("GET", f"/v2/user/resolve/{there.client_user_id}", 200),
        ("POST", "/v2/link/token", 200),
    ]


def test_as_json_it_is_complete(run: Run, here: dict[str, str]) -> None:
    """Breaks if a program cannot read the link, or anything else stands on standard output."""
    said = json.loads(run("--user", "m", "--provider", "garmin", "--provider", "oura", "--json", **here).stdout)
    assert set(said) == {"aggregator", "client_user_id", "user_id", "url", "token", "expires_in", "demo"}
    assert (said["aggregator"], said["client_user_id"], said["expires_in"]) == ("junction", "m", 600)
    assert set(httpx.get(said["url"]).json()["choose"]) == {"garmin", "oura"}


def test_a_demo_person_is_connected_at_once(run: Run, here: dict[str, str], simulator: Simulator) -> None:
    """Breaks if the sandbox's people cannot be had without a browser."""
    done = run("--user", "demo-1", "--demo", "Oura", **here)
    assert done.exit_code == 0
    assert "demo-1 is connected with Oura. Junction sends" in done.stdout
    assert "open" not in done.stdout
    user = simulator.world.named("demo-1")
    assert user is not None
    assert user.connection("oura") is not None
    ((arrived, connection),) = simulator.world.arrived()
    assert (arrived, connection.provider.slug) == (user, "oura")


def test_a_wrong_key_is_told(run: Run, here: dict[str, str]) -> None:
    """Breaks if the most likely mistake is told as anything else, or the key itself is printed."""
    line = refused(run("--user", "m", **here | {"JUNCTION_API_KEY": "sk_us_wrong"}))
    assert line.startswith("Error: Junction refuses the key (status 401: Invalid token): check JUNCTION_API_KEY, for h")
    assert "wrong" not in line


@pytest.mark.parametrize("words", [("--provider", "garmn"), ("--demo", "garmin")])
def test_an_unknown_provider_is_told(run: Run, here: dict[str, str], words: tuple[str, str]) -> None:
    """Breaks if a typing error in a provider's name is told without what may stand there."""
    line = refused(run("--user", "m", *words, **here))
    assert line.startswith("Error: Junction refuses that (status 422: provider: Input should be one of 'apple_heal")
    assert line.endswith("a provider is named as in its list of providers")


def test_the_command_stores_nothing_and_needs_no_stack(run: Run, here: dict[str, str], tmp_path: Path) -> None:
    """Breaks if a link needs a database, or leaves a token lying around."""
    assert run("--user", "m", **here).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_no_token_and_no_key_is_logged(
    run: Run, here: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if whoever reads the logs can connect as the person."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "httpx")
    said = json.loads(run("--user", "m", "--json", **here).stdout)
    assert caplog.text
    assert said["token"] not in caplog.text
    assert API_KEY not in caplog.text


# Terra


def test_terra_gives_a_session(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a person cannot connect through Terra, or their own id does not go along."""
    asked = answered(
        monkeypatch, lambda _: httpx.Response(200, json={"url": URL, "session_id": "s1", "expires_in": 900})
    )
    done = run("--user", "member-1", "--provider", "garmin", **TERRA)
    assert (done.exit_code, done.stderr) == (0, "")
    (request,) = asked
    assert json.loads(request.content) == {"reference_id": "member-1", "providers": "GARMIN"}
    assert str(request.url) == "https://access.tryterra.co/api/v2/auth/generateWidgetSession"
    assert request.headers["content-type"] == "application/json"
    assert (request.headers["dev-id"], request.headers["x-api-key"]) == ("terra-dev", "terra-key")
    assert URL in done.stdout
    assert "within 15 minutes, as member-1" in done.stdout
    assert "Terra sends the connection and its data to your endpoint, /webhooks/terra" in done.stdout
    said = json.loads(run("--user", "member-1", "--json", **TERRA).stdout)
    assert (said["aggregator"], said["user_id"], said["token"]) == ("terra", None, "s1")


def test_a_session_of_the_simulated_terra_connects(run: Run, simulator: Simulator) -> None:
    """Breaks if linking through Terra cannot be tried without an account."""
    said = json.loads(
        run(
            "--user", "newcomer", "--aggregator", "terra", "--provider", "oura", "--json", **simulator.environment
        ).stdout
    )
    assert httpx.get(said["url"]).json() == {"connected": "OURA"}
    auth = simulator.terra.waiting()[0]
    assert auth.event["user"]["reference_id"] == "newcomer"


def test_a_provider_that_terra_does_not_know_is_told(run: Run, simulator: Simulator) -> None:
    """Breaks if Terra's own words, in the form of RFC 9457, are lost."""
    line = refused(run("--user", "m", "--aggregator", "terra", "--provider", "ourah", **simulator.environment))
    assert line.startswith("Error: Terra refuses that (status 400: unknown provider OURAH; known are PELOTON, OURA")


def test_terras_refusal_with_status_200_is_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if an error of Terra's older form is told as an address."""
    answered(monkeypatch, lambda _: httpx.Response(200, json={"status": "error", "message": "no such dev-id"}))
    assert refused(run("--user", "m", **TERRA)) == "Error: Terra says: no such dev-id"


# What both refuse


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (401, {}, "Terra refuses the key (status 401: because): check TERRA_API_KEY and TERRA_DEV_ID, for https://a"),
        (403, {}, "Terra refuses the key (status 403: because)"),
        (400, {}, "Terra refuses that (status 400: because); a provider is named as"),
        (422, {}, "Terra refuses that (status 422: because)"),
        (404, {}, "Terra answers with status 404: because: check TERRA_BASE_URL, which is https://access.tryterra"),
        (301, {}, "Terra answers with status 301: because: check TERRA_BASE_URL"),
        (429, {"Retry-After": "30"}, "Terra cannot answer now (status 429: because): try again in 30 s"),
        (500, {}, "Terra cannot answer now (status 500: because): try again in a while"),
        (503, {}, "Terra cannot answer now (status 503: because): try again in a while"),
    ],
)
def test_every_refusal_is_one_line_with_a_remedy(
    run: Run, monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str], said: str
) -> None:
    """Breaks if an operator is not told whose turn it is, or sees a traceback."""
    answered(monkeypatch, lambda _: httpx.Response(status, headers=headers, json={"detail": "because"}))
    assert refused(run("--user", "m", **TERRA)).startswith(f"Error: {said}")


@pytest.mark.parametrize("environment", [KEY, TERRA])
def test_who_cannot_be_reached_is_told(run: Run, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Breaks if a wrong address or a cut line is told as a wrong key."""

    def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("as asked")

    answered(monkeypatch, fail)
    line = refused(run("--user", "m", **environment))
    assert "cannot be reached at https://" in line
    assert line.endswith("_BASE_URL")


@pytest.mark.parametrize("environment", [KEY, TERRA])
@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", b""])
def test_an_answer_that_is_none_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], body: bytes
) -> None:
    """Breaks if a proxy's login page is taken for an answer."""
    answered(monkeypatch, lambda _: httpx.Response(200, content=body))
    assert " says: " in refused(run("--user", "m", **environment))


def test_another_reason_than_the_name_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a sandbox that is full (400) is told as a person who cannot be found."""

    def full(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400 if request.method == "POST" else 404, json={"detail": "50 users at most"})

    answered(monkeypatch, full)
    line = refused(run("--user", "m", **KEY))
    assert line.startswith("Error: Junction refuses that (status 400: 50 users at most)")


# What is not even asked


@pytest.mark.parametrize(
    ("words", "environment", "code", "said"),
    [
        (("--user", "m"), {}, 1, "headrace: JUNCTION_API_KEY: not set, nor is TERRA_API_KEY"),
        (("--user", "m"), KEY | TERRA, 2, "Error: JUNCTION_API_KEY and TERRA_API_KEY are both set: say --aggregator"),
        (("--user", "m", "--aggregator", "terra"), KEY, 1, "headrace: TERRA_DEV_ID: not set"),
        (("--user", "m", "--aggregator", "terra"), {"TERRA_DEV_ID": "d"}, 1, "headrace: TERRA_API_KEY: not set"),
        (("--user", "m", "--aggregator", "junction"), TERRA, 1, "headrace: JUNCTION_"),
        (("--user", "m"), {"TERRA_API_KEY": "k"}, 1, "headrace: TERRA_DEV_ID: not set"),
        (("--user", " "), KEY, 2, "Error: --user is empty"),
        ((), KEY, 2, "Error: Missing option '--user'"),
        (("--user", "m", "--demo", "oura"), TERRA, 2, "Error: --demo: only Junction"),
        (("--user", "m", "--demo", "oura", "--provider", "x"), KEY, 2, "Error: --demo connects at once"),
        (("--user", "m", "--demo", "oura", "--redirect-url", "x"), KEY, 2, "Error: --demo connects at once"),
        (("--user", "m", "--demo", "oura"), {"JUNCTION_API_KEY": "pk_us_1"}, 2, "Error: --demo works in Junction's"),
    ],
)
def test_what_cannot_be_asked_is_told_before(  # noqa: PLR0917
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    environment: dict[str, str],
    code: int,
    said: str,
) -> None:
    """Breaks if a user is made at the aggregator for a command that cannot end well."""
    asked = answered(monkeypatch, lambda _: httpx.Response(500))
    assert refused(run(*words, **environment), code).startswith(said)
    assert asked == []


def test_both_keys_and_a_word_are_enough(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if whoever uses both aggregators cannot link with either."""
    asked: Any = answered(monkeypatch, lambda _: httpx.Response(200, json={"url": URL}))
    assert run("--user", "m", "--aggregator", "terra", **KEY | TERRA).exit_code == 0
    assert len(asked) == 1
