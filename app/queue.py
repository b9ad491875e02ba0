"""The queue: lanes, task names, the Celery object, and publishing deliveries so that they survive a power cut."""

import contextlib
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.exceptions import KombuError, OperationalError

from app import tracing
from app.config import Settings
from app.delivery import Delivery, pack
from app.errors import NotTaken

LANES = ("live", "download", "backfill", "maintenance")
APPLY = "headrace.apply"  # applies one message of deliveries; the only task that the endpoint sends
FETCH = "headrace.fetch"  # goes on with one backfill for a while
DOWNLOAD = "headrace.download"  # fetches one delivery that was only announced, before its URL expires
RECONCILE = "headrace.reconcile"  # goes on with comparing what there should be with what is stored
SWEEP = "headrace.sweep"  # beat's: looks for work that is due
WAITS = (1, 2, 4, 8, 16, 32, 64)  # seconds that a message may wait in RabbitMQ: a queue for each, see deploy/DESIGN.md

NOWHERE = "headrace.nowhere"  # a queue that does not exist
SENT_AT = "headrace-sent-at"  # the header that says so, in unix seconds

Role = Literal["publisher", "worker"]


def is_amqp(url: str) -> bool:
    """Whether the broker speaks AMQP (RabbitMQ) rather than Redis."""
    return urlsplit(url).scheme in ("amqp", "amqps")


def system(settings: Settings) -> str:
    """The broker's kind, by the name that OpenTelemetry has for it."""
    return "rabbitmq" if is_amqp(settings.need_broker()) else "redis"


def make_celery(settings: Settings, role: Role) -> Celery:
    """The Celery application of one process. Publishers give up quickly; workers wait for their broker."""
    url = settings.need_broker()
    celery = Celery("headrace", broker=url, set_as_current=role == "worker")
    if not is_amqp(url):
        celery.conf.broker_transport = "app.transport:Transport"
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
        worker_prefetch_multiplier=1,  # a batch is work enough; what is prefetched waits for its visibility timeout
        worker_send_task_events=True,  # Flower's
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


def _queue(lane: str, url: str) -> Queue:
    arguments = {"x-queue-type": "quorum"} if is_amqp(url) else None
    return Queue(lane, Exchange(lane, type="direct", durable=True), lane, durable=True, queue_arguments=arguments)


class _WaitingRoom(Queue):  # type: ignore[misc]
    """A queue that is declared before every message: one that somebody has removed would swallow it."""

    can_cache_declaration = False


def waiting_room(lane: str, seconds: float) -> Queue:
    """Where a message waits until RabbitMQ gives it back to its lane: a worker that held it could do nothing else."""
    wait = next((one for one in WAITS if one >= seconds), WAITS[-1])
    name = f"{lane}.{wait}s"
    arguments = {
        "x-queue-type": "quorum",
        "x-message-ttl": wait * 1000,
        "x-dead-letter-exchange": lane,
        "x-dead-letter-routing-key": lane,
        "x-dead-letter-strategy": "at-least-once",  # it leaves the room once the lane has confirmed it
        "x-overflow": "reject-publish",  # which that needs
    }
    return _WaitingRoom(name, Exchange(""), name, durable=True, queue_arguments=arguments)


def with_waiting_rooms(lane: Queue, url: str) -> list[Queue]:
    """Every queue of this broker in which messages of a lane may be."""
    return [lane, *(waiting_room(lane.name, wait) for wait in WAITS if is_amqp(url))]


def after(celery: Celery, lane: str, seconds: float) -> dict[str, Any]:
    """The options with which a task that is sent to a lane, or put back into it, is done in so many seconds."""
    if seconds <= 0 or not is_amqp(celery.conf.broker_url):
        return {"countdown": max(seconds, 0)}
    room = waiting_room(lane, seconds)
    return {"countdown": 0, "queue": room, "exchange": "", "routing_key": room.name, "mandatory": True}


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
        # Without these two a killed worker's message comes back after ten times ten seconds more.
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        # Who gives them back holds this lock. Killed with it, nobody did for kombu's five minutes.
        "unacked_mutex_expire": 5,
        "socket_keepalive": True,
    }
    if role == "publisher":
        # A frozen broker spends the socket's timeout twice (measured: 4.0 s with 2 s), and 5 s are all there is.
        options |= {"socket_timeout": 1.5, "socket_connect_timeout": 1, "max_retries": 1, "interval_start": 0}
    return options


def _refuse(reason: str) -> None:
    """RabbitMQ is short of memory or disk and has said so. Until that is over it reads nothing."""
    raise OperationalError(reason)


class Publisher:
    """Puts messages of deliveries on the live lane over one connection, for one thread."""

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._lane = next(queue for queue in celery.conf.task_queues if queue.name == "live")
        self._connection: Any = None
        self._producer: Any = None

    def publish(self, deliveries: Sequence[Delivery]) -> None:
        """Returns once the broker has the message on disk. Raises NotTaken if that is not certain."""
        try:
            if self._producer is None:
                self._connection = self._celery.connection_for_write()
                self._producer = self._celery.amqp.Producer(self._connection)
            self._celery.send_task(
                APPLY,
                args=(pack(deliveries),),
                queue=self._lane,  # declared with every first publish: an unbound key would swallow the message
                producer=self._producer,
                headers=tracing.carried(),
                retry=False,
                mandatory=True,  # RabbitMQ confirms also what it could route nowhere, unless it is to send that back
                argsrepr=f"({len(deliveries)} deliveries)",  # what Flower and logs may show
                kwargsrepr="{}",
            )
        except self._errors() as error:
            self.close(goodbye=False)
            raise NotTaken(f"the broker did not confirm ({type(error).__name__})") from error

    def ping(self) -> None:
        """Raises NotTaken if the broker cannot be reached now, or takes nothing."""
        connection = self._celery.connection_for_write()
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=1)
            if is_amqp(self._celery.conf.broker_url):  # which tells of an alarm only who publishes something
                connection.Producer().publish("", exchange="", routing_key=NOWHERE)
        except self._errors() as error:
            self._let_go(connection, goodbye=False)
            raise NotTaken(f"the broker cannot be reached, or takes nothing ({type(error).__name__})") from error
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
