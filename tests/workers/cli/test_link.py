"""`headrace link`, against the simulated aggregators and against mocked responses."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, workout
from tests.support.cli import invoke
from tests.support.database import run as database_run
from workers.fetch import http
from workers.fetch.http import Client
from workers.simulator.server import API_KEY, Simulator

Run = Callable[..., Result]
KEY = {"JUNCTION_API_KEY": API_KEY}
TERRA = {"TERRA_API_KEY": "terra-key", "TERRA_DEV_ID": "terra-dev"}
URL = "https://widget.test/session/1"


@pytest.fixture
def run() -> Run:
    return lambda *words, **environment: invoke("link", *words, **environment)


@pytest.fixture
def here(simulator: Simulator) -> dict[str, str]:
    """The environment for the simulated Junction."""
    return KEY | {"JUNCTION_BASE_URL": simulator.url}


def answered(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]) -> list[httpx.Request]:
    """Mocks the aggregator; the returned list collects its requests."""
    asked: list[httpx.Request] = []

    def note(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answer(request)

    transport = httpx.MockTransport(note)
    monkeypatch.setattr(http, "Client", lambda url, headers: Client(url, headers, transport))
    return asked


def refused(done: Result, code: int = 1) -> str:
    """The error line; standard output is empty."""
    assert (done.exit_code, done.stdout) == (code, "")
    line = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    return line


# Junction, as the simulated provider has it


def test_a_new_user_gets_a_working_link(run: Run, here: dict[str, str], simulator: Simulator) -> None:
    done = run("--user", "newcomer/1", "--provider", "Garmin", "--redirect-url", "https://app.test/done", **here)
    assert (done.exit_code, done.stderr) == (0, "")
    user = simulator.world.named("newcomer/1")
    assert user is not None
    first, address, within, *message = done.stdout.splitlines()
    assert first.split() == ["user_id", user.user_id]
    assert within.strip() == "within 10 minutes, as newcomer/1"
    assert [line.strip() for line in message[-2:]] == [
        "headrace status",
        f"headrace backfill list --user {user.user_id}",
    ]

    landed = httpx.get(address.split()[1])

    assert (landed.status_code, landed.headers["location"]) == (302, "https://app.test/done")
    joined = simulator.world.user(user.user_id)
    assert joined is not None
    assert [connection.provider.slug for connection in joined.connections] == ["garmin"]
    assert httpx.get(address.split()[1]).status_code == 404


def test_an_existing_user_gets_a_link(run: Run, here: dict[str, str], simulator: Simulator) -> None:
    there = simulator.world.members[0]
    result = json.loads(run("--user", there.client_user_id, "--json", **here).stdout)
    assert result["user_id"] == there.user_id
    assert len(simulator.world.members) == 2
    assert [(one["method"], one["path"], one["status"]) for one in simulator.requests] == [
        ("POST", "/v2/user", 400),
        ("GET", f"/v2/user/resolve/{there.client_user_id}", 200),
        ("POST", "/v2/link/token", 200),
    ]


def test_as_json_it_is_complete(run: Run, here: dict[str, str]) -> None:
    result = json.loads(run("--user", "m", "--provider", "garmin", "--provider", "oura", "--json", **here).stdout)
    assert set(result) == {"aggregator", "client_user_id", "user_id", "url", "token", "expires_in", "demo"}
    assert (result["aggregator"], result["client_user_id"], result["expires_in"]) == ("junction", "m", 600)
    assert set(httpx.get(result["url"]).json()["choose"]) == {"garmin", "oura"}


def test_a_demo_user_is_connected_immediately(run: Run, here: dict[str, str], simulator: Simulator) -> None:
    done = run("--user", "demo-1", "--demo", "Oura", **here)
    assert done.exit_code == 0
    assert "demo-1 is connected with Oura. Junction sends" in done.stdout
    assert "open" not in done.stdout
    user = simulator.world.named("demo-1")
    assert user is not None
    assert user.connection("oura") is not None
    (connection,) = simulator.world.arrived()
    assert (connection.user_id, connection.provider.slug) == (user.user_id, "oura")


def test_a_wrong_api_key_is_reported_without_it(run: Run, here: dict[str, str]) -> None:
    line = refused(run("--user", "m", **here | {"JUNCTION_API_KEY": "sk_us_wrong"}))
    assert line.startswith(
        "Error: Junction rejects the API key (status 401: Invalid token); check JUNCTION_API_KEY for h"
    )
    assert "wrong" not in line


def test_an_unknown_provider_is_refused(run: Run, here: dict[str, str], simulator: Simulator) -> None:
    """Breaks if the user was created at Junction before the provider's name turns out to be a typing error."""
    line = refused(run("--user", "m", "--provider", "garmn", **here), 4)
    assert line.startswith("headrace: unknown provider garmn; did you mean garmin? (--new-provider accepts")
    assert simulator.requests == []


