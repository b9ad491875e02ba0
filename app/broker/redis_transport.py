"""Kombu's Redis transport, which moves a message atomically instead of popping it.

Kombu pops a message with BRPOP and records it as unacknowledged in a second command. If the worker is killed in
between, or the broker before it has sent its answer, the message is lost: 4 of 6,000 acknowledged events in a minute
of random kill -9. BLMOVE (Redis 6.2, Valkey) moves the message into a processing list of its lane.
"""

import contextlib
import json
import logging
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from kombu.transport import redis, virtual
from kombu.utils.json import dumps
from kombu.utils.objects import cached_property
from redis.connection import Connection, SSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.sentinel import SentinelConnectionPool

from app.broker.lanes import INVALID, LANES, PROCESSING, RECEIVED_AT
from app.broker.merging import Message, first_attempts, is_first_attempt, merge_batches
from app.broker.sentinel import POLL_SECONDS, finder_named, need_replicas, wait_commands
from app.errors import Unprocessable

MAX_PROCESSING_SECONDS = 5.0  # then the consumer counts as dead; returning its messages earlier would only repeat work
# A consumer merges the messages that are queued behind the one it received, up to this number and size. After a shared
# batch that was small and has emptied the lane it lingers for more: record 0072.
MAX_MERGED_MESSAGES, MAX_MERGED_BYTES = 256, 1024 * 1024
LINGER_SECONDS, SMALL_BATCH_BYTES = 0.100, 128 * 1024
MAX_INSPECTED = 2 * MAX_MERGED_MESSAGES  # messages of killed consumers that are returned at once
log = logging.getLogger(__name__)
# A broker whose memory is full refuses LMOVE and all other commands that could need memory, except in a script that
# begins by freeing some. So these scripts do: otherwise workers could not empty a full broker.
MOVE_BATCH = """
local taken, bytes = {}, tonumber(ARGV[2])
while #taken < tonumber(ARGV[1]) do
    local raw = redis.call('LINDEX', KEYS[1], -1 - #taken)
    if not raw or #raw > bytes then break end
    bytes = bytes - #raw
    table.insert(taken, raw)
end
if #taken > 0 then
    redis.call('RPOP', KEYS[1], #taken)
    redis.call('LPUSH', KEYS[2], unpack(taken))
end
return {taken, redis.call('LLEN', KEYS[1])}"""
MOVE_BACK = "if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 1 then redis.call('RPUSH', KEYS[2], ARGV[1]) end"
# LREM searches from the tail, where the oldest messages are.
MOVE_TO_UNACKED = """
for place = 4, #ARGV do redis.call('LREM', KEYS[1], -1, ARGV[place]) end
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])"""
FULL_PAUSE_SECONDS = 0.1  # between two requests to a full broker, which refuses to wait for a message
# Codes of replies with which a node refuses to work for now: it is a replica, has lost its replicas, or cannot write to
# its disk. The first word of an error reply is its code (RESP specification, "Simple errors").
REFUSALS = ("READONLY", "NOREPLICAS", "MISCONF", "MASTERDOWN", "UNBLOCKED")


class _LeavesRefusingNodes:
    """Reports a refusal as a lost connection. Kombu would end the worker: it expects no such error.

    Behind a proxy, the next connection may be to a new primary.
    """

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)  # type: ignore[misc]
        except ResponseError as error:
            code = error.status_code or str(error).partition(" ")[0]
            if code not in REFUSALS:
                raise
            self.disconnect()  # type: ignore[attr-defined]
            raise RedisConnectionError(f"the node refuses commands: {code}") from None


def _leaving(connection_class: type) -> type:
    return type(connection_class.__name__, (_LeavesRefusingNodes, connection_class), {})


class Base64(virtual.base.Base64):
    """Decodes with msgspec, in a fifth of kombu's time; with kombu if msgspec is too strict."""

    def decode(self, s: str) -> bytes:
        try:
            return msgspec.convert(s, bytes)
        except msgspec.ValidationError:
            return super().decode(s)  # type: ignore[no-any-return]


