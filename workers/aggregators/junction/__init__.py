"""Junction (formerly Vital). Pure: no I/O."""

from workers.aggregators.junction.api import (
    API_LIMITS,
    connect,
    event_of,
    read_page,
    read_stream,
    request,
    stream_request,
)
from workers.aggregators.junction.events import identify, parse
from workers.aggregators.junction.introspection import (
    connections_request,
    coverage_request,
    pulls_request,
    read_connections,
    read_coverage,
    read_pulls,
    read_refresh,
    read_zone,
    refresh_request,
    zone_request,
)

__all__ = [
    "API_LIMITS",
    "connect",
    "connections_request",
    "coverage_request",
    "event_of",
    "identify",
    "parse",
    "pulls_request",
    "read_connections",
    "read_coverage",
    "read_page",
    "read_pulls",
    "read_refresh",
    "read_stream",
    "read_zone",
    "refresh_request",
    "request",
    "stream_request",
    "zone_request",
]
