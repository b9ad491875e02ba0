"""The workers' transport on a real Valkey: a message is always in a place where it is found again."""

import base64
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from celery import Task
from celery.exceptions import Reject, Retry
from sqlalchemy import Engine

from app.broker import redis_transport
from app.broker.celery import make_celery
from app.broker.publisher import Publisher
from app.broker.redis_transport import INVALID, MAX_MERGED_BYTES, MAX_MERGED_MESSAGES, PROCESSING
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import TryLater
from tests.support import delivery, rows, until, worker, workout
from workers.celery.tasks import retry_later

LIVE = "live"
_numbers = itertools.count()


@pytest.fixture
def broker(broker_url: str) -> Iterator["redis.Redis"]:
    """What is in the broker."""
    with redis.Redis.from_url(broker_url) as client:
        yield client


def publish(settings: Settings, *messages: list[Delivery]) -> None:
    """Puts messages on the live lane, as the endpoint does."""
    publisher = Publisher(make_celery(settings, "publisher"))
    for deliveries in messages:
        publisher.publish(deliveries)
    publisher.close()


def held(broker: "redis.Redis") -> int:
    """How many messages the broker has, wherever."""
    return int(broker.llen(LIVE) + broker.llen(LIVE + PROCESSING) + broker.hlen("unacked"))


def test_what_a_killed_worker_had_just_taken_comes_back(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path
) -> None:
    """Breaks if a worker that is killed between taking a message and writing it down takes it along."""
    count = 3
    publish(settings, *([delivery(workout(f"u{number}"))] for number in range(count)))
    taken = 0
    while broker.lmove(LIVE, LIVE + PROCESSING, "RIGHT", "LEFT"):
        taken += 1
    assert (taken, broker.llen(LIVE)) == (count, 0)
    with worker(settings, tmp_path / "log") as process:
        query = "SELECT count(*) AS n, count(DISTINCT user_id) AS users FROM health.workouts"
        until(lambda: rows(engine, query) == [{"n": count, "users": count}])
        until(lambda: held(broker) == 0)
        assert process.poll() is None
    assert "Traceback" not in (tmp_path / "log").read_text()
    ledger = rows(engine, "SELECT outcome, attempts, count(*) AS n FROM health.deliveries GROUP BY 1, 2")
    assert ledger == [{"outcome": "applied", "attempts": 1, "n": count}]


def test_nothing_stays_behind_after_normal_work(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path
) -> None:
    """Breaks if a message stays in the list beside the lane, to be applied once more every few seconds."""
    with worker(settings, tmp_path / "log"):
        for wave in range(3):
            publish(settings, *([delivery(workout(f"u{wave}", f"w{number}"))] for number in range(40)))
            until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 40 * (wave + 1))  # noqa: B023
            until(lambda: held(broker) == 0)
    assert rows(engine, "SELECT DISTINCT attempts FROM health.deliveries") == [{"attempts": 1}]
    assert (broker.exists("unacked_index"), broker.exists(LIVE + PROCESSING)) == (0, 0)


@pytest.mark.parametrize(
    "rubbish",
    [
        b"{}",
        b"no JSON",
        pytest.param(b"[" * 100_000, id="deep"),
        b"[]",
        b'{"properties": {}}',
        b'{"properties": {"delivery_tag": "1"}, "headers": {}}',
        b'{"properties": {"delivery_tag": "1", "delivery_info": {}, "body_encoding": "base64"}, "body": "/"}',
        b'{"properties": {"delivery_tag": "1", "delivery_info": {}}, "headers": []}',
    ],
)
def test_rubbish_in_the_lane_does_not_stop_it(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path, rubbish: bytes
) -> None:
    """Breaks if an entry that is no message ends every worker of the lane, one after the other."""
    broker.lpush(LIVE, rubbish)
    publish(settings, [delivery(workout("u1"))])
    with worker(settings, tmp_path / "log") as process:
        until(lambda: rows(engine, "SELECT 1 FROM health.workouts") or process.poll() is not None)
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 1


def test_a_fresh_transport_takes_a_message_by_moving_it(settings: Settings, broker: "redis.Redis") -> None:
    """Breaks if a message is in no list while its taker has not yet written it down."""
    publish(settings, [delivery(workout("u1"))])
    celery = make_celery(settings, "publisher")
    celery.conf.broker_transport = "app.broker.redis_transport:Transport"
    seen: list[tuple[int, int, int]] = []
    lane = next(queue for queue in celery.conf.task_queues if queue.name == LIVE)

    def note(message: Any) -> None:
        seen.append((broker.llen(LIVE), broker.llen(LIVE + PROCESSING), broker.hlen("unacked")))
        message.ack()

    with celery.connection_for_read() as connection, connection.channel() as channel:
        consumer = celery.amqp.Consumer(channel, [lane], on_message=note, accept=["json"])
        with consumer:
            connection.drain_events(timeout=10)
    assert seen == [(0, 0, 1)]
    assert held(broker) == 0
    celery.close()


