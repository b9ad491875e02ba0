"""PostgreSQL: engines, session settings, transactions, and the translation of database errors into ours."""

import os
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psycopg
from psycopg.errors import CrashShutdown
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Connection, Engine, Row, TextClause, create_engine, event, make_url, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DisconnectionError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from app.config.settings import Settings
from app.errors import CommitUnknown, ConnectionLost, HeadraceError, RetryAlone, RetryCause, TryLater, Unprocessable
from app.scheduling import share_niceness

SESSION = {
    "datestyle": "ISO",  # the only style that psycopg can parse
    "timezone": "UTC",  # a time without an offset is UTC, whatever the server's default
    "statement_timeout": "45s",
    "lock_timeout": "20s",
    "idle_in_transaction_session_timeout": "60s",
}
# libpq's parameters, unless DATABASE_URL sets them. Without them, workers waited 106 s for a primary whose machine had
# lost its power: the kernel repeats unacknowledged data for 15 min, and keepalives start after 2 h. With them, a worker
# that waits for an answer notices after 11 s (probes after 5, 7, 9 and 11 s), and one that has sent data after 10 s.
NETWORK = {
    "connect_timeout": 5,  # seconds per address
    "keepalives_idle": 5,  # seconds
    "keepalives_interval": 2,  # seconds
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # ms
}
T = TypeVar("T")
SILENT_SECONDS = 10.0  # without data from the server, then a new connection tests it
PING_SECONDS = 3
# With several hosts: two of three machines may be silent, and the third must be reached within the same 12 s.
CONNECT_TIMEOUT_OF_EACH = 3
# Lane workers wait less for a lock, because everything behind them waits too, and a retry costs milliseconds. Measured
# with four workers on two cores and 240 messages of 20 deliveries, all of the same users: with a limit of 100 ms 49
# messages had to be retried, with 300 ms none.
WORKER_SESSION = {"lock_timeout": "500ms"}
# For a delivery that is applied alone after it or its message has failed: a lock that is held for minutes would
# otherwise cost a worker half a second in every retry.
WAIT_LITTLE = text("SET LOCAL lock_timeout = '100ms'")
LOCK_SECONDS, LOCK_PAUSE_SECONDS = 600.0, 0.2  # of tries for a lock, and between two of them
# The meaning of an SQLSTATE, by its first characters. Any other SQLSTATE concerns the statement: RetryAlone.
REFUSED = ("22", "23", "54", "XX000")  # invalid data, constraints, limits of PostgreSQL, internal errors such as 1 GB
UNAVAILABLE = (
    *("08", "28", "53", "57P", "58", "F0"),  # connections, logins, resources, shutdown, I/O, configuration
    *("0A", "25006", "3D", "3F", "42"),  # not migrated yet, no rights, or a standby
)
# The connection cannot be used again: it is broken, or its server shuts down or has become a standby.
DISCONNECTED = ("08", "25006", "57P")
CAUSES: dict[str, RetryCause] = {
    "57014": "statement_timeout",
    "55P03": "lock_timeout",
    "40001": "conflict",
    "40P01": "conflict",
    "XX001": "damaged_page",
    "XX002": "damaged_page",
    "58030": "storage",  # a file cannot be read or written: a damaged one, or the whole disk fails
    "58P01": "storage",  # a file is missing
    "53400": "other",  # temp_file_limit
    "53200": "out_of_memory",  # of one backend, usually because of the statement's size; a full disk is 53100
}
# The id of this transaction once it has written, and later its outcome. See record 0065.
TRANSACTION_ID = text("SELECT CAST(pg_current_xact_id_if_assigned() AS text)")
TRANSACTION_STATUS = text("SELECT pg_xact_status(CAST(:id AS xid8))")
CONFIRM_SECONDS = 30.0  # a failover takes 10 to 25 s
# PostgreSQL keeps the plan of a prepared statement until one of its tables is analyzed, by default within a minute. The
# plan for a table that was empty then reads all its rows for each batch: with 40,000 rows stored, a workout took 219 to
# 282 us of PostgreSQL's CPU time instead of about 100. Planning again takes 1.6 ms (record 0083).
PLANNED_TRANSACTIONS = 50
STAGING = """
CREATE TEMPORARY TABLE staged_samples (
    n int, series_id int, ts timestamptz, ts_end timestamptz, value double precision, unit text,
    timezone_offset int, extra jsonb, version timestamptz, origin headrace.origin
) ON COMMIT DELETE ROWS"""


