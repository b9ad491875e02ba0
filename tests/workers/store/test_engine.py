"""Engines: sessions, partitions, and the translation of errors."""

import contextlib
import os
import socket
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg.adapt import PyFormat
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import DBAPIError

from app.config.settings import Settings, load
from app.errors import HeadraceError, Misconfigured, RetryAlone, TryLater, Unprocessable
from tests.support import apply, delivery, event, heartrate, rows
from tests.support.cases import Failures
from tests.support.database import run
from workers.local.ports import free_port
from workers.store.engine import (
    CONNECT_TIMEOUT_OF_EACH,
    NETWORK,
    PLANNED_TRANSACTIONS,
    SESSION,
    make_engine,
    make_writer,
    transaction,
)


def refused(engine: Engine, query: str, **parameters: object) -> str:
    """The message of the Unprocessable that a query raises."""
    with pytest.raises(Unprocessable) as caught, transaction(engine) as connection:
        connection.execute(text(query), parameters)
    return str(caught.value)


def retried(engine: Engine, *queries: str) -> str:
    """The message of the TryLater that queries raise."""
    with pytest.raises(TryLater) as caught:
        run(engine, *queries)
    return str(caught.value)


def copy(engine: Engine, row: tuple[object, ...]) -> None:
    """Copies a row into the staging table, as the writer does."""
    with transaction(engine) as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        with driver.cursor() as cursor, cursor.copy("COPY staged_samples (n) FROM STDIN") as copied:
            copied.write_row(row)


def test_rejected_data_is_unprocessable(shared: Engine) -> None:
    """Breaks if invalid data is retried for ever, or the error message quotes it."""
    failures = Failures()
    for query, state in (
        ("SELECT CAST(:value AS int)", "22P02"),
        ("SELECT CAST(:value AS timestamptz)", "22007"),
        ("SELECT CAST(:value || '\"' AS jsonb)", "22P02"),
        ("SELECT 1 / (length(:value) - length(:value))", "22012"),
        ("INSERT INTO headrace.users (user_id) VALUES (:value), (:value)", "23505"),
        ("INSERT INTO headrace.users (user_id, client_user_id) VALUES (NULL, :value)", "23502"),
    ):
        with failures.of(query, state):
            message = refused(shared, query, value="a secret value")
            assert message.startswith("PostgreSQL refuses it: ")
            assert state in message
            assert "secret" not in message
    assert failures == {}


def test_nul_is_unprocessable(shared: Engine) -> None:
    """Breaks if a NUL character, which the driver rejects, is retried for ever."""
    assert "secret" not in refused(shared, "SELECT CAST(:value AS text)", value="a secret\x00value")


@pytest.mark.parametrize("row", [("no number",), (2**40,)])
def test_data_rejected_by_copy_is_unprocessable(shared: Engine, row: tuple[object, ...]) -> None:
    """Breaks if errors of COPY, which SQLAlchemy does not wrap, are not translated."""
    with pytest.raises(Unprocessable) as caught:
        copy(shared, row)
    assert str(row[0]) not in str(caught.value)


def raised(state: str) -> str:
    """A statement that fails with this SQLSTATE."""
    return f"DO $$ BEGIN RAISE EXCEPTION 'a secret value' USING ERRCODE = '{state}'; END $$"


def test_an_sqlstate_decides_what_happens_next(shared: Engine) -> None:
    """Breaks if a full disk makes dead letters, a poisonous delivery holds its neighbours, or bad data is retried."""
    failures = Failures()
    expected = {
        Unprocessable: "22001 22P02 23505 23514 54000 54001 XX000",
        RetryAlone: "57014 55P03 40001 40P01 XX001 XX002 53200 53400 58030 58P01 21000 25P03 P0001 UX123",
        TryLater: "08006 08P01 0A000 25006 28P01 3D000 42P01 42501 53100 53300 57P01 57P02 57P03 58000 F0000",
    }
    for error, states in expected.items():
        for state in states.split():
            with failures.of(error, state):
                with pytest.raises(HeadraceError) as caught:
                    run(shared, raised(state))
                assert type(caught.value) is error
                assert state in str(caught.value)
                assert "secret" not in str(caught.value)
    assert failures == {}


def test_an_unusable_server_is_not_the_fault_of_a_delivery(shared: Engine) -> None:
    """Breaks if a delivery is lost because the server restarts or is not migrated yet."""
    for query, message in (
        ("SELECT pg_terminate_backend(pg_backend_pid())", "PostgreSQL: AdminShutdown (57P01)"),
        ("SELECT 1 FROM headrace.no_such_table", "PostgreSQL: UndefinedTable (42P01)"),
    ):
        assert retried(shared, query) == message
        assert rows(shared, "SELECT 1 AS alive") == [{"alive": 1}]


