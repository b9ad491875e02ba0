"""The aggregators, by the name in their route. Each is a pure module with the same functions, and opens no socket.

parse(delivery, body, settings) -> Parsed                    raises Unprocessable
connect(settings) -> base URL and headers                    raises Misconfigured
request(resource, user_id, provider, slice, cursor) -> Request
read_page(resource, user_id, body, asked_at) -> Page         raises Unprocessable, NotYet
API_LIMITS: what its read API allows
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol

from app.catalogue import Resource
from app.config.settings import Settings
from app.delivery import Delivery
from workers.actions import Parsed
from workers.aggregators import junction, terra
from workers.aggregators.requests import ApiLimits, DateRange, Page, Request


class Aggregator(Protocol):
    """What an aggregator module offers; modules satisfy it, nothing inherits."""

    API_LIMITS: ApiLimits

    def parse(self, delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
        """What it means."""

    def connect(self, settings: Settings) -> tuple[str, Mapping[str, str]]:
        """The base URL and the headers of every request."""

    def request(
        self, resource: Resource, user_id: str, provider: str, part: DateRange, cursor: str | None = None
    ) -> Request:
        """The request for a slice of a resource, or for its next page."""

    def read_page(self, resource: Resource, user_id: str, body: bytes, asked_at: datetime, provider: str = "") -> Page:
        """What an answer holds."""


AGGREGATORS: Mapping[str, Aggregator] = {"junction": junction, "terra": terra}
