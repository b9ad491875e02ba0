"""Opening the database: migrations, sessions, partitions, and what an error means for a task."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from app.config.settings import Settings
from app.errors import Misconfigured, TryLater, Unprocessable
from tests.support import apply, delivery, event, heartrate, rows
from tests.support.cases import Failures
from tests.support.database import run
from workers.local.ports import free_port
from workers.store.engine import SESSION, make_engine, make_writer, transaction


def refused(engine: Engine, query: str, **parameters: object) -> str:
    """The text of the DeadLetter that a query ends in."""
    with pytest.raises(Unprocessable) as caught, transaction(engine) as connection:
        connection.execute(text(query), parameters)
    return str(caught.value)


def put_off(engine: Engine, *queries: str) -> str:
    """The text of the TryLater that queries end in."""
    with pytest.raises(TryLater) as caught:
        run(engine, *queries)
    return str(caught.value)


def copy(engine: Engine, row: tuple[object, ...]) -> None:
    """Copies a row into the table that samples are staged in, as the writer does."""
    with transaction(engine) as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        with driver.cursor() as cursor, cursor.copy("COPY staged_samples (n) FROM STDIN") as copied:
            copied.write_row(row)


def test_data_that_is_refused_is_a_dead_letter_without_the_data(shared: Engine) -> None:
    """Breaks if bad data is tried for ever, or if its text gets into logs by the error's."""
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
            told = refused(shared, query, value="a secret value")
            assert told.startswith("PostgreSQL refuses it: ")
            assert state in told
            assert "secret" not in told
    assert failures == {}


def test_nul_is_a_dead_letter(shared: Engine) -> None:
    """Breaks if a character that PostgreSQL cannot hold, which the driver refuses, is tried for ever."""
    assert "secret" not in refused(shared, "SELECT CAST(:value AS text)", value="a secret\x00value")


@pytest.mark.parametrize("row", [("no number",), (2**40,)])
def test_data_that_is_refused_while_copied_is_a_dead_letter(shared: Engine, row: tuple[object, ...]) -> None:
    """Breaks if errors of COPY, which SQLAlchemy does not see, come through as they are."""
    with pytest.raises(Unprocessable) as caught:
        copy(shared, row)
    assert str(row[0]) not in str(caught.value)


@pytest.mark.parametrize(
    ("queries", "told"),
    [
        (("SET LOCAL statement_timeout = '50ms'", "SELECT pg_sleep(20)"), "QueryCanceled (57014)"),
        (("SELECT pg_terminate_backend(pg_backend_pid())",), "AdminShutdown (57P01)"),
        (("SELECT 1 FROM headrace.no_such_table",), "UndefinedTable (42P01)"),
    ],
)
def test_everything_else_is_tried_later(shared: Engine, queries: tuple[str, ...], told: str) -> None:
    """Breaks if a server that restarts, is slow or is not yet migrated costs a delivery its life."""
    assert put_off(shared, *queries) == f"PostgreSQL: {told}"
    assert rows(shared, "SELECT 1 AS alive") == [{"alive": 1}]


def test_a_lock_that_is_not_given_is_tried_later(shared: Engine) -> None:
    """Breaks if somebody who holds a table for long makes dead letters."""
    with shared.begin() as holder:
        holder.execute(text("LOCK TABLE headrace.users"))
        told = put_off(shared, "SET LOCAL lock_timeout = '50ms'", "SELECT 1 FROM headrace.users")
    assert told == "PostgreSQL: LockNotAvailable (55P03)"


def test_no_server_is_tried_later_without_the_password(shared_settings: Settings) -> None:
    """Breaks if a database that is down costs a delivery its life, or its URL gets into the log."""
    url = f"postgresql+psycopg://headrace:sesame@127.0.0.1:{free_port()}/headrace"
    engine = make_engine(replace(shared_settings, database_url=url))
    assert put_off(engine, "SELECT 1") == "PostgreSQL: OperationalError"
    engine.dispose()


def test_a_transaction_that_fails_leaves_nothing(shared: Engine) -> None:
    """Breaks if what came before the error stays."""
    with pytest.raises(Unprocessable):
        run(shared, "INSERT INTO headrace.users (user_id) VALUES ('half')", "SELECT 1 / 0")
    assert rows(shared, "SELECT 1 FROM health.users WHERE user_id = 'half'") == []


def test_an_error_of_the_driver_hides_its_parameters(shared: Engine) -> None:
    """Breaks if a traceback in a log quotes what a body held."""
    with pytest.raises(DBAPIError) as caught, shared.connect() as connection:
        connection.execute(text("SELECT :value FROM nowhere"), {"value": "a secret value"})
    assert "secret" not in str(caught.value)