class QoS(redis.QoS):
    """The messages that are received and not acknowledged."""

    _seen: Mapping[bytes, float] = {}  # when a message was first seen in a processing list (monotonic seconds)

    def append(self, message: Any, delivery_tag: str) -> None:
        """Moves a message from the processing list to "unacked" in one script."""
        raw_message = message._raw  # noqa: SLF001 - as kombu does
        raw_message["headers"][RECEIVED_AT] = time.time()
        written = json.dumps([raw_message, "", self.channel.lane])
        keys = (self.channel.lane + PROCESSING, self.unacked_index_key, self.unacked_key)
        values = (delivery_tag, time.time(), written, *self.channel.processing)
        with self.channel.conn_or_acquire() as client:
            client.eval(MOVE_TO_UNACKED, len(keys), *keys, *values)
        self.channel.processing = ()
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledges a message. If the broker refuses, it redelivers the message after the visibility timeout.

        The message is removed here even then: it would fill the prefetch count, and the worker would not ask for
        another.
        """
        try:
            super().ack(delivery_tag)
        except RedisError:
            virtual.QoS.ack(self, delivery_tag)
            raise

    def extend(self) -> None:
        """Starts the visibility timeout of the received messages again. Safe to call from another thread."""
        if tags := list(self._delivered):
            with self.channel.conn_or_acquire() as client:  # XX: not of messages that were acknowledged in the meantime
                client.zadd(self.unacked_index_key, dict.fromkeys(tags, time.time()), xx=True)

    def restore_visible(self, *args: Any, **options: Any) -> None:
        """Called every 1 to 5 s: returns messages of killed workers from "unacked" and from the processing lists.

        It looks in one round trip. Kombu's search is three, two of which write a lock to the broker's disk.
        """
        lanes = tuple(self.channel.active_queues)
        with self.channel.conn_or_acquire() as client:
            with client.pipeline(transaction=False) as pipe:
                pipe.zcount(self.unacked_index_key, 0, time.time() - self.visibility_timeout)
                for lane in lanes:
                    pipe.lrange(lane + PROCESSING, -MAX_INSPECTED, -1)
                overdue, *found = pipe.execute()
            if overdue:
                self._restore_unacked(*args, **options)
            present = {}
            for lane, messages in zip(lanes, found, strict=True):
                for raw in messages:
                    present[raw] = self._seen.get(raw, time.monotonic())
                    if time.monotonic() - present[raw] > MAX_PROCESSING_SECONDS:
                        client.eval(MOVE_BACK, 2, lane + PROCESSING, lane, raw)
            self._seen = present

    def _restore_unacked(self, *args: Any, **options: Any) -> None:
        try:
            super().restore_visible(*args, **options)
        except OutOfMemoryError:
            log.warning("the memory of the broker is full: messages of killed workers wait until the lanes are emptied")


class Channel(redis.Channel):
    """Receives messages by BLMOVE. A worker consumes one lane, and messages have no priorities."""

    QoS = QoS
    connection_class, connection_class_ssl = _leaving(Connection), _leaving(SSLConnection)
    from_transport_options = (*redis.Channel.from_transport_options, "replicas")
    replicas = 0  # the number that must have a published message on disk
    codecs = {"base64": Base64()}  # noqa: RUF012 - kombu's
    _own_client: Any = None
    lane = ""  # the lane that was read last
    processing: Sequence[bytes] = ()  # its messages that are not yet in "unacked"
    lingers = False  # whether the last batch was shared and small, and has emptied the lane

    @contextlib.contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """One client for the life of the channel: kombu makes one per command, which costs more than sending it."""
        if client is None:
            if self._own_client is None or self._own_client.connection_pool is not self.pool:
                self._own_client = self._create_client()
            client = self._own_client
        yield client

    def _put(self, queue: str, message: Message, **options: Any) -> None:
        """Returns once the broker and the replicas have the message on disk. Raises NotReplicated."""
        if self.replicas and queue in LANES:
            self._write_to_replicas("LPUSH", queue, dumps(message))
        else:
            super()._put(queue, message, **options)

    def _write_to_replicas(self, *command: Any) -> None:
        """In one round trip and on one connection: WAIT and WAITAOF wait for the writes of their connection only."""
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for one in (command, *self._waits):
                pipe.execute_command(*one)
            need_replicas(pipe.execute()[-1], self.replicas)

    @cached_property  # type: ignore[untyped-decorator]
    def _waits(self) -> tuple[tuple[Any, ...], ...]:
        with self.conn_or_acquire() as client:
            return wait_commands(self.replicas, client.info("server")["redis_version"])

    def _brpop_start(self, timeout: float | None = None) -> None:
        lanes = self._queue_cycle.consume(len(self.active_queues))
        if not lanes:
            return
        self.lane = lanes[0]
        self._queue_cycle.rotate(self.lane)
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        wait = self.brpop_timeout if timeout is None else timeout
        self.client.connection.send_command("BLMOVE", self.lane, self.lane + PROCESSING, "RIGHT", "LEFT", wait or 0)

    def _brpop_read(self, **options: Any) -> bool:
        try:
            try:
                raw = self.client.parse_response(self.client.connection, "BLMOVE", **options)
            except OutOfMemoryError:
                raw = self._move_without_waiting()
            except self.connection_errors:
                self.client.connection.disconnect()  # the next round connects again
                raise
            if raw is None:
                raise virtual.base.Empty
            self.processing = [raw]
            message = self._parse(raw)
            if message is None:
                self._quarantine(raw)
                raise virtual.base.Empty
            if is_first_attempt(message) and len(raw) < MAX_MERGED_BYTES:
                message = self._merge_queued(message, raw)
            self.connection._deliver(message, self.lane)  # noqa: SLF001 - as kombu does
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _move_without_waiting(self) -> bytes | None:
        with self.conn_or_acquire() as client:
            found, _ = client.eval(MOVE_BATCH, 2, self.lane, self.lane + PROCESSING, 1, sys.maxsize)
        if not found:
            time.sleep(FULL_PAUSE_SECONDS)
            return None
        return found[0]  # type: ignore[no-any-return]

    def _merge_queued(self, message: Message, raw: bytes) -> Message:
        """The message, merged with those queued behind it. All of them stay in the processing list until `append`."""
        lists = (self.lane, self.lane + PROCESSING)
        if self.lingers:
            time.sleep(LINGER_SECONDS)
        with self.conn_or_acquire() as client:
            others, left = client.eval(MOVE_BATCH, 2, *lists, MAX_MERGED_MESSAGES - 1, MAX_MERGED_BYTES - len(raw))
            fresh = first_attempts(others)
            try:
                merged = merge_batches([message, *fresh]) if fresh else message
            except Unprocessable:  # one of them is invalid: each is then delivered alone
                merged, fresh = message, []
            for other_raw in reversed(others[len(fresh) :]):
                client.eval(MOVE_BACK, 2, *reversed(lists), other_raw)
        self.processing = [raw, *others[: len(fresh)]]
        self.lingers = bool(fresh) and not left and sum(map(len, self.processing)) < SMALL_BATCH_BYTES
        return merged

    def _quarantine(self, raw: bytes) -> None:
        """Moves bytes that are not a message out of the lane: they would crash one worker after another."""
        log.error("lane %s contained bytes that are not a message, now in %s%s", self.lane, self.lane, INVALID)
        with self.conn_or_acquire() as client:
            client.eval(MOVE_BACK, 2, self.lane + PROCESSING, self.lane + INVALID, raw)
        self.processing = ()

    def _parse(self, raw: bytes) -> Message | None:
        try:
            found = json.loads(raw)
            parts = (found["headers"], found["properties"], found["properties"]["delivery_info"])
            if not all(isinstance(part, dict) for part in parts):
                return None
            # Two messages with one tag would be one in "unacked".
            found["properties"]["delivery_tag"] = uuid.uuid4().hex
            self.Message(found, channel=self)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return None
        return found  # type: ignore[no-any-return]

    def _receive_one(self, c: Any) -> Any:
        """Receives a broadcast. One that is not a message is dropped: kombu's exception would end the worker."""
        try:
            return super()._receive_one(c)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            log.warning("a broadcast that is not a message was dropped: %s", type(error).__name__)
            raise virtual.base.Empty from None

    def _do_restore_message(
        self, payload: dict[str, Any], _exchange: str, lane: str, pipe: Any, leftmost: Any = None
    ) -> None:
        """Returns a message to the lane it came from, in the transaction that removes it from "unacked".

        Kombu looks up the lane in the exchange's bindings. Without a binding, or after an error of Redis, it drops the
        message and logs its body.
        """
        payload["headers"]["redelivered"] = True
        payload["properties"]["delivery_info"]["redelivered"] = True
        (pipe.lpush if leftmost else pipe.rpush)(lane, json.dumps(payload))


