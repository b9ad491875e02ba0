"""The aggregators, by the name in their route. Each is a pure module with the same functions, and opens no socket.

verify(headers, body, settings, now) -> Receipt              raises Refused
parse(delivery, body, settings) -> Parsed                    raises DeadLetter
connect(settings) -> base URL and headers                    raises Misconfigured
request(resource, user_id, provider, slice, cursor) -> Request
read_page(resource, user_id, body, asked_at) -> Page         raises DeadLetter, NotYet
TERMS: what its read API allows
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol

from app.actions import Parsed
from app.catalogue import Resource
from app.config import Settings
from app.delivery import Delivery, Headers, Receipt
from app.providers import junction, terra
from app.providers.request import Page, Request, Slice, Terms


class Provider(Protocol):
    """What a provider module offers; modules satisfy it, nothing inherits."""

    TERMS: Terms

    def verify(self, headers: Headers, body: bytes, settings: Settings, now: datetime) -> Receipt:
        """Who sent it, proven by the signature over the raw bytes."""

    def parse(self, delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
        """What it means."""

    def connect(self, settings: Settings) -> tuple[str, Mapping[str, str]]:
        """The base URL and the headers of every request."""

    def request(
        self, resource: Resource, user_id: str, provider: str, part: Slice, cursor: str | None = None
    ) -> Request:
        """The request for a slice of a resource, or for its next page."""

    def read_page(self, resource: Resource, user_id: str, body: bytes, asked_at: datetime, provider: str = "") -> Page:
        """What an answer holds."""


PROVIDERS: Mapping[str, Provider] = {"junction": junction, "terra": terra}
