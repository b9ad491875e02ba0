"""Warnings about PostgreSQL settings with which an applied delivery could be lost."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psycopg
import pytest
from sqlalchemy import make_url

from app.config.settings import Settings, load
from workers.local.ports import free_port
from workers.operate.check import findings, replication_warnings


@pytest.fixture
def several(settings: Settings) -> Settings:
    """The settings with two hosts in DATABASE_URL, which are the same server."""
    url = make_url(settings.need_database())
    host = f"127.0.0.1:{url.port}"
    value = f"postgresql://{url.username}:{url.password}@{host},{host}/{url.database}"
    return replace(settings, database_url=load({"DATABASE_URL": value}).database_url)


@contextmanager
def configured(server: psycopg.Connection, *statements: str) -> Iterator[None]:
    """Changes settings of the database or the server, until the block ends."""
    for one in statements:
        server.execute(one)
    server.execute("SELECT pg_reload_conf()")
    time.sleep(0.2)  # new sessions have the new settings
    try:
        yield
    finally:
        server.execute("ALTER DATABASE shared RESET synchronous_commit")
        server.execute("ALTER SYSTEM RESET synchronous_standby_names")
        server.execute("SELECT pg_reload_conf()")


def test_one_server_is_durable_by_itself(settings: Settings, emptier: psycopg.Connection) -> None:
    """Breaks if a single server is asked for standbys, or one that loses commits in a crash is not reported."""
    assert replication_warnings(settings) == []
    with configured(emptier, "ALTER DATABASE shared SET synchronous_commit = local"):
        assert replication_warnings(settings) == []
    with configured(emptier, "ALTER DATABASE shared SET synchronous_commit = off"):
        (found,) = replication_warnings(settings)
        assert found.startswith("synchronous_commit is off")


def test_several_servers_must_replicate_synchronously(several: Settings, emptier: psycopg.Connection) -> None:
    """Breaks if nobody learns that a failover can lose deliveries that were answered 202."""
    shown = [one for one in findings(several) if one.what == "PostgreSQL replication"]
    assert [(one.fine, one.is_warning) for one in shown] == [(True, True)]
    assert shown[0].text.startswith("synchronous_standby_names is empty")
    emptier.execute("SET synchronous_commit = local")  # its own commits must not wait for a standby
    standby = "ALTER SYSTEM SET synchronous_standby_names = 'ghost'"
    try:
        with configured(emptier, standby):
            assert replication_warnings(several) == []
        with configured(emptier, standby, "ALTER DATABASE shared SET synchronous_commit = local"):
            (found,) = replication_warnings(several)
            assert found.startswith("synchronous_commit is local")
    finally:
        emptier.execute("RESET synchronous_commit")


def test_an_unreachable_server_has_no_second_message(settings: Settings) -> None:
    """Breaks if `check` fails in its warnings, or reports one outage twice."""
    assert (
        replication_warnings(replace(settings, database_url=f"postgresql+psycopg://u:p@127.0.0.1:{free_port()}/d"))
        == []
    )
