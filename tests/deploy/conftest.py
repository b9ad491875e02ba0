"""The environment with dlt and dbt, and a database role for them."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from app.config.settings import Settings
from tests.deploy.support import DEPLOY, ROOT
from tests.support.dbt import created_reader


@pytest.fixture(scope="session")
def examples(full: bool) -> Path:
    """The Python of the environment with dlt and dbt."""
    lock, made_from = DEPLOY / "requirements-examples.lock", ROOT / ".venv" / ".made-from-examples"
    if full:
        subprocess.run([DEPLOY / "setup", "examples"], check=False, timeout=280)
    if not made_from.exists() or made_from.read_bytes() != lock.read_bytes():
        pytest.skip("dlt and dbt are not installed; `./deploy/setup examples` installs them (190 MB)")
    return ROOT / ".venv" / "examples" / "bin" / "python"


@pytest.fixture
def source_url(settings: Settings, emptier: psycopg.Connection) -> Iterator[str]:
    """The database, with the rights of a reader, and with a schema of its own for dbt."""
    yield created_reader(emptier, settings.need_database())
    emptier.execute("DROP OWNED BY examples CASCADE")
    emptier.execute("DROP ROLE examples")
