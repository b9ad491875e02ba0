"""Kombu's Redis transport with one hole closed: a message leaves its lane only for a place where it is found again.

Kombu takes a message with BRPOP and writes down that it is being worked on in a second command. Whoever is killed in
between, the worker, or the broker with its answer not yet sent, takes the message along: in a minute of kill -9 at
random, 4 of 6,000 acknowledged events were lost. BLMOVE (Redis 6.2, Valkey) moves it into a list beside the lane.
"""

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from kombu.transport import redis, virtual

from app.broker.merging import Message, is_first_attempt, merge_batches
from app.errors import Unprocessable

PROCESSING = ":processing"  # beside a lane: its messages between the list and "unacked"
INVALID = ":invalid"  # beside a lane: what was in it and is no message
# The names of 0.1, drained as well: a worker of that version may still run, or have been killed. They go with 0.3.
ALL_PROCESSING, ALL_INVALID = (PROCESSING, ":taken"), (INVALID, ":foreign")
MAX_PROCESSING_SECONDS = 5.0  # what is longer in there belongs to nobody; an early return would only be done twice
log = logging.getLogger(__name__)
MAX_INSPECTED = 50
# What waits behind a message that was taken is taken along, up to so many messages and bytes of them. If something did
# last time, what comes within this time is taken as well: a tenth more is committed a second (measured in turns).
MAX_MERGED_MESSAGES, MAX_MERGED_BYTES = 32, 512 * 1024
LINGER_SECONDS = 0.010
MOVE_BATCH = """
local taken, bytes = {}, tonumber(ARGV[2])
while #taken < tonumber(ARGV[1]) do
    local raw = redis.call('LINDEX', KEYS[1], -1)
    if not raw or #raw > bytes then break end
    bytes = bytes - #raw
    table.insert(taken, redis.call('LMOVE', KEYS[1], KEYS[2], 'RIGHT', 'LEFT'))
end
return taken"""
MOVE_BACK = "if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 1 then redis.call('RPUSH', KEYS[2], ARGV[1]) end"


class QoS(redis.QoS):
    """What is being worked on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._seen: dict[bytes, float] = {}

    def append(self, message: Any, delivery_tag: str) -> None:
        """Writes a message down as being worked on and takes it out of the list, in one transaction."""
        written = json.dumps([message._raw, "", self.channel.lane])  # noqa: SLF001 - kombu's own way
        with self.pipe_or_acquire() as pipe:
            pipe.zadd(self.unacked_index_key, {delivery_tag: time.time()})
            pipe.hset(self.unacked_key, delivery_tag, written)
            for raw in self.channel.processing:
                pipe.lrem(self.channel.lane + PROCESSING, 1, raw)
            pipe.execute()
        self.channel.processing = ()
        virtual.QoS.append(self, message, delivery_tag)

    def restore_visible(self, *args: Any, **options: Any) -> None:
        """Called every second: gives back what a killed worker held, in either place."""
        super().restore_visible(*args, **options)
        with self.channel.conn_or_acquire() as client:
            present = {}
            for lane, suffix in itertools.product(self.channel.active_queues, ALL_PROCESSING):
                for raw in client.lrange(lane + suffix, -MAX_INSPECTED, -1):
                    present[raw] = self._seen.get(raw, time.monotonic())
                    if time.monotonic() - present[raw] > MAX_PROCESSING_SECONDS:
                        client.eval(MOVE_BACK, 2, lane + suffix, lane, raw)
            self._seen = present


class Channel(redis.Channel):
    """Takes messages by BLMOVE. A worker works on one lane, and messages have no priorities."""

    QoS = QoS
    _kept: Any = None
    lane = ""  # that was read last
    processing: Sequence[bytes] = ()  # and from it, until that is written down
    last_batch_was_shared = False  # what was taken last

    @contextlib.contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """One client for the life of the channel: kombu makes one a command, which costs more than sending it."""
        if client is None:
            if self._kept is None or self._kept.connection_pool is not self.pool:
                self._kept = self._create_client()
            client = self._kept
        yield client

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
            except self.connection_errors:
                self.client.connection.disconnect()  # the next round connects again
                raise
            if raw is None:
                raise virtual.base.Empty
            self.processing = [raw]
            message = self._message(raw)
            if message is None:
                self._quarantine(raw)
                raise virtual.base.Empty
            if is_first_attempt(message) and len(raw) < MAX_MERGED_BYTES:
                message = self._with_more(message, raw)
            self.connection._deliver(message, self.lane)  # noqa: SLF001 - kombu's own way
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _with_more(self, message: Message, raw: bytes) -> Message:
        """The message and those that wait behind it, as one. None of them is anywhere else meanwhile than in TAKEN."""
        places = (self.lane, self.lane + PROCESSING)
        if self.last_batch_was_shared:
            time.sleep(LINGER_SECONDS)
        with self.conn_or_acquire() as client:
            others = client.eval(MOVE_BATCH, 2, *places, MAX_MERGED_MESSAGES - 1, MAX_MERGED_BYTES - len(raw))
            fresh = list(itertools.takewhile(lambda one: one and is_first_attempt(one), map(self._message, others)))
            try:
                joined = merge_batches([message, *filter(None, fresh)]) if fresh else message
            except Unprocessable:  # whichever it is that cannot be read: each goes alone
                joined, fresh = message, []
            for other in reversed(others[len(fresh) :]):
                client.eval(MOVE_BACK, 2, *reversed(places), other)
        self.processing, self.last_batch_was_shared = [raw, *others[: len(fresh)]], bool(fresh)
        return joined

    def _quarantine(self, raw: bytes) -> None:
        """Bytes that are no message would end the worker, and after it the next one. They are kept, out of the way."""
        log.error("something that is no message was in lane %s; it is kept in %s%s", self.lane, self.lane, INVALID)
        with self.conn_or_acquire() as client:
            client.pipeline().lrem(self.lane + PROCESSING, 1, raw).lpush(self.lane + INVALID, raw).execute()
        self.processing = ()

    def _message(self, raw: bytes) -> dict[str, Any] | None:
        try:
            found = json.loads(raw)
            self.Message(found, channel=self)
            parts = (found["headers"], found["properties"]["delivery_info"])
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return None
        return found if all(isinstance(part, dict) for part in parts) else None

    def _do_restore_message(
        self, payload: dict[str, Any], _exchange: str, lane: str, pipe: Any, leftmost: Any = None
    ) -> None:
        """Gives a message back to the lane that it was taken from, in the transaction that takes it from "unacked".

        Kombu asks the exchange's bindings for the lane, and drops the message (and logs its body) if there are none, or
        if Redis answers with an error.
        """
        payload["headers"]["redelivered"] = True
        payload["properties"]["delivery_info"]["redelivered"] = True
        (pipe.lpush if leftmost else pipe.rpush)(lane, json.dumps(payload))


class Transport(redis.Transport):
    """For whoever takes; and for whoever publishes, whom its one client saves a third of what a message costs."""

    Channel = Channel
