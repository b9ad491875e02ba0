"""Checks of RabbitMQ's durability, and the depths of its queues."""

# ruff: noqa: PLC0415 - importing Celery and kombu costs 0.1 s of CPU; many commands contact no broker
from dataclasses import dataclass
from typing import Any

from app.broker.celery import make_celery
from app.config.settings import Settings
from app.errors import Misconfigured, TryLater


@dataclass(frozen=True)
class QueueDepth:
    """The messages of a lane that no worker has received."""

    lane: str
    ready: int
    delayed: int  # retries in the lane's delay queue, without those that a worker holds


def unreachable(error: Exception) -> TryLater:
    from amqp.exceptions import NotAllowed  # type: ignore[import-untyped]

    what = "rejects the login or the vhost" if isinstance(error, NotAllowed) else "cannot be reached"
    return TryLater(f"the broker {what} ({type(error).__name__})", setting="BROKER_URL")


def need_quorum_queues(settings: Settings) -> None:
    """Declares the lanes and their delay queues on the first broker of BROKER_URL that can be reached.

    RabbitMQ rejects a declaration that differs from the existing queue. Queues are declared early because an older
    RabbitMQ that dies in the first half second after a queue was created makes it unusable permanently, and delayed
    retries are published just when processes fail.
    """
    from kombu.exceptions import OperationalError

    from app.broker.delays import delay_queue
    from app.broker.failover import on_any_broker

    celery = make_celery(settings, "publisher")
    errors = celery.connection_for_write()
    name = ""

    def declare(connection: Any) -> None:
        nonlocal name
        for lane in celery.conf.task_queues:
            for queue in (lane, delay_queue(lane.name)):
                name = queue.name
                queue.bind(connection.default_channel).declare()

    try:
        on_any_broker(celery, declare)
    except errors.channel_errors as error:
        if not name:
            text = f"the broker rejects user, password or vhost ({type(error).__name__})"
            raise Misconfigured(text, setting="BROKER_URL") from None
        raise Misconfigured(
            f"queue {name} is not a durable quorum queue ({type(error).__name__}): a crash of the broker would lose "
            f"events that were answered 202. Let the workers empty it, then delete it "
            f"(rabbitmqctl delete_queue {name}), or use another vhost",
            setting="BROKER_URL",
        ) from None
    except (OperationalError, *errors.connection_errors) as error:
        raise unreachable(error) from None


def queue_depths(settings: Settings) -> list[QueueDepth]:
    """The depth of every lane. Raises TryLater if no broker can be reached."""
    from kombu.exceptions import OperationalError

    from app.broker.delays import delay_queue
    from app.broker.failover import on_any_broker

    celery = make_celery(settings, "publisher")
    errors = celery.connection_for_read()

    def depth(connection: Any, lane: Any) -> QueueDepth:
        queues = (lane, delay_queue(lane.name))
        ready, delayed = (one.bind(connection.default_channel).queue_declare().message_count for one in queues)
        return QueueDepth(lane.name, ready, delayed)

    try:
        return on_any_broker(celery, lambda connection: [depth(connection, lane) for lane in celery.conf.task_queues])
    except (OperationalError, *errors.connection_errors, *errors.channel_errors) as error:
        raise unreachable(error) from None
