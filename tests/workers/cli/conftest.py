"""What tests of commands share: a command run in this process, against the test's own database."""

import base64
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, create_engine

from app.config.settings import Settings
from tests.support import ENCRYPTION_KEY
from tests.support.cli import Headrace
from workers.cli.main import main
from workers.store import engine as opening


@pytest.fixture
def headrace(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Headrace]:
    """Runs a command; whatever engines it makes are ended with the test."""
    monkeypatch.chdir(tmp_path)
    for name in [setting.metadata["name"] for setting in fields(Settings)]:
        monkeypatch.delenv(name, raising=False)
    key = base64.b64encode(ENCRYPTION_KEY).decode()
    environment = {"DATABASE_URL": settings.need_database(), "HEADRACE_ENCRYPTION_KEY": key}
    environment["BROKER_URL"] = settings.need_broker()
    made: list[Engine] = []

    def noted(*given: Any, **named: Any) -> Engine:
        made.append(create_engine(*given, **named))
        return made[-1]

    monkeypatch.setattr(opening, "create_engine", noted)

    def invoke(*words: str, answer: str | None = None, **more: str) -> Result:
        done = CliRunner().invoke(main, words, input=answer, env=environment | more)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    yield invoke
    for one in made:
        one.dispose()
