"""A connection that gives up a server that is frozen or cannot end, and that notices crashes of other processes."""

import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg
from psycopg.errors import CrashShutdown

T = TypeVar("T")
SILENT_SECONDS = 10.0  # without data from the server, then a new connection tests it
PING_SECONDS = 3


class WatchedConnection(psycopg.Connection):
    """Raises OperationalError if its server neither sends data nor accepts connections.

    The kernel of a frozen server still acknowledges packets. A primary that was cut off from its replicas and replaced
    shuts down, but waits without end for its transactions, which wait for a replica. Then it refuses connections.

    Raises CrashShutdown (57P02) if the server ends all connections because the process of another one has crashed. It
    says so in a warning and closes the connection, which looks like a crash of this connection's process.
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
