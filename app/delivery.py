"""Deliveries: what a sender handed over once, and the message that carries many of them through the broker."""

import base64
import binascii
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
    """Request headers, whatever their case: what a framework gives, or a plain mapping in tests."""

    def get(self, name: str, /) -> str | None:
        """The header's value, if it came."""


class Receipt(msgspec.Struct, frozen=True):
    """What the headers of a verified request say."""

    message_id: str  # the same over all attempts of the sender
    ordering_ms: int | None = None  # Terra's clock, unix milliseconds
    reference: str | None = None  # Terra's: the request that this delivery answers


class Delivery(msgspec.Struct, frozen=True, array_like=True):
    """One delivery of an aggregator, its body sealed. Only ids are readable."""

    aggregator: str  # "junction" or "terra"
    message_id: str
    received_at: float  # unix seconds, our clock
    sealed: bytes
    ordering_ms: int | None = None
    reference: str | None = None

    @property
    def key(self) -> str:
        """What the sealed body is bound to."""
        return f"{self.aggregator}:{self.message_id}"

    @property
    def received(self) -> datetime:
        """When this attempt arrived."""
        return datetime.fromtimestamp(self.received_at, UTC)


class _Message(msgspec.Struct, frozen=True, array_like=True):
    version: int
    deliveries: list[Delivery]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Message)


def seal(aggregator: str, receipt: Receipt, body: bytes, sealer: Sealer) -> Delivery:
    """Wraps a verified body. An id is made up where the sender gave none: such a delivery is never a duplicate."""
    message_id = receipt.message_id or f"unnamed-{uuid.uuid4()}"
    sealed = sealer.seal(body, f"{aggregator}:{message_id}")
    return Delivery(aggregator, message_id, time.time(), sealed, receipt.ordering_ms, receipt.reference)


def pack(deliveries: Sequence[Delivery]) -> str:
    """Many deliveries as the one argument of a task: text, because Celery's messages are JSON."""
    return base64.b64encode(_encoder.encode(_Message(MESSAGE_VERSION, list(deliveries)))).decode()


def unpack(packed: str) -> list[Delivery]:
    """The deliveries of a message. Raises Unprocessable if it is not one of ours, or of a newer version."""
    try:
        raw = base64.b64decode(packed, validate=True)
        version = msgspec.msgpack.decode(raw)[0]
        if version != MESSAGE_VERSION:
            raise Unprocessable(f"a message of version {version}; this worker reads version {MESSAGE_VERSION}")
        return _decoder.decode(raw).deliveries
    except (binascii.Error, msgspec.DecodeError, LookupError, TypeError, ValueError, RecursionError):
        raise Unprocessable("not a message of deliveries") from None
