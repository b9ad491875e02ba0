"""Delayed messages: a countdown on Redis; on RabbitMQ a queue per lane, from which the lane's workers return them."""

import math
import time
from typing import Any

from celery import Celery
from kombu.entity import Exchange, Queue

from app.broker.lanes import is_amqp

MAX_DELAY_SECONDS = 64.0  # workers do not hold a message longer, whatever it says


def delay_queue(lane: str) -> Queue:
    """The queue on RabbitMQ in which messages of this lane wait: deploy/docs/decisions/0064-rabbitmq-failover.md."""
    name = f"{lane}.delayed"
    return Queue(name, Exchange(""), name, durable=True, queue_arguments={"x-queue-type": "quorum"})


def delay_options(celery: Celery, lane: str, seconds: float) -> dict[str, Any]:
    """The options of `send_task` or `retry` that delay a task of this lane by `seconds`.

    They name the queue: `retry` would use the message's exchange and routing key, which are other ones in messages of
    0.2, and without an exchange Celery would choose the default queue.
    """
    if seconds <= 0 or not is_amqp(celery.conf.broker_url):
        return {"countdown": max(seconds, 0), "queue": lane, "exchange": "", "routing_key": lane}
    queue = delay_queue(lane)
    # The AMQP timestamp of a delayed message is its due time, in whole unix seconds.
    due = {"timestamp": math.ceil(time.time() + seconds)}
    return {"countdown": 0, "queue": queue, "exchange": "", "routing_key": queue.name, **due}


def seconds_until_due(timestamp: Any) -> float:
    """How long a delayed message still waits. 0 without a timestamp, because any client may publish to the queue."""
    left = timestamp - time.time() if isinstance(timestamp, int) else 0.0
    return min(max(left, 0.0), MAX_DELAY_SECONDS)
