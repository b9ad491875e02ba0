"""`headrace etl`: consumes events that Junction's ETL pipeline publishes to a RabbitMQ queue.

Messages are trusted without a signature: the right to publish to the queue replaces it. A message is acknowledged after
its commit. If a process is killed in between, RabbitMQ redelivers the message, and applying it again changes nothing.
"""

import hashlib
import logging
import signal
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kombu import Connection
from kombu.exceptions import OperationalError

from app.config.settings import Settings
from app.delivery import Receipt, seal
from app.errors import ConnectionLost, Misconfigured, Unprocessable
from app.observability import metrics, tracing
from app.observability.ready import mark_ready
from app.sealing import LARGEST, Sealer
from workers.fetch.backoff import backoff
from workers.ingest.apply import Applier
from workers.ingest.outcomes import (
    MAX_LIVE_BYTES,
    MAX_LOST,
    Applied,
    ParsedDelivery,
    cause_of,
    failures_after,
    retry_reason,
)

AGGREGATOR, TASK = "junction", "headrace.etl"
PREFETCH = 50  # the maximum number of unacknowledged messages, and of messages in one transaction
IDLE_SECONDS = 0.05  # linger: a batch is applied when no other message arrives for so long
POLL_SECONDS = 1.0  # how often the stop flag is checked
HEARTBEAT_SECONDS = 30
MAX_RECONNECT_SECONDS = 30.0
MAX_RETRY_SECONDS = 5.0  # between attempts to apply a batch
MICROSECOND = 1e-6
MAX_TIMESTAMP = 1 << 33  # larger timestamps are in milliseconds, which AMQP does not allow, and are ignored
PLAIN_ENCODINGS = ("", "identity", "utf-8", "utf8")  # some clients set the charset here
# Enqueues fetches of the backfills, and the deliveries that must be retried alone. Raises TryLater.
HandOver = Callable[[Applied], object]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReceivedMessage:
    """A message from the queue."""

    tag: int
    body: bytes
    encoding: str
    routing_key: str  # the event type
    redelivered: bool  # delivered before without an acknowledgement
    message_id: str | None
    seconds: int | None  # its AMQP timestamp


def from_amqp(message: Any) -> ReceivedMessage:
    """Converts a message of the AMQP library."""
    info, properties = message.delivery_info, message.properties
    timestamp = properties.get("timestamp")
    return ReceivedMessage(
        tag=info["delivery_tag"],
        body=message.body if isinstance(message.body, bytes) else str(message.body).encode(),
        encoding=str(properties.get("content_encoding") or "").lower(),
        routing_key=str(info.get("routing_key") or ""),
        redelivered=bool(info.get("redelivered")),
        message_id=properties.get("message_id"),
        seconds=timestamp if isinstance(timestamp, int) and 0 < timestamp < MAX_TIMESTAMP else None,
    )


def decode_body(received: ReceivedMessage, max_bytes: int) -> bytes:
    """Decompresses the event. Raises Unprocessable."""
    if received.encoding in PLAIN_ENCODINGS:
        return received.body
    if received.encoding != "gzip":
        raise Unprocessable("unsupported content-encoding: use gzip or none")
    inflater = zlib.decompressobj(wbits=31)
    try:
        body = inflater.decompress(received.body, max_bytes)
    except zlib.error:
        raise Unprocessable("the body is not gzip, although its content-encoding is") from None
    if inflater.unconsumed_tail or not inflater.eof or inflater.unused_data:
        raise Unprocessable("the gzip body is truncated, or larger than HEADRACE_MAX_BODY_BYTES when decompressed")
    return body


