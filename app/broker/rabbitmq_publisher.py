"""Publishes messages of deliveries to the live lane of RabbitMQ."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from amqp.exceptions import MessageNacked  # type: ignore[import-untyped]
from celery import Celery
from kombu.exceptions import KombuError, OperationalError

from app.broker.lanes import APPLY, PROBE, in_order, mark_failed
from app.delivery import Delivery, pack
from app.errors import PublishFailed
from app.observability import tracing

# Other brokers are tried only within this time after the first attempt began. The batcher answers in time anyway.
FAILOVER_SECONDS = 2.5
# A broker that has just accepted a connection works, so the lane is the cause of a late confirm. When the leader of a
# quorum queue has vanished without closing its connections, RabbitMQ sends a message of a new connection to the old
# leader first, and to the new leader after 10 s. On another connection the 10 s would begin again.
NEW_CONNECTION_SECONDS = 12.0


class RabbitMQPublisher:
    """Publishes over one connection, to the first broker that confirms; for use by one thread."""

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._url = str(celery.conf.broker_url)
        self._lane = next(queue for queue in celery.conf.task_queues if queue.name == "live")
        self._broker = ""
        self._connection: Any = None
        self._producer: Any = None
        self._confirm_seconds: float | None = None  # None: the read timeout of the connection
        self._probing: RabbitMQPublisher | None = None

    def publish(self, deliveries: Sequence[Delivery]) -> None:
        """Returns once a broker has confirmed the message. Raises PublishFailed if that is uncertain.

        If a broker stored the message but did not confirm it in time, the next broker gets it as well. Applying it
        twice changes nothing.
        """
        packed, count = pack(deliveries), f"({len(deliveries)} deliveries)"  # Flower and logs show the count only
        self._try_brokers(
            lambda: self._send(APPLY, args=(packed,), headers=tracing.inject(), argsrepr=count, kwargsrepr="{}")
        )

    def publish_raw(self, lane: str, message: Any) -> None:
        """Publishes a message of the AMQP library to a lane, as it is. Raises PublishFailed."""
        self._try_brokers(
            lambda: self._producer.channel.basic_publish(
                message, exchange="", routing_key=lane, mandatory=True, confirm_timeout=self._confirm_seconds
            )
        )

    def ping(self) -> None:
        """Raises PublishFailed unless a broker accepts messages for the live lane.

        It uses a connection of its own, so that another thread may publish at the same time.
        """
        self._probing = self._probing or RabbitMQPublisher(self._celery)
        self._probing.probe()

    def probe(self) -> None:
        """Publishes a message that expires at once. A worker that is free receives and ignores it.

        Only a message for the lane shows whether a majority of its members can store one: RabbitMQ answers a passive
        declaration without asking the members, and confirms an unroutable message without storing it.
        """
        self._try_brokers(lambda: self._send(PROBE, expiration=0), "cannot be reached or accepts no messages")

    def close(self, *, graceful: bool = True) -> None:
        """Closes the connections; the next publish opens another."""
        if self._probing is not None:
            self._probing.close(graceful=graceful)
        self._disconnect(graceful=graceful)

    def _disconnect(self, *, graceful: bool = False) -> None:
        """Leaves the connection for checks open, because another thread uses it."""
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            # A graceful close would wait for the reply of a frozen or blocked RabbitMQ.
            with contextlib.suppress(*self._errors()):  # raised if the connection is lost already
                (connection.release if graceful else connection.collect)()

    def _try_brokers(self, send: Callable[[], object], failure: str = "did not confirm") -> None:
        """Sends over the open connection; if that fails, to each other broker in order. Raises PublishFailed."""
        began = time.monotonic()
        left = in_order(self._url)
        while True:
            if self._producer is None:
                self._broker = left[0]
            left.remove(self._broker)
            try:
                if self._producer is None:
                    self._connect()
                send()
            except self._errors() as error:
                self._disconnect()
                mark_failed(self._broker)
                if not left or time.monotonic() - began > FAILOVER_SECONDS:
                    raise PublishFailed(f"the broker {failure} ({type(error).__name__})") from error
            else:
                self._confirm_seconds = None
                return

    def _connect(self) -> None:
        self._connection = self._celery.connection_for_write(self._broker)
        self._connection.ensure_connection(max_retries=0)  # kombu would try a silent broker again
        self._confirm_seconds = NEW_CONNECTION_SECONDS
        self._producer = self._celery.amqp.Producer(self._connection)

    def _send(self, task: str, **options: Any) -> None:
        self._celery.send_task(
            task,
            queue=self._lane,
            producer=self._producer,
            retry=False,
            confirm_timeout=self._confirm_seconds,
            **options,
        )

    def _errors(self) -> tuple[type[Exception], ...]:
        """The exceptions of a broker that is unreachable, full or broken.

        RabbitMQ rejects a message while the leader of a quorum queue moves to another node. Neither of kombu's lists
        has that error.
        """
        transport = self._celery.connection_for_write()
        errors = (*transport.connection_errors, *transport.channel_errors)
        return (KombuError, OperationalError, OSError, MessageNacked, *errors)
