"""The workers' transport on a real Valkey: every message is always in a list from which it is recovered."""

import base64
import json
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from sqlalchemy import Engine

from app.broker.celery import make_celery
from app.broker.lanes import INVALID, PROCESSING
from app.broker.redis_transport import MAX_MERGED_MESSAGES
from app.config.settings import Settings
from tests.support import delivery, rows, until, worker, workout
from tests.support.workers import BUSY, LIVE, SharedWorker, consume_one, held, ledger, publish

pytestmark = pytest.mark.processes


def test_a_message_popped_by_a_killed_worker_is_redelivered(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if a message is lost when its worker is killed right after popping it."""
    count = 3
    with live_worker.busy(engine):
        publish(settings, *([delivery(workout(f"u{number}"))] for number in range(count)))
        popped = 0
        while broker.lmove(LIVE, LIVE + PROCESSING, "RIGHT", "LEFT"):
            popped += 1
        assert (popped, broker.llen(LIVE)) == (count, 0)
    query = "SELECT count(*) AS n, count(DISTINCT user_id) AS users FROM health.workouts"
    until(lambda: rows(engine, query) == [{"n": count, "users": count}])
    until(lambda: held(broker) == 0)
    assert live_worker.is_alive
    assert "Traceback" not in live_worker.output
    assert ledger(engine) == [{"outcome": "applied", "attempts": 1, "n": count}]


def test_applied_messages_leave_the_processing_list(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if an applied message stays in the processing list: it would be applied again every few seconds."""
    for batch in range(3):
        publish(settings, *([delivery(workout(f"u{batch}", f"w{number}"))] for number in range(40)))
        until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 40 * (batch + 1))  # noqa: B023
        until(lambda: held(broker) == 0)
    assert ledger(engine) == [{"outcome": "applied", "attempts": 1, "n": 120}]
    assert (broker.exists("unacked_index"), broker.exists(LIVE + PROCESSING)) == (0, 0)


INVALID_ENTRIES = (
    b"{}",
    b"no JSON",
    b"[" * 100_000,
    b"[]",
    b'{"properties": {}}',
    b'{"properties": {"delivery_tag": "1"}, "headers": {}}',
    b'{"properties": {"delivery_tag": "1", "delivery_info": {}, "body_encoding": "base64"}, "body": "/"}',
    b'{"properties": {"delivery_tag": "1", "delivery_info": {}}, "headers": []}',
)


def test_an_invalid_entry_does_not_stop_the_lane(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if an invalid entry ends every worker of the lane, one after the other."""
    stopped = []
    for number, entry in enumerate(INVALID_ENTRIES):
        broker.lpush(LIVE, entry)
        publish(settings, [delivery(workout(f"u{number}"))])
        query = f"SELECT 1 FROM health.workouts WHERE user_id = 'u{number}'"
        until(lambda: rows(engine, query) or not live_worker.is_alive)  # noqa: B023
        if not live_worker.is_alive:
            stopped.append(entry[:200])
            broker.flushall()
            live_worker.ready()
    assert stopped == []
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == len(INVALID_ENTRIES)


def test_a_worker_killed_during_a_restore_does_not_block_other_restores(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if a dead process holds the restore lock for minutes, so that no other process restores messages."""
    with live_worker.busy(engine):
        publish(settings, [delivery(workout("u1"))])
        message = json.loads(broker.rpop(LIVE) or b"")
        broker.hset("unacked", "1", json.dumps([message, "", LIVE]))
        broker.zadd("unacked_index", {"1": 1})  # long ago
        with make_celery(settings, "worker").connection_for_read().channel() as dead:
            assert broker.lock(dead.unacked_mutex_key, timeout=dead.unacked_mutex_expire).acquire(blocking=False)
    until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))


