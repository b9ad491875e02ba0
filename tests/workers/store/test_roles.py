"""Roles: the writer has the rights that workers need, the reader sees only the views."""

import os
import pwd
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib import import_module
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine, make_url, text

from app.config.settings import Settings
from app.errors import Misconfigured
from tests.support import apply, delivery, event, heartrate, rows, workout
from tests.support.database import run
from tests.support.servers import Servers
from workers.operate.erase import Eraser
from workers.store import audit, partitions, retention
from workers.store.engine import make_engine, make_writer
from workers.store.migrate import create_writer, migrate
from workers.store.partitions import maintain_partitions
from workers.store.roles import WRITER_LOGIN, script
from workers.store.sql import quoted

OWNER, WRITER, READER = "roles owner", 'the "writer"', "reader's"
NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def urls(servers: Servers) -> Iterator[dict[str, str]]:
    """A migrated database with both roles, whose owner is not a superuser."""
    where = urlsplit(servers.database_url)
    made: dict[str, str] = {}
    with psycopg.connect(urlunsplit(where._replace(path="/postgres")), autocommit=True) as connection:
        for role in (OWNER, WRITER, READER):
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'tests'").format(sql.Identifier(role)))
        connection.execute(sql.SQL("ALTER ROLE {} CREATEROLE").format(sql.Identifier(OWNER)))
        connection.execute(sql.SQL("CREATE DATABASE roles TEMPLATE template0 OWNER {}").format(sql.Identifier(OWNER)))
        connection.execute("REVOKE ALL ON DATABASE roles FROM PUBLIC")
        connection.execute(sql.SQL("GRANT CONNECT ON DATABASE roles TO {}").format(sql.Identifier(READER)))
        for role, user in ((OWNER, "roles%20owner"), (WRITER, "the%20%22writer%22"), (READER, "reader%27s")):
            made[role] = f"postgresql+psycopg://{user}:tests@{where.hostname}:{where.port}/roles"
        engine = make_engine(Settings(database_url=made[OWNER]))
        migrate(engine)
        maintain_partitions(engine, 30)
        engine.dispose()
        for _ in range(2):  # idempotent
            with psycopg.connect(made[OWNER].replace("+psycopg", "")) as owner:
                owner.execute(script(WRITER, READER))
        yield made
        connection.execute("DROP DATABASE roles WITH (FORCE)")
        connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(WRITER_LOGIN)))


@pytest.fixture
def writer(urls: dict[str, str]) -> Iterator[Engine]:
    engine = make_writer(Settings(database_url=urls[WRITER]))
    yield engine
    engine.dispose()


def of_writer(settings: Settings, urls: dict[str, str]) -> Settings:
    """The settings of a worker that uses the writer role."""
    return replace(settings, database_url=urls[WRITER], retention=(("*", 3650),), ledger_days=40)


def test_the_writer_can_do_what_workers_do(writer: Engine, settings: Settings, urls: dict[str, str]) -> None:
    """Breaks if applying, erasing, archiving or retention needs a right that the writer lacks."""
    here = of_writer(settings, urls)
    connected = event("provider.connection.created", "u1", {"provider": {"slug": "oura"}})
    history = event("historical.data.sleep.created", "u1", {"user_id": "u1", "provider": "oura"})
    sent = [delivery(one) for one in (workout("u1"), heartrate("u1", {0: 60}), connected, history, b"{}")]
    assert apply(writer, here, *sent) == {"applied": 4, "dead": 1}
    assert len(rows(writer, "SELECT 1 FROM health.workouts")) == 1
    assert len(rows(writer, "SELECT 1 FROM headrace.archive")) == 4
    assert len(maintain_partitions(writer, 0, datetime.now(UTC) + 3 * DAY)) == 3
    assert rows(writer, "SELECT 1 FROM headrace.archive") == []
    assert list(retention.remove(writer, retention.limits(here, NOW + 3650 * DAY))) != []
    apply(writer, here, delivery(workout("u2")))
    Eraser(writer, here).erase("u2", lambda _: None)
    assert rows(writer, "SELECT 1 FROM health.workouts") == []