def test_a_timeout_names_its_limit(shared: Engine, shared_settings: Settings) -> None:
    """Breaks if an operator cannot see which limit a statement or a lock has exceeded."""
    engine = make_engine(shared_settings, session={"statement_timeout": "60ms", "lock_timeout": "50ms"})
    with pytest.raises(RetryAlone, match=r"^PostgreSQL: QueryCanceled \(57014\) after 60ms$") as slow:
        run(engine, "SELECT pg_sleep(20)")
    with shared.begin() as holder:
        holder.execute(text("LOCK TABLE headrace.users"))
        with pytest.raises(RetryAlone, match=r"\(55P03\)$") as locked:
            run(engine, "SELECT 1 FROM headrace.users")
    assert (slow.value.cause, locked.value.cause) == ("statement_timeout", "lock_timeout")
    engine.dispose()


def copy_slowly(engine: Engine) -> None:
    """A COPY that takes 20 s."""
    with transaction(engine) as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        with driver.cursor() as cursor, cursor.copy("COPY (SELECT pg_sleep(20)) TO STDOUT") as copied:
            copied.read()


def test_an_error_of_copy_has_the_same_meaning(shared: Engine, shared_settings: Settings) -> None:
    """Breaks if an error of COPY, which SQLAlchemy does not wrap, counts as an outage."""
    engine = make_writer(shared_settings, session={"statement_timeout": "60ms"})
    with pytest.raises(RetryAlone) as caught:
        copy_slowly(engine)
    assert caught.value.cause == "statement_timeout"
    engine.dispose()


# The network


def on(settings: Settings, *ports: int, query: str = "") -> Settings:
    """The settings with these ports of this machine in front of the server's own, as several hosts."""
    url = make_url(settings.need_database())
    hosts = ",".join(f"127.0.0.1:{port}" for port in (*ports, url.port))
    return load({"DATABASE_URL": f"postgresql://{url.username}:{url.password}@{hosts}/{url.database}{query}"})


def options_of(engine: Engine) -> dict[str, str]:
    """The parameters of a connection that differ from libpq's defaults."""
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        return driver.info.get_parameters()


def test_a_vanished_server_is_noticed_by_the_kernel(shared: Engine) -> None:
    """Breaks if a worker waits 15 min for the answer of a machine that has lost its power."""
    with shared.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        with socket.socket(fileno=os.dup(driver.fileno())) as one:
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            idle, interval, count, user_timeout = (one.getsockopt(socket.IPPROTO_TCP, name) for name in names)
    assert idle + interval * count <= 12
    assert 5_000 <= user_timeout <= 12_000


def test_parameters_of_the_url_replace_the_defaults(shared_settings: Settings) -> None:
    """Breaks if an operator cannot change keepalives or the time to connect."""
    url = f"{shared_settings.need_database()}?keepalives_idle=77&tcp_user_timeout=99000&connect_timeout=9"
    engine = make_engine(replace(shared_settings, database_url=url))
    found = options_of(engine)
    assert (found["keepalives_idle"], found["tcp_user_timeout"], found["connect_timeout"]) == ("77", "99000", "9")
    assert found["keepalives_count"] == str(NETWORK["keepalives_count"])
    engine.dispose()


