"""Migrations: repeated, concurrent, by an ordinary role, and failed."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import Misconfigured, TryLater, Unprocessable
from tests.support import apply, delivery, heartrate, rows, until, workout
from tests.support.database import run
from tests.support.servers import Servers
from workers.operate import check
from workers.store.engine import make_engine, make_writer
from workers.store.migrate import migrate

COUNT_VIEWS = "SELECT count(*) AS n FROM pg_views WHERE schemaname = 'health'"


def test_migrating_twice_changes_nothing(empty: Engine) -> None:
    """Breaks if a deployment that migrates at every start fails at the second start."""
    version = migrate(empty)
    before = rows(empty, "SELECT oid, relname FROM pg_class ORDER BY oid")
    assert migrate(empty) == version == "0014"
    assert rows(empty, "SELECT oid, relname FROM pg_class ORDER BY oid") == before
    parents = "SELECT DISTINCT parent FROM headrace.partitions ORDER BY 1"
    assert [row["parent"] for row in rows(empty, parents)] == ["archive", "changes", "deliveries", "samples"]
    assert rows(empty, COUNT_VIEWS) == [{"n": len(catalogue()) + 12}]


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_that_is_not_in_utf8_is_refused(servers: Servers, settings: Settings, encoding: str) -> None:
    """Breaks if `migrate` or `check` accepts a database that cannot store every text, or ends in a traceback."""
    name = f"in_{encoding.lower()}"
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0"
        )
        url = urlunsplit(urlsplit(settings.need_database())._replace(path=f"/{name}"))
        there = replace(settings, database_url=url)
        engine = make_engine(there)
        try:
            with pytest.raises(Misconfigured, match=f"encoding of the database is {encoding}, .*`createdb -E UTF8"):
                migrate(engine)
        finally:
            engine.dispose()
        (found,) = (one for one in check.findings(there) if one.what == "database")
        assert not found.fine
        assert "createdb -E UTF8 -T template0" in found.text
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_newer_schema_is_not_changed(empty: Engine) -> None:
    """Breaks if a downgrade of the program ends in a traceback, or changes the newer schema."""
    migrate(empty)
    with empty.begin() as connection:
        connection.execute(text("UPDATE headrace.schema_version SET version_num = '9999'"))
    with pytest.raises(Misconfigured, match="newer version of Headrace"):
        migrate(empty)
    assert rows(empty, "SELECT version_num FROM headrace.schema_version") == [{"version_num": "9999"}]


def test_concurrent_migrations_succeed(empty_settings: Settings) -> None:
    """Breaks if the pods of a fresh installation race: three of four would crash."""
    together = threading.Barrier(4)

    def one(_number: int) -> str:
        engine = make_engine(empty_settings)
        try:
            together.wait(20)
            return migrate(engine)
        finally:
            engine.dispose()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == ["0014"] * 4
    engine = make_engine(empty_settings)
    assert rows(engine, COUNT_VIEWS) == [{"n": len(catalogue()) + 12}]
    engine.dispose()


def test_an_ordinary_role_of_any_name_can_migrate_and_apply(empty: Engine, empty_settings: Settings) -> None:
    """Breaks if a superuser is needed, or a role whose name is that of the schema."""
    name = rows(empty, "SELECT current_database() AS name")[0]["name"]
    run(empty, "CREATE ROLE somebody LOGIN PASSWORD 'sesame'", f"ALTER DATABASE {name} OWNER TO somebody")
    where = urlsplit(empty_settings.need_database())
    url = urlunsplit(where._replace(netloc=f"somebody:sesame@{where.hostname}:{where.port}"))
    theirs = replace(empty_settings, database_url=url)
    engine = make_engine(theirs)
    try:
        migrate(engine)
        writer = make_writer(theirs)
        assert apply(writer, theirs, delivery(workout("u1")), delivery(heartrate("u1", {0: 60}))) == {"applied": 2}
        writer.dispose()
        assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 60.0}]
    finally:
        engine.dispose()
        until(lambda: _is_dropped(empty, "somebody"))


def _is_dropped(engine: Engine, role: str) -> bool:
    """Drops a role with tables. PostgreSQL refuses it (XX000) while autovacuum updates the catalog rows of one."""
    try:
        run(engine, f"REASSIGN OWNED BY {role} TO headrace", f"DROP ROLE {role}")
    except Unprocessable:
        return False
    return True


def test_a_failed_migration_is_rolled_back(empty: Engine) -> None:
    """Breaks if a failed migration leaves half a schema, so that the next one fails."""
    with empty.begin() as connection:
        connection.execute(text("CREATE SCHEMA health; CREATE TABLE health.users (mine int)"))
    with pytest.raises(TryLater, match="DuplicateTable"):
        migrate(empty)
    assert rows(empty, "SELECT 1 FROM pg_namespace WHERE nspname = 'headrace'") == []