@contextlib.contextmanager
def taking(settings: Settings, then: Callable[[Any], None]) -> Iterator[Callable[[], None]]:
    """Takes a message of the lane as a worker does, each time it is called, and does this with it."""
    celery = make_celery(settings, "worker")
    lane = next(queue for queue in celery.conf.task_queues if queue.name == LIVE)
    with (
        celery.connection_for_read() as connection,
        connection.channel() as channel,
        celery.amqp.Consumer(channel, [lane], on_message=then, accept=["json"]),
    ):
        yield lambda: connection.drain_events(timeout=10)
    celery.close()


def take(settings: Settings, then: Callable[[Any], None]) -> None:
    """Takes one."""
    with taking(settings, then) as take_one:
        take_one()


def test_a_message_is_given_back_to_the_lane_it_came_from(settings: Settings, broker: "redis.Redis") -> None:
    """Breaks if a message is dropped when its exchange has no bindings: kombu finds no lane for it then."""
    publish(settings, [delivery(workout("u1"))])

    def give_back(message: Any) -> None:
        broker.delete("_kombu.binding.live")
        message.reject(requeue=True)

    take(settings, give_back)
    assert (broker.llen(LIVE), held(broker)) == (1, 1)


def test_whoever_is_killed_while_giving_back_does_not_stop_the_others(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path
) -> None:
    """Breaks if the lock of a dead process outlives it by minutes, in which no killed worker's message comes back."""
    publish(settings, [delivery(workout("u1"))])
    message = json.loads(broker.rpop(LIVE) or b"")
    broker.hset("unacked", "1", json.dumps([message, "", LIVE]))
    broker.zadd("unacked_index", {"1": 1})  # long ago
    with make_celery(settings, "worker").connection_for_read().channel() as dead:
        assert broker.lock(dead.unacked_mutex_key, timeout=dead.unacked_mutex_expire).acquire(blocking=False)
    with worker(settings, tmp_path / "log"):
        until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))


# What waits together


def test_what_waits_together_is_applied_together(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path
) -> None:
    """Breaks if a lane that has filled is worked off at a message's price for each, or anything of it is lost."""
    count = 200
    publish(settings, *([delivery(workout(f"u{number}"))] for number in range(count)))
    with worker(settings, tmp_path / "log"):
        until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == count and held(broker) == 0)
    (found,) = rows(engine, "SELECT count(*) AS n, count(DISTINCT applied_at) AS together FROM health.deliveries")
    assert found["n"] == count
    assert found["together"] <= 2 * count / MAX_MERGED_MESSAGES
    assert rows(engine, "SELECT DISTINCT outcome, attempts FROM health.deliveries") == [
        {"outcome": "applied", "attempts": 1}
    ]