@dataclass
class MessageIdentity:
    """Assigns delivery ids and ordering clocks to the messages of one connection.

    A message with an id gets a digest of that id, the event type and the body, because ids may not be unique alone.
    Any other message gets a random id: of A, B, A the second A is a separate event, but would have the digest of the
    first. Only redelivered messages are identified by content, with the number of equal ones since the connection was
    opened, so that a message that crashes workers is recognised.
    """

    seen: Counter[str] = field(default_factory=Counter)
    newest: float = 0.0
    ordering_ms: int = 0

    def name(self, received: ReceivedMessage) -> str:
        """The message id of the delivery."""
        content = b"\0".join((received.routing_key.encode(), (received.message_id or "").encode(), received.body))
        digest = hashlib.sha256(content).hexdigest()
        if received.message_id:
            return f"etl-{digest}"
        if not received.redelivered:
            return f"etl-{uuid.uuid4()}"
        self.seen[digest] += 1
        return f"etl-{digest}-{self.seen[digest]}"

    def clock(self, received: ReceivedMessage) -> tuple[float, int | None]:
        """The time of receipt (unix seconds), and the message's timestamp (unix milliseconds) if it has one.

        Both increase strictly from message to message. Timestamps have a resolution of seconds, so the messages of one
        second, which the queue keeps in order, are numbered by milliseconds.
        """
        self.newest = max(round(time.time(), 6), round(self.newest + MICROSECOND, 6))
        if received.seconds is None:
            return self.newest, None
        sent_ms = received.seconds * 1000
        self.ordering_ms = self.ordering_ms + 1 if 0 <= self.ordering_ms - sent_ms < 1000 else sent_ms
        return self.newest, self.ordering_ms


class PipelineConsumer:
    """Consumes and applies batches until `stop` is called."""

    def __init__(self, settings: Settings, applier: Applier, hand_over: HandOver | None = None) -> None:
        self._settings, self._applier, self._hand_over = settings, applier, hand_over
        self._sealer = Sealer(settings.encryption_keys)
        self._stopping = False

    def stop(self, *_: object) -> None:
        """Stops after the current batch. A signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Consumes until `stop` is called. Reconnects with backoff after an error of RabbitMQ."""
        attempt = 0
        while not self._stopping:
            connection = make_connection(self._settings)
            try:
                with connection:
                    queue = self._open(connection)
                    log.info("consuming from queue %s", self._settings.etl_queue)
                    attempt = 0
                    self._consume(connection, queue)
            except (OperationalError, OSError, *connection.connection_errors, *connection.channel_errors) as error:
                if not self._stopping:
                    attempt += 1
                    log.warning("HEADRACE_ETL_URL: %s; reconnecting", reason_for(error))
                    self._pause_for(backoff(attempt, limit=MAX_RECONNECT_SECONDS))

    def _pause_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < until:
            time.sleep(min(POLL_SECONDS, max(until - time.monotonic(), 0)))

    def _open(self, connection: Any) -> list[ReceivedMessage]:
        """Starts to consume. Received messages are appended to the returned list.

        The consumer is exclusive, because the queue's order orders versions without a timestamp. RabbitMQ refuses a
        second consumer of the queue, which keeps reconnecting as a standby.
        """
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=5)
        channel, arrived = connection.default_channel, list[ReceivedMessage]()
        channel.auto_decode = False  # would decode with the content-encoding as the charset
        channel.basic_qos(0, PREFETCH, False)
        channel.basic_consume(
            self._settings.etl_queue, no_ack=False, exclusive=True, callback=lambda m: arrived.append(from_amqp(m))
        )
        return arrived

    def _consume(self, connection: Any, arrived: list[ReceivedMessage]) -> None:
        identity = MessageIdentity()
        while not self._stopping:
            _drain(connection, POLL_SECONDS)
            while arrived and len(arrived) < PREFETCH and _drain(connection, IDLE_SECONDS):
                pass
            if arrived:
                batch = arrived[:PREFETCH]
                del arrived[:PREFETCH]
                self._commit(connection, batch, identity)
            connection.heartbeat_check()

    def _commit(self, connection: Any, batch: Sequence[ReceivedMessage], identity: MessageIdentity) -> None:
        """Applies a batch, then acknowledges it. Retries with backoff while the database is unavailable.

        Deliveries that fail alone go to the live lane, and large ones to the lane `download`. Without a broker of our
        own, all are applied here.
        """
        deliveries = [self._to_apply(received, identity) for received in batch]
        redelivered = any(received.redelivered for received in batch)
        attempt = failures = lost = 0
        while deliveries and not self._stopping:
            try:
                with tracing.consumer_span(TASK, self._settings.etl_queue or "", "", None):
                    is_suspect = redelivered or lost >= MAX_LOST
                    applied = self._applier.apply_batch(deliveries, redelivered=is_suspect, failures=failures)
                log.debug("applied %s", dict(applied.outcomes))
                has_failed = any(one.error for one in applied.unsettled)  # the others were only not tried yet
                failures += has_failed
                if self._hand_over:
                    self._hand_over(applied)
            except Exception as error:  # noqa: BLE001 - unexpected errors are retried too; their text may quote a body
                has_failed, failures = True, failures_after(failures, error)
                lost += isinstance(error, ConnectionLost)
                metrics.RETRIES.labels(TASK, cause_of(error)).inc()
                log.warning("%d messages wait: %s", len(batch), retry_reason(error))
            else:
                deliveries = [] if self._hand_over else [ParsedDelivery(one.delivery) for one in applied.unsettled]
            if deliveries:
                attempt = attempt + 1 if has_failed else 0
                if has_failed:
                    self._pause_for(backoff(attempt, limit=MAX_RETRY_SECONDS))
                connection.heartbeat_check()
        if not deliveries:
            connection.default_channel.basic_ack(batch[-1].tag, multiple=True)

    def _to_apply(self, received: ReceivedMessage, identity: MessageIdentity) -> ParsedDelivery:
        """The delivery, with the reason if its body cannot be decoded."""
        reason, body = None, received.body
        try:
            body = decode_body(received, self._settings.max_body_bytes)
        except Unprocessable as error:
            reason = str(error)
        received_at, ordering_ms = identity.clock(received)
        receipt = Receipt(identity.name(received), ordering_ms)
        delivery = seal(AGGREGATOR, receipt, body, self._sealer, received_at=received_at)
        limit = MAX_LIVE_BYTES if self._hand_over else LARGEST  # without a broker, there is no other lane
        return ParsedDelivery(delivery, limit=limit, reason=reason)