def test_a_silent_host_is_passed_over(shared_settings: Settings) -> None:
    """Breaks if a machine that accepts connections but never answers blocks workers, `check` and `status`."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = make_engine(on(shared_settings, silent.getsockname()[1], free_port()))
        began = time.monotonic()
        found = options_of(engine)
        assert time.monotonic() - began < CONNECT_TIMEOUT_OF_EACH + 2
    assert found["target_session_attrs"] == "read-write"
    engine.dispose()


def test_a_standby_is_passed_over(empty: Engine, empty_settings: Settings) -> None:
    """Breaks if a worker stays on a server that accepts connections but no writes."""
    database = rows(empty, "SELECT current_database() AS name")[0]["name"]
    run(empty, f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    port = make_url(empty_settings.need_database()).port or 0
    for query, is_refused in (("", True), ("?target_session_attrs=any", False)):
        engine = make_engine(on(empty_settings, port, query=query))
        if is_refused:
            assert retried(engine, "SELECT 1") == "PostgreSQL: OperationalError"
        else:
            assert rows(engine, "SHOW transaction_read_only") == [{"transaction_read_only": "on"}]
        engine.dispose()


@pytest.mark.parametrize("how", ["statement", "copy"])
def test_a_server_that_became_a_standby_is_left(shared_settings: Settings, how: str) -> None:
    """Breaks if a worker keeps its connections to a demoted primary, and retries there without end."""
    engine = make_writer(shared_settings)
    read_only = text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
    before = set()
    with engine.connect() as one, engine.connect() as other:
        for connection in (one, other):
            before.add(connection.scalar(text("SELECT pg_backend_pid()")))
            connection.execute(read_only)
            connection.commit()
    for _ in range(len(before)):
        with contextlib.suppress(TryLater), transaction(engine) as connection:
            if how == "copy":
                driver = connection.connection.driver_connection
                assert isinstance(driver, psycopg.Connection)
                with driver.cursor() as cursor, cursor.copy("COPY headrace.users (user_id) FROM STDIN") as copied:
                    copied.write_row((f"{how}-{uuid.uuid4()}",))
            else:
                connection.execute(text("INSERT INTO headrace.users (user_id) VALUES (:user)"), {"user": how})
    with engine.connect() as one, engine.connect() as other:
        after = {connection.scalar(text("SELECT pg_backend_pid()")) for connection in (one, other)}
    assert not before & after
    engine.dispose()


def test_an_unreachable_server_is_retried_without_its_password(shared_settings: Settings) -> None:
    """Breaks if a delivery is lost because the database is down, or its URL is logged."""
    url = f"postgresql+psycopg://headrace:sesame@127.0.0.1:{free_port()}/headrace"
    engine = make_engine(replace(shared_settings, database_url=url))
    assert retried(engine, "SELECT 1") == "PostgreSQL: OperationalError"
    engine.dispose()


def test_a_failed_transaction_is_rolled_back(shared: Engine) -> None:
    """Breaks if statements before the error stay."""
    with pytest.raises(Unprocessable):
        run(shared, "INSERT INTO headrace.users (user_id) VALUES ('half')", "SELECT 1 / 0")
    assert rows(shared, "SELECT 1 FROM health.users WHERE user_id = 'half'") == []


def test_an_error_of_the_driver_hides_its_parameters(shared: Engine) -> None:
    """Breaks if a traceback in a log quotes a parameter."""
    with pytest.raises(DBAPIError) as caught, shared.connect() as connection:
        connection.execute(text("SELECT :value FROM nowhere"), {"value": "a secret value"})
    assert "secret" not in str(caught.value)


def test_a_database_url_is_required(shared_settings: Settings) -> None:
    """Breaks if a missing DATABASE_URL raises another error."""
    with pytest.raises(Misconfigured, match="DATABASE_URL"):
        make_engine(replace(shared_settings, database_url=None))


def test_arrays_are_sent_in_binary(shared: Engine) -> None:
    """Breaks if a worker needs a quarter more CPU time for a workout, whose texts are quoted and searched."""
    with shared.connect() as connection:
        adapters = connection.connection.driver_connection.adapters  # type: ignore[union-attr]
    assert adapters.get_dumper(list, PyFormat.AUTO) is ListBinaryDumper


def test_session_settings_override_the_defaults(empty: Engine, empty_settings: Settings) -> None:
    """Breaks if a time without an offset is read in the server's zone, or a statement may hang for ever."""
    name = rows(empty, "SELECT current_database() AS name")[0]["name"]
    for setting in ("timezone = 'Asia/Tokyo'", "statement_timeout = 0", "lock_timeout = 0"):
        run(empty, f"ALTER DATABASE {name} SET {setting}")
    engine = make_engine(empty_settings, "a-name")
    names = (*SESSION, "application_name")
    found = {one: rows(engine, f"SELECT current_setting('{one}') AS v")[0]["v"] for one in names}
    assert found.pop("timezone") == "UTC"
    assert found.pop("application_name") == "a-name"
    assert "0" not in found.values()
    naive = rows(engine, "SELECT CAST('2026-03-14 06:30' AS timestamptz) AS at")
    assert naive == [{"at": datetime(2026, 3, 14, 6, 30, tzinfo=UTC)}]
    engine.dispose()


def test_statements_are_planned_again_while_a_table_grows(shared_settings: Settings) -> None:
    """Breaks if a plan that was made for an empty table reads the whole table for every batch until it is analyzed."""
    engine = make_engine(shared_settings)
    look_up = text(
        "SELECT count(*) FROM jsonb_to_recordset('[]'::jsonb || :rows) AS given(id int) JOIN growing USING (id)"
    )
    scans = text("SELECT seq_scan FROM pg_stat_xact_user_tables WHERE relname = 'growing'")

    def reads_all() -> bool:
        with transaction(engine) as connection:
            before = connection.scalar(scans)  # of transactions that are not in the statistics yet
            connection.execute(look_up, {"rows": '[{"id": 1}]'})
            return connection.scalar(scans) != before

    run(engine, "CREATE TABLE growing (id int PRIMARY KEY, rest char(500)) WITH (autovacuum_enabled = false)")
    run(engine, "INSERT INTO growing VALUES (1)")
    try:
        before = [reads_all() for _ in range(20)]
        run(engine, "INSERT INTO growing SELECT generate_series(2, 20000), ''")
        after = [reads_all() for _ in range(PLANNED_TRANSACTIONS)]
    finally:
        run(engine, "DROP TABLE growing")
        engine.dispose()
    assert (before, after[0], after[-1]) == ([True] * 20, True, False)


