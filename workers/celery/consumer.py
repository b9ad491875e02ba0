"""The worker's consumer: it accepts tasks of its lane, stores every other message, and restricts remote control."""

import logging
from collections.abc import Callable
from typing import Any

import kombu.compression
from celery.utils.imports import symbol_by_name
from celery.worker import consumer
from celery.worker.consumer.control import Control
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from kombu.message import Message

from app.broker.envelope import check_arguments, checked_headers
from app.broker.lanes import PROBE, is_amqp
from app.errors import TryLater, Unprocessable

Keep = Callable[[bytes, str], object]
log = logging.getLogger(__name__)
CONTROL_SECONDS = 20.0  # between two attempts to start remote control
HOLD_SECONDS = 5.0  # between two attempts to store a dead letter
# The commands that Flower sends; they only switch the sending of events. Celery's others include `shutdown`, and
# `revoke` and `hello`, after which a worker drops a task.
COMMANDS = frozenset({"ping", "stats", "active", "reserved", "scheduled", "registered", "revoked", "active_queues"})
COMMANDS |= {"conf", "enable_events", "heartbeat"}


class ReadOnlyControl(Control):  # type: ignore[misc]
    """Remote control with COMMANDS only, because it is not authenticated."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        node = self.box.node
        node.handlers = {name: command for name, command in node.handlers.items() if name in COMMANDS}
        self.start = self._start

    def _start(self, worker: consumer.Consumer, connection: Any = None) -> None:
        """Starts remote control, or tries again later; tasks do not wait for it.

        After a RabbitMQ node has vanished, the exclusive queue of the lost connection stays locked for up to
        `net_ticktime`, and a new queue is declared only after that. Celery would end the worker, or never start it.
        """
        if connection not in (None, worker.connection):
            return  # the worker has reconnected, which has started remote control again
        try:
            self.box.start(worker)
        except (TimeoutError, *worker.connection.channel_errors) as error:
            log.warning("remote control starts in %.0f s at the earliest: %s", CONTROL_SECONDS, type(error).__name__)
            worker.timer.call_after(CONTROL_SECONDS, self._start, (worker, worker.connection))


def _steps() -> tuple[Any, ...]:
    """Leaves out the 28 queues of Celery's delayed delivery, which lanes with a direct exchange do not use."""
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
                if message.headers.get("task") == PROBE:
                    message.ack()
                    return
                try:
                    found = checked_headers(message.headers, message.properties, message.delivery_info, lane)
                    check_arguments(found["task"], message.body, message.content_type, message.content_encoding)
                except Unprocessable as reason:
                    _dead_letter(self, message, str(reason), keep)
                else:
                    message.headers = found
                    handle(message)

            return on_message

        def call_soon_ack(self, p: Callable[..., object], *args: Any, **kwargs: Any) -> object:
            """Acknowledges at once on RabbitMQ. Redis has one write for the acknowledgement and the next message.

            Kombu's event loop runs a callback before its next poll only if the message was read during the last poll.
            A message that it has read after that poll, because it was there already, would be acknowledged when the
            next timer is due, and RabbitMQ sends the next message only then: a backlog was applied at 1 to 16 messages
            a second instead of 120.
            """
            if not is_amqp(self.app.conf.broker_url):
                return super().call_soon_ack(p, *args, **kwargs)
            return p(*args, **kwargs)

        def on_decode_error(self, message: Message, _error: Exception) -> None:
            _dead_letter(self, message, "a message that cannot be decoded", keep)

    return Consumer


def _refuse_compression() -> None:
    """Kombu would decompress a message without a limit before the consumer sees it. Ours are not compressed."""
    for content_type in kombu.compression.encoders():
        kombu.compression.register(_no_compression, _no_compression, content_type)


def _no_compression(_body: Any) -> bytes:
    raise Unprocessable("a compressed message")


def _raw(body: Any) -> bytes:
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    return str(body).encode(errors="backslashreplace")


def _dead_letter(worker: consumer.Consumer, message: Message, reason: str, keep: Keep) -> None:
    """Stores the message and acknowledges it.

    While PostgreSQL is down, the worker keeps the message and tries again. It receives no other message meanwhile,
    because it could not apply one. A requeued message would be redelivered at once, and RabbitMQ 4 drops a message that
    was requeued 20 times.
    """
    if message.channel.connection is None or getattr(message.channel, "closed", False):
        return  # the connection is lost, so the broker redelivers the message
    try:
        keep(_raw(message.body), reason)
    except TryLater as error:
        log.warning("cannot store a dead letter, the next attempt is in %.0f s: %s", HOLD_SECONDS, error)
        worker.timer.call_after(HOLD_SECONDS, _dead_letter, (worker, message, reason, keep))
    else:
        log.error("message moved to the dead letters: %s", reason)
        message.ack()
