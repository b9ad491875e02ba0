"""Tasks, in real workers on the real broker: what becomes of a message when something is away."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from sqlalchemy import Engine

from app.config import Settings
from app.delivery import Delivery
from app.queue import APPLY, Publisher, make_celery
from tests.support import ENCRYPTION_KEY, delivery, rows, until, workout
from workers.tasks import LONGEST_PAUSE_SECONDS, pause_before

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("attempt", "longest"),
    [(0, 0.5), (1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 16.0), (6, 30.0), (7, 30.0), (10**9, 30.0)],
)
def test_a_pause_doubles_up_to_half_a_minute(attempt: int, longest: float) -> None:
    """Breaks if workers try again all at once, hammer what is away, or sleep past the visibility timeout."""
    pauses = [pause_before(attempt) for _ in range(200)]
    assert longest / 2 <= min(pauses) < max(pauses) <= longest
    assert max(pauses) - min(pauses) > longest / 4


def test_a_waiting_message_is_not_given_to_another_worker() -> None:
    """Breaks if a message that waits in a worker becomes visible again meanwhile, and is applied by two."""
    assert Settings().visibility_timeout_seconds > LONGEST_PAUSE_SECONDS


@dataclass(frozen=True)
class Worker:
    """A worker process and what it has written."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def waits(self) -> int:
        """How often it has put a task back."""
        return self.log.read_text().count("headrace.apply waits")


@contextmanager
def worker(settings: Settings, log: Path, database_url: str | None = None) -> Iterator[Worker]:
    """A worker of the live lane, ended with SIGTERM unless it has ended."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "BROKER_URL": settings.need_broker(),
        "DATABASE_URL": database_url or settings.need_database(),
        "HEADRACE_ENCRYPTION_KEY": base64.b64encode(ENCRYPTION_KEY).decode(),
        "HEADRACE_VISIBILITY_TIMEOUT_SECONDS": "2",
    }
    command = (sys.executable, "-m", "workers.cli", "worker", "--lane", "live")
    with log.open("wb") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            yield Worker(process, log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()


def publish(settings: Settings, *deliveries: Delivery) -> None:
    """Puts one message on the live lane, as the endpoint does."""
    publisher = Publisher(make_celery(settings, "publisher"))
    publisher.publish(deliveries)
    publisher.close()


def held(settings: Settings) -> list[dict[str, Any]]:
    """The messages that the broker still has: those that wait, and those that a worker has not acknowledged."""
    with redis.Redis.from_url(settings.need_broker()) as client:
        lists = ("live", "live:taken")
        waiting = [json.loads(raw) for name in lists for raw in client.lrange(name, 0, -1)]
        return waiting + [json.loads(raw)[0] for raw in client.hvals("unacked")]


def stored(engine: Engine) -> list[dict[str, Any]]:
    """The workouts that a reader sees."""
    return rows(engine, "SELECT user_id FROM health.workouts")


NOWHERE = "postgresql://u:sesame@127.0.0.1:1/d"


@pytest.mark.parametrize("ending", ["terminate", "kill"])
def test_a_message_waits_for_a_database_that_is_away(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path, ending: str
) -> None:
    """Breaks if a message is lost or acknowledged while PostgreSQL is down, or while the worker that held it ends."""
    publish(settings, delivery(workout("u1")))
    with worker(settings, tmp_path / "first.log", NOWHERE) as first:
        until(lambda: first.waits() >= 3)
        assert held(settings)
        log = first.log.read_text()
        getattr(first.process, ending)()
        first.process.wait(30)
    assert "sesame" not in log
    (message,) = {one["headers"]["id"]: one for one in held(settings)}.values()
    assert message["headers"]["task"] == APPLY
    assert message["headers"]["retries"] >= 2
    assert message["headers"]["argsrepr"] == "(1 deliveries)"
    assert message["headers"]["kwargsrepr"] == "{}"
    assert stored(engine) == []
    with worker(settings, tmp_path / "second.log"):
        until(lambda: stored(engine))
        until(lambda: not held(settings))
    assert stored(engine) == [{"user_id": "u1"}]


def test_a_worker_that_is_killed_amid_messages_loses_none(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if a message is acknowledged before its rows are committed, or does not come back."""
    for number in range(120):
        publish(settings, *(delivery(workout(f"u{number}", f"w{each}")) for each in range(10)))
    with worker(settings, tmp_path / "first.log") as first:
        until(lambda: stored(engine))
        first.process.kill()
        first.process.wait(30)
    assert held(settings)
    count = "SELECT count(*) AS n, count(DISTINCT user_id) AS users FROM health.workouts"
    with worker(settings, tmp_path / "second.log") as second:
        until(lambda: rows(engine, count) == [{"n": 1200, "users": 120}])
        until(lambda: not held(settings))
    assert "Traceback" not in second.log.read_text()
    assert rows(engine, "SELECT outcome, count(*) AS n FROM health.deliveries GROUP BY 1") == [
        {"outcome": "applied", "n": 1200}
    ]


def send(settings: Settings, packed: str) -> None:
    """Puts a message of any content on the live lane."""
    celery = make_celery(settings, "publisher")
    celery.send_task(APPLY, args=(packed,), queue="live", argsrepr="(?)")
    celery.close()


def test_a_message_that_is_none_of_ours_does_not_stop_the_lane(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if rubbish in the queue ends the worker, or what it held gets into the log."""
    send(settings, "sesame!")
    publish(settings, delivery(workout("u1")))
    with worker(settings, tmp_path / "log") as one:
        until(lambda: stored(engine))
        assert one.process.poll() is None
    assert "sesame" not in one.log.read_text()


def test_a_message_of_a_newer_version_is_not_lost(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if deliveries that were answered 202 are gone because an older worker met them during an update."""
    newer = msgspec.msgpack.encode((2, [delivery(workout("u1"))]))
    send(settings, base64.b64encode(newer).decode())
    publish(settings, delivery(workout("u2")))
    with worker(settings, tmp_path / "log"):
        until(lambda: stored(engine))
    assert held(settings) or rows(engine, "SELECT 1 FROM headrace.dead_letters")