class Transport(redis.Transport):
    """For consumers and for the publisher: one Redis client per channel saves a third of the CPU cost of a publish."""

    Channel = Channel


class SentinelChannel(Channel, redis.SentinelChannel):
    """Finds the primary through Sentinel, and follows it when another node becomes the primary."""

    connection_class = _leaving(redis.SentinelChannel.connection_class)
    connection_class_ssl = _leaving(redis.SentinelChannel.connection_class_ssl)
    from_transport_options = (*Channel.from_transport_options, "sentinels", "master_name")
    sentinels = ""  # the name of a finder

    def _sentinel_managed_pool(self, asynchronous: bool = False) -> SentinelConnectionPool:  # noqa: FBT001, FBT002
        """The pool of PrimaryFinder. Kombu's own pool asks the sentinels without TLS and trusts the first answer."""
        options = self._connparams(asynchronous)
        for name in ("host", "port"):
            del options[name]
        return finder_named(self.sentinels).pool(**options)

    def maybe_refresh_binding_expiry(self) -> None:
        """Follows the primary. Kombu calls this every second, even if the channel consumes broadcasts only."""
        finder_named(self.sentinels).primary(POLL_SECONDS)
        super().maybe_refresh_binding_expiry()


class SentinelTransport(Transport):
    Channel = SentinelChannel
