"""Runs commands in this process, in an empty folder and against the test's own database."""

import base64
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import Engine, create_engine

from app.config.settings import Settings
from tests.support import ENCRYPTION_KEY
from tests.support.cli import Headrace, invoke
from workers.simulator.server import Simulator
from workers.store import engine as opening


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in [*(setting.metadata["name"] for setting in fields(Settings)), "COLUMNS"]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    with Simulator(2, 3) as simulator:
        yield simulator


@pytest.fixture
def headrace(settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Headrace]:
    """Runs a command against an empty database, and disposes of its engines after the test."""
    del engine  # which empties the database
    key = base64.b64encode(ENCRYPTION_KEY).decode()
    environment = {"DATABASE_URL": settings.need_database(), "HEADRACE_ENCRYPTION_KEY": key}
    environment["BROKER_URL"] = settings.need_broker()
    made: list[Engine] = []

    def noted(*given: Any, **named: Any) -> Engine:
        made.append(create_engine(*given, **named))
        return made[-1]

    monkeypatch.setattr(opening, "create_engine", noted)

    def run(*words: str, answer: str | None = None, **more: str) -> Result:
        return invoke(*words, answer=answer, **environment | more)

    yield run
    for one in made:
        one.dispose()
