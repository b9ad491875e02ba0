"""Live events at a fixed low rate, each timed from its 202 until its row is visible, and until its day is computed."""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
from sqlalchemy import TextClause, text

from tests.bench.load import workout_event
from tests.bench.results import Times, times
from tests.bench.stack import Stack
from tests.support import message_id, signed

POLL_SECONDS, POLL_DAYS_SECONDS = 0.005, 0.1
LOSS_TIMEOUT_SECONDS = 30
FOUND = text("SELECT message_id FROM health.deliveries WHERE message_id = ANY(:ids) AND provider = 'junction'")
# A workout is kept in the transaction that writes its day: those of one user do not overlap.
KEPT = text("""
SELECT id FROM headrace.kept_sessions WHERE user_id = ANY(:users) AND resource = 'workouts' AND id = ANY(:ids)""")


class Sender:
    """Sends signed events as the aggregator does."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._client = stack, httpx.Client(timeout=20)

    def send(self, body: dict[str, Any]) -> str:
        """Sends an event, checks the status, and returns the id."""
        now = datetime.now(UTC)
        raw, name = msgspec.json.encode(body), message_id(now)
        headers = signed(raw, name=name, at=now, secret=self._stack.secret)
        self._client.post(self._stack.url, content=raw, headers=headers).raise_for_status()
        return name

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


class Probe:
    """Sends workouts at a fixed rate within its `with` block. With `days` it waits for their days too."""

    def __init__(self, stack: Stack, rate: float, *, days: bool = False) -> None:
        self._sender, self._pause = Sender(stack), 1 / rate
        self._engine = stack.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._users = [str(uuid.uuid4()) for _ in range(50)]
        self._over, self._rows, self._days = Event(), dict[str, float](), dict[str, float]()
        self._row_seconds: list[float] = []
        self._day_seconds: list[float] = []
        self._threads = [
            Thread(target=self._send_all),
            Thread(target=self._poll, args=(self._rows, FOUND, {}, self._row_seconds, POLL_SECONDS)),
        ]
        if days:
            of_days = (self._days, KEPT, {"users": self._users}, self._day_seconds, POLL_DAYS_SECONDS)
            self._threads.append(Thread(target=self._poll, args=of_days))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._sender.close()

    @property
    def to_row(self) -> Times:
        """The times from 202 to row."""
        return times(self._row_seconds)

    @property
    def to_day(self) -> Times:
        """The times from 202 to the day's value."""
        return times(self._day_seconds)

    def _send_all(self) -> None:
        number, due = 0, time.perf_counter()
        with ThreadPoolExecutor(16) as pool:  # a slow response does not delay other events
            while not self._over.wait(max(0.0, due - time.perf_counter())):
                pool.submit(self._send, workout_event(self._users[number % 50], number))
                number, due = number + 1, due + self._pause

    def _send(self, body: dict[str, Any]) -> None:
        name = self._sender.send(body)
        self._rows[name] = self._days[body["data"]["id"]] = time.perf_counter()

    def _poll(
        self, waiting: dict[str, float], query: TextClause, values: dict[str, Any], seconds: list[float], pause: float
    ) -> None:
        """Polls for ids, only while some are pending: polling costs as much as the measured work."""
        deadline = None
        with self._engine.connect() as connection:
            while waiting or not self._over.is_set():
                if self._over.is_set():
                    deadline = deadline or time.perf_counter() + LOSS_TIMEOUT_SECONDS
                    if time.perf_counter() > deadline:
                        raise TimeoutError(f"{len(waiting)} live events never reached the database")
                if waiting:
                    found = connection.scalars(query, values | {"ids": list(waiting)}).all()
                    now = time.perf_counter()
                    seconds += [now - waiting.pop(name) for name in found]
                time.sleep(pause)