def test_the_message_of_a_long_task_is_not_redelivered(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if a task that takes longer than the visibility timeout runs on two workers at a time."""
    timeout = 2  # of the worker, see `of_worker`
    celery = make_celery(replace(settings, visibility_timeout_seconds=timeout), "worker")
    with live_worker.busy(engine), celery.connection_for_read().channel() as other:
        until_then = time.monotonic() + timeout + 0.6
        while time.monotonic() < until_then:
            other.qos.restore_visible(interval=1)
            assert (broker.llen(LIVE), broker.zcard("unacked_index")) == (0, 1)
            time.sleep(0.1)
    until(lambda: held(broker) == 0)
    assert [row["attempts"] for row in rows(engine, "SELECT attempts FROM health.deliveries")] == [1]
    celery.close()


# Merged messages


def test_queued_messages_are_merged_and_applied_together(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if a worker consumes a long queue one message at a time, or a message is lost."""
    count = 400
    with live_worker.busy(engine):
        publish(settings, *([delivery(workout(f"u{number}"))] for number in range(count)))
    until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == count and held(broker) == 0)
    query = "SELECT count(DISTINCT applied_at) AS transactions FROM health.deliveries WHERE message_id <> :busy"
    assert rows(engine, query, busy=BUSY)[0]["transactions"] <= 2 * count / MAX_MERGED_MESSAGES
    assert ledger(engine) == [{"outcome": "applied", "attempts": 1, "n": count}]


def test_merged_messages_are_redelivered_together(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if all messages but the first are lost when merged messages are requeued."""
    seen = []

    def requeue(message: Any) -> None:
        seen.append(
            (message.headers["argsrepr"], broker.llen(LIVE), broker.llen(LIVE + PROCESSING), broker.hlen("unacked"))
        )
        message.reject(requeue=True)

    with live_worker.busy(engine):
        publish(settings, *([delivery(workout(f"u{number}"))] for number in range(5)))
        consume_one(settings, requeue)
        busy = 1  # the worker's own message
        assert seen == [("(5 deliveries)", 0, 0, 1 + busy)]
        assert (broker.llen(LIVE), held(broker)) == (1, 1 + busy)
    until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 5)


@pytest.mark.parametrize("kind", ["invalid", "retried", "newer", "another task"])
def test_a_message_that_cannot_be_merged_blocks_no_other(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker, kind: str
) -> None:
    """Breaks if a message that cannot be merged makes other messages stay in the lane or get lost."""
    with live_worker.busy(engine):
        publish(settings, *([delivery(workout(f"u{number}"))] for number in range(9)))
        message = json.loads(broker.lindex(LIVE, 4) or b"")
        arguments = json.loads(base64.b64decode(message["body"]))
        if kind == "retried":
            message["headers"] |= {"retries": 1}
        elif kind == "newer":
            arguments[0] = [base64.b64encode(msgspec.msgpack.encode([3, []])).decode()]
        elif kind == "another task":
            message["headers"] |= {"task": "headrace.unknown"}
        message["body"] = base64.b64encode(json.dumps(arguments).encode()).decode()
        broker.lset(LIVE, 4, b"invalid" if kind == "invalid" else json.dumps(message))
    until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == (9 if kind == "retried" else 8))
    until(lambda: held(broker) == 0)
    stored = len(rows(engine, "SELECT 1 FROM headrace.dead_letters")) + broker.llen(LIVE + INVALID)
    assert stored == (0 if kind == "retried" else 1)


@pytest.mark.parametrize("is_new", [False, True], ids=["running", "started meanwhile"])
def test_a_worker_empties_a_full_broker(
    engine: Engine,
    settings: Settings,
    broker: "redis.Redis",
    live_worker: SharedWorker,
    tmp_path: Path,
    *,
    is_new: bool,
) -> None:
    """Breaks if a worker ends, or cannot start, while the broker's memory is full: nobody could empty it then."""
    with ExitStack() as until_end:
        until_end.callback(broker.config_set, "maxmemory", "0")
        busy = until_end.enter_context(ExitStack())
        busy.enter_context(live_worker.busy(engine))
        publish(settings, *([delivery(workout(f"u{number}"))] for number in range(3)))
        broker.set("filler", b"x" * 2_000_000)
        broker.config_set("maxmemory", "1mb")
        if is_new:
            until_end.enter_context(worker(settings, tmp_path / "log"))
        else:
            busy.close()
        until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 3)
        busy.close()
        until(lambda: held(broker) == 0)
    assert live_worker.is_alive


def test_a_worker_outlives_a_broker_without_replicas(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if a worker ends because the broker refuses commands: NOREPLICAS, READONLY, MISCONF."""
    with live_worker.busy(engine):
        publish(settings, [delivery(workout("u1"))])
        broker.config_set("min-replicas-to-write", 1)
    try:
        until(lambda: "NOREPLICAS" in live_worker.output)
    finally:
        broker.config_set("min-replicas-to-write", 0)
    until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 1)
    assert live_worker.is_alive