def test_a_connection_that_cannot_be_planned_again_is_replaced(shared_settings: Settings, shared: Engine) -> None:
    """Breaks if a worker fails because its connection was closed before its plans are discarded."""
    engine = make_engine(shared_settings)
    pid = text("SELECT pg_backend_pid()")
    with transaction(engine) as connection:
        before = connection.scalar(pid)
        connection.info["transactions"] = PLANNED_TRANSACTIONS - 1
    run(shared, f"SELECT pg_terminate_backend({before}, 5000)")
    with transaction(engine) as connection:
        assert connection.scalar(pid) != before
    engine.dispose()


def test_times_are_parsed_with_any_datestyle(empty: Engine, empty_settings: Settings) -> None:
    """Breaks if a database with another datestyle makes every delivery a dead letter."""
    name = rows(empty, "SELECT current_database() AS name")[0]["name"]
    run(empty, f"ALTER DATABASE {name} SET datestyle = 'SQL, DMY'")
    engine = make_engine(empty_settings)
    try:
        assert rows(engine, "SELECT CAST('2026-03-14' AS timestamptz) AS at") == [
            {"at": datetime(2026, 3, 14, tzinfo=UTC)}
        ]
    finally:
        engine.dispose()


def test_staged_samples_are_deleted_at_commit(shared: Engine) -> None:
    """Breaks if a message's samples are still staged when the next one is merged over the same connection."""
    with transaction(shared) as connection:
        connection.execute(text("INSERT INTO staged_samples (n) VALUES (1)"))
    with transaction(shared) as connection:
        assert connection.scalar(text("SELECT count(*) FROM staged_samples")) == 0


def test_every_connection_of_a_writer_can_stage(shared_settings: Settings) -> None:
    """Breaks if only the first connection of the pool has the staging table."""
    engine = make_writer(shared_settings)
    with engine.connect() as one, engine.connect() as other:
        for connection in (one, other):
            assert connection.scalar(text("SELECT count(*) FROM staged_samples")) == 0
    engine.dispose()


@pytest.mark.parametrize(
    ("moment", "partition"),
    [
        ("2026-01-01T00:00:00+00:00", "samples_202601"),
        ("2025-12-31T23:59:59.999999+00:00", "samples_202512"),
        ("2026-01-01T00:30:00+01:00", "samples_202512"),
        ("2000-01-01T00:00:00Z", "samples_200001"),
        ("1999-12-31T23:59:59Z", "samples_other"),
        ("1970-01-01T00:00:00Z", "samples_other"),
        ("0001-01-02T00:00:00Z", "samples_other"),
    ],
)
def test_a_sample_lands_in_the_partition_of_its_month(
    shared: Engine, shared_settings: Settings, moment: str, partition: str
) -> None:
    """Breaks if a wrong device clock makes a dead letter, or a month's samples are in several partitions."""
    body = event("daily.data.steps.created", moment, {"data": [{"timestamp": moment, "value": 1, "unit": "count"}]})
    assert apply(shared, shared_settings, delivery(body)) == {"applied": 1}
    query = """SELECT c.relname AS found FROM headrace.samples s JOIN pg_class c ON c.oid = s.tableoid
        JOIN headrace.series n ON n.id = s.series_id WHERE n.user_id = :user"""
    assert rows(shared, query, user=moment) == [{"found": partition}]
    assert rows(shared, "SELECT value FROM health.steps WHERE user_id = :user", user=moment) == [{"value": 1.0}]


def test_one_event_may_span_partitions(shared: Engine, shared_settings: Settings) -> None:
    """Breaks if a merge into several partitions writes only one, or deadlocks."""
    year = 365 * 24 * 60
    body = heartrate("spanning", {-30 * year: 1, -2 * year: 2, -year: 3, 0: 4})
    assert apply(shared, shared_settings, delivery(body)) == {"applied": 1}
    found = rows(shared, "SELECT value FROM health.heartrate WHERE user_id = 'spanning' ORDER BY ts")
    assert [row["value"] for row in found] == [1, 2, 3, 4]
