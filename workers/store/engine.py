"""PostgreSQL: engines, session settings, transactions, and the translation of database errors into ours."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psycopg
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Connection, Engine, TextClause, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError

from app.config.settings import Settings
from app.errors import HeadraceError, RetryAlone, RetryCause, TryLater, Unprocessable

SESSION = {
    "datestyle": "ISO",  # the only style that psycopg can parse
    "timezone": "UTC",  # a time without an offset is UTC, whatever the server's default
    "statement_timeout": "45s",
    "lock_timeout": "20s",
    "idle_in_transaction_session_timeout": "60s",
}
# Lane workers wait less for a lock, because everything behind them waits too, and a retry costs milliseconds. Measured
# with four workers on two cores and 240 messages of 20 deliveries, all of the same users: with a limit of 100 ms 49
# messages had to be retried, with 300 ms none.
WORKER_SESSION = {"lock_timeout": "500ms"}
# For a delivery that is applied alone after it or its message has failed: a lock that is held for minutes would
# otherwise cost a worker half a second in every retry.
WAIT_LITTLE = text("SET LOCAL lock_timeout = '100ms'")
# The meaning of an SQLSTATE, by its first characters. Any other SQLSTATE concerns the statement: RetryAlone.
REFUSED = ("22", "23", "54", "XX000")  # invalid data, constraints, limits of PostgreSQL, internal errors such as 1 GB
UNAVAILABLE = (
    *("08", "28", "53", "57P", "58", "F0"),  # connections, logins, resources, shutdown, I/O, configuration
    *("0A", "25006", "3D", "3F", "42"),  # not migrated yet, no rights, or a standby
)
CAUSES: dict[str, RetryCause] = {
    "57014": "statement_timeout",
    "55P03": "lock_timeout",
    "40001": "conflict",
    "40P01": "conflict",
    "XX001": "damaged_page",
    "XX002": "damaged_page",
    "53200": "out_of_memory",  # of one backend, usually because of the statement's size; a full disk is 53100
}
STAGING = """
CREATE TEMPORARY TABLE staged_samples (
    n int, series_id int, ts timestamptz, ts_end timestamptz, value double precision, unit text,
    timezone_offset int, extra jsonb, version timestamptz, origin headrace.origin
) ON COMMIT DELETE ROWS"""


def make_engine(settings: Settings, name: str = "headrace", session: Mapping[str, str] = SESSION) -> Engine:
    """A connection pool for one process. `session` overrides settings of SESSION.

    Error messages omit parameters, which could hold health values.
    """
    session = {**SESSION, **session}
    engine = create_engine(
        settings.need_database(),
        pool_size=1,
        max_overflow=2,
        pool_timeout=10,
        hide_parameters=True,
        execution_options={"57014": session["statement_timeout"]},  # for messages
        connect_args={
            "options": " ".join(f"-c {key}={value}" for key, value in session.items()),
            "application_name": name,
            "connect_timeout": 5,
            "client_encoding": "UTF8",  # psycopg would otherwise return every text of an SQL_ASCII database as bytes
        },
    )

    @event.listens_for(engine, "connect")
    def lists_in_binary(connection: psycopg.Connection, _record: object) -> None:
        """Sends arrays of sealed bodies in binary: hexadecimal text, escaped and unescaped, is three times the work."""
        connection.adapters.register_dumper(list, ListBinaryDumper)

    return engine


def make_writer(settings: Settings, name: str = "headrace-worker", session: Mapping[str, str] = SESSION) -> Engine:
    """As `make_engine`, but each connection has the temporary table in which samples are staged."""
    engine = make_engine(settings, name, session)

    @event.listens_for(engine, "connect")
    def stage(connection: psycopg.Connection, _record: object) -> None:
        connection.execute(STAGING)
        connection.commit()

    return engine


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Runs one transaction.

    Raises Unprocessable for data that PostgreSQL rejects, RetryAlone if it did not execute a statement, and TryLater if
    it is unavailable.
    """
    try:
        with engine.begin() as connection:
            yield connection
    except (SQLAlchemyError, psycopg.Error) as error:  # COPY raises psycopg's errors, which SQLAlchemy does not wrap
        raise _translated(error, engine.get_execution_options()) from None


def _translated(error: Exception, timeouts: Mapping[str, object]) -> HeadraceError:
    """The error with its SQLSTATE and without its message, which would quote the value. `timeouts` are by SQLSTATE."""
    driver_error = getattr(error, "orig", None) or error
    state = getattr(driver_error, "sqlstate", None)
    name = f"{type(driver_error).__name__} ({state})" if state else type(driver_error).__name__
    if isinstance(driver_error, psycopg.DataError | psycopg.IntegrityError) or (state and state.startswith(REFUSED)):
        return Unprocessable(f"PostgreSQL refuses it: {name}")
    if state and (state in CAUSES or not state.startswith(UNAVAILABLE)):
        after = f" after {timeouts[state]}" if state in timeouts else ""
        return RetryAlone(f"PostgreSQL: {name}{after}", CAUSES.get(state, "other"))
    return TryLater(f"PostgreSQL: {name}")


def delete_in_batches(engine: Engine, query: TextClause, values: Mapping[str, object], size: int) -> Iterator[int]:
    """Repeats a DELETE that has a `:limit`, one transaction per batch, until a batch is not full. Yields row counts."""
    deleted = size
    while deleted == size:
        with transaction(engine) as connection:
            deleted = connection.execute(query, {**values, "limit": size}).rowcount
        yield deleted
