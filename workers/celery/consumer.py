"""The worker's consumer: it accepts tasks of its lane, stores every other message, and restricts remote control."""

import logging
import time
from collections.abc import Callable
from typing import Any

import kombu.compression
from celery.utils.imports import symbol_by_name
from celery.worker import consumer
from celery.worker.consumer.control import Control
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from kombu.message import Message

from app.broker.envelope import check_arguments, checked_headers
from app.errors import TryLater, Unprocessable

Keep = Callable[[bytes, str], object]
log = logging.getLogger(__name__)
REQUEUE_PAUSE_SECONDS = 1.0  # the broker redelivers a requeued message at once
# The commands that Flower sends; they change nothing but whether events are sent. Celery's others include `shutdown`,
# and `revoke` and `hello`, after which a worker drops a task.
COMMANDS = frozenset({"ping", "stats", "active", "reserved", "scheduled", "registered", "revoked", "active_queues"})
COMMANDS |= {"conf", "enable_events", "heartbeat"}


class ReadOnlyControl(Control):  # type: ignore[misc]
    """Remote control with COMMANDS only, because it is not authenticated."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        node = self.box.node
        node.handlers = {name: command for name, command in node.handlers.items() if name in COMMANDS}


def _steps() -> tuple[Any, ...]:
    """Without the 28 queues of Celery's delayed delivery, which lanes with a direct exchange do not use."""
    steps = consumer.Consumer.Blueprint.default_steps
    kept = [one for one in steps if symbol_by_name(one) is not DelayedDelivery]
    return tuple(ReadOnlyControl if symbol_by_name(one) is Control else one for one in kept)


def make_consumer(keep: Keep) -> type[consumer.Consumer]:
    """A class for `worker_consumer`. `keep(body, reason)` stores a message; it may raise TryLater."""
    _refuse_compression()

    class Consumer(consumer.Consumer):  # type: ignore[misc]
        """Logs only the reason: Celery's own messages quote the body."""

        class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc]
            default_steps = _steps()

        def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Message], None]:
            handle = super().create_task_handler(*args, **options)
            (lane,) = self.app.amqp.queues.consume_from

            def on_message(message: Message) -> None:
                try:
                    found = checked_headers(message.headers, message.properties, message.delivery_info, lane)
                    check_arguments(found["task"], message.body, message.content_type, message.content_encoding)
                except Unprocessable as reason:
                    _dead_letter(message, str(reason), keep)
                else:
                    message.headers = found
                    handle(message)

            return on_message

        def on_decode_error(self, message: Message, _error: Exception) -> None:
            _dead_letter(message, "a message that cannot be decoded", keep)

    return Consumer


def _refuse_compression() -> None:
    """Kombu would decompress a message without a limit before the consumer sees it. Ours are not compressed."""
    for content_type in kombu.compression.encoders():
        kombu.compression.register(_no_compression, _no_compression, content_type)


def _no_compression(_body: Any) -> bytes:
    raise Unprocessable("a compressed message")


def _dead_letter(message: Message, reason: str, keep: Keep) -> None:
    log.error("message moved to the dead letters: %s", reason)
    body = message.body
    try:
        keep(
            bytes(body)
            if isinstance(body, bytes | bytearray | memoryview)
            else str(body).encode(errors="backslashreplace"),
            reason,
        )
    except TryLater as error:
        log.warning("cannot store the dead letter, the message is requeued: %s", error)
        time.sleep(REQUEUE_PAUSE_SECONDS)
        message.reject(requeue=True)
    else:
        message.ack()
