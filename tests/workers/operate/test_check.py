"""What `headrace check` finds, each fault by itself."""

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
    "what is kept",
    "Junction's API",
    "broker",
    "rate limits",
    "database",
    "Flower",
]
PASSWORD = "a-password-that-is-secret"
NO_REDIS = f"redis://:{PASSWORD}@127.0.0.1:1/0"


def faults(settings: Settings) -> dict[str, str]:
    """What is wrong, and the text about it."""
    found = list(findings(settings))
    assert [one.what for one in found] == LOOKS
    return {one.what: one.text for one in found if not one.fine}


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment that nobody has been refused by."""
    del broker_url  # emptied
    return settings


@pytest.fixture
def unmigrated(settings: Settings) -> Iterator[Settings]:
    """The settings with a database in which nothing is."""
    where = urlsplit(settings.need_database().replace("+psycopg", ""))
    with psycopg.connect(urlunsplit(where._replace(path="/postgres")), autocommit=True) as connection:
        connection.execute("CREATE DATABASE unmigrated TEMPLATE template0")
        url = urlunsplit(where._replace(scheme="postgresql+psycopg", path="/unmigrated"))
        yield replace(settings, database_url=url)
        connection.execute("DROP DATABASE unmigrated WITH (FORCE)")


@contextlib.contextmanager
def everysec(url: str) -> Iterator[None]:
    """A broker that loses its last second, for as long as the block lasts."""
    with redis.Redis.from_url(url) as client:
        client.config_set("appendfsync", "everysec")
        try:
            yield
        finally:
            client.config_set("appendfsync", "always")


def test_a_complete_deployment_has_no_fault(settings: Settings) -> None:
    """Breaks if a deployment in which nothing is wrong cannot pass its check."""
    assert faults(settings) == {}
    texts = {one.what: one.text for one in findings(settings)}
    assert texts["webhook secrets"] == "1 for Junction, 1 for Terra"
    assert texts["encryption"] == "AES-256-GCM, 1 key(s)"
    assert texts["what is kept"] == f"{len(catalogue())} resources, all providers"
    assert texts["broker"] == "keeps what it confirms"
    assert re.fullmatch(r"PostgreSQL \d+, migrated", texts["database"])
    assert texts["Flower"] == "has a password"


@pytest.mark.parametrize(
    ("change", "what", "told"),
    [
        ({"junction_webhook_secrets": (), "terra_signing_secrets": ()}, "webhook secrets", "JUNCTION_WEBHOOK_SECRET: "),
        ({"resources": ("workouts", "workuots")}, "what is kept", "HEADRACE_RESOURCES: no such resource: workuots"),
        ({"junction_api_key": "no_prefix_of_ours"}, "Junction's API", "JUNCTION_BASE_URL: not set"),
        ({"broker_url": None}, "broker", "BROKER_URL: not set"),
        ({"broker_url": NO_REDIS}, "broker", "BROKER_URL: the broker cannot be reached"),
        ({"broker_url": "amqp://127.0.0.1:1"}, "rate limits", "REDIS_URL: not set"),
        ({"database_url": None}, "database", "DATABASE_URL: not set"),
        (
            {"database_url": f"postgresql+psycopg://u:{PASSWORD}@127.0.0.1:1/d"},
            "database",
            "DATABASE_URL: the database cannot be used",
        ),
        ({"flower_auth": None}, "Flower", "HEADRACE_FLOWER_AUTH: not set"),
        ({"flower_auth": "somebody:short"}, "Flower", "HEADRACE_FLOWER_AUTH: not set"),
        ({"flower_auth": ":password-alone"}, "Flower", "HEADRACE_FLOWER_AUTH: not set"),
    ],
)
def test_each_fault_is_found_and_names_its_setting(
    settings: Settings, change: dict[str, Any], what: str, told: str
) -> None:
    """Breaks if a fault is overlooked, hides the ones behind it, or its text tells a secret."""
    if change.get("broker_url") == NO_REDIS:
        change = change | {"redis_url": settings.broker_url}
    found = faults(replace(settings, **change))
    assert found[what].startswith(told)
    assert not any(PASSWORD in text for text in found.values())


def test_a_database_that_is_away_is_named_by_its_setting(settings: Settings) -> None:
    """Breaks if the operator is not told which setting to look at."""
    url = f"postgresql+psycopg://u:{PASSWORD}@127.0.0.1:{free_port()}/d"
    assert "DATABASE_URL" in faults(replace(settings, database_url=url))["database"]


@pytest.mark.parametrize(
    ("change", "faulty"),
    [({"redis_url": NO_REDIS}, ["rate limits"]), ({"broker_url": NO_REDIS}, ["broker", "rate limits"])],
)
def test_rate_limits_that_cannot_be_reached_are_a_fault(
    settings: Settings, change: dict[str, str], faulty: list[str]
) -> None:
    """Breaks if a Redis that is away ends the check in a traceback instead of a finding."""
    found = faults(replace(settings, **change))
    assert list(found) == faulty
    assert "_URL: Redis cannot be reached" in found["rate limits"]
    assert PASSWORD not in found["rate limits"]


def test_a_missing_schema_is_found(unmigrated: Settings) -> None:
    """Breaks if a database that nobody has migrated passes."""
    assert faults(unmigrated) == {"database": "DATABASE_URL: the schema is missing; run `headrace migrate`"}


def test_an_unsafe_broker_is_found(settings: Settings) -> None:
    """Breaks if a broker that loses events passes without being vouched for."""
    with everysec(settings.need_broker()):
        assert list(faults(settings)) == ["broker"]
        vouched = replace(settings, broker_durability_asserted=True)
        assert faults(vouched) == {}
        assert "asserted by you" in {one.what: one.text for one in findings(vouched)}["broker"]


@pytest.mark.parametrize(
    ("change", "what", "told"),
    [
        ({"encryption_keys": ()}, "encryption", "compressed, not encrypted; set HEADRACE_ENCRYPTION_KEY"),
        ({"resources": ("sleep",), "providers": ("oura", "garmin")}, "what is kept", "1 resources, oura, garmin"),
        ({"junction_api_key": "pk_eu_x"}, "Junction's API", "https://api.eu.junction.com"),
        ({"junction_webhook_secrets": ()}, "webhook secrets", "1 for Terra"),
    ],
)
def test_what_is_fine_is_told_too(settings: Settings, change: dict[str, Any], what: str, told: str) -> None:
    """Breaks if the operator is not told what his settings come to."""
    found = {one.what: one for one in findings(replace(settings, **change))}[what]
    assert found.fine
    assert told in found.text


def test_nothing_set_is_told_completely() -> None:
    """Breaks if the first thing that is missing hides the others."""
    found = {one.what for one in findings(Settings()) if not one.fine}
    assert found == {"webhook secrets", "broker", "rate limits", "database", "Flower"}


def test_explain_lists_every_setting() -> None:
    """Breaks if a setting that config.py reads is not told, or a secret has a default that is."""
    rows = explain()
    names = [row["setting"] for row in rows]
    assert sorted(names) == sorted(one.metadata["name"] for one in Settings.__dataclass_fields__.values())
    assert len(names) == len(set(names))
    assert {"DATABASE_URL", "BROKER_URL", "REDIS_URL", "JUNCTION_WEBHOOK_SECRET", "TERRA_DEV_ID"} < set(names)
    assert all(row["meaning"] for row in rows)
    defaults = {row["setting"]: row["default"] for row in rows}
    assert (defaults["DATABASE_URL"], defaults["HEADRACE_RESOURCES"]) == ("", "")
    assert (defaults["HEADRACE_PORT"], defaults["HEADRACE_BROKER_DURABILITY_ASSERTED"]) == ("8000", "false")


def test_a_key_that_workers_were_refused_with_is_told(settings: Settings, broker_url: str) -> None:
    """Breaks if all is well but history, and the shell that asks has another key, or none."""
    here = replace(settings, broker_url=broker_url)
    Throttle(here).pause("junction", 300, "status 429: refused")
    assert faults(here) == {}
    Throttle(here).pause("junction", 400, "status 401: the API key is refused", kind="key_refused")
    assert "the API key is refused; set another" in faults(here)["Junction's API"]
