"""Signs events as Terra does; sending them is the same for all."""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import datetime

import msgspec

from workers.simulator.sender import Sender
from workers.simulator.terra.events import Message


def sign(secret: str, at: datetime, body: bytes) -> str:
    """The `terra-signature` header of an attempt: the moment, and a HMAC over it and the body."""
    moment = str(int(at.timestamp()))
    return f"t={moment},v1={hmac.new(secret.encode(), moment.encode() + b'.' + body, hashlib.sha256).hexdigest()}"


class TerraSender(Sender):
    """A sender of Terra's events. Each names itself and says when it was made, whenever it is sent."""

    def name(self, event: Message, at: datetime) -> str:  # noqa: ARG002 - as any sender
        """What names a message over all its attempts."""
        return event.trace_id

    def body(self, event: Message) -> bytes:
        """What is posted."""
        return msgspec.json.encode(event.event)

    def sign(self, name: str, event: Message, body: bytes, at: datetime) -> Mapping[str, str]:
        """The headers of an attempt."""
        return {
            "terra-signature": sign(self._secret, at, body),
            "X-Terra-Trace-Id": name,
            "terra-reference": event.reference,
            "X-Terra-Ordering-Timestamp": str(event.ordering_ms),
        }
