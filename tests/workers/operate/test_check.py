"""The findings of `headrace check`."""

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import redis

from app.catalogue import catalogue
from app.config.settings import Settings, load
from app.errors import RetryAlone
from workers.fetch.rate_limits import Throttle, pauses
from workers.local.ports import free_port
from workers.operate.check import explain, findings
from workers.simulator.server import Simulator
from workers.store import partitions

LOOKS = [
    "webhook secrets",
    "encryption",
    "stored data",
    "Junction's API",
    "Terra's API",
    "broker",
    "rate limits",
    "database",
    "Flower",
]
PASSWORD = "a-password-that-is-secret"
NO_REDIS = f"redis://:{PASSWORD}@127.0.0.1:1/0"


def faults(settings: Settings) -> dict[str, str]:
    found = list(findings(settings))
    assert [one.what for one in found] == LOOKS
    return {one.what: one.text for one in found if not one.fine}


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment whose broker holds no paused account."""
    del broker_url  # emptied
    return settings


@pytest.fixture
def unmigrated(settings: Settings) -> Iterator[Settings]:
    """The settings with an empty database."""
    where = urlsplit(settings.need_database().replace("+psycopg", ""))
    with psycopg.connect(urlunsplit(where._replace(path="/postgres")), autocommit=True) as connection:
        connection.execute("CREATE DATABASE unmigrated TEMPLATE template0")
        url = urlunsplit(where._replace(scheme="postgresql+psycopg", path="/unmigrated"))
        yield replace(settings, database_url=url)
        connection.execute("DROP DATABASE unmigrated WITH (FORCE)")


def test_a_large_default_partition_is_no_fault(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if `check` says that it cannot connect because the search for tables to split took too long."""

    def slow(_: object) -> list[str]:
        raise RetryAlone("PostgreSQL: QueryCanceled (57014)", "statement_timeout")

    monkeypatch.setattr(partitions, "misplaced", slow)
    assert faults(settings) == {}


@contextlib.contextmanager
def everysec(url: str) -> Iterator[None]:
    """A broker that can lose its last second, for the duration of the block."""
    with redis.Redis.from_url(url) as client:
        client.config_set("appendfsync", "everysec")
        try:
            yield
        finally:
            client.config_set("appendfsync", "always")


def test_a_complete_deployment_has_no_fault(settings: Settings) -> None:
    assert faults(settings) == {}
    texts = {one.what: one.text for one in findings(settings)}
    assert texts["webhook secrets"] == "1 for Junction, 1 for Terra"
    assert texts["encryption"] == "AES-256-GCM, 1 key(s)"
    assert texts["stored data"] == f"{len(catalogue())} resources, all providers"
    assert texts["broker"] == "durable"
    assert re.fullmatch(r"PostgreSQL \d+, migrated", texts["database"])
    assert texts["Flower"] == "password set"


@pytest.mark.parametrize(
    ("change", "what", "message"),
    [
        ({"junction_webhook_secrets": (), "terra_signing_secrets": ()}, "webhook secrets", "JUNCTION_WEBHOOK_SECRET: "),
        ({"resources": ("workouts", "workuots")}, "stored data", "HEADRACE_RESOURCES: no such resource: workuots"),
        ({"junction_api_key": "no_prefix_of_ours"}, "Junction's API", "JUNCTION_BASE_URL: not set"),
        ({"broker_url": None}, "broker", "BROKER_URL: not set"),
        ({"broker_url": NO_REDIS}, "broker", "BROKER_URL: the broker cannot be reached"),
        ({"broker_url": "amqp://127.0.0.1:1"}, "rate limits", "REDIS_URL: not set"),
        ({"database_url": None}, "database", "DATABASE_URL: not set"),
        (
            {"database_url": f"postgresql+psycopg://u:{PASSWORD}@127.0.0.1:1/d"},
            "database",
            "DATABASE_URL: cannot connect to the database (",
        ),
        ({"flower_auth": None}, "Flower", "HEADRACE_FLOWER_AUTH: not set"),
        ({"flower_auth": "somebody:short"}, "Flower", "HEADRACE_FLOWER_AUTH: not set"),
        ({"flower_auth": ":password-alone"}, "Flower", "HEADRACE_FLOWER_AUTH: not set"),
    ],
)
def test_each_fault_is_found_and_names_its_setting(
    settings: Settings, change: dict[str, Any], what: str, message: str
) -> None:
    """A fault must not hide later ones, and its text must not contain a secret."""
    if change.get("broker_url") == NO_REDIS:
        change = change | {"redis_url": settings.broker_url}
    found = faults(replace(settings, **change))
    assert found[what].startswith(message)
    assert not any(PASSWORD in text for text in found.values())