class WatchedConnection(psycopg.Connection):
    """Raises OperationalError if its server neither sends data nor accepts connections: it is frozen, or cannot end.

    The kernel of a frozen server still acknowledges packets. A primary that was cut off from its replicas and replaced
    shuts down, but waits without end for its transactions, which wait for a replica. Then it refuses connections.

    Raises CrashShutdown (57P02) if the server ends all connections because the process of another one has crashed. The
    server sends a warning and closes the connection, which looks like a crash of this connection's process.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        states = self._notices = list[str | None]()
        self.add_notice_handler(lambda notice: states.append(notice.sqlstate))

    def wait(self, gen: Generator[Any, Any, T], interval: float = 0.1, timeout: float | None = None) -> T:
        self._notices.clear()
        try:
            return super().wait(self._watched(gen), interval, timeout)
        except psycopg.OperationalError as error:
            if error.sqlstate is None and CrashShutdown.sqlstate in self._notices:
                raise CrashShutdown("another process of the server has crashed") from None
            raise

    def _watched(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        """Passes on what `gen` waits for. psycopg sends a value that is false after each interval without data."""
        heard_at = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready:
                    heard_at = time.monotonic()
                elif time.monotonic() > heard_at + SILENT_SECONDS:
                    self._need_answer()
                    heard_at = time.monotonic()
                wanted = gen.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result

    def _need_answer(self) -> None:
        """Connects again, to this server only: with several hosts in DATABASE_URL, another one would answer.

        A server at its limit of connections also refuses one. Then this transaction is repeated, which is harmless. Not
        with PQping, which holds the interpreter's lock while it waits.
        """
        try:
            psycopg.connect(
                self.info.dsn,
                host=self.info.host,
                hostaddr=self.info.hostaddr,
                port=self.info.port,
                password=self.info.password,
                target_session_attrs="any",
                connect_timeout=PING_SECONDS,
            ).close()
        except psycopg.OperationalError:
            self.pgconn.finish()
            raise


def make_engine(
    settings: Settings, name: str = "headrace", session: Mapping[str, str] = SESSION, *, pre_ping: bool = False
) -> Engine:
    """A connection pool for one process. `session` overrides settings of SESSION.

    With `pre_ping`, each use begins with a round trip that replaces a broken connection: for work without retries.
    Error messages omit parameters, which could hold health values.
    """
    session = {**SESSION, **session}
    url = make_url(settings.need_database())
    network = NETWORK | ({"connect_timeout": CONNECT_TIMEOUT_OF_EACH} if "," in str(url.query.get("host", "")) else {})
    engine = create_engine(
        url,
        pool_size=1,
        max_overflow=2,
        pool_timeout=10,
        pool_pre_ping=pre_ping,
        hide_parameters=True,
        execution_options={"57014": session["statement_timeout"]},  # for messages
        connect_args={
            "options": " ".join(f"-c {key}={value}" for key, value in session.items()),
            "application_name": name,
            "client_encoding": "UTF8",  # psycopg would otherwise return every text of an SQL_ASCII database as bytes
            **{name: value for name, value in network.items() if name not in url.query},
        },
    )

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: object, _record: object, args: tuple[str, ...], named: dict[str, Any]) -> WatchedConnection:
        connection = WatchedConnection.connect(*args, **named)
        # Sends arrays of sealed bodies in binary: hexadecimal text, escaped and unescaped, is three times the work. Not
        # in the constructor, after which psycopg replaces the adapters by those of SQLAlchemy.
        connection.adapters.register_dumper(list, ListBinaryDumper)
        return connection

    @event.listens_for(engine, "handle_error")
    def reconnect(context: ExceptionContext) -> None:
        """Discards the connections of the pool: SQLAlchemy itself does so only for closed connections."""
        if _is_disconnected(context.original_exception):
            context.is_disconnect = True

    event.listen(engine, "checkout", _plan_again)
    return engine


def _plan_again(connection: psycopg.Connection, record: ConnectionPoolEntry, _proxy: object) -> None:
    """Discards the plans of a connection before every PLANNED_TRANSACTIONS-th transaction."""
    record.info["transactions"] = record.info.get("transactions", 0) + 1
    if record.info["transactions"] % PLANNED_TRANSACTIONS:
        return
    try:
        connection.execute("DISCARD PLANS")
        connection.commit()
    except psycopg.Error as error:
        raise DisconnectionError from error  # the pool connects again


def make_writer(
    settings: Settings, name: str = "headrace-worker", session: Mapping[str, str] = SESSION, *, pre_ping: bool = False
) -> Engine:
    """As `make_engine`, but each connection has the temporary table in which samples are staged."""
    engine = make_engine(settings, name, session, pre_ping=pre_ping)

    @event.listens_for(engine, "connect")
    def stage(connection: psycopg.Connection, _record: object) -> None:
        connection.execute(STAGING)
        connection.commit()

    return engine


def make_background(settings: Settings, name: str) -> Engine:
    """As `make_engine`, for work that can wait: its PostgreSQL processes get the niceness of this process."""
    engine = make_engine(settings, name, WORKER_SESSION)

    @event.listens_for(engine, "connect")
    def lower(connection: psycopg.Connection, _record: object) -> None:
        with socket.socket(fileno=os.dup(connection.fileno())) as ours:
            address = ours.getsockname()
        if isinstance(address, tuple):  # not a Unix socket
            share_niceness(connection.info.backend_pid, address[1])

    return engine


@contextmanager
def transaction(engine: Engine, *, confirm: bool = False) -> Iterator[Connection]:
    """Runs one transaction.

    Raises Unprocessable for data that PostgreSQL rejects, RetryAlone if it did not execute a statement, TryLater if it
    is unavailable, ConnectionLost if the connection broke during a statement, and CommitUnknown if during COMMIT.

    Work that is retried must be repeatable: its second execution finds the effect of the first. For all other work, use
    `confirm`: if the connection breaks during COMMIT, the outcome is looked up over another connection. The block ends
    normally if the transaction is committed, and with TryLater if it is rolled back. This costs one round trip.
    """
    is_connected, is_committing, transaction_id = False, False, None
    unknown: CommitUnknown | None = None
    try:
        with engine.begin() as connection:
            is_connected = True
            try:
                yield connection
            except psycopg.Error as error:  # of COPY, which SQLAlchemy does not handle
                if _is_disconnected(error):
                    connection.invalidate(error)
                raise
            if confirm:
                transaction_id = connection.scalar(TRANSACTION_ID)
            is_committing = True
    except (SQLAlchemyError, psycopg.Error) as error:
        failure = _translated(error, engine.get_execution_options(), is_committing=is_committing)
        if is_connected and type(failure) is TryLater and _is_crash(error):
            failure = ConnectionLost(str(failure))
        if not isinstance(failure, CommitUnknown) or transaction_id is None:
            raise failure from None
        unknown = failure
    if unknown and transaction_id:
        _confirm(engine, transaction_id, unknown)


def _confirm(engine: Engine, transaction_id: str, failure: CommitUnknown) -> None:
    """Looks up the outcome of a transaction. Raises TryLater if it is rolled back, and `failure` if it is not known."""
    until, status = time.monotonic() + CONFIRM_SECONDS, None
    while time.monotonic() < until:
        with suppress(TryLater):
            status = _status(engine, transaction_id)
        if status in ("committed", "aborted"):
            break
        time.sleep(0.5)
    if status == "aborted":
        raise TryLater("PostgreSQL: the connection broke during COMMIT, and the transaction was rolled back")
    if status != "committed":
        raise failure


def _status(engine: Engine, transaction_id: str) -> str | None:
    try:
        status: str | None
        (status,) = scalars(engine, TRANSACTION_STATUS, {"id": transaction_id})
    except Unprocessable:  # "in the future": the new primary has not received this transaction
        return "aborted"
    return status


def _translated(error: Exception, timeouts: Mapping[str, object], *, is_committing: bool) -> HeadraceError:
    """The error with its SQLSTATE and without its message, which would quote the value. `timeouts` are by SQLSTATE."""
    driver_error = getattr(error, "orig", None) or error
    state = getattr(driver_error, "sqlstate", None)
    name = f"{type(driver_error).__name__} ({state})" if state else type(driver_error).__name__
    if is_committing and (not state or state.startswith(DISCONNECTED)):
        return CommitUnknown(f"PostgreSQL: {name} during COMMIT, so the transaction may be committed")
    if isinstance(driver_error, psycopg.DataError | psycopg.IntegrityError) or (state and state.startswith(REFUSED)):
        return Unprocessable(f"PostgreSQL refuses it: {name}")
    if state and (state in CAUSES or not state.startswith(UNAVAILABLE)):
        after = f" after {timeouts[state]}" if state in timeouts else ""
        return RetryAlone(f"PostgreSQL: {name}{after}", CAUSES.get(state, "other"))
    return TryLater(f"PostgreSQL: {name}")


def _is_crash(error: Exception) -> bool:
    """Whether the server process of an open connection may have crashed. After a crash of another one, it is 57P02."""
    driver_error = getattr(error, "orig", None) or error
    return isinstance(driver_error, psycopg.OperationalError) and driver_error.sqlstate is None


def _is_disconnected(error: BaseException) -> bool:
    return (getattr(error, "sqlstate", None) or "").startswith(DISCONNECTED)


def execute(
    engine: Engine, statement: TextClause, values: Mapping[str, Any] | None = None, *, confirm: bool = False
) -> Sequence[Row[Any]]:
    """Runs one statement in a transaction of its own, and returns its rows. Raises as `transaction`."""
    with transaction(engine, confirm=confirm) as connection:
        result = connection.execute(statement, values)
        return result.all() if result.returns_rows else ()


def scalars(
    engine: Engine, statement: TextClause, values: Mapping[str, Any] | None = None, *, confirm: bool = False
) -> list[Any]:
    """As `execute`, but returns the first value of each row."""
    return [row[0] for row in execute(engine, statement, values, confirm=confirm)]


def insist(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Repeats a transaction until it gets its locks, for each of which it waits 100 ms. Raises RetryAlone.

    Statements of workers queue behind a lock that waits, and they wait for 500 ms.
    """
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            with transaction(engine) as connection:
                connection.execute(WAIT_LITTLE)
                return work(connection)
        except RetryAlone as error:
            if error.cause not in ("lock_timeout", "conflict") or time.monotonic() > until:
                raise
        time.sleep(LOCK_PAUSE_SECONDS)


def wait_for_notification(connection: Connection, seconds: float) -> None:
    """Waits for a notification of a channel that the connection listens to, at most for these seconds.

    Raises TryLater if the connection breaks.
    """
    driver = connection.connection.driver_connection
    if isinstance(driver, psycopg.Connection):
        for _ in driver.notifies(timeout=seconds, stop_after=1):
            pass


def delete_in_batches(engine: Engine, query: TextClause, values: Mapping[str, object], size: int) -> Iterator[int]:
    """Repeats a DELETE that has a `:limit`, one transaction per batch, until a batch is not full. Yields row counts.

    A statement with a result returns the row count.
    """
    deleted = size
    while deleted == size:
        with transaction(engine) as connection:
            result = connection.execute(query, {**values, "limit": size})
            deleted = result.scalar_one() if result.returns_rows else result.rowcount
        yield deleted
