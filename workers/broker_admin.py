"""Checks of the broker's durability, queue depths, and the lists of invalid messages.

The parts for one kind of broker are in rabbitmq_admin and redis_durability.
"""

# ruff: noqa: PLC0415 - importing redis, Celery and kombu costs 0.2 s of CPU; many commands contact no broker
import base64
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from app.broker.lanes import FAILING_SINCE, INVALID, LANES, PROCESSING, RECEIVED_AT, RETRY_REASON, SENT_AT, is_amqp
from app.config.settings import Settings
from app.delivery import unpack
from app.errors import Misconfigured, TryLater, Unprocessable
from workers.rabbitmq_admin import need_quorum_queues, queue_depths, unreachable
from workers.rabbitmq_management import Held, held_messages
from workers.redis_durability import need_durable_redis, redis_client


def need_durable(settings: Settings) -> Sequence[str]:
    """Raises Misconfigured if a confirmed event could be lost, and TryLater if the broker cannot be reached.

    Returns remarks for the operator.
    """
    import redis

    url = settings.need_broker()
    if is_amqp(url) and settings.broker_replicas:
        raise Misconfigured(
            "for Redis and Valkey only, and BROKER_URL is RabbitMQ: its quorum queues replicate each message before "
            "they confirm it. Remove the setting",
            setting="HEADRACE_BROKER_REPLICAS",
        )
    if settings.broker_durability_asserted:
        return []
    if is_amqp(url):
        need_quorum_queues(settings)
        return []
    try:
        return need_durable_redis(settings)
    except redis.RedisError as error:
        raise unreachable(error) from None


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

    On RabbitMQ `messages` includes delayed retries, and only the number of these is known of retried messages.
    """

    name: str
    messages: int
    oldest: timedelta | None  # age of the oldest message; None: empty, or not readable (RabbitMQ)
    unacked: int | None = 0  # of all lanes together, the first MAX_UNACKED are counted; None: unknown (RabbitMQ)
    # Since the oldest was received, without those that wait for a retry. On RabbitMQ, at least for how long this
    # process has seen unacknowledged messages and no acknowledgement.
    unacked_for: timedelta | None = None
    retrying: int = 0  # messages whose last try failed
    retries: int = 0  # the most retries of such a message
    retrying_for: timedelta | None = None  # since the first failure of the oldest
    retry_reason: str = ""  # of the one that failed last


def lanes(settings: Settings) -> list[Lane]:
    """The depth of every lane. Raises TryLater if the broker cannot be reached."""
    url = settings.need_broker()
    if not is_amqp(url):
        return _redis_lanes(url)
    depths, held = queue_depths(settings), held_messages(settings)
    found = []
    for one in depths:
        unacked, since = _unacked_of(url, one.lane, held)
        messages = one.ready + one.delayed
        found.append(Lane(one.lane, messages, None, unacked=unacked, unacked_for=since, retrying=one.delayed))
    return found


# By broker and lane: the number of acknowledgements, and since when it is that.
_seen: dict[tuple[str, str], tuple[int | None, float]] = {}


def _unacked_of(url: str, name: str, held: Mapping[str, Held]) -> tuple[int | None, timedelta | None]:
    """The unacknowledged messages of a lane of RabbitMQ, and since when none was acknowledged; None: unknown.

    Those of its delay queue, which wait in a worker for their time, are counted only.
    """
    from app.broker.delays import delay_queue

    found, waiting = held.get(name), held.get(delay_queue(name).name)
    if found is None or found.messages_unacknowledged is None:
        return None, None
    now, acknowledged = time.monotonic(), found.acknowledgements
    before, since = _seen.get((url, name), (acknowledged, now))
    if not found.messages_unacknowledged or acknowledged is None or before != acknowledged:
        since = now
    _seen[url, name] = acknowledged, since
    unacked = found.messages_unacknowledged + ((waiting and waiting.messages_unacknowledged) or 0)
    return unacked, timedelta(seconds=now - since) if now > since else None


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
        raise unreachable(error) from None
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
        unacked=(lane.unacked or 0) + len(unacked),
        unacked_for=_since(min(running, default=None)),
        retrying=len(failed),
        retries=max((one.retries for one in failed), default=0),
        retrying_for=_since(first),
        retry_reason=failed[-1].reason if failed else "",
    )


def _since(at: float | None) -> timedelta | None:
    return None if at is None else timedelta(seconds=min(max(time.time() - at, 0.0), MAX_AGE_SECONDS))


def drain_invalid(settings: Settings, keep: Callable[[bytes, str], object]) -> None:
    """Passes invalid messages, which the Redis transport moved to `:invalid` lists, to `keep`, then deletes them."""
    import redis

    url, names = settings.need_broker(), [lane + INVALID for lane in LANES]
    if is_amqp(url):
        return
    try:
        with redis_client(url) as client:
            with client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.lrange(name, 0, -1)
                found = pipeline.execute()
            for name, messages in zip(names, found, strict=True):
                for raw in messages:
                    keep(raw, "bytes that are not a message")
                    client.lrem(name, 1, raw)
    except redis.RedisError as error:
        raise unreachable(error) from None


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
