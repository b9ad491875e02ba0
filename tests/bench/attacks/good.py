"""The good sender: Junction workouts at a steady rate, each timed until its answer and from its 202 until its row."""

import http.client
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import psycopg

from tests.bench.attacks.target import Signals, Target
from tests.bench.load import workout_event
from tests.bench.results import times
from tests.support import message_id, signed

POLL_SECONDS = 0.02
SENDER_TIMEOUT_SECONDS = 15  # Junction's
THREADS = 128  # a slow answer must not delay the next event
PATH = "/webhooks/junction"
FOUND = "SELECT message_id FROM health.deliveries WHERE message_id = ANY(%s) AND provider = 'junction'"
ROWS = "SELECT count(*) FROM health.workouts WHERE user_id = ANY(%s) AND id = ANY(%s)"


@dataclass(frozen=True)
class Spread:
    """Median, 99th percentile and maximum, in milliseconds."""

    p50: float
    p99: float
    longest: float


@dataclass(frozen=True)
class Good:
    """What happened to the good events. `lost` got a 202 and have no row at the end."""

    sent: int
    statuses: dict[str, int]  # by status code or name of the error
    answer: Spread
    to_row: Spread
    lost: int

    @property
    def server_errors(self) -> int:
        """The number of 5xx answers."""
        return sum(count for status, count in self.statuses.items() if status.startswith("5"))

    @property
    def failed(self) -> int:
        """The number of events without any answer."""
        return sum(count for status, count in self.statuses.items() if not status.isdigit())


def spread(seconds: list[float]) -> Spread:
    """The spread of times in seconds."""
    found = times(seconds)
    return Spread(found.p50, found.p99, max(seconds, default=float("nan")) * 1000)


@dataclass
class _Sender:
    target: Target
    users: list[str] = field(default_factory=lambda: [str(uuid.uuid4()) for _ in range(50)])
    statuses: Counter[str] = field(default_factory=Counter)
    answers: list[float] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)  # the workouts
    waiting: dict[str, float] = field(default_factory=dict)  # the time of the 202, by delivery

    def send(self, number: int, due: float) -> None:
        """Sends one event over a new connection. Its times count from `due`."""
        now = datetime.now(UTC)
        workout, name = workout_event(self.users[number % len(self.users)], number), message_id(now)
        body = msgspec.json.encode(workout)
        headers = signed(body, name=name, at=now, secret=self.target.junction_secret)
        try:
            status = str(post(self.target, PATH, body, headers))
        except (OSError, http.client.HTTPException) as error:
            status = type(error).__name__
        answered = time.perf_counter()
        self.statuses[status] += 1
        self.answers.append(answered - due)
        if status == "202":
            self.waiting[name] = answered
            self.accepted.append(workout["data"]["id"])


def post(target: Target, path: str, body: bytes, headers: dict[str, str]) -> int:
    """Sends one request over a new connection and returns the status."""
    connection = http.client.HTTPConnection(target.host, target.port, timeout=SENDER_TIMEOUT_SECONDS)
    try:
        connection.request("POST", path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def run(target: Target, signals: Signals, rate: float, settle_seconds: float) -> None:
    """Sends until `over`, then waits for the rows for at most `settle_seconds`. The process of the good sender."""
    sender, to_row = _Sender(target), list[float]()
    with psycopg.connect(target.database_url, autocommit=True) as connection:
        thread = threading.Thread(target=_send_all, args=(sender, signals, rate))
        thread.start()
        deadline = time.monotonic() + settle_seconds
        while thread.is_alive() or sender.waiting:
            if thread.is_alive():
                deadline = time.monotonic() + settle_seconds
            elif time.monotonic() > deadline:
                break
            if ids := list(sender.waiting):
                found = connection.execute(FOUND, (ids,)).fetchall()
                now = time.perf_counter()
                to_row += [now - sender.waiting.pop(name) for (name,) in found]
            time.sleep(POLL_SECONDS)
        thread.join()
        stored: Any = connection.execute(ROWS, (sender.users, sender.accepted)).fetchone()
    sent, lost = sender.statuses.total(), len(sender.accepted) - stored[0]
    signals.result.put(Good(sent, dict(sender.statuses), spread(sender.answers), spread(to_row), lost))


def _send_all(sender: _Sender, signals: Signals, rate: float) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        number, due = 0, time.perf_counter()
        signals.ready.set()
        while not signals.over.wait(max(0.0, due - time.perf_counter())):
            pool.submit(sender.send, number, due)
            number, due = number + 1, due + 1 / rate
