"""The Celery application, configured for the endpoint's publisher or for a worker."""

# ruff: noqa: PLC0415 - importing Celery costs 0.1 s of CPU, so commands that use no broker do not import it
from typing import TYPE_CHECKING, Any, Literal

from app.broker.lanes import LANES, is_amqp
from app.config.settings import Settings

if TYPE_CHECKING:
    from celery import Celery
    from kombu.entity import Queue

Role = Literal["publisher", "worker"]


def make_celery(settings: Settings, role: Role) -> "Celery":
    """The Celery application of one process. Publishers fail fast; workers wait for the broker."""
    from celery import Celery

    url = settings.need_broker()
    celery = Celery("headrace", broker=url, set_as_current=role == "worker")
    if not is_amqp(url):
        celery.conf.broker_transport = "app.broker.redis_transport:Transport"
    celery.conf.update(
        task_queues=[_queue(lane, url) for lane in LANES],
        task_default_queue="maintenance",
        task_create_missing_queues=False,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_publish_retry=role == "worker",
        worker_prefetch_multiplier=1,  # a killed worker's prefetched messages wait for the visibility timeout
        worker_send_task_events=True,  # for Flower
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=_transport_options(settings, role),
        broker_pool_limit=10,
        event_queue_ttl=60,
        event_queue_expires=60,
        timezone="UTC",
        enable_utc=True,
    )
    return celery


def _queue(lane: str, url: str) -> "Queue":
    from kombu.entity import Exchange, Queue

    arguments = {"x-queue-type": "quorum"} if is_amqp(url) else None
    return Queue(lane, Exchange(lane, type="direct", durable=True), lane, durable=True, queue_arguments=arguments)


def _transport_options(settings: Settings, role: Role) -> dict[str, Any]:
    url = settings.need_broker()
    if is_amqp(url):
        options: dict[str, Any] = {"confirm_publish": True}
        if role == "publisher":
            options |= {"read_timeout": 2, "write_timeout": 2}
            options |= {"max_retries": 1, "interval_start": 0, "interval_step": 0, "on_blocked": _refuse}
        return options
    options = {
        "visibility_timeout": settings.visibility_timeout_seconds,
        # Without these two a killed worker's message is redelivered up to 100 s after the visibility timeout.
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        # The worker that restores messages holds this lock. If it is killed, kombu's default blocks it for 5 min.
        "unacked_mutex_expire": 5,
        "socket_keepalive": True,
    }
    if role == "publisher":
        # A frozen broker costs the socket timeout twice (measured: 4.0 s with 2 s); an answer is due within 5 s.
        options |= {"socket_timeout": 1.5, "socket_connect_timeout": 1, "max_retries": 1, "interval_start": 0}
    return options


def _refuse(reason: str) -> None:
    """RabbitMQ blocks publishers while it is short of memory or disk."""
    from kombu.exceptions import OperationalError

    raise OperationalError(reason)
