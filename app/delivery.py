"""Deliveries, and the messages that carry them through the broker."""

import base64
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from app.errors import Unprocessable
from app.sealing import Sealer

MESSAGE_VERSION = 1


class Headers(Protocol):
    """Request headers by name, in any case."""

    def get(self, name: str, /) -> str | None:
        """The header's value; None if the request has no such header."""


class Receipt(msgspec.Struct, frozen=True):
    """The headers of a verified request."""

    message_id: str  # the same for all attempts of the sender
    ordering_ms: int | None = None  # Terra's clock, unix milliseconds
    reference: str | None = None  # Terra's id of the API request that caused this delivery


class Delivery(msgspec.Struct, frozen=True, array_like=True):
    """One webhook of an aggregator with its body sealed. Only ids are readable."""

    aggregator: str  # "junction" or "terra"
    message_id: str
    received_at: float  # unix seconds, our clock
    sealed: bytes
    ordering_ms: int | None = None
    reference: str | None = None

    @property
    def key(self) -> str:
        """Additional authenticated data of the sealed body."""
        return f"{self.aggregator}:{self.message_id}"

    @property
    def received(self) -> datetime:
        """When this attempt arrived."""
        return datetime.fromtimestamp(self.received_at, UTC)


class _Version(msgspec.Struct, frozen=True, array_like=True):
    version: int


class _Message(msgspec.Struct, frozen=True, array_like=True):
    version: int
    deliveries: list[Delivery]


_encoder = msgspec.msgpack.Encoder()
_version_decoder = msgspec.msgpack.Decoder(_Version)  # skips everything behind the version
_decoder = msgspec.msgpack.Decoder(_Message)


def seal(aggregator: str, receipt: Receipt, body: bytes, sealer: Sealer) -> Delivery:
    """Seals a verified body. A delivery without an id gets a random one, so it never counts as a duplicate."""
    message_id = receipt.message_id or f"unnamed-{uuid.uuid4()}"
    sealed = sealer.seal(body, f"{aggregator}:{message_id}")
    return Delivery(aggregator, message_id, time.time(), sealed, receipt.ordering_ms, receipt.reference)


def pack(deliveries: Sequence[Delivery]) -> str:
    """Packs deliveries into the one argument of a task: MessagePack in base64, because Celery's messages are JSON."""
    return base64.b64encode(_encoder.encode(_Message(MESSAGE_VERSION, list(deliveries)))).decode()


def unpack(packed: str) -> list[Delivery]:
    """The deliveries of a message. Raises Unprocessable if it has another format or version.

    msgspec decodes base64 strictly and in a fifth of the time of base64.b64decode (16 kB: 14 us, not 68).
    """
    try:
        raw = msgspec.convert(packed, bytes)
        version = _version_decoder.decode(raw).version
        if version != MESSAGE_VERSION:
            raise Unprocessable(f"a message of version {version}; this worker reads version {MESSAGE_VERSION}")
        return _decoder.decode(raw).deliveries
    except (msgspec.DecodeError, RecursionError):
        raise Unprocessable("not a message of deliveries") from None
