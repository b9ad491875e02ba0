"""Delayed messages: a countdown on Redis, TTL queues with dead-letter routing on RabbitMQ."""

from typing import Any

from celery import Celery
from kombu.entity import Exchange, Queue

from app.broker.lanes import is_amqp

DELAYS = (1, 2, 4, 8, 16, 32, 64)  # seconds that a message may wait in RabbitMQ: a queue for each, see deploy/DESIGN.md


class _DelayQueue(Queue):  # type: ignore[misc]
    """A queue that is declared before every message: one that somebody has removed would swallow it."""

    can_cache_declaration = False


def delay_queue(lane: str, seconds: float) -> Queue:
    """Where a message waits until RabbitMQ gives it back to its lane: a worker that held it could do nothing else."""
    wait = next((one for one in DELAYS if one >= seconds), DELAYS[-1])
    name = f"{lane}.{wait}s"
    arguments = {
        "x-queue-type": "quorum",
        "x-message-ttl": wait * 1000,
        "x-dead-letter-exchange": lane,
        "x-dead-letter-routing-key": lane,
        "x-dead-letter-strategy": "at-least-once",  # it leaves the room once the lane has confirmed it
        "x-overflow": "reject-publish",  # which that needs
    }
    return _DelayQueue(name, Exchange(""), name, durable=True, queue_arguments=arguments)


def with_delay_queues(lane: Queue, url: str) -> list[Queue]:
    """Every queue of this broker in which messages of a lane may be."""
    return [lane, *(delay_queue(lane.name, wait) for wait in DELAYS if is_amqp(url))]


def delay_options(celery: Celery, lane: str, seconds: float) -> dict[str, Any]:
    """The options with which a task that is sent to a lane, or put back into it, is done in so many seconds."""
    if seconds <= 0 or not is_amqp(celery.conf.broker_url):
        return {"countdown": max(seconds, 0)}
    room = delay_queue(lane, seconds)
    return {"countdown": 0, "queue": room, "exchange": "", "routing_key": room.name, "mandatory": True}
