"""Delayed messages: a countdown on Redis, TTL queues with dead-letter routing on RabbitMQ."""

from typing import Any

from celery import Celery
from kombu.entity import Exchange, Queue

from app.broker.lanes import is_amqp

# Seconds, each with a queue per lane on RabbitMQ: deploy/docs/decisions/0010-rabbitmq-delay-queues.md
DELAYS = (1, 2, 4, 8, 16, 32, 64)


class _DelayQueue(Queue):  # type: ignore[misc]
    """Declared before every publish: RabbitMQ silently drops messages for a deleted queue."""

    can_cache_declaration = False


def delay_queue(lane: str, seconds: float) -> Queue:
    """The queue from which RabbitMQ returns a message to its lane, so that no worker has to hold it meanwhile."""
    wait = next((one for one in DELAYS if one >= seconds), DELAYS[-1])
    name = f"{lane}.{wait}s"
    arguments = {
        "x-queue-type": "quorum",
        "x-message-ttl": wait * 1000,
        "x-dead-letter-exchange": lane,
        "x-dead-letter-routing-key": lane,
        "x-dead-letter-strategy": "at-least-once",  # the message is removed once the lane has confirmed it
        "x-overflow": "reject-publish",  # required by at-least-once
    }
    return _DelayQueue(name, Exchange(""), name, durable=True, queue_arguments=arguments)


def with_delay_queues(lane: Queue, url: str) -> list[Queue]:
    """A lane and its delay queues on this broker."""
    return [lane, *(delay_queue(lane.name, wait) for wait in DELAYS if is_amqp(url))]


def delay_options(celery: Celery, lane: str, seconds: float) -> dict[str, Any]:
    """The options of `send_task` or `retry` that delay a task of this lane by `seconds`."""
    if seconds <= 0 or not is_amqp(celery.conf.broker_url):
        return {"countdown": max(seconds, 0)}
    queue = delay_queue(lane, seconds)
    return {"countdown": 0, "queue": queue, "exchange": "", "routing_key": queue.name, "mandatory": True}
