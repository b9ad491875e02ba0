"""The workers' transport on a real Valkey: every message is always in a list from which it is recovered."""

import base64
import json
from typing import Any

import msgspec
import pytest
import redis
from sqlalchemy import Engine

from app.broker.celery import make_celery
from app.broker.redis_transport import INVALID, MAX_MERGED_MESSAGES, PROCESSING
from app.config.settings import Settings
from tests.support import delivery, rows, until, workout
from tests.support.workers import BUSY, LIVE, SharedWorker, held, ledger, publish, take

pytestmark = pytest.mark.processes


def test_what_a_killed_worker_had_just_taken_comes_back(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if a worker that is killed right after it popped a message loses it."""
    count = 3
    with live_worker.busy(engine):
        publish(settings, *([delivery(workout(f"u{number}"))] for number in range(count)))
        taken = 0
        while broker.lmove(LIVE, LIVE + PROCESSING, "RIGHT", "LEFT"):
            taken += 1
        assert (taken, broker.llen(LIVE)) == (count, 0)
    query = "SELECT count(*) AS n, count(DISTINCT user_id) AS users FROM health.workouts"
    until(lambda: rows(engine, query) == [{"n": count, "users": count}])
    until(lambda: held(broker) == 0)
    assert live_worker.is_alive
    assert "Traceback" not in live_worker.output
    assert ledger(engine) == [{"outcome": "applied", "attempts": 1, "n": count}]


def test_nothing_stays_behind_after_normal_work(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if a message stays in the processing list after it was applied, to be applied again every few seconds."""
    for wave in range(3):
        publish(settings, *([delivery(workout(f"u{wave}", f"w{number}"))] for number in range(40)))
        until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 40 * (wave + 1))  # noqa: B023
        until(lambda: held(broker) == 0)
    assert ledger(engine) == [{"outcome": "applied", "attempts": 1, "n": 120}]
    assert (broker.exists("unacked_index"), broker.exists(LIVE + PROCESSING)) == (0, 0)


RUBBISH = (
    b"{}",
    b"no JSON",
    b"[" * 100_000,
    b"[]",
    b'{"properties": {}}',
    b'{"properties": {"delivery_tag": "1"}, "headers": {}}',
    b'{"properties": {"delivery_tag": "1", "delivery_info": {}, "body_encoding": "base64"}, "body": "/"}',
    b'{"properties": {"delivery_tag": "1", "delivery_info": {}}, "headers": []}',
)


def test_rubbish_in_the_lane_does_not_stop_it(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if an invalid entry ends every worker of the lane, one after the other."""
    stopped = []
    for number, rubbish in enumerate(RUBBISH):
        broker.lpush(LIVE, rubbish)
        publish(settings, [delivery(workout(f"u{number}"))])
        query = f"SELECT 1 FROM health.workouts WHERE user_id = 'u{number}'"
        until(lambda: rows(engine, query) or not live_worker.is_alive)  # noqa: B023
        if not live_worker.is_alive:
            stopped.append(rubbish[:200])
            broker.flushall()
            live_worker.ready()
    assert stopped == []
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == len(RUBBISH)


def test_whoever_is_killed_while_giving_back_does_not_stop_the_others(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if the restore lock of a dead process stays for minutes, and no lost message is restored meanwhile."""
    with live_worker.busy(engine):
        publish(settings, [delivery(workout("u1"))])
        message = json.loads(broker.rpop(LIVE) or b"")
        broker.hset("unacked", "1", json.dumps([message, "", LIVE]))
        broker.zadd("unacked_index", {"1": 1})  # long ago
        with make_celery(settings, "worker").connection_for_read().channel() as dead:
            assert broker.lock(dead.unacked_mutex_key, timeout=dead.unacked_mutex_expire).acquire(blocking=False)
    until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))


# Merged messages


def test_what_waits_together_is_applied_together(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if a filled lane is consumed one message at a time, or any message is lost."""
    count = 200
    with live_worker.busy(engine):
        publish(settings, *([delivery(workout(f"u{number}"))] for number in range(count)))
    until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == count and held(broker) == 0)
    query = "SELECT count(DISTINCT applied_at) AS together FROM health.deliveries WHERE message_id <> :busy"
    assert rows(engine, query, busy=BUSY)[0]["together"] <= 2 * count / MAX_MERGED_MESSAGES
    assert ledger(engine) == [{"outcome": "applied", "attempts": 1, "n": count}]


def test_what_was_taken_together_comes_back_together(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if a worker that is killed with merged messages loses all but the first."""
    seen = []

    def give_back(message: Any) -> None:
        seen.append(
            (message.headers["argsrepr"], broker.llen(LIVE), broker.llen(LIVE + PROCESSING), broker.hlen("unacked"))
        )
        message.reject(requeue=True)

    with live_worker.busy(engine):
        publish(settings, *([delivery(workout(f"u{number}"))] for number in range(5)))
        take(settings, give_back)
        busy = 1  # the worker's own message
        assert seen == [("(5 deliveries)", 0, 0, 1 + busy)]
        assert (broker.llen(LIVE), held(broker)) == (1, 1 + busy)
    until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 5)


@pytest.mark.parametrize("odd", ["rubbish", "retried", "newer", "another task"])
def test_what_cannot_be_joined_stops_nothing(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker, odd: str
) -> None:
    """Breaks if one message of another kind makes its neighbours stay in the lane or get lost."""
    with live_worker.busy(engine):
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
    until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == (9 if odd == "retried" else 8))
    until(lambda: held(broker) == 0)
    kept = len(rows(engine, "SELECT 1 FROM headrace.dead_letters")) + broker.llen(LIVE + INVALID)
    assert kept == (0 if odd == "retried" else 1)
