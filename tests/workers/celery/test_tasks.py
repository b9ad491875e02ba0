"""When a task is tried again, and what becomes of its message."""

import itertools
import json

import pytest
import redis
from celery import Task
from celery.exceptions import Reject, Retry

from app.broker.celery import make_celery
from app.config.settings import Settings
from app.errors import TryLater
from tests.support import delivery, workout
from tests.support.workers import LIVE, publish
from workers.celery.tasks import MAX_RETRY_SECONDS, retry_delay, retry_later

_numbers = itertools.count()


@pytest.mark.parametrize(
    ("attempt", "longest"),
    [(0, 0.5), (1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 16.0), (6, 30.0), (7, 30.0), (10**9, 30.0)],
)
def test_a_pause_doubles_up_to_half_a_minute(attempt: int, longest: float) -> None:
    """Breaks if workers try again all at once, hammer what is away, or sleep past the visibility timeout."""
    pauses = [retry_delay(attempt) for _ in range(200)]
    assert longest / 2 <= min(pauses) < max(pauses) <= longest
    assert max(pauses) - min(pauses) > longest / 4


def test_a_waiting_message_is_not_given_to_another_worker() -> None:
    """Breaks if a message that waits in a worker becomes visible again meanwhile, and is applied by two."""
    assert Settings().visibility_timeout_seconds > MAX_RETRY_SECONDS


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
