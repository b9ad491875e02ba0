"""The worker's consumer: Celery logs and drops a message that it cannot make a task of; here it is kept."""

import logging
import time
from collections.abc import Callable
from typing import Any

from celery.utils.imports import symbol_by_name
from celery.worker import consumer
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from kombu.message import Message

from app.errors import TryLater

Keep = Callable[[bytes, str], None]
log = logging.getLogger(__name__)
REQUEUE_PAUSE_SECONDS = 1.0  # before a message that cannot be kept now is given out again: it would come back at once


def make_consumer(keep: Keep) -> type[consumer.Consumer]:
    """A consumer class for `worker_consumer`; `keep` takes what a message held and why, and may raise TryLater."""

    class Consumer(consumer.Consumer):  # type: ignore[misc]
        """Says of a message only why it is set aside: Celery's own words quote its body."""

        class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc]
            """Without the 28 queues of Celery's delayed delivery: lanes with a direct exchange have no use for them."""

            default_steps = tuple(
                one for one in consumer.Consumer.Blueprint.default_steps if symbol_by_name(one) is not DelayedDelivery
            )

        def on_unknown_message(self, _body: Any, message: Message) -> None:
            _dead_letter(message, "not a message of Celery's", keep)

        def on_unknown_task(self, _body: Any, message: Message, _error: Exception) -> None:
            _dead_letter(message, "a task that this worker does not know", keep)

        def on_invalid_task(self, _body: Any, message: Message, _error: Exception) -> None:
            _dead_letter(message, "not a valid task", keep)

        def on_decode_error(self, message: Message, _error: Exception) -> None:
            _dead_letter(message, "a message that cannot be decoded", keep)

    return Consumer


def _dead_letter(message: Message, reason: str, keep: Keep) -> None:
    log.error("a message is set aside: %s", reason)
    body = message.body
    try:
        keep(bytes(body) if isinstance(body, bytes | bytearray | memoryview) else str(body).encode(), reason)
    except TryLater as error:
        log.warning("it cannot be kept now, and is given back: %s", error)
        time.sleep(REQUEUE_PAUSE_SECONDS)
        message.reject(requeue=True)
    else:
        message.ack()
