"""Opens PostgreSQL: the engine every process uses, the migration, and what its errors mean for a task."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from app.config.settings import Settings
from app.errors import TryLater, Unprocessable

SESSION = {
    "datestyle": "ISO",  # the only one that psycopg reads
    "timezone": "UTC",  # a time without an offset is UTC, whatever the server thinks
    "statement_timeout": "45s",
    "lock_timeout": "20s",
    "idle_in_transaction_session_timeout": "60s",
}
STAGING = """
CREATE TEMPORARY TABLE staged_samples (
    n int, series_id int, ts timestamptz, ts_end timestamptz, value double precision, unit text,
    timezone_offset int, extra jsonb, version timestamptz, origin headrace.origin
) ON COMMIT DELETE ROWS"""


def make_engine(settings: Settings, name: str = "headrace") -> Engine:
    """A pool for one process. Its errors name no parameter: they could hold what a body held."""
    options = " ".join(f"-c {key}={value}" for key, value in SESSION.items())
    engine = create_engine(
        settings.need_database(),
        pool_size=1,
        max_overflow=2,
        pool_timeout=10,
        hide_parameters=True,
        connect_args={"options": options, "application_name": name, "connect_timeout": 5},
    )

    @event.listens_for(engine, "connect")
    def lists_in_binary(connection: psycopg.Connection, _record: object) -> None:
        """Sealed bodies in an array would go as hexadecimal text, escaped and unescaped: three times the work."""
        connection.adapters.register_dumper(list, ListBinaryDumper)

    return engine


def make_writer(settings: Settings, name: str = "headrace-worker") -> Engine:
    """As `make_engine`, each connection with the table that samples are staged in."""
    engine = make_engine(settings, name)

    @event.listens_for(engine, "connect")
    def stage(connection: psycopg.Connection, _record: object) -> None:
        connection.execute(STAGING)
        connection.commit()

    return engine


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction. Raises Unprocessable for data that PostgreSQL refuses and TryLater for everything else."""
    try:
        with engine.begin() as connection:
            yield connection
    except (DataError, IntegrityError) as error:
        raise Unprocessable(f"PostgreSQL refuses it: {_plain(error)}") from None
    except SQLAlchemyError as error:
        raise TryLater(f"PostgreSQL: {_plain(error)}") from None
    except psycopg.DataError as error:  # raised while rows are copied, where SQLAlchemy does not look
        raise Unprocessable(f"PostgreSQL refuses it: {type(error).__name__} {error.sqlstate or ''}".rstrip()) from None
    except psycopg.Error as error:
        raise TryLater(f"PostgreSQL: {type(error).__name__} {error.sqlstate or ''}".rstrip()) from None


def _plain(error: Exception) -> str:
    """The kind of an error and its SQLSTATE; its message would quote the value."""
    cause = getattr(error, "orig", None) or error
    state = getattr(cause, "sqlstate", None)
    return f"{type(cause).__name__} ({state})" if state else type(cause).__name__
