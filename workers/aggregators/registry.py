"""The aggregators by the name in their webhook route. Each is a pure module with the same functions: no I/O."""

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol

from app.catalogue import Resource
from app.config.settings import Settings
from app.delivery import Delivery
from workers.actions import Parsed, Record
from workers.aggregators import junction, terra
from workers.aggregators.requests import ApiLimits, DateRange, Page, Request


class Aggregator(Protocol):
    """The functions of an aggregator module. The modules satisfy it; nothing inherits from it."""

    API_LIMITS: ApiLimits

    def parse(self, delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
        """The actions of an event. Raises Unprocessable."""

    def identify(self, body: bytes) -> Parsed:
        """The type and the user of an event that `parse` refuses, as far as they can be read."""

    def event_of(self, record: Record) -> bytes:
        """JSON of the event in which the aggregator would send a record."""

    def connect(self, settings: Settings) -> tuple[str, Mapping[str, str]]:
        """The base URL and the headers of every request. Raises Misconfigured."""

    def request(
        self, resource: Resource, user_id: str, provider: str, part: DateRange, cursor: str | None = None
    ) -> Request:
        """The request for a date range of a resource, or for its next page."""

    def read_page(self, resource: Resource, user_id: str, body: bytes, asked_at: datetime, provider: str = "") -> Page:
        """The records of an answer and its cursor. Raises Unprocessable, NotYet."""


AGGREGATORS: Mapping[str, Aggregator] = {"junction": junction, "terra": terra}