def test_a_shared_batch_lingers_for_the_next(
    settings: Settings, broker: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if several workers share a busy lane in small messages, or one at a quiet lane waits in vain."""
    monkeypatch.setattr(redis_transport, "LINGER_SECONDS", 2.0)
    publisher, taken = Publisher(make_celery(settings, "publisher")), list[tuple[str, bool]]()
    began = time.monotonic()

    def note(message: Any) -> None:
        taken.append((message.headers["argsrepr"], time.monotonic() - began > 2.0))
        message.ack()

    with taking(settings, note) as take_one:
        for user in ("u1", "u2"):
            publisher.publish([delivery(workout(user))])
        take_one()  # both were there
        publisher.publish([delivery(workout("u3"))])
        timer = threading.Timer(0.3, publisher.publish, [[delivery(workout("u4"))]])
        timer.start()
        take_one()
        timer.join()
        publisher.publish([delivery(workout("u5"))])
        take_one()
    publisher.close()
    assert [many for many, _ in taken] == ["(2 deliveries)", "(2 deliveries)", "(1 deliveries)"]
    assert not taken[0][1]


def test_what_was_taken_together_comes_back_together(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path
) -> None:
    """Breaks if a worker that is killed with joined messages takes along all but the first."""
    publish(settings, *([delivery(workout(f"u{number}"))] for number in range(5)))
    seen = []

    def give_back(message: Any) -> None:
        seen.append(
            (message.headers["argsrepr"], broker.llen(LIVE), broker.llen(LIVE + PROCESSING), broker.hlen("unacked"))
        )
        message.reject(requeue=True)

    take(settings, give_back)
    assert (seen, broker.llen(LIVE), held(broker)) == ([("(5 deliveries)", 0, 0, 1)], 1, 1)
    with worker(settings, tmp_path / "log"):
        until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 5)


def test_no_more_is_taken_along_than_a_worker_can_hold(settings: Settings, broker: "redis.Redis") -> None:
    """Breaks if messages of megabytes are joined, or so many that one transaction takes seconds."""
    noise = os.urandom(MAX_MERGED_BYTES // 6).hex()  # does not shrink; base64 twice makes it 1.8 times as large
    publish(settings, *([delivery(workout("u1", note=noise))] for _ in range(4)))
    publish(settings, *([delivery(workout(f"u{number}"))] for number in range(2 * MAX_MERGED_MESSAGES)))
    taken: list[int] = []

    def note(message: Any) -> None:
        taken.append(int(message.headers["argsrepr"][1:].partition(" ")[0]))
        message.ack()

    while broker.llen(LIVE):
        take(settings, note)
    assert (sum(taken), max(taken), taken[0]) == (4 + 2 * MAX_MERGED_MESSAGES, MAX_MERGED_MESSAGES, 2), taken


@pytest.mark.parametrize("odd", ["rubbish", "retried", "newer", "another task"])
def test_what_cannot_be_joined_stops_nothing(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path, odd: str
) -> None:
    """Breaks if one message among others that is of another kind takes them along, or stays for ever."""
    publish(settings, *([delivery(workout(f"u{number}"))] for number in range(9)))
    message = json.loads(broker.lindex(LIVE, 4) or b"")
    arguments = json.loads(base64.b64decode(message["body"]))
    if odd == "retried":
        message["headers"] |= {"retries": 1}
    elif odd == "newer":
        arguments[0] = [base64.b64encode(msgspec.msgpack.encode([2, []])).decode()]
    elif odd == "another task":
        message["headers"] |= {"task": "headrace.unheard"}
    message["body"] = base64.b64encode(json.dumps(arguments).encode()).decode()
    broker.lset(LIVE, 4, b"rubbish" if odd == "rubbish" else json.dumps(message))
    with worker(settings, tmp_path / "log"):
        until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == (9 if odd == "retried" else 8))
        until(lambda: held(broker) == 0)
    kept = len(rows(engine, "SELECT 1 FROM headrace.dead_letters")) + broker.llen(LIVE + INVALID)
    assert kept == (0 if odd == "retried" else 1)


# A task that cannot be put back


def failing_task(broker_url: str) -> Task:
    """A task as a worker has it in its hands, of a broker at this place."""
    celery = make_celery(Settings(broker_url=broker_url), "publisher")

    name = f"tests.fails{next(_numbers)}"

    @celery.task(name=name, bind=True, max_retries=None)
    def task(task: Task) -> None:
        """Does nothing."""

    bound: Task = celery.tasks[name]
    bound.push_request(
        id="1",
        args=(),
        kwargs={},
        retries=3,
        called_directly=False,
        argsrepr="(1 deliveries)",
        delivery_info={"routing_key": "live", "exchange": "live"},
    )
    return bound


@pytest.mark.parametrize("error", [TryLater("PostgreSQL: away"), ValueError("canary")])
def test_a_task_that_cannot_be_put_back_is_not_dropped(error: Exception) -> None:
    """Breaks if a message is gone when the database and the broker are away at the same time."""

    def fail() -> None:
        raise error

    task = failing_task("redis://127.0.0.1:1/0")
    with pytest.raises(Reject) as rejected:
        retry_later(task, fail)
    assert rejected.value.requeue is True
    task.app.close()


def test_a_task_that_can_be_put_back_is(broker: "redis.Redis", broker_url: str) -> None:
    """Breaks if a failing task is acknowledged without a message that takes its place, or that tells what it held."""

    def fail() -> None:
        raise ValueError("canary")

    publish(Settings(broker_url=broker_url), [delivery(workout("u1"))])  # the lane is known, as to every worker of it
    broker.delete(LIVE)
    task = failing_task(broker_url)
    with pytest.raises(Retry) as retry:
        retry_later(task, fail)
    assert "canary" not in str(retry.value.excs)
    (raw,) = broker.lrange(LIVE, 0, -1)
    assert b"canary" not in raw
    headers = json.loads(raw)["headers"]
    assert (headers["retries"], headers["argsrepr"], headers["kwargsrepr"]) == (4, "(1 deliveries)", "{}")
    task.app.close()