@pytest.mark.parametrize(
    ("change", "faulty"),
    [({"redis_url": NO_REDIS}, ["rate limits"]), ({"broker_url": NO_REDIS}, ["broker", "rate limits"])],
)
def test_an_unreachable_redis_is_a_fault(settings: Settings, change: dict[str, str], faulty: list[str]) -> None:
    found = faults(replace(settings, **change))
    assert list(found) == faulty
    assert "_URL: Redis cannot be reached" in found["rate limits"]
    assert PASSWORD not in found["rate limits"]


def test_a_missing_schema_is_found(unmigrated: Settings) -> None:
    assert faults(unmigrated) == {"database": "DATABASE_URL: the schema is missing; run `headrace migrate`"}


def test_an_unsafe_broker_is_found(settings: Settings) -> None:
    with everysec(settings.need_broker()):
        assert list(faults(settings)) == ["broker"]
        vouched = replace(settings, broker_durability_asserted=True)
        assert faults(vouched) == {}
        assert "asserted by the operator" in {one.what: one.text for one in findings(vouched)}["broker"]


@pytest.mark.parametrize(
    ("change", "what", "message"),
    [
        ({"encryption_keys": ()}, "encryption", "compressed, not encrypted; set HEADRACE_ENCRYPTION_KEY"),
        ({"resources": ("sleep",), "providers": ("oura", "garmin")}, "stored data", "1 resources, oura, garmin"),
        ({"junction_api_key": None}, "Junction's API", "JUNCTION_API_KEY is not set: workers store events"),
        ({"terra_api_key": None}, "Terra's API", "TERRA_API_KEY is not set: workers store events"),
        ({"junction_webhook_secrets": ()}, "webhook secrets", "1 for Terra"),
    ],
)
def test_successful_checks_describe_the_settings(
    settings: Settings, change: dict[str, Any], what: str, message: str
) -> None:
    found = {one.what: one for one in findings(replace(settings, **change))}[what]
    assert found.fine
    assert message in found.text


def test_without_settings_every_missing_one_is_found() -> None:
    found = {one.what for one in findings(Settings()) if not one.fine}
    assert found == {"webhook secrets", "broker", "rate limits", "database", "Flower"}


def test_explain_lists_every_setting() -> None:
    rows = explain()
    names = [row["setting"] for row in rows]
    assert sorted(names) == sorted(one.metadata["name"] for one in Settings.__dataclass_fields__.values())
    assert len(names) == len(set(names))
    assert {"DATABASE_URL", "BROKER_URL", "REDIS_URL", "JUNCTION_WEBHOOK_SECRET", "TERRA_DEV_ID"} < set(names)
    assert all(row["meaning"] for row in rows)
    defaults = {row["setting"]: row["default"] for row in rows}
    assert (defaults["DATABASE_URL"], defaults["HEADRACE_RESOURCES"]) == ("", "")
    assert (defaults["HEADRACE_PORT"], defaults["HEADRACE_BROKER_DURABILITY_ASSERTED"]) == ("8000", "false")


