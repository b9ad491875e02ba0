"""Terra. Pure: no I/O."""

from workers.aggregators.terra.api import API_LIMITS, connect, event_of, read_page, request
from workers.aggregators.terra.events import identify, parse

__all__ = ["API_LIMITS", "connect", "event_of", "identify", "parse", "read_page", "request"]