def test_a_database_is_needed(shared_settings: Settings) -> None:
    """Breaks if a missing DATABASE_URL shows as something else."""
    with pytest.raises(Misconfigured, match="DATABASE_URL"):
        make_engine(replace(shared_settings, database_url=None))


def test_a_session_is_ours_whatever_the_servers_default(empty: Engine, empty_settings: Settings) -> None:
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


def test_times_can_be_read_whatever_the_servers_style(empty: Engine, empty_settings: Settings) -> None:
    """Breaks if a database whose dates are written the local way makes a dead letter of every delivery."""
    name = rows(empty, "SELECT current_database() AS name")[0]["name"]
    run(empty, f"ALTER DATABASE {name} SET datestyle = 'SQL, DMY'")
    engine = make_engine(empty_settings)
    try:
        assert rows(engine, "SELECT CAST('2026-03-14' AS timestamptz) AS at") == [
            {"at": datetime(2026, 3, 14, tzinfo=UTC)}
        ]
    finally:
        engine.dispose()


def test_staged_samples_go_with_the_transaction(shared: Engine) -> None:
    """Breaks if a message's samples are still staged when the next one is merged over the same connection."""
    with transaction(shared) as connection:
        connection.execute(text("INSERT INTO staged_samples (n) VALUES (1)"))
    with transaction(shared) as connection:
        assert connection.scalar(text("SELECT count(*) FROM staged_samples")) == 0


def test_every_connection_of_a_writer_can_stage(shared_settings: Settings) -> None:
    """Breaks if only the first connection of the pool has the table."""
    engine = make_writer(shared_settings)
    with engine.connect() as one, engine.connect() as other:
        for connection in (one, other):
            assert connection.scalar(text("SELECT count(*) FROM staged_samples")) == 0
    engine.dispose()


@pytest.mark.parametrize(
    ("moment", "partition"),
    [
        ("2026-01-01T00:00:00+00:00", "samples_2026"),
        ("2025-12-31T23:59:59.999999+00:00", "samples_2025"),
        ("2026-01-01T00:30:00+01:00", "samples_2025"),
        ("2010-01-01T00:00:00Z", "samples_2010"),
        ("2009-12-31T23:59:59Z", "samples_other"),
        ("2030-12-31T23:59:59Z", "samples_2030"),
        ("2031-01-01T00:00:00Z", "samples_other"),
        ("1970-01-01T00:00:00Z", "samples_other"),
        ("0001-01-01T00:00:00Z", "samples_other"),
        ("9999-12-31T23:59:59Z", "samples_other"),
    ],
)
def test_a_sample_lands_in_the_partition_of_its_year(
    shared: Engine, shared_settings: Settings, moment: str, partition: str
) -> None:
    """Breaks if a device with a wrong clock makes a dead letter, or a year's samples are not together."""
    body = event("daily.data.steps.created", moment, {"data": [{"timestamp": moment, "value": 1, "unit": "count"}]})
    assert apply(shared, shared_settings, delivery(body)) == {"applied": 1}
    query = """SELECT c.relname AS found FROM headrace.samples s JOIN pg_class c ON c.oid = s.tableoid
        JOIN headrace.series n ON n.id = s.series_id WHERE n.user_id = :user"""
    assert rows(shared, query, user=moment) == [{"found": partition}]
    assert rows(shared, "SELECT value FROM health.steps WHERE user_id = :user", user=moment) == [{"value": 1.0}]


def test_there_are_partitions_for_now_and_for_years(shared: Engine) -> None:
    """Breaks if today's samples land in the default partition, which is never dropped by age."""
    found = rows(shared, "SELECT relname AS name FROM pg_class WHERE relname LIKE 'samples_2%'")
    names, now = {row["name"] for row in found}, datetime.now(UTC)
    assert names >= {f"samples_{(now + timedelta(days=days)).year}" for days in (-3650, 0, 365)}


def test_one_event_may_span_partitions(shared: Engine, shared_settings: Settings) -> None:
    """Breaks if a merge that touches several partitions writes only one, or deadlocks with itself."""
    year = 365 * 24 * 60
    body = heartrate("spanning", {-year: 1, 0: 2, year: 3, 30 * year: 4})
    assert apply(shared, shared_settings, delivery(body)) == {"applied": 1}
    found = rows(shared, "SELECT value FROM health.heartrate WHERE user_id = 'spanning' ORDER BY ts")
    assert [row["value"] for row in found] == [1, 2, 3, 4]
