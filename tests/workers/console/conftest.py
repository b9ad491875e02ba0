"""The console on the tests' PostgreSQL and Valkey, with one account of each role."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from flask import Flask
from sqlalchemy import Engine

from app.accounts import ROLES, Account, hash_password
from app.config.settings import Settings
from tests.support import apply, delivery, heartrate, workout
from tests.support.backfills import announce, notice
from tests.support.console import CANARY, PASSWORD, Browser, Clock
from workers.console.app import create_app
from workers.console.context import make_console

HASH = hash_password(PASSWORD)  # 0.1 s each


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def app(settings: Settings, engine: Engine, clock: Clock) -> Iterator[Flask]:
    del engine  # which empties the database
    accounts = tuple(Account(f"{role}-1", HASH, role) for role in ROLES)
    given = replace(settings, console_users=accounts, console_url="https://console.example.com")
    state = make_console(given, clock=clock)
    yield create_app(state)
    state.close()


@pytest.fixture
def browser(app: Flask) -> Browser:
    """A browser without a login."""
    return Browser(app)


@pytest.fixture
def viewer(app: Flask) -> Browser:
    return Browser(app, "viewer-1")


@pytest.fixture
def operator(app: Flask) -> Browser:
    return Browser(app, "operator-1")


@pytest.fixture
def privacy(app: Flask) -> Browser:
    return Browser(app, "privacy-1")


@pytest.fixture
def person(engine: Engine, settings: Settings) -> str:
    """A user with a workout and heart rates whose values are canaries, and an open backfill."""
    apply(engine, settings, delivery(workout("u1", "w1", average_hr=CANARY, distance=CANARY + 0.5), name="msg_workout"))
    apply(engine, settings, delivery(heartrate("u1", dict.fromkeys(range(5), CANARY)), name="msg_heartrate"))
    announce(engine, settings, notice("u1"))
    return "u1"
