"""Checks of the broker's durability, queue depths, and the lists of invalid messages."""

# ruff: noqa: PLC0415 - importing redis, Celery and kombu costs 0.2 s of CPU; many commands contact no broker
import base64
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from app.broker.celery import make_celery
from app.broker.lanes import FAILING_SINCE, LANES, PROCESSING, RECEIVED_AT, RETRY_REASON, SENT_AT, is_amqp
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


# The ends of the first unacknowledged messages of all lanes: their headers and lane follow the body, which may have
# many megabytes. The broker does nothing else meanwhile: 0.2 ms for 10 messages, and for 200 messages 8 ms with
# bodies of 16 kB and 93 ms with bodies of 256 kB (on a busy machine).
READ_UNACKED = """
local found = {}
for _, tag in ipairs(redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1)) do
    local raw = redis.call('HGET', KEYS[2], tag)
    if raw then table.insert(found, raw:sub(-ARGV[2])) end
end
return found"""
MAX_UNACKED, TAIL_BYTES, MAX_AGE_SECONDS = 200, 16_384, 1e9
MAX_NUMBER = 1e15  # of a header; NaN and infinity are not below it


@dataclass(frozen=True)
class Lane:
    """The depth of a lane's queue, and the messages that workers have received and not acknowledged.

    On RabbitMQ `messages` includes delayed retries, and only the number of these is known of the rest.
    """

    name: str
    messages: int
    oldest: timedelta | None  # age of the oldest message; None: empty, or not readable (RabbitMQ)
    unacked: int = 0  # of all lanes together, the first MAX_UNACKED are counted
    unacked_for: timedelta | None = None  # since the oldest was received; without those that wait for a retry
    retrying: int = 0  # messages whose last try failed
    retries: int = 0  # the most retries of such a message
    retrying_for: timedelta | None = None  # since the first failure of the oldest
    retry_reason: str = ""  # of the one that failed last


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
                pipeline.llen(name + PROCESSING)
            pipeline.eval(READ_UNACKED, 2, "unacked_index", "unacked", MAX_UNACKED, TAIL_BYTES)
            *found, entries = pipeline.execute()
    except redis.RedisError as error:
        raise _unreachable(error) from None
    unacked = [_unacked(tail.decode(errors="replace")) for tail in entries]
    return [
        _with_unacked(
            Lane(name, found[3 * at], _age(found[3 * at + 1]), unacked=found[3 * at + 2]),
            [one for one in unacked if one.lane == name],
        )
        for at, name in enumerate(LANES)
    ]


@dataclass(frozen=True)
class _Unacked:
    """A message that a worker has received and not acknowledged. Times are in unix seconds."""

    lane: str
    received: float
    is_delayed: bool  # its worker keeps it until its next try
    retries: int
    since: float | None
    reason: str


def _unacked(tail: str) -> _Unacked:
    """The headers may be anything, because every client of the broker can set them."""
    headers: Any = {}
    with contextlib.suppress(ValueError, RecursionError):
        headers, _ = json.JSONDecoder().raw_decode(tail, tail.index('"headers": {') + len('"headers": '))
    numbers = {name: one for name, one in headers.items() if isinstance(one, int | float) and abs(one) < MAX_NUMBER}
    eta, reason = headers.get("eta"), headers.get(RETRY_REASON)
    return _Unacked(
        lane=tail.rpartition(", ")[2].strip('"]'),
        received=numbers.get(RECEIVED_AT, time.time()),
        is_delayed=isinstance(eta, str) and eta > datetime.now(UTC).isoformat(),  # Celery writes UTC in ISO 8601
        retries=int(numbers.get("retries", 0)),
        since=numbers.get(FAILING_SINCE),
        reason="".join(filter(str.isprintable, reason))[:200] if isinstance(reason, str) else "",
    )


def _with_unacked(lane: Lane, unacked: Sequence[_Unacked]) -> Lane:
    running = [one.received for one in unacked if not one.is_delayed]
    failed = sorted((one for one in unacked if one.retries), key=lambda one: one.received)
    first = min((one.since for one in failed if one.since is not None), default=None)
    return replace(
        lane,
        unacked=lane.unacked + len(unacked),
        unacked_for=_since(min(running, default=None)),
        retrying=len(failed),
        retries=max((one.retries for one in failed), default=0),
        retrying_for=_since(first),
        retry_reason=failed[-1].reason if failed else "",
    )


def _since(at: float | None) -> timedelta | None:
    return None if at is None else timedelta(seconds=min(max(time.time() - at, 0.0), MAX_AGE_SECONDS))


def _amqp_lanes(settings: Settings) -> list[Lane]:
    from kombu.exceptions import OperationalError

    from app.broker.delays import with_delay_queues

    celery = make_celery(settings, "publisher")
    connection = celery.connection_for_read()
    try:
        with connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=2)
            channel = connection.default_channel
            found = []
            for lane in celery.conf.task_queues:
                queues = with_delay_queues(lane, settings.need_broker())
                ready, *delayed = (one.bind(channel).queue_declare().message_count for one in queues)
                found.append(Lane(lane.name, ready + sum(delayed), None, retrying=sum(delayed)))
            return found
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
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError, RecursionError, Unprocessable):
        return None  # not a message of Headrace, so its age is unknown
    return datetime.now(UTC) - since


def _received(message: Any) -> datetime:
    """When the first delivery of a message was received: the endpoint's messages have no other timestamp."""
    (packed,), *_ = json.loads(base64.b64decode(message["body"]))
    return unpack(packed)[0].received
