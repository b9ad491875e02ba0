"""Live events at a fixed low rate, each timed from its 202 until its row is visible."""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
from sqlalchemy import text

from tests.bench.load import workout_event
from tests.bench.results import Times, times
from tests.bench.stack import Stack
from tests.support import message_id, signed

POLL_SECONDS = 0.005
LOSS_TIMEOUT_SECONDS = 30
FOUND = text("SELECT message_id FROM health.deliveries WHERE message_id = ANY(:ids) AND provider = 'junction'")


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
    """Sends workouts at a fixed rate within its `with` block."""

    def __init__(self, stack: Stack, rate: float) -> None:
        self._sender, self._pause = Sender(stack), 1 / rate
        self._engine = stack.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._over, self._waiting = Event(), dict[str, float]()
        self._threads = [Thread(target=self._send_all), Thread(target=self._poll)]
        self._seconds_each: list[float] = []

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
        return times(self._seconds_each)

    def _send_all(self) -> None:
        users, number, due = [str(uuid.uuid4()) for _ in range(50)], 0, time.perf_counter()
        with ThreadPoolExecutor(16) as pool:  # a slow response does not delay other events
            while not self._over.wait(max(0.0, due - time.perf_counter())):
                pool.submit(self._send, workout_event(users[number % 50], number))
                number, due = number + 1, due + self._pause

    def _send(self, body: dict[str, Any]) -> None:
        name = self._sender.send(body)
        self._waiting[name] = time.perf_counter()

    def _poll(self) -> None:
        """Polls for rows, only while events are pending: polling costs as much as the measured work."""
        deadline = None
        with self._engine.connect() as connection:
            while self._waiting or not self._over.is_set():
                if self._over.is_set():
                    deadline = deadline or time.perf_counter() + LOSS_TIMEOUT_SECONDS
                    if time.perf_counter() > deadline:
                        raise TimeoutError(f"{len(self._waiting)} live events never reached the database")
                if self._waiting:
                    found = connection.scalars(FOUND, {"ids": list(self._waiting)}).all()
                    now = time.perf_counter()
                    self._seconds_each += [now - self._waiting.pop(name) for name in found]
                time.sleep(POLL_SECONDS)
