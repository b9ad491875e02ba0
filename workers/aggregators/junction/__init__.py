"""Junction (formerly Vital). Pure: no I/O."""

from workers.aggregators.junction.api import API_LIMITS, connect, event_of, read_page, request
from workers.aggregators.junction.events import identify, parse

__all__ = ["API_LIMITS", "connect", "event_of", "identify", "parse", "read_page", "request"]