def make_connection(settings: Settings) -> Any:
    """A connection to the pipeline's RabbitMQ, not yet opened. Raises Misconfigured."""
    url, _ = settings.need_etl()
    return Connection(url, heartbeat=HEARTBEAT_SECONDS, connect_timeout=5)


def queue_depth(settings: Settings) -> int:
    """The number of messages in the queue. Raises Misconfigured."""
    connection = make_connection(settings)
    try:
        with connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=3)
            found = connection.default_channel.queue_declare(settings.etl_queue, passive=True)
            return int(found.message_count)
    except (OperationalError, OSError, *connection.connection_errors, *connection.channel_errors) as error:
        raise Misconfigured(reason_for(error), setting="HEADRACE_ETL_URL") from None


def reason_for(error: Exception) -> str:
    """A message for an error of RabbitMQ, whose own text names the user and the host."""
    known = {
        404: "there is no queue of the name in HEADRACE_ETL_QUEUE",
        403: "RabbitMQ refuses the login, or another `headrace etl` consumes from the queue and this one stands by",
    }
    return known.get(getattr(error, "reply_code", 0), f"RabbitMQ cannot be reached ({type(error).__name__})")


def _drain(connection: Any, seconds: float) -> bool:
    """Waits for a message. False if none arrived."""
    try:
        connection.drain_events(timeout=seconds)
    except TimeoutError:
        return False
    return True


def idle() -> None:
    """Sleeps until SIGTERM or Ctrl-C: a Procfile runner stops all its processes when one of them exits."""
    log.warning("HEADRACE_ETL_URL: not set, so no messages are consumed; waiting for SIGTERM")
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.sigwait(signals)


def run(settings: Settings, applier: Applier, hand_over: HandOver | None = None) -> None:
    """Consumes until SIGTERM or Ctrl-C."""
    consumer = PipelineConsumer(settings, applier, hand_over)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, consumer.stop)
    mark_ready(settings)
    tracing.start(settings, "etl", "rabbitmq")
    consumer.run()
    tracing.stop()
