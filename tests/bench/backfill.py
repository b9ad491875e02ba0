"""History beside live events: samples stored a second by two workers, and how long a live event takes meanwhile."""

import multiprocessing
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
from sqlalchemy import Engine, text

from app.actions import Samples
from app.catalogue import catalogue
from app.config import load
from app.providers import junction
from tests.bench.load import workout_event
from tests.bench.pages import SAMPLES_A_PAGE, WINDOW, page
from tests.support import START, event, message_id, signed
from workers.store.engine import make_engine, make_writer, transaction
from workers.store.series import SeriesNumbers
from workers.store.users import touch_users
from workers.store.writer import Numbered, write

PAGES = 50  # of one person's history
PATIENCE_SECONDS = 60
LOOKS_SECONDS = 0.005
FOUND = text("SELECT message_id FROM health.deliveries WHERE message_id = ANY(:ids)")
PROGRESS = text("""
SELECT count(*) FILTER (WHERE status = 'complete') AS complete, count(*) FILTER (WHERE status = 'failed') AS failed,
       coalesce(sum(records), 0) AS records,
       extract(epoch FROM max(finished_at) - min(started_at)) AS seconds
FROM health.backfills WHERE user_id = ANY(:users)""")
STORED = text("SELECT count(*) FROM health.heartrate WHERE user_id = ANY(:users)")


class Sender:
    """Sends signed events as the aggregator does."""

    def __init__(self, stack: dict[str, Any]) -> None:
        self._url, self._secret = f"{stack['web']}/webhooks/junction", stack["junction_webhook_secret"]
        self._client = httpx.Client(timeout=20)

    def send(self, body: dict[str, Any]) -> str:
        """The id of an event, once it was answered 202."""
        now = datetime.now(UTC)
        raw, name = msgspec.json.encode(body), message_id(now)
        headers = signed(raw, name=name, at=now, secret=self._secret)
        self._client.post(self._url, content=raw, headers=headers).raise_for_status()
        return name

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()


class Live:
    """Workouts at a fixed rate while it is entered; how long each took from its 202 until a reader found its row."""

    def __init__(self, stack: dict[str, Any], rate: float) -> None:
        self._sender, self._pause = Sender(stack), 1 / rate
        self._engine = make_engine(load({"DATABASE_URL": stack["database_url"]}), "headrace-bench-live")
        self._over, self._waiting = Event(), dict[str, float]()
        self._threads = [Thread(target=self._send_all), Thread(target=self._look)]
        self.seconds_each: list[float] = []

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
        self._engine.dispose()
        self._sender.close()

    def percentile(self, share: float) -> float:
        """The time that this share of the events stayed under, in milliseconds."""
        return sorted(self.seconds_each)[int(len(self.seconds_each) * share)] * 1000

    def _send_all(self) -> None:
        users, number, due = [str(uuid.uuid4()) for _ in range(50)], 0, time.perf_counter()
        with ThreadPoolExecutor(16) as pool:  # whoever waits for an answer holds up nobody
            while not self._over.wait(max(0.0, due - time.perf_counter())):
                pool.submit(self._send, workout_event(users[number % 50], number))
                number, due = number + 1, due + self._pause

    def _send(self, body: dict[str, Any]) -> None:
        name = self._sender.send(body)
        self._waiting[name] = time.perf_counter()

    def _look(self) -> None:
        deadline = None
        while self._waiting or not self._over.is_set():
            if self._over.is_set() and time.perf_counter() > (deadline := deadline or time.perf_counter() + 30):
                raise TimeoutError(f"{len(self._waiting)} live events never came to the database")
            with self._engine.connect() as connection:
                found = connection.scalars(FOUND, {"ids": list(self._waiting)}).all()
            now = time.perf_counter()
            self.seconds_each += [now - self._waiting.pop(name) for name in found]
            time.sleep(LOOKS_SECONDS)


