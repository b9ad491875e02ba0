"""Signs events as Terra does."""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import datetime

import msgspec

from workers.simulator.sender import Sender
from workers.simulator.terra.events import Message


class TerraSender(Sender):
    """A sender of Terra's events. An event brings its own id and the time at which it was made."""

    aggregator = "Terra"

    def name(self, event: Message) -> str:
        return event.trace_id

    def body(self, event: Message) -> bytes:
        return msgspec.json.encode(event.event)

    def sign(self, name: str, event: Message, body: bytes, at: datetime) -> Mapping[str, str]:
        """The headers of an attempt, with a HMAC over its time and the body."""
        moment = str(int(at.timestamp()))
        signature = hmac.new(self._secret.encode(), moment.encode() + b"." + body, hashlib.sha256).hexdigest()
        return {
            "terra-signature": f"t={moment},v1={signature}",
            "X-Terra-Trace-Id": name,
            "terra-reference": event.reference,
            "X-Terra-Ordering-Timestamp": str(event.ordering_ms),
        }