@pytest.mark.parametrize("words", [("--provider", "garmn", "--new-provider"), ("--demo", "garmin")])
def test_a_provider_that_junction_rejects_is_reported(run: Run, here: dict[str, str], words: tuple[str, ...]) -> None:
    line = refused(run("--user", "m", *words, **here))
    assert line.startswith(
        "Error: Junction rejects the request (status 422: provider: Input should be one of 'apple_heal"
    )
    assert line.endswith("check that it lists the provider under this name")


def test_a_stored_user_id_is_resolved(
    run: Run, here: dict[str, str], simulator: Simulator, settings: Settings, engine: Engine
) -> None:
    """Breaks if a known person gets a second account, whose own id is the user_id of the first one."""
    user = simulator.world.members[0]
    apply(engine, settings, delivery(workout(user.user_id) | {"client_user_id": user.client_user_id}))
    database = here | {"DATABASE_URL": settings.need_database()}
    count = len(simulator.world.members)
    for name in (user.user_id, user.user_id.upper(), user.client_user_id):
        linked = json.loads(run("--user", name, "--json", **database).stdout)
        assert (linked["user_id"], linked["client_user_id"]) == (user.user_id, user.client_user_id)
    assert len(simulator.world.members) == count
    assert json.loads(run("--user", "newcomer", "--json", **database).stdout)["client_user_id"] == "newcomer"
    database_run(engine, "UPDATE headrace.users SET client_user_id = NULL")
    line = refused(run("--user", user.user_id, **database), 4)
    assert line.endswith("is a user_id without a client_user_id; use your own user id")


def test_the_command_stores_nothing_and_needs_no_stack(run: Run, here: dict[str, str], tmp_path: Path) -> None:
    assert run("--user", "m", **here).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_no_token_and_no_key_is_logged(
    run: Run, here: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "httpx")
    result = json.loads(run("--user", "m", "--json", **here).stdout)
    assert caplog.text
    assert result["token"] not in caplog.text
    assert API_KEY not in caplog.text


# Terra


def test_terra_creates_a_session(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
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
    result = json.loads(run("--user", "member-1", "--json", **TERRA).stdout)
    assert (result["aggregator"], result["user_id"], result["token"]) == ("terra", None, "s1")


def test_a_session_of_the_simulated_terra_connects(run: Run, simulator: Simulator) -> None:
    result = json.loads(
        run(
            "--user", "newcomer", "--aggregator", "terra", "--provider", "oura", "--json", **simulator.environment
        ).stdout
    )
    assert httpx.get(result["url"]).json() == {"connected": "OURA"}
    auth = simulator.terra.pending()[0]
    assert auth.event["user"]["reference_id"] == "newcomer"


def test_terras_reason_is_reported(run: Run, simulator: Simulator) -> None:
    """It is in the format of RFC 9457."""
    words = ("--user", "m", "--aggregator", "terra", "--provider", "ourah", "--new-provider")
    line = refused(run(*words, **simulator.environment))
    assert line.startswith(
        "Error: Terra rejects the request (status 400: unknown provider OURAH; known are PELOTON, OURA"
    )


def test_terras_error_with_status_200_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(monkeypatch, lambda _: httpx.Response(200, json={"status": "error", "message": "no such dev-id"}))
    assert refused(run("--user", "m", **TERRA)) == "Error: Terra reports: no such dev-id"


# What both refuse


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (
            401,
            {},
            "Terra rejects the API key (status 401: because); check TERRA_API_KEY and TERRA_DEV_ID for https://a",
        ),
        (403, {}, "Terra rejects the API key (status 403: because)"),
        (400, {}, "Terra rejects the request (status 400: because); check that it lists"),
        (422, {}, "Terra rejects the request (status 422: because)"),
        (
            404,
            {},
            "Terra answers unexpectedly (status 404: because); check TERRA_BASE_URL, which is https://access.tryterra",
        ),
        (301, {}, "Terra answers unexpectedly (status 301: because); check TERRA_BASE_URL"),
        (429, {"Retry-After": "30"}, "Terra is unavailable (status 429: because); try again in 30 s"),
        (500, {}, "Terra is unavailable (status 500: because); try again later"),
        (503, {}, "Terra is unavailable (status 503: because); try again later"),
    ],
)
def test_every_error_is_one_line_with_a_hint(
    run: Run, monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str], expected: str
) -> None:
    answered(monkeypatch, lambda _: httpx.Response(status, headers=headers, json={"detail": "because"}))
    assert refused(run("--user", "m", **TERRA)).startswith(f"Error: {expected}")


