"""Deliveries, and the messages that carry them through the broker."""

import base64
import contextlib
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Protocol

import msgspec
from msgspec.structs import replace

from app.errors import Unprocessable
from app.sealing import BOUND, ENCRYPTED, LARGEST, Sealer

MESSAGE_VERSION = 2
OLD_VERSION = 1  # of 0.2: without the digest; bodies are bound to the aggregator and the id only
DIGEST_BYTES = 16
MAX_NAME = 256  # of an id or a reference, in characters
# A message may have waited for months, and its publisher's clock may be ahead. A time in the future would make the
# delivery newer than all later ones.
EARLIEST, LATEST = 1_577_836_800.0, 4_102_444_800.0  # 2020 and 2100, unix seconds
MAX_AHEAD_SECONDS = 3600.0
MICROSECONDS = 1_000_000

# Limits that `unpack` checks. PostgreSQL cannot store NaN as a time or U+0000 in a text.
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]
Moment = Annotated[float, msgspec.Meta(ge=EARLIEST, le=LATEST)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, lt=10**15)]
Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class Headers(Protocol):
    """Request headers by name, in any case."""

    def get(self, name: str, /) -> str | None:
        """The header's value; None if the request has no such header."""


class Receipt(msgspec.Struct, frozen=True):
    """The headers of a verified request."""

    message_id: str  # the same for all attempts of the sender
    ordering_ms: int | None = None  # Terra's clock, unix milliseconds
    reference: str | None = None  # Terra's id of the API request that caused this delivery
    digest: bytes | None = None  # of the signed time and body, if an unsigned header contains the id


class Delivery(msgspec.Struct, frozen=True, array_like=True):
    """One webhook of an aggregator with its body sealed. With a key, every other field is authenticated with it."""

    aggregator: Annotated[str, msgspec.Meta(max_length=32, pattern=r"\A[a-z_]+\Z")]  # "junction" or "terra"
    message_id: Name
    received_at: Moment  # unix seconds, our clock, in whole microseconds
    sealed: bytes
    ordering_ms: Milliseconds | None = None
    reference: Name | None = None
    digest: Digest | None = None

    @property
    def key(self) -> str:
        """The name of the delivery, unique among all aggregators."""
        return f"{self.aggregator}:{self.message_id}"

    @property
    def received(self) -> datetime:
        """When this attempt arrived."""
        return datetime.fromtimestamp(self.received_at, UTC)

    def open(self, sealer: Sealer, limit: int = LARGEST) -> bytes:
        """The body of a delivery that is stored in the database, which may have been sealed before a key was set.

        Raises Unprocessable, NotAuthentic, or TooLarge for a body of more than `limit` bytes.
        """
        return sealer.open(self.sealed, self._aad(), self.key.encode(), limit)

    def open_received(self, sealer: Sealer, limit: int = LARGEST) -> bytes:
        """As `open`, for a delivery from the broker: NotAuthentic unless a configured key authenticates it."""
        sealer.require(self.sealed, ENCRYPTED | BOUND)
        return self.open(sealer, limit)

    def with_body(self, body: bytes, sealer: Sealer) -> "Delivery":
        return replace(self, sealed=sealer.seal(body, self._aad()))

    def with_fields(
        self, sealer: Sealer, *, message_id: str | None = None, received_at: float | None = None
    ) -> "Delivery":
        """The delivery with another id or time of receipt, sealed again, because the body is bound to both."""
        body = self.open(sealer)
        changed = replace(
            self,
            message_id=message_id or self.message_id,
            received_at=self.received_at if received_at is None else received_at,
        )
        return changed.with_body(body, sealer)

    def _aad(self) -> bytes:
        """Additional authenticated data: every field except the body.

        The time is bound in whole microseconds, the resolution in which PostgreSQL returns it.
        """
        moment = round(self.received_at * MICROSECONDS)
        return _encoder.encode(
            (self.aggregator, self.message_id, moment, self.ordering_ms, self.reference, self.digest)
        )


class _Version(msgspec.Struct, frozen=True, array_like=True):
    version: int


class _Message(msgspec.Struct, frozen=True, array_like=True):
    version: int
    deliveries: list[Delivery]


_encoder = msgspec.msgpack.Encoder()
_version_decoder = msgspec.msgpack.Decoder(_Version)  # skips everything behind the version
_decoder = msgspec.msgpack.Decoder(_Message)


def seal(
    aggregator: str, receipt: Receipt, body: bytes, sealer: Sealer, *, received_at: float | None = None
) -> Delivery:
    """Seals a verified body. `received_at` is in unix seconds, by default now.

    The id of a delivery without one is its digest. Without a digest the id is random, so it is never a duplicate.
    """
    moment = round((time.time() if received_at is None else received_at) * MICROSECONDS)
    unsealed = Delivery(
        aggregator=aggregator,
        message_id=receipt.message_id or f"unnamed-{receipt.digest.hex() if receipt.digest else uuid.uuid4()}",
        received_at=moment / MICROSECONDS,
        sealed=b"",
        ordering_ms=receipt.ordering_ms,
        reference=receipt.reference,
        digest=receipt.digest,
    )
    return unsealed.with_body(body, sealer)


def pack(deliveries: Sequence[Delivery]) -> str:
    """Packs deliveries into the one argument of a task: MessagePack in base64, because Celery's messages are JSON."""
    return base64.b64encode(_encoder.encode(_Message(MESSAGE_VERSION, list(deliveries)))).decode()


def unpack(packed: str, version: int = MESSAGE_VERSION) -> list[Delivery]:
    """The deliveries of a message. Raises Unprocessable if it has another format or version, or a value out of range.

    msgspec decodes base64 strictly and in a fifth of the time of base64.b64decode (16 kB: 14 us, not 68).
    """
    try:
        raw = msgspec.convert(packed, bytes)
        found = _version_decoder.decode(raw).version
        if found != version:
            raise Unprocessable(f"a message of version {found}; this worker reads version {version}")
        deliveries = _decoder.decode(raw).deliveries
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        raise Unprocessable("not a message of deliveries") from None
    latest = time.time() + MAX_AHEAD_SECONDS
    if any(one.received_at > latest for one in deliveries):
        raise Unprocessable("a message of deliveries that were received in the future: check the publisher's clock")
    return deliveries


def unpack_stored(packed: str) -> list[Delivery]:
    """As `unpack`, for a message in a dead letter, which version 0.2 may have published."""
    try:
        return unpack(packed)
    except Unprocessable:
        with contextlib.suppress(Unprocessable):
            return unpack(packed, OLD_VERSION)
        raise


def sealed_again(one: Delivery, sealer: Sealer) -> Delivery:
    """A delivery in a dead letter, sealed as a new one, because an operator applies it again.

    A body that version 0.2 has sealed authenticates only the aggregator and the id. Raises NotAuthentic if the body is
    not encrypted although a key is set: such a message may have been forged.
    """
    sealer.require(one.sealed, ENCRYPTED)
    is_bound = bool(one.sealed) and bool(one.sealed[0] & BOUND)
    return (one if is_bound else replace(one, digest=None)).with_fields(sealer)