def test_the_writer_deletes_all_old_rows(
    writer: Engine, settings: Settings, urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if the worker, which does not own the tables, cannot drop a partition, or keeps other old rows."""
    monkeypatch.setattr(partitions, "BATCH", 2)
    apply(writer, of_writer(settings, urls), *(delivery(workout("u3", f"w{n}")) for n in range(5)))
    maintain_partitions(writer, 1)
    assert len(rows(writer, "SELECT 1 FROM headrace.archive")) == 5
    maintain_partitions(writer, 0, datetime.now(UTC) + DAY)  # not NOW: midnight may have passed
    assert rows(writer, "SELECT 1 FROM headrace.archive") == []


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM headrace.audit",
        "UPDATE headrace.audit SET operator = 'nobody'",
        "INSERT INTO headrace.audit (operator, os_user, action, subject, detail) VALUES ('root', 'x', 'x', 'x', '{}')",
        "INSERT INTO headrace.audit (at, os_user, action, subject, detail) VALUES ('2020-01-01', 'x', 'x', 'x', '{}')",
        "INSERT INTO headrace.audit (id, action, subject, detail) OVERRIDING SYSTEM VALUE VALUES (1, 'x', 'x', '{}')",
        "COPY headrace.audit FROM '/dev/null'",
        "SET SESSION AUTHORIZATION headrace",
        "SELECT pg_read_file('postgresql.conf')",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "CREATE ROLE another SUPERUSER",
        "DROP TABLE headrace.workouts",
        "ALTER TABLE headrace.users ADD COLUMN x int",
        "CREATE TABLE headrace.x (y int)",
        "UPDATE headrace.schema_version SET version_num = '0'",
        "DROP VIEW health.workouts",
    ],
)
def test_the_writer_can_do_no_more(writer: Engine, query: str) -> None:
    """Breaks if a compromised worker can cover its tracks in the audit log, or change the schema."""
    with pytest.raises(Exception, match="InsufficientPrivilege"), writer.begin() as connection:
        connection.execute(text(query))


def test_the_audit_log_records_the_login(writer: Engine) -> None:
    """Breaks if the writer can act in the name of another operator, or an operator cannot act at all."""
    claim = "INSERT INTO headrace.audit (os_user, action, subject, detail) VALUES ('root', '', 'the login', '{}')"
    with writer.begin() as connection:
        audit.note(connection, "test", "the login", {})
        connection.execute(text(claim))
    found = rows(writer, "SELECT operator, os_user FROM headrace.audit WHERE subject = 'the login' ORDER BY id")
    assert [one["operator"] for one in found] == [WRITER, WRITER]
    assert found[0]["os_user"] == pwd.getpwuid(os.getuid()).pw_name


def test_a_migration_takes_the_right_to_name_the_operator(urls: dict[str, str], writer: Engine) -> None:
    """Breaks if a writer of an earlier version can still insert rows in other names until `headrace roles` runs."""
    downgrade = [
        "ALTER TABLE headrace.audit DROP COLUMN operator",
        "ALTER TABLE headrace.audit RENAME COLUMN os_user TO operator",
        "GRANT INSERT ON headrace.audit TO " + quoted(WRITER),
        "INSERT INTO headrace.audit (operator, action, subject, detail) VALUES ('earlier', 'test', 'before', '{}')",
    ]
    migration = import_module("workers.migrations.versions.0006_audit_logins")
    owner = make_engine(Settings(database_url=urls[OWNER]))
    try:
        run(owner, *downgrade, migration.CHANGES)
    finally:
        owner.dispose()
    found = rows(writer, "SELECT operator, os_user FROM headrace.audit WHERE subject = 'before'")
    assert found == [{"operator": None, "os_user": "earlier"}]
    forged = "INSERT INTO headrace.audit (operator, action, subject, detail) VALUES ('root', 'x', 'x', '{}')"
    test_the_writer_can_do_no_more(writer, forged)
    with writer.begin() as connection:
        audit.note(connection, "test", "after", {})
    assert rows(writer, "SELECT operator FROM headrace.audit WHERE subject = 'after'") == [{"operator": WRITER}]


def test_the_reader_sees_the_views(urls: dict[str, str], writer: Engine, settings: Settings) -> None:
    """Breaks if a dashboard needs another role."""
    apply(writer, of_writer(settings, urls), delivery(workout("seen")))
    with psycopg.connect(urls[READER].replace("+psycopg", "")) as reader:
        assert reader.execute("SELECT average_hr FROM health.workouts WHERE user_id = 'seen'").fetchall() == [(120,)]
        views = reader.execute("SELECT table_name FROM information_schema.views WHERE table_schema = 'health'")
        for (name,) in views.fetchall():
            reader.execute(sql.SQL("SELECT * FROM health.{} LIMIT 1").format(sql.Identifier(name)))


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 FROM headrace.workouts",
        "SELECT 1 FROM headrace.archive",
        "SELECT 1 FROM headrace.audit",
        "DELETE FROM health.grants",
        "INSERT INTO health.users (user_id) VALUES ('x')",
        "UPDATE health.grants SET provider = 'x'",
        "CREATE TABLE health.x (y int)",
        "CREATE TEMPORARY TABLE x (y int)",
    ],
)
def test_the_reader_sees_nothing_else_and_writes_nothing(urls: dict[str, str], query: str) -> None:
    """Breaks if an analyst can read sealed bodies or erased names, or change data."""
    with (
        psycopg.connect(urls[READER].replace("+psycopg", "")) as reader,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        reader.execute(query)


def test_the_roles_include_later_tables(urls: dict[str, str]) -> None:
    """Breaks if a new view cannot be read, or a new table not written, after an upgrade."""
    with psycopg.connect(urls[OWNER].replace("+psycopg", ""), autocommit=True) as owner:
        owner.execute("CREATE TABLE headrace.later (y int); CREATE VIEW health.later AS SELECT * FROM headrace.later")
        try:
            for role, query in ((WRITER, "INSERT INTO headrace.later VALUES (1)"), (READER, "TABLE health.later")):
                with psycopg.connect(urls[role].replace("+psycopg", "")) as connection:
                    connection.execute(query)
        finally:
            owner.execute("DROP VIEW health.later; DROP TABLE headrace.later")


def test_the_migration_creates_the_writer(urls: dict[str, str]) -> None:
    """Breaks if the files for deployment have no login for the workers, or theirs could change the audit log."""
    owner = make_engine(Settings(database_url=urls[OWNER]))
    for password in ("first", "it's the second"):  # a new password replaces the old one
        create_writer(owner, password)
        url = make_url(urls[OWNER]).set(username=WRITER_LOGIN, password=password)
        writer = make_writer(Settings(database_url=url.render_as_string(hide_password=False)))
        with writer.begin() as connection:
            audit.note(connection, "test", password, {})
        with pytest.raises(Exception, match="InsufficientPrivilege"), writer.begin() as connection:
            connection.execute(text("DELETE FROM headrace.audit"))
        writer.dispose()
    rights = f"SELECT rolsuper, rolcreaterole, rolcreatedb FROM pg_roles WHERE rolname = '{WRITER_LOGIN}'"
    assert rows(owner, rights) == [{"rolsuper": False, "rolcreaterole": False, "rolcreatedb": False}]
    owner.dispose()


def test_a_login_that_may_not_create_roles_is_told(writer: Engine) -> None:
    """Breaks if the operator sees only an SQLSTATE."""
    with pytest.raises(Misconfigured, match=r"HEADRACE_WRITER_PASSWORD.*CREATEROLE"):
        create_writer(writer, "password")
