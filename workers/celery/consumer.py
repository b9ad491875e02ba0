"""The worker's consumer: it stores messages that are no valid task, which Celery would log and drop."""

import logging
import time
from collections.abc import Callable
from typing import Any

from celery.utils.imports import symbol_by_name
from celery.worker import consumer
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from kombu.message import Message

from app.errors import TryLater

Keep = Callable[[bytes, str], object]
log = logging.getLogger(__name__)
REQUEUE_PAUSE_SECONDS = 1.0  # the broker redelivers a requeued message at once


def make_consumer(keep: Keep) -> type[consumer.Consumer]:
    """A class for `worker_consumer`. `keep(body, reason)` stores a message; it may raise TryLater."""

    class Consumer(consumer.Consumer):  # type: ignore[misc]
        """Logs only the reason: Celery's own messages quote the body."""

        class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc]
            """Without the 28 queues of Celery's delayed delivery, which lanes with a direct exchange do not use."""

            default_steps = tuple(
                one for one in consumer.Consumer.Blueprint.default_steps if symbol_by_name(one) is not DelayedDelivery
            )

        def on_unknown_message(self, _body: Any, message: Message) -> None:
            _dead_letter(message, "not a Celery message", keep)

        def on_unknown_task(self, _body: Any, message: Message, _error: Exception) -> None:
            _dead_letter(message, "a task unknown to this worker", keep)

        def on_invalid_task(self, _body: Any, message: Message, _error: Exception) -> None:
            _dead_letter(message, "not a valid task", keep)

        def on_decode_error(self, message: Message, _error: Exception) -> None:
            _dead_letter(message, "a message that cannot be decoded", keep)

    return Consumer


def _dead_letter(message: Message, reason: str, keep: Keep) -> None:
    log.error("message moved to the dead letters: %s", reason)
    body = message.body
    try:
        keep(bytes(body) if isinstance(body, bytes | bytearray | memoryview) else str(body).encode(), reason)
    except TryLater as error:
        log.warning("cannot store the dead letter, the message is requeued: %s", error)
        time.sleep(REQUEUE_PAUSE_SECONDS)
        message.reject(requeue=True)
    else:
        message.ack()