@pytest.mark.parametrize("environment", [KEY, TERRA])
def test_an_unreachable_aggregator_is_reported(
    run: Run, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("as asked")

    answered(monkeypatch, fail)
    line = refused(run("--user", "m", **environment))
    assert "cannot be reached at https://" in line
    assert line.endswith("_BASE_URL")


@pytest.mark.parametrize("environment", [KEY, TERRA])
@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", b""])
def test_an_invalid_response_is_reported(
    run: Run, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], body: bytes
) -> None:
    """For example a proxy's login page."""
    answered(monkeypatch, lambda _: httpx.Response(200, content=body))
    assert " reports: " in refused(run("--user", "m", **environment))


def test_a_full_sandbox_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 400 has other causes than an existing user."""

    def full(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400 if request.method == "POST" else 404, json={"detail": "50 users at most"})

    answered(monkeypatch, full)
    line = refused(run("--user", "m", **KEY))
    assert line.startswith("Error: Junction rejects the request (status 400: 50 users at most)")


# What is not even asked


@pytest.mark.parametrize(
    ("words", "environment", "code", "expected"),
    [
        (("--user", "m"), {}, 1, "headrace: JUNCTION_API_KEY: not set, and TERRA_API_KEY is not set either"),
        (("--user", "m"), KEY | TERRA, 2, "Error: JUNCTION_API_KEY and TERRA_API_KEY are both set; add --aggregator"),
        (("--user", "m", "--aggregator", "terra"), KEY, 1, "headrace: TERRA_DEV_ID: not set"),
        (("--user", "m", "--aggregator", "terra"), {"TERRA_DEV_ID": "d"}, 1, "headrace: TERRA_API_KEY: not set"),
        (("--user", "m", "--aggregator", "junction"), TERRA, 1, "headrace: JUNCTION_"),
        (("--user", "m"), {"TERRA_API_KEY": "k"}, 1, "headrace: TERRA_DEV_ID: not set"),
        (("--user", " "), KEY, 2, "Error: --user is empty"),
        ((), KEY, 2, "Error: Missing option '--user'"),
        (("--user", "m", "--demo", "oura"), TERRA, 2, "Error: --demo works with Junction"),
        (("--user", "m", "--demo", "oura", "--provider", "x"), KEY, 2, "Error: --demo connects immediately"),
        (("--user", "m", "--demo", "oura", "--redirect-url", "x"), KEY, 2, "Error: --demo connects immediately"),
        (("--user", "m", "--demo", "oura"), {"JUNCTION_API_KEY": "pk_us_1"}, 2, "Error: --demo works in Junction's"),
    ],
)
def test_invalid_options_send_no_request(  # noqa: PLR0917
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    environment: dict[str, str],
    code: int,
    expected: str,
) -> None:
    asked = answered(monkeypatch, lambda _: httpx.Response(500))
    assert refused(run(*words, **environment), code).startswith(expected)
    assert asked == []


def test_aggregator_selects_one_of_two_keys(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Any = answered(monkeypatch, lambda _: httpx.Response(200, json={"url": URL}))
    assert run("--user", "m", "--aggregator", "terra", **KEY | TERRA).exit_code == 0
    assert len(asked) == 1
