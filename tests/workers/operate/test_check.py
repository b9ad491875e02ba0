"""The findings of `headrace check`."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import redis

from app.catalogue import catalogue
from app.config.settings import Settings
from workers.fetch.rate_limits import Throttle
from workers.local.ports import free_port
from workers.operate.check import explain, findings

LOOKS = [
    "webhook secrets",
    "encryption",
    "stored data",
    "Junction's API",
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


def test_an_unreachable_database_is_named_by_its_setting(settings: Settings) -> None:
    url = f"postgresql+psycopg://u:{PASSWORD}@127.0.0.1:{free_port()}/d"
    assert "DATABASE_URL" in faults(replace(settings, database_url=url))["database"]


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
        ({"junction_api_key": "pk_eu_x"}, "Junction's API", "https://api.eu.junction.com"),
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


def test_an_api_key_that_workers_found_invalid_is_a_fault(settings: Settings, broker_url: str) -> None:
    """The shell that runs the check may have another key, or none."""
    here = replace(settings, broker_url=broker_url)
    Throttle(here).pause("junction", 300, "status 429: refused")
    assert faults(here) == {}
    Throttle(here).pause("junction", 400, "status 401: the API key is refused", kind="key_refused")
    assert "the API key is refused; set a valid key" in faults(here)["Junction's API"]
