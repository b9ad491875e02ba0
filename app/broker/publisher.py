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
    """Puts messages of deliveries on the live lane over one connection, for one thread."""

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._lane = next(queue for queue in celery.conf.task_queues if queue.name == "live")
        self._connection: Any = None
        self._producer: Any = None

    def publish(self, deliveries: Sequence[Delivery]) -> None:
        """Returns once the broker has the message on disk. Raises PublishFailed if that is not certain."""
        try:
            if self._producer is None:
                self._connection = self._celery.connection_for_write()
                self._producer = self._celery.amqp.Producer(self._connection)
            self._celery.send_task(
                APPLY,
                args=(pack(deliveries),),
                queue=self._lane,  # declared with every first publish: an unbound key would swallow the message
                producer=self._producer,
                headers=tracing.inject(),
                retry=False,
                mandatory=True,  # RabbitMQ confirms also what it could route nowhere, unless it is to send that back
                argsrepr=f"({len(deliveries)} deliveries)",  # what Flower and logs may show
                kwargsrepr="{}",
            )
        except self._errors() as error:
            self.close(goodbye=False)
            raise PublishFailed(f"the broker did not confirm ({type(error).__name__})") from error

    def ping(self) -> None:
        """Raises PublishFailed if the broker cannot be reached now, or takes nothing."""
        connection = self._celery.connection_for_write()
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=1)
            if is_amqp(self._celery.conf.broker_url):  # which tells of an alarm only who publishes something
                connection.Producer().publish("", exchange="", routing_key=UNROUTABLE)
        except self._errors() as error:
            self._let_go(connection, goodbye=False)
            raise PublishFailed(f"the broker cannot be reached, or takes nothing ({type(error).__name__})") from error
        self._let_go(connection)

    def close(self, *, goodbye: bool = True) -> None:
        """Forgets the connection, so that the next publish makes another."""
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            self._let_go(connection, goodbye=goodbye)

    def _let_go(self, connection: Any, *, goodbye: bool = True) -> None:
        """AMQP waits until a goodbye is answered, so a broker that is frozen or blocks is not told one."""
        with contextlib.suppress(*self._errors()):  # one that has gone makes it fail
            (connection.release if goodbye else connection.collect)()

    def _errors(self) -> tuple[type[Exception], ...]:
        """What a broker that is away, full or broken raises, which differs by transport."""
        transport = self._celery.connection_for_write()
        return (KombuError, OperationalError, OSError, *transport.connection_errors, *transport.channel_errors)
