"""The Celery application, configured for the endpoint's publisher or for a worker."""

# ruff: noqa: PLC0415 - importing Celery costs 0.1 s of CPU, so commands without a broker do not import it
from typing import TYPE_CHECKING, Any, Literal

from app.broker.lanes import LANES, is_amqp
from app.config.settings import Settings

if TYPE_CHECKING:
    from celery import Celery
    from kombu.entity import Queue

Role = Literal["publisher", "worker"]
# RabbitMQ and a worker close a connection that is silent for twice this time. RabbitMQ recommends 5 to 20 s. Publishers
# need no heartbeats: a publish that is not confirmed within 2 s goes to the next broker.
HEARTBEAT_SECONDS = 6
# A worker waits this long for a reply. Without a limit, a frozen broker would block its event loop, which then sends
# and checks no heartbeats. With 12 s, a worker took more than 40 s to continue on the next broker.
WORKER_SECONDS = 5
CYCLE_SECONDS = 60  # in total, to try all brokers of BROKER_URL


def make_celery(settings: Settings, role: Role) -> "Celery":
    """The Celery application of one process. Publishers fail fast; workers wait for the broker."""
    url = settings.need_broker()
    if is_amqp(url):
        from app.broker.failover import FailoverCelery as Celery
    else:
        from app.broker.redis_celery import RedisCelery as Celery
    celery = Celery("headrace", broker=url, set_as_current=role == "worker")
    celery.conf.update(
        task_queues=[_queue(lane, url) for lane in LANES],
        task_default_queue="maintenance",
        task_default_exchange="",  # otherwise Celery binds each lane to an exchange with the default queue's name
        task_create_missing_queues=False,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_publish_retry=role == "worker",
        worker_prefetch_multiplier=1,  # a killed worker's prefetched messages wait for the visibility timeout
        worker_send_task_events=True,  # for Flower
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_heartbeat=HEARTBEAT_SECONDS,
        event_queue_ttl=60,
        **_broker_options(settings, role),
    )
    return celery


def _queue(lane: str, url: str) -> "Queue":
    from kombu.entity import Exchange, Queue

    # Without an exchange of its own: RabbitMQ 3 creates a binding, even one that exists, only after every node has
    # answered, and waits for a node that has vanished until net_ticktime (60 s by default). Redis would read the
    # bindings with every publish, and a full Redis refuses to write one, so that workers could not start.
    arguments = {"x-queue-type": "quorum"} if is_amqp(url) else None
    return Queue(lane, Exchange(""), lane, durable=True, queue_arguments=arguments)


def _broker_options(settings: Settings, role: Role) -> dict[str, Any]:
    if not is_amqp(settings.need_broker()):
        from app.broker.redis_celery import redis_options

        return redis_options(settings, role)
    seconds = 2 if role == "publisher" else WORKER_SECONDS
    options: dict[str, Any] = {"confirm_publish": True, "read_timeout": seconds, "write_timeout": seconds}
    # Kombu's limit for one attempt applies to all of them together: with a silent first broker, it never tried the
    # second.
    options["connect_retries_timeout"] = CYCLE_SECONDS
    if role == "publisher":
        retries = max(settings.need_broker().count(";"), 1)
        options |= {"max_retries": retries, "interval_start": 0, "interval_step": 0, "on_blocked": _refuse}
    # Seconds until the next broker of BROKER_URL is tried.
    timeout = 1 if role == "publisher" else 2
    return {"broker_transport_options": options, "broker_connection_timeout": timeout}


def _refuse(reason: str) -> None:
    """Raises an error, because RabbitMQ blocks publishers while it is short of memory or disk."""
    from kombu.exceptions import OperationalError

    raise OperationalError(reason)
