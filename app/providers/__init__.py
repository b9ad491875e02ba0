"""The aggregators, by the name in their route. Each is a pure module with the same functions, and opens no socket.

verify(headers, body, settings, now) -> Receipt     raises Refused
parse(delivery, body, settings) -> Parsed           raises DeadLetter
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol

from app.actions import Parsed
from app.config import Settings
from app.delivery import Delivery, Headers, Receipt
from app.providers import junction, terra


class Provider(Protocol):
    """What a provider module offers; modules satisfy it, nothing inherits."""

    def verify(self, headers: Headers, body: bytes, settings: Settings, now: datetime) -> Receipt:
        """Who sent it, proven by the signature over the raw bytes."""

    def parse(self, delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
        """What it means."""


PROVIDERS: Mapping[str, Provider] = {"junction": junction, "terra": terra}