@dataclass(frozen=True)
class History:
    """What came of fetching a history: `seconds` from the first request to the last page's commit."""

    samples: int
    missing: int
    seconds: float

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds


def pull(stack: dict[str, Any], people: int) -> History:
    """Tells that so many people's heart rate can be fetched, and waits until all of it is there."""
    users = [str(uuid.uuid4()) for _ in range(people)]
    data = {"start_date": START.isoformat(), "end_date": (START + WINDOW).isoformat(), "provider": "garmin"}
    sender, engine = Sender(stack), make_engine(load({"DATABASE_URL": stack["database_url"]}), "headrace-bench")
    for user in users:
        sender.send(event("historical.data.heartrate.created", user, data | {"is_final": True}))
    sender.close()
    seconds = _fetched(engine, users)
    with engine.connect() as connection:
        count = connection.scalar(STORED, {"users": users}) or 0
    engine.dispose()
    return History(count, people * PAGES * SAMPLES_A_PAGE - count, seconds)


def _fetched(engine: Engine, users: Sequence[str]) -> float:
    """Waits until everybody's backfill is complete: how long they took together."""
    last, changed = -1, time.monotonic()
    while True:
        with engine.connect() as connection:
            row = connection.execute(PROGRESS, {"users": list(users)}).one()
        if row.complete == len(users):
            return float(row.seconds)
        if row.records != last:
            last, changed = row.records, time.monotonic()
        if row.failed or time.monotonic() > changed + PATIENCE_SECONDS:
            raise RuntimeError(f"the history does not come: {row}")
        time.sleep(0.2)


def asking(url: str, seconds: float = 2.0) -> float:
    """Samples a second that one client gets, without reading what they say."""
    count, began = 0, time.perf_counter()
    with httpx.Client(base_url=url) as client:
        while time.perf_counter() < began + seconds:
            client.get("/", params={"next_cursor": str(count % PAGES)}).raise_for_status()
            count += 1
    return count * SAMPLES_A_PAGE / (time.perf_counter() - began)


def reading(seconds: float = 2.0) -> float:
    """Samples a second that one process makes of pages that it has."""
    body, count, began = page(0, PAGES), 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        junction.read_page(catalogue()["heartrate"], "floor", body, START)
        count += 1
    return count * SAMPLES_A_PAGE / (time.perf_counter() - began)


def writing(database_url: str, people: int, processes: int) -> float:
    """Samples a second that processes write who have read them before, page by page, each for people of its own."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Barrier(processes + 1), context.Barrier(processes + 1)
    share = people // processes
    children = [context.Process(target=_write_all, args=(database_url, share, ready, go)) for _ in range(processes)]
    for child in children:
        child.start()
    ready.wait(120)
    go.wait(120)
    began = time.perf_counter()
    for child in children:
        child.join(300)
    if any(child.exitcode for child in children):
        raise RuntimeError("a process could not write")
    return share * processes * PAGES * SAMPLES_A_PAGE / (time.perf_counter() - began)


def _write_all(database_url: str, people: int, ready: Any, go: Any) -> None:
    engine = make_writer(load({"DATABASE_URL": database_url}), "headrace-bench-floor")
    numbers, read = SeriesNumbers(engine), [_samples(page(number, PAGES)) for number in range(PAGES)]
    with transaction(engine) as connection:  # else the first page would pay for the connection
        touch_users(connection, {"floor": None})
    ready.wait(120)
    go.wait(120)
    for _ in range(people):
        user = str(uuid.uuid4())
        for samples in read:
            action = replace(samples, user_id=user)
            known = numbers.of([action.series])
            with transaction(engine) as connection:
                touch_users(connection, {user: None})
                write(connection, [Numbered(0, action)], "backfill", known)
    engine.dispose()


def _samples(body: bytes) -> Samples:
    (action,) = junction.read_page(catalogue()["heartrate"], "floor", body, datetime.now(UTC)).actions
    assert isinstance(action, Samples)
    return action
