"""The retries of a task and of its message."""

import itertools
import json
import time
from typing import Any

import pytest
import redis
from celery import Task
from celery.exceptions import Reject, Retry
from celery.worker import state

from app.broker.celery import make_celery
from app.broker.lanes import FAILING_SINCE, FAILURES, LOST, RETRY_REASON
from app.config.settings import Settings
from app.errors import ConnectionLost, RetryAlone, TryLater
from tests.support import delivery, workout
from tests.support.workers import LIVE, publish
from workers.celery import tasks
from workers.celery.retries import MAX_RETRY_SECONDS, count_of
from workers.celery.tasks import retry_later

_numbers = itertools.count()


def test_a_delayed_message_stays_with_its_worker() -> None:
    """Breaks if a message that waits in a worker becomes visible meanwhile, and two workers apply it."""
    assert Settings().visibility_timeout_seconds > MAX_RETRY_SECONDS


def failing_task(broker_url: str) -> Task:
    """A running task on the broker at this URL."""
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
def test_a_task_that_cannot_be_enqueued_again_is_repeated(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a message is lost, or returned to the broker again and again, while PostgreSQL and the broker are down.

    RabbitMQ 4 drops a message that was returned 20 times. Here it is returned once, because the worker stops.
    """
    tries = []
    monkeypatch.setattr(tasks, "seconds_before", lambda _: 0.01)

    def fail() -> None:
        tries.append(error)
        if len(tries) == 25:
            monkeypatch.setattr(state, "should_stop", 0)
        raise error

    task = failing_task("redis://127.0.0.1:1/0")
    with pytest.raises(Reject) as rejected:
        retry_later(task, fail)
    assert rejected.value.requeue is True
    assert len(tries) == 25
    task.app.close()


def test_a_repeated_task_succeeds_when_its_cause_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a worker stops working for as long as the broker accepts no message."""
    monkeypatch.setattr(tasks, "seconds_before", lambda _: 0.01)
    results: list[Any] = [TryLater("PostgreSQL: away"), TryLater("PostgreSQL: away"), "applied"]

    def work() -> str:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return str(result)

    task = failing_task("redis://127.0.0.1:1/0")
    assert retry_later(task, work) == "applied"
    task.app.close()


def test_a_failing_task_is_retried(broker: "redis.Redis", broker_url: str) -> None:
    """Breaks if a failing task is acknowledged without a new message, or the new message shows the error's text."""

    def fail() -> None:
        raise ValueError("canary")

    publish(Settings(broker_url=broker_url), [delivery(workout("u1"))])  # declares the lane, as every worker does
    broker.delete(LIVE)
    task = failing_task(broker_url)
    with pytest.raises(Retry) as retry:
        retry_later(task, fail)
    assert "canary" not in str(retry.value.excs)
    (raw,) = broker.lrange(LIVE, 0, -1)
    assert b"canary" not in raw
    headers = json.loads(raw)["headers"]
    assert (headers["retries"], headers["argsrepr"], headers["kwargsrepr"]) == (4, "(1 deliveries)", "{}")
    assert (headers[FAILURES], headers[RETRY_REASON]) == (0, "unexpected ValueError")
    assert time.time() - headers[FAILING_SINCE] < 60
    task.app.close()


@pytest.mark.parametrize(
    "error",
    [RetryAlone("PostgreSQL: slow", "statement_timeout"), TryLater("PostgreSQL: away"), ConnectionLost("lost")],
)
def test_statements_that_were_not_executed_and_lost_connections_are_counted(
    broker: "redis.Redis", broker_url: str, error: TryLater
) -> None:
    """Breaks if an outage separates the deliveries of a message, or a poisonous one is retried together for ever."""
    publish(Settings(broker_url=broker_url), [delivery(workout("u1"))])
    broker.delete(LIVE)
    task = failing_task(broker_url)
    task.request.headers = {FAILURES: 1, FAILING_SINCE: 7.0}

    def fail() -> None:
        raise error

    with pytest.raises(Retry):
        retry_later(task, fail)
    (raw,) = broker.lrange(LIVE, 0, -1)
    headers = json.loads(raw)["headers"]
    assert (headers[FAILURES], headers[FAILING_SINCE]) == (1 + isinstance(error, RetryAlone), 7.0)
    assert (headers.get(LOST) == 1) is isinstance(error, ConnectionLost)
    assert count_of(headers | {LOST: "odd"}, LOST) == 0
    assert headers[RETRY_REASON] == str(error)
    task.app.close()
