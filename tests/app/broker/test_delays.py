"""Delayed messages: queues, delays and dead-letter routing."""

import pytest

from app.broker.celery import make_celery
from app.broker.delays import DELAYS, delay_options, delay_queue
from app.config.settings import Settings
from workers.celery.context import MAX_COUNTDOWN_SECONDS
from workers.celery.retries import MAX_RETRY_SECONDS


@pytest.mark.parametrize(
    ("seconds", "name"), [(0.1, "live.1s"), (1, "live.1s"), (1.1, "live.2s"), (33, "live.64s"), (1000, "live.64s")]
)
def test_a_message_waits_in_the_shortest_queue_that_is_long_enough(seconds: float, name: str) -> None:
    """Breaks if a message returns before it is due, or much later."""
    assert delay_queue("live", seconds).name == name


def test_a_delayed_message_is_stored_and_returns() -> None:
    """Breaks if RabbitMQ can lose a delayed message or returns it to another lane."""
    room = delay_queue("backfill", 4)
    assert room.durable
    assert room.queue_arguments == {
        "x-queue-type": "quorum",
        "x-message-ttl": 4000,
        "x-dead-letter-exchange": "backfill",
        "x-dead-letter-routing-key": "backfill",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def test_there_is_a_queue_for_the_longest_wait() -> None:
    """Breaks if a delay that workers use is shortened."""
    assert max(DELAYS) >= max(MAX_RETRY_SECONDS, MAX_COUNTDOWN_SECONDS)


@pytest.mark.parametrize("url", ["redis://h", "amqp://h"])
def test_a_message_without_a_delay_goes_to_its_lane(url: str) -> None:
    """Breaks if a task without a delay is delayed, for instance by Celery's default of three minutes."""
    celery = make_celery(Settings(broker_url=url), "worker")
    assert delay_options(celery, "live", 0) == delay_options(celery, "live", -1) == {"countdown": 0}


def test_where_a_message_waits_depends_on_the_broker() -> None:
    """Breaks if a worker holds delayed messages on RabbitMQ, or Redis gets delay queues."""
    redis_celery, amqp_celery = (make_celery(Settings(broker_url=url), "worker") for url in ("redis://h", "amqp://h"))
    assert delay_options(redis_celery, "live", 2.5) == {"countdown": 2.5}
    options = delay_options(amqp_celery, "live", 2.5)
    assert options.pop("queue").name == "live.4s"
    assert options == {"countdown": 0, "exchange": "", "routing_key": "live.4s", "mandatory": True}
