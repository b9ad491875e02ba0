"""Delayed messages: their queues, and when they are due."""

import time

import pytest

from app.broker.celery import make_celery
from app.broker.delays import MAX_DELAY_SECONDS, delay_options, delay_queue, seconds_until_due
from app.config.settings import Settings
from workers.celery.context import MAX_COUNTDOWN_SECONDS
from workers.celery.retries import MAX_RETRY_SECONDS


def to_live(seconds: float) -> dict[str, object]:
    """The options of a message that goes to the lane itself."""
    return {"countdown": seconds, "queue": "live", "exchange": "", "routing_key": "live"}


def test_a_delayed_message_is_stored() -> None:
    """Breaks if RabbitMQ can lose a delayed message, or moves it on its own."""
    queue = delay_queue("backfill")
    assert queue.durable
    assert queue.queue_arguments == {"x-queue-type": "quorum"}


def test_the_longest_delay_is_not_cut_off() -> None:
    """Breaks if a delay that workers use is shortened."""
    assert max(MAX_RETRY_SECONDS, MAX_COUNTDOWN_SECONDS) < MAX_DELAY_SECONDS


@pytest.mark.parametrize("timestamp", [None, "soon", 1.5, -1, 0, 10**30, float("nan")])
def test_an_odd_due_time_does_not_hold_a_message(timestamp: object) -> None:
    """Breaks if a client of the broker can end the thread that returns messages, or let it hold one for years."""
    assert 0 <= seconds_until_due(timestamp) <= MAX_DELAY_SECONDS


@pytest.mark.parametrize("url", ["redis://h", "amqp://h"])
def test_a_message_without_a_delay_goes_to_its_lane(url: str) -> None:
    """Breaks if a task without a delay is delayed, for instance by Celery's default of three minutes."""
    celery = make_celery(Settings(broker_url=url), "worker")
    assert delay_options(celery, "live", 0) == delay_options(celery, "live", -1) == to_live(0)


def test_where_a_message_waits_depends_on_the_broker() -> None:
    """Breaks if a worker holds delayed messages on RabbitMQ, or Redis gets delay queues."""
    redis_celery, amqp_celery = (make_celery(Settings(broker_url=url), "worker") for url in ("redis://h", "amqp://h"))
    assert delay_options(redis_celery, "live", 2.5) == to_live(2.5)
    options = delay_options(amqp_celery, "live", 2.5)
    assert options.pop("queue").name == "live.delayed"
    assert 1.5 < options["timestamp"] - time.time() <= 3.5
    assert 1.4 < seconds_until_due(options.pop("timestamp")) <= 3.5
    assert options == {"countdown": 0, "exchange": "", "routing_key": "live.delayed"}
