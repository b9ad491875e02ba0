"""PostgreSQL: engines, session settings, transactions, and the translation of database errors into ours."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psycopg
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Connection, Engine, TextClause, create_engine, event
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from app.config.settings import Settings
from app.errors import TryLater, Unprocessable

SESSION = {
    "datestyle": "ISO",  # the only style that psycopg can parse
    "timezone": "UTC",  # a time without an offset is UTC, whatever the server's default
    "statement_timeout": "45s",
    "lock_timeout": "20s",
    "idle_in_transaction_session_timeout": "60s",
}
# A key that is too long for an index, or JSON that is nested too deep.
LIMIT_EXCEEDED = (psycopg.errors.ProgramLimitExceeded, psycopg.errors.StatementTooComplex)
STAGING = """
CREATE TEMPORARY TABLE staged_samples (
    n int, series_id int, ts timestamptz, ts_end timestamptz, value double precision, unit text,
    timezone_offset int, extra jsonb, version timestamptz, origin headrace.origin
) ON COMMIT DELETE ROWS"""


def make_engine(settings: Settings, name: str = "headrace") -> Engine:
    """A connection pool for one process. Error messages omit parameters, which could hold health values."""
    options = " ".join(f"-c {key}={value}" for key, value in SESSION.items())
    engine = create_engine(
        settings.need_database(),
        pool_size=1,
        max_overflow=2,
        pool_timeout=10,
        hide_parameters=True,
        connect_args={
            "options": options,
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


def make_writer(settings: Settings, name: str = "headrace-worker") -> Engine:
    """As `make_engine`, but each connection has the temporary table in which samples are staged."""
    engine = make_engine(settings, name)

    @event.listens_for(engine, "connect")
    def stage(connection: psycopg.Connection, _record: object) -> None:
        connection.execute(STAGING)
        connection.commit()

    return engine


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Runs one transaction. Raises Unprocessable for data that PostgreSQL rejects, TryLater for every other error."""
    try:
        with engine.begin() as connection:
            yield connection
    # COPY raises psycopg's errors, which SQLAlchemy does not wrap.
    except (DataError, IntegrityError, psycopg.DataError) as error:
        raise Unprocessable(f"PostgreSQL refuses it: {_plain(error)}") from None
    except (SQLAlchemyError, psycopg.Error) as error:
        if isinstance(getattr(error, "orig", error), LIMIT_EXCEEDED):
            raise Unprocessable(f"PostgreSQL refuses it: {_plain(error)}") from None
        raise TryLater(f"PostgreSQL: {_plain(error)}") from None


def _plain(error: Exception) -> str:
    """The class of an error and its SQLSTATE. Its message would quote the value."""
    cause = getattr(error, "orig", None) or error
    state = getattr(cause, "sqlstate", None)
    return f"{type(cause).__name__} ({state})" if state else type(cause).__name__


def delete_in_batches(engine: Engine, query: TextClause, values: Mapping[str, object], size: int) -> Iterator[int]:
    """Repeats a DELETE that has a `:limit`, one transaction per batch, until a batch is not full. Yields row counts."""
    deleted = size
    while deleted == size:
        with transaction(engine) as connection:
            deleted = connection.execute(query, {**values, "limit": size}).rowcount
        yield deleted
