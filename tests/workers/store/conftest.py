"""One database per test module: a copy of the migrated template takes almost a second."""

import itertools
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import ENCRYPTION_KEY
from tests.support.servers import Servers
from workers.store.engine import make_engine, make_writer

_numbers = itertools.count()


def _at(servers: Servers, database: str, scheme: str = "postgresql") -> str:
    return urlunsplit(urlsplit(servers.database_url)._replace(scheme=scheme, path=f"/{database}"))


def _database(servers: Servers, template: str) -> Iterator[Settings]:
    name = f"shared_{next(_numbers)}"
    with psycopg.connect(_at(servers, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield Settings(
            database_url=_at(servers, name, "postgresql+psycopg"),
            broker_url=servers.broker_url,
            encryption_keys=(ENCRYPTION_KEY,),
        )
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def shared_settings(servers: Servers) -> Iterator[Settings]:
    """Settings of a migrated database that the tests of a module share. Each test uses its own users."""
    yield from _database(servers, "headrace")


@pytest.fixture(scope="module")
def shared(shared_settings: Settings) -> Iterator[Engine]:
    engine = make_writer(shared_settings)
    yield engine
    engine.dispose()


@pytest.fixture
def empty_settings(servers: Servers) -> Iterator[Settings]:
    """Settings of a database that is not migrated."""
    yield from _database(servers, "template0")


@pytest.fixture
def empty(empty_settings: Settings) -> Iterator[Engine]:
    """An engine on a database that is not migrated."""
    engine = make_engine(empty_settings)
    yield engine
    engine.dispose()
