"""Celery for RabbitMQ: connections to the first broker that responds, and publishing without declarations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from amqp.exceptions import ChannelError, ConnectionError  # type: ignore[import-untyped] # noqa: A004
from celery import Celery
from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.exceptions import OperationalError

from app.broker.lanes import in_order, mark_failed

T = TypeVar("T")
FAILED = (OperationalError, OSError, ConnectionError)  # of a broker: it cannot be connected, or does not answer
NO_ROUTE = 312  # reply code of basic.return: no queue is bound to the routing key (AMQP 0-9-1)


class FailoverConnection(Connection):  # type: ignore[misc]
    """Takes the next broker in the order of the process. Kombu's own order starts again with each connection."""

    _broker = ""  # after the first switch

    def _connection_factory(self) -> Any:
        """Opens a connection, and closes the channels of the one that it replaces.

        Kombu leaves them open. A publish with retries on such a channel then opens connections without a pause and
        without end: after a freeze of 40 s, a worker did so in its heartbeat.
        """
        if self._connection is not None:
            self._connection.collect()
        return super()._connection_factory()

    def maybe_switch_next(self) -> None:
        """Called by kombu after each error of a connection."""
        if self.alt:
            mark_failed(self._broker or self.alt[0])
            self._broker = in_order(";".join(self.alt))[0]
            self.switch(self._broker)


class ReturnAwareAMQP(AMQP):  # type: ignore[misc]
    """Declares a queue only after RabbitMQ has returned a message for it.

    A declaration with a new connection, which is Celery's default, waits for a node that has vanished: up to
    `net_ticktime`, 60 s by default.
    """

    Connection = FailoverConnection

    def _create_task_sender(self) -> Callable[..., Any]:
        send = super()._create_task_sender()

        def send_and_declare(producer: Any, name: str, message: Any, **options: Any) -> Any:
            # Without mandatory, RabbitMQ also confirms a message that it cannot route.
            options = {"declare": [], "mandatory": True} | options
            try:
                return send(producer, name, message, **options)
            except ChannelError as error:
                if error.reply_code != NO_ROUTE:
                    raise
            # RabbitMQ confirms a message that it has returned. The next publish on this channel would read that
            # confirm as its own, so the channel cannot be used again.
            connection = producer.connection
            connection.collect()
            producer.revive(connection)
            queue = options["queue"]
            return send(
                producer,
                name,
                message,
                **options | {"declare": [self.queues[queue] if isinstance(queue, str) else queue]},
            )

        return send_and_declare


class FailoverCelery(Celery):  # type: ignore[misc]
    """A Celery application whose connections use the order of the process."""

    amqp_cls = ReturnAwareAMQP

    def _connection(self, url: str, **options: Any) -> Any:
        return super()._connection(";".join(in_order(url)), **options)


@contextmanager
def connected(celery: Celery, heartbeat: float = 0) -> Iterator[Any]:
    """A connection to the first broker of the order. If it fails, the next call takes another broker.

    Raises kombu's OperationalError, OSError and the connection errors of amqp.
    """
    broker = in_order(celery.conf.broker_url)[0]
    connection = celery.connection_for_write(broker, heartbeat=heartbeat)
    try:
        yield connection.ensure_connection(max_retries=0)
    except BaseException as error:
        if isinstance(error, FAILED):
            mark_failed(broker)
        connection.collect()  # a graceful close would wait for the reply of a frozen broker
        raise
    connection.release()


def on_any_broker(celery: Celery, work: Callable[[Any], T]) -> T:
    """Runs the work with a connection, on the next broker if one fails. Raises the error of the last broker."""
    for _ in in_order(celery.conf.broker_url)[1:]:
        with suppress(*FAILED), connected(celery) as connection:
            return work(connection)
    with connected(celery) as connection:
        return work(connection)
