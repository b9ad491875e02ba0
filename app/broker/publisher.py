"""Publishes messages of deliveries to the live lane."""

import contextlib
from collections.abc import Sequence
from typing import Any

from celery import Celery
from kombu.exceptions import KombuError, OperationalError

from app.broker.lanes import APPLY, is_amqp
from app.delivery import Delivery, pack
from app.errors import PublishFailed
from app.observability import tracing

UNROUTABLE = "headrace.nowhere"  # a queue that does not exist


class Publisher:
    """Publishes over one connection; for use by one thread."""

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._lane = next(queue for queue in celery.conf.task_queues if queue.name == "live")
        self._connection: Any = None
        self._producer: Any = None

    def publish(self, deliveries: Sequence[Delivery]) -> None:
        """Returns once the broker has confirmed the message. Raises PublishFailed if it is not certain that it has."""
        try:
            if self._producer is None:
                self._connection = self._celery.connection_for_write()
                self._producer = self._celery.amqp.Producer(self._connection)
            self._celery.send_task(
                APPLY,
                args=(pack(deliveries),),
                queue=self._lane,  # declared before the first publish: a message for an unbound key is dropped
                producer=self._producer,
                headers=tracing.inject(),
                retry=False,
                mandatory=True,  # otherwise RabbitMQ also confirms a message that it cannot route
                argsrepr=f"({len(deliveries)} deliveries)",  # shown by Flower and in logs instead of the deliveries
                kwargsrepr="{}",
            )
        except self._errors() as error:
            self.close(graceful=False)
            raise PublishFailed(f"the broker did not confirm ({type(error).__name__})") from error

    def ping(self) -> None:
        """Raises PublishFailed if the broker is unreachable or accepts no messages."""
        connection = self._celery.connection_for_write()
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=1)
            if is_amqp(self._celery.conf.broker_url):  # RabbitMQ reports an alarm only to a connection that publishes
                connection.Producer().publish("", exchange="", routing_key=UNROUTABLE)
        except self._errors() as error:
            self._release(connection, graceful=False)
            raise PublishFailed(
                f"the broker cannot be reached or accepts no messages ({type(error).__name__})"
            ) from error
        self._release(connection)

    def close(self, *, graceful: bool = True) -> None:
        """Closes the connection; the next publish opens another."""
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            self._release(connection, graceful=graceful)

    def _release(self, connection: Any, *, graceful: bool = True) -> None:
        """A graceful close waits for the broker's reply, and a frozen or blocked RabbitMQ sends none."""
        with contextlib.suppress(*self._errors()):  # raised if the connection is lost already
            (connection.release if graceful else connection.collect)()

    def _errors(self) -> tuple[type[Exception], ...]:
        """The exceptions of a broker that is unreachable, full or broken; they differ by transport."""
        transport = self._celery.connection_for_write()
        return (KombuError, OperationalError, OSError, *transport.connection_errors, *transport.channel_errors)
