"""`headrace etl`: the second front door, a RabbitMQ queue into which Junction's ETL pipeline puts events.

Whoever may publish there is trusted: the broker's login is the signature. A message is acknowledged when what it says
is committed, so that whatever is killed in between, RabbitMQ gives it out again and nothing changes.
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

import msgspec
from kombu import Connection
from kombu.exceptions import OperationalError

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, seal
from app.errors import Misconfigured, TryLater, Unprocessable
from app.observability import tracing
from app.observability.ready import mark_ready
from app.sealing import Sealer
from workers.ingest.apply import Applier
from workers.ingest.outcomes import Applied

AGGREGATOR, TASK = "junction", "headrace.etl"
PREFETCH = 50  # messages that are held, and applied in one transaction, at most
IDLE_SECONDS = 0.05  # without another message, what has come is applied
POLL_SECONDS = 1.0  # how often it looks whether it is to end
HEARTBEAT_SECONDS = 30
MAX_RECONNECT_SECONDS = 30.0
MICROSECOND = 1e-6
MAX_TIMESTAMP = 1 << 33  # whoever gives milliseconds gives no time that can be used
PLAIN_ENCODINGS = ("", "identity", "utf-8", "utf8")  # some clients name the charset there
Announce = Callable[[Sequence[int]], object]  # takes the backfills that somebody should go on with
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReceivedMessage:
    """A message as it came from the queue."""

    tag: int
    body: bytes
    encoding: str
    routing_key: str  # the event type
    redelivered: bool  # it was given out before, and not acknowledged
    message_id: str | None
    seconds: int | None  # its AMQP timestamp


def from_amqp(message: Any) -> ReceivedMessage:
    """What the AMQP library gives, as far as it matters."""
    about, told = message.delivery_info, message.properties
    body = message.body if isinstance(message.body, bytes) else bytes(str(message.body), "utf-8")
    made = told.get("timestamp")
    seconds = made if isinstance(made, int) and 0 < made < MAX_TIMESTAMP else None
    encoding = str(told.get("content_encoding") or "").lower()
    key, redelivered = str(about.get("routing_key") or ""), bool(about.get("redelivered"))
    return ReceivedMessage(about["delivery_tag"], body, encoding, key, redelivered, told.get("message_id"), seconds)


def decode_body(received: ReceivedMessage, max_bytes: int) -> bytes:
    """The event. Raises Unprocessable."""
    if received.encoding in PLAIN_ENCODINGS:
        return received.body
    if received.encoding != "gzip":
        raise Unprocessable("its content-encoding is neither gzip nor none")
    inflater = zlib.decompressobj(wbits=31)
    try:
        body = inflater.decompress(received.body, max_bytes)
    except zlib.error:
        raise Unprocessable("its content-encoding is gzip, and it is not") from None
    if inflater.unconsumed_tail or not inflater.eof or inflater.unused_data:
        raise Unprocessable("gzip that was cut short, or is larger than HEADRACE_MAX_BODY_BYTES")
    return body


@dataclass
class MessageIdentity:
    """Gives messages the id and the clock that they do not bring, for one connection.

    The id: from a message's own id where it has one, with the event type and the body, because such ids need not be
    unique beyond them. Else it is made up: of A, B, A the second A is an event of its own, and an id made of its
    content would be taken for the first one's. Only what is given out again is named by its content, and by how
    often that came since the connection was made, so that a message with which workers die is known again.
    """

    seen: Counter[str] = field(default_factory=Counter)
    newest: float = 0.0
    ordering_ms: int = 0

    def name(self, received: ReceivedMessage) -> str:
        """The message id of the delivery."""
        whole = b"\0".join((received.routing_key.encode(), (received.message_id or "").encode(), received.body))
        digest = hashlib.sha256(whole).hexdigest()
        if received.message_id:
            return f"etl-{digest}"
        if not received.redelivered:
            return f"etl-{uuid.uuid4()}"
        self.seen[digest] += 1
        return f"etl-{digest}-{self.seen[digest]}"

    def clock(self, received: ReceivedMessage) -> tuple[float, int | None]:
        """When it came, and when it was made if it says: each later than that of the message before it.

        A queue keeps its order and a timestamp has only seconds, so messages of one second are counted on.
        """
        self.newest = max(time.time(), self.newest + MICROSECOND)
        if received.seconds is None:
            return self.newest, None
        made = received.seconds * 1000
        self.ordering_ms = self.ordering_ms + 1 if 0 <= self.ordering_ms - made < 1000 else made
        return self.newest, self.ordering_ms


class PipelineConsumer:
    """Takes batches out of the queue until it is told to end."""

    def __init__(
        self,
        settings: Settings,
        applier: Applier,
        announce: Announce | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings, self._applier, self._announce, self._sleep = settings, applier, announce, pause
        self._sealer = Sealer(settings.encryption_keys)
        self._stopping = False

    def stop(self, *_: object) -> None:
        """After the batch that is at hand."""
        self._stopping = True

    def run(self) -> None:
        """Goes on until it is ended, whatever goes away and comes back meanwhile."""
        attempt = 0
        while not self._stopping:
            connection = make_connection(self._settings)
            try:
                with connection:
                    queue = self._open(connection)
                    log.info("takes what comes into %s", self._settings.etl_queue)
                    attempt = 0
                    self._consume(connection, queue)
            except (OperationalError, OSError, *connection.connection_errors, *connection.channel_errors) as error:
                if not self._stopping:
                    attempt += 1
                    log.warning("HEADRACE_ETL_URL: %s; tries again", reason_for(error))
                    self._pause_for(min(MAX_RECONNECT_SECONDS, 0.5 * 2 ** min(attempt, 10)))

    def _pause_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < until:
            self._sleep(min(POLL_SECONDS, max(until - time.monotonic(), 0)))

    def _open(self, connection: Any) -> list[ReceivedMessage]:
        """Starts to consume; the list is what arrives in it.

        Exclusively, because the order of the queue is what orders versions that bring no clock: a second worker on the
        same queue is refused by RabbitMQ, and stands by.
        """
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=5)
        channel, arrived = connection.default_channel, list[ReceivedMessage]()
        channel.auto_decode = False  # gzip is no charset
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
        """Applies a batch, and acknowledges all of it then. While the database is away, it waits with it."""
        deliveries = [self._delivery(received, identity) for received in batch]
        attempt = 0
        while not self._stopping:
            try:
                with tracing.consumer_span(TASK, self._settings.etl_queue or "", "", None):
                    applied = self._apply(deliveries, redelivered=any(received.redelivered for received in batch))
            except Exception as error:  # noqa: BLE001 - what nobody foresaw waits too; its text may quote a body
                attempt += 1
                reason = str(error) if isinstance(error, TryLater) else f"unforeseen {type(error).__name__}"
                log.warning("%d messages wait: %s", len(batch), reason)
                self._pause_for(min(5.0, 0.5 * 2**attempt))
                connection.heartbeat_check()
            else:
                connection.default_channel.basic_ack(batch[-1].tag, multiple=True)
                if self._announce:
                    self._announce(applied.backfills)
                return

    def _apply(self, deliveries: Sequence[tuple[Delivery, str | None]], *, redelivered: bool) -> Applied:
        sound = [delivery for delivery, reason in deliveries if reason is None]
        for delivery, reason in deliveries:
            if reason is not None:
                self._applier.reject(delivery, reason)
        applied = self._applier.apply_deliveries(sound, redelivered=redelivered) if sound else Applied([], [])
        log.debug("applied %s", dict(applied.outcomes))
        return applied

    def _delivery(self, received: ReceivedMessage, identity: MessageIdentity) -> tuple[Delivery, str | None]:
        """The delivery, and why it cannot be used if it cannot."""
        reason, body = None, received.body
        try:
            body = decode_body(received, self._settings.max_body_bytes)
        except Unprocessable as why_not:
            reason = str(why_not)
        received_at, ordering_ms = identity.clock(received)
        sealed = seal(AGGREGATOR, Receipt(identity.name(received), ordering_ms), body, self._sealer)
        return msgspec.structs.replace(sealed, received_at=received_at), reason


def make_connection(settings: Settings) -> Any:
    """A connection to the pipeline's RabbitMQ, not opened yet."""
    url, _ = settings.need_etl()
    return Connection(url, heartbeat=HEARTBEAT_SECONDS, connect_timeout=5)