@contextlib.contextmanager
def api(status: int, seen: list[str]) -> Iterator[str]:
    """The base URL of an API that answers with this status, and records requests and keys."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys = [self.headers.get(name, "") for name in ("X-Vital-API-Key", "dev-id", "x-api-key")]
            seen.append(" ".join([self.path, *filter(None, keys)]))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def with_apis(settings: Settings, url: str) -> Settings:
    keys = {"junction_api_key": "sk_us_key", "terra_dev_id": "dev", "terra_api_key": "terra-key"}
    return replace(settings, junction_base_url=url, terra_base_url=url, **keys)


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        (200, None),
        (429, None),
        (401, ("_API_KEY: refused by ", "(status 401)")),
        (403, ("_API_KEY: refused by ", "(status 403)")),
        (500, ("_BASE_URL: ", "is unreachable (status 500)")),
        (404, ("_BASE_URL: ", "answers status 404")),
    ],
)
def test_both_apis_are_asked(settings: Settings, status: int, parts: tuple[str, str] | None) -> None:
    """Breaks if a refused key or an API that is down is found only when history is missing."""
    seen: list[str] = []
    with api(status, seen) as url:
        found = faults(with_apis(settings, url))
        texts = {one.what: one.text for one in findings(with_apis(settings, url))}
    assert seen[:2] == ["/v2/user?limit=1 sk_us_key", "/subscriptions?page=0&per_page=1 dev terra-key"]
    for name in ("Junction", "Terra"):
        text = texts[f"{name}'s API"]
        assert (f"{name}'s API" in found) == (parts is not None)
        assert all(part in text for part in parts or ("the key is accepted", url))
        assert "sk_us_key" not in text
        assert "terra-key" not in text
        assert parts is None or text.startswith(name.upper())


def test_the_simulated_apis_accept_the_requests(settings: Settings) -> None:
    """Breaks if the check asks for a path that the APIs do not have, or a wrong key is not seen."""
    with Simulator(users=1) as simulator:
        given = load(simulator.environment)
        names = ("junction_api_key", "junction_base_url", "terra_dev_id", "terra_api_key", "terra_base_url")
        here = replace(settings, **{name: getattr(given, name) for name in names})
        assert faults(here) == {}
        found = faults(replace(here, junction_api_key="sk_us_wrong", terra_dev_id="wrong"))
        assert {name: text.partition(" refused")[0] for name, text in found.items()} == {
            "Junction's API": "JUNCTION_API_KEY:",
            "Terra's API": "TERRA_API_KEY:",
        }


def test_an_api_that_cannot_be_reached_is_not_a_refused_key(settings: Settings) -> None:
    """Breaks if a missing network or a wrong host name looks like a wrong key."""
    for url in (f"http://127.0.0.1:{free_port()}", "http://no-such-host.invalid"):
        found = faults(with_apis(settings, url))
        for name in ("Junction", "Terra"):
            assert found[f"{name}'s API"].startswith(f"{name.upper()}_BASE_URL: {url} is unreachable (no answer)")


def test_the_check_sends_a_request_although_the_account_is_paused(settings: Settings, broker_url: str) -> None:
    """Breaks if the check repeats what workers found five minutes ago instead of asking."""
    here, seen = replace(settings, broker_url=broker_url), list[str]()
    with api(200, seen) as url:
        here = with_apis(here, url)
        Throttle(here).pause("junction", 300, "status 401: the API key is refused", kind="key_refused")
        assert faults(here) == {}
        old = replace(here, junction_api_key="sk_us_old")
        Throttle(old).pause("junction", 300, "status 401: the API key is refused", kind="key_refused")
        (pause,) = [one for one in pauses(here) if not one.is_own]
        text = faults(here)["Junction's API"]
    assert f"for key {pause.key}, which is not the one in this shell; set a valid key and restart" in text
    assert len(seen) == 4


def test_an_api_key_that_workers_found_invalid_is_a_fault(settings: Settings, broker_url: str) -> None:
    """The shell that runs the check may have another key, or none."""
    here = replace(settings, broker_url=broker_url)
    Throttle(here).pause("junction", 300, "status 429: refused")
    assert faults(here) == {}
    Throttle(here).pause("junction", 400, "status 401: the API key is refused", kind="key_refused")
    assert "the API key is refused; set a valid key" in faults(here)["Junction's API"]


def test_the_token_of_terras_admin_api_is_checked(settings: Settings) -> None:
    """Breaks if a refused token is found only by the next reconciliation, or the token is printed."""
    with Simulator(users=1) as simulator:
        given = load(simulator.environment)
        names = ("terra_dev_id", "terra_api_key", "terra_base_url", "terra_admin_token", "terra_admin_base_url")
        here = replace(settings, **{name: getattr(given, name) for name in names})
        texts = [
            next(one.text for one in findings(given) if one.what == "Terra's Admin API")
            for given in (
                here,
                replace(here, terra_admin_token="terra_at_canary"),
                replace(here, terra_admin_base_url=simulator.url),
            )
        ]
        assert texts[0] == f"the token is accepted; it expires on {simulator.terra_admin.expires_at:%Y-%m-%d}"
    assert texts[1].startswith("TERRA_ADMIN_TOKEN: refused by http://")
    assert "canary" not in texts[1]
    assert texts[2].startswith("TERRA_ADMIN_BASE_URL: ")
    assert "Terra's Admin API" not in {one.what for one in findings(settings)}
