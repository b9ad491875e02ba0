"""Returns delayed messages to their lane on RabbitMQ: a thread of each worker consumes the lane's delay queue.

RabbitMQ's own way, a time to live and dead-lettering, stops permanently when a node is lost: decision 0064.
"""

import logging
import time
from collections import deque
from contextlib import suppress
from threading import Thread
from typing import Any

from amqp import Message  # type: ignore[import-untyped]
from celery import Celery
from celery.worker.consumer import Consumer

from app.broker.celery import HEARTBEAT_SECONDS
from app.broker.delays import delay_queue, seconds_until_due
from app.broker.failover import connected
from app.broker.lanes import is_amqp
from app.broker.rabbitmq_publisher import RabbitMQPublisher
from app.errors import PublishFailed

# The number of messages that one worker holds. Those behind them in the queue wait until one of these is due, 50 s at
# most. A message of the lane `download` may have 100 MB.
PREFETCH = {"download": 1}
DEFAULT_PREFETCH = 20
POLL_SECONDS = 0.5
PAUSE_SECONDS = 1.0  # after an error
log = logging.getLogger(__name__)


class DelayedMessages:
    """Consumes over one connection and publishes over another, because RabbitMQ may block one that publishes.

    A message is acknowledged after the lane has confirmed it. If the process dies in between, the message is returned
    twice, and applying it twice changes nothing. A message that cannot be returned is kept and never requeued: RabbitMQ
    4 drops a message that was requeued 20 times.
    """

    def __init__(self, celery: Celery, lane: str) -> None:
        self._celery, self._lane = celery, lane
        self._publisher = RabbitMQPublisher(celery)

    def start(self) -> None:
        Thread(target=self._run, name="delayed", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self._consume()
            except Exception as error:  # noqa: BLE001 - the edge of the thread, which must keep running
                log.warning("delayed messages wait, the next attempt is in a second (%s)", type(error).__name__)
                time.sleep(PAUSE_SECONDS)

    def _consume(self) -> None:
        held: deque[Any] = deque()
        queue = delay_queue(self._lane)
        with connected(self._celery, heartbeat=HEARTBEAT_SECONDS) as connection:
            channel = connection.default_channel
            queue.bind(channel).declare()
            channel.basic_qos(0, PREFETCH.get(self._lane, DEFAULT_PREFETCH), False)
            channel.basic_consume(queue.name, callback=held.append)
            while True:
                self._return_due(channel, held)
                with suppress(TimeoutError):
                    connection.drain_events(timeout=POLL_SECONDS)
                connection.heartbeat_check()

    def _return_due(self, channel: Any, held: "deque[Any]") -> None:
        """Returns the due messages, and keeps the others in their order."""
        for _ in range(len(held)):
            message = held.popleft()
            if seconds_until_due(message.properties.get("timestamp")) > 0:
                held.append(message)
                continue
            try:
                self._publisher.publish_raw(self._lane, Message(message.body, **message.properties))
            except PublishFailed as error:
                log.warning("cannot return a delayed message, the next attempt is in %.0f s: %s", PAUSE_SECONDS, error)
                held.append(message)
                time.sleep(PAUSE_SECONDS)
                return
            channel.basic_ack(message.delivery_tag)


def start_delayed_messages(sender: Consumer, **_: Any) -> None:
    if is_amqp(sender.app.conf.broker_url):
        (lane,) = sender.app.amqp.queues.consume_from
        DelayedMessages(sender.app, lane).start()
