"""A connection that fails when its server is frozen or cannot shut down, which keepalives do not detect."""

import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg

T = TypeVar("T")
SILENT_SECONDS = 10.0  # without data from the server, then a new connection tests it
PING_SECONDS = 3


class WatchedConnection(psycopg.Connection):
    """Raises OperationalError if its server neither sends data nor accepts connections.

    The kernel of a frozen server still acknowledges packets. A primary that was cut off from its replicas and replaced
    shuts down, but waits for ever for its transactions, which wait for a replica. Meanwhile it refuses connections.
    """

    def wait(self, gen: Generator[Any, Any, T], interval: float = 0.1, timeout: float | None = None) -> T:
        return super().wait(self._watched(gen), interval, timeout)

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