def queue_depth(settings: Settings) -> int:
    """How many messages wait in the queue. Raises Misconfigured, naming the setting."""
    connection = make_connection(settings)
    try:
        with connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=3)
            found = connection.default_channel.queue_declare(settings.etl_queue, passive=True)
            return int(found.message_count)
    except (OperationalError, OSError, *connection.connection_errors, *connection.channel_errors) as error:
        raise Misconfigured(reason_for(error), setting="HEADRACE_ETL_URL") from None


def reason_for(error: Exception) -> str:
    """What a refusal of RabbitMQ's means; its own words name the user and the host."""
    known = {
        404: "there is no queue of the name in HEADRACE_ETL_QUEUE",
        403: "it refuses the login, or another `headrace etl` has the queue, and this one stands by",
    }
    return known.get(getattr(error, "reply_code", 0), f"RabbitMQ cannot be reached ({type(error).__name__})")


def _drain(connection: Any, seconds: float) -> bool:
    """Waits for a message; whether one came."""
    try:
        connection.drain_events(timeout=seconds)
    except TimeoutError:
        return False
    return True


def idle() -> None:
    """Nothing, until SIGTERM or Ctrl-C: a runner that starts every line of a Procfile ends them all with the first."""
    log.warning("HEADRACE_ETL_URL: not set, so there is nothing to take; waits to be ended")
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    signal.sigwait(ends)


def run(settings: Settings, applier: Applier, announce: Announce | None = None) -> None:
    """Until SIGTERM or Ctrl-C."""
    consumer = PipelineConsumer(settings, applier, announce)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, consumer.stop)
    mark_ready(settings)
    tracing.start(settings, "etl", "rabbitmq")
    consumer.run()
    tracing.stop()
