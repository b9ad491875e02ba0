"""Terra. Pure: no I/O."""

from workers.aggregators.terra.api import API_LIMITS, connect, read_page, request
from workers.aggregators.terra.events import parse

__all__ = ["API_LIMITS", "connect", "parse", "read_page", "request"]
