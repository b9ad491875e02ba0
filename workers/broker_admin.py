"""Checks of the broker's durability, queue depths, and the lists of invalid messages."""

# ruff: noqa: PLC0415 - importing redis, Celery and kombu costs 0.2 s of CPU; many commands contact no broker
import base64
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from app.broker.celery import make_celery
from app.broker.lanes import LANES, SENT_AT, is_amqp
from app.config.settings import Settings
from app.delivery import unpack
from app.errors import Misconfigured, TryLater, Unprocessable

if TYPE_CHECKING:
    import redis

DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
WHY = {
    "appendonly": "without it, a restart loses every event that was answered 202",
    "appendfsync": "with any other value, a power cut loses the last second of events that were answered 202",
    "maxmemory-policy": "any other policy deletes events when memory runs out",
}


def redis_client(url: str) -> "redis.Redis":
    """A client with short timeouts."""
    import redis

    return redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=2)


def _unreachable(error: Exception) -> TryLater:
    return TryLater(f"the broker cannot be reached ({type(error).__name__})", setting="BROKER_URL")


def need_durable(settings: Settings) -> None:
    """Raises Misconfigured if a confirmed event could be lost, and TryLater if the broker cannot be reached."""
    import redis

    url = settings.need_broker()
    if settings.broker_durability_asserted:
        return
    if is_amqp(url):
        _need_quorum_queues(settings)
        return
    try:
        with redis_client(url) as client:
            found = {name: str(client.config_get(name).get(name)) for name in DURABLE}
    except redis.ResponseError:
        raise Misconfigured(
            "the broker forbids CONFIG GET, so its durability cannot be checked; if it is configured with "
            "appendfsync always and noeviction, set HEADRACE_BROKER_DURABILITY_ASSERTED=true",
            setting="BROKER_URL",
        ) from None
    except redis.RedisError as error:
        raise _unreachable(error) from None
    for name, wanted in DURABLE.items():
        if found[name] != wanted:
            raise Misconfigured(
                f"the broker has {name} {found[name]} but needs {wanted}: {WHY[name]}. "
                f"Fix it with CONFIG SET {name} {wanted}, or set HEADRACE_BROKER_DURABILITY_ASSERTED=true",
                setting="BROKER_URL",
            )


def _need_quorum_queues(settings: Settings) -> None:
    """Declares the lanes, as every publish does: RabbitMQ rejects a declaration that differs from the existing queue.

    Also declares their delay queues early. An older RabbitMQ that dies in the first half second after a queue was
    created makes it unusable permanently, and delayed retries are published just when processes fail.
    """
    from kombu.exceptions import OperationalError

    from app.broker.delays import with_delay_queues

    celery = make_celery(settings, "publisher")
    connection = celery.connection_for_write()
    name = ""
    try:
        with connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=2)
            lanes = celery.conf.task_queues
            for queue in (one for lane in lanes for one in with_delay_queues(lane, settings.need_broker())):
                name = queue.name
                queue.bind(connection.default_channel).declare()
    except connection.channel_errors as error:
        if not name:
            text = f"the broker rejects user, password or vhost ({type(error).__name__})"
            raise Misconfigured(text, setting="BROKER_URL") from None
        raise Misconfigured(
            f"queue {name} is not a durable quorum queue ({type(error).__name__}): a crash of the broker would lose "
            f"events that were answered 202. Let the workers empty it, then delete it "
            f"(rabbitmqctl delete_queue {name}), or use another vhost",
            setting="BROKER_URL",
        ) from None
    except (OperationalError, *connection.connection_errors) as error:
        raise _unreachable(error) from None


def need_redis(url: str, name: str) -> None:
    """Raises TryLater, which names the setting, if Redis cannot be reached."""
    import redis

    try:
        with redis_client(url) as client:
            client.ping()
    except redis.RedisError as error:
        raise TryLater(f"Redis cannot be reached ({type(error).__name__})", setting=name) from None


@dataclass(frozen=True)
class Lane:
    """The depth of a lane's queue, including delayed retries."""

    name: str
    messages: int
    oldest: timedelta | None  # age of the oldest message; None: empty, or not readable (RabbitMQ)


def lanes(settings: Settings) -> list[Lane]:
    """The depth of every lane. Raises TryLater if the broker cannot be reached."""
    url = settings.need_broker()
    return _amqp_lanes(settings) if is_amqp(url) else _redis_lanes(url)


def _redis_lanes(url: str) -> list[Lane]:
    """Without Celery, whose import would take half of the time of `headrace status`."""
    import redis

    try:
        with redis_client(url) as client, client.pipeline(transaction=False) as pipeline:
            for name in LANES:
                pipeline.llen(name)
                pipeline.lindex(name, -1)  # the next message: kombu pushes on the left and pops on the right
            found = pipeline.execute()
    except redis.RedisError as error:
        raise _unreachable(error) from None
    return [Lane(name, found[2 * at], _age(found[2 * at + 1])) for at, name in enumerate(LANES)]


def _amqp_lanes(settings: Settings) -> list[Lane]:
    from kombu.exceptions import OperationalError

    from app.broker.delays import with_delay_queues

    celery = make_celery(settings, "publisher")
    connection = celery.connection_for_read()
    try:
        with connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=2)
            channel = connection.default_channel
            return [
                Lane(lane.name, sum(one.bind(channel).queue_declare().message_count for one in queues), None)
                for lane in celery.conf.task_queues
                for queues in [with_delay_queues(lane, settings.need_broker())]
            ]
    except (OperationalError, OSError, *connection.channel_errors) as error:
        raise _unreachable(error) from None


def drain_invalid(settings: Settings, keep: Callable[[bytes, str], object]) -> None:
    """Passes invalid messages, which the Redis transport moved to `:invalid` lists, to `keep`, then deletes them."""
    import redis

    from app.broker.redis_transport import ALL_INVALID

    url = settings.need_broker()
    if is_amqp(url):
        return
    try:
        with redis_client(url) as client:
            for name in map("".join, itertools.product(LANES, ALL_INVALID)):
                for raw in client.lrange(name, 0, -1):
                    keep(raw, "bytes that are not a message")
                    client.lrem(name, 1, raw)
    except redis.RedisError as error:
        raise _unreachable(error) from None


def _age(raw: object) -> timedelta | None:
    """The time since a message was sent."""
    if not isinstance(raw, bytes):
        return None
    try:
        message = json.loads(raw)
        sent_at = message["headers"].get(SENT_AT)
        since = _received(message) if sent_at is None else datetime.fromtimestamp(sent_at, UTC)
    except (ValueError, KeyError, TypeError, AttributeError, Unprocessable):
        return None  # not a message of Headrace, so its age is unknown
    return datetime.now(UTC) - since


def _received(message: Any) -> datetime:
    """When the first delivery of a message was received: the endpoint's messages have no other timestamp."""
    (packed,), *_ = json.loads(base64.b64decode(message["body"]))
    return unpack(packed)[0].received
