"""Junction (formerly Vital). Pure: no socket is opened here."""

from app.providers.junction.api import TERMS, connect, read_page, read_stream, request, stream_request
from app.providers.junction.events import parse
from app.providers.junction.introspection import (
    connections_request,
    pulls_request,
    read_connections,
    read_pulls,
    read_refresh,
    read_supplies,
    refresh_request,
    supplies_request,
)
from app.providers.junction.signature import verify

__all__ = [
    "TERMS",
    "connect",
    "connections_request",
    "parse",
    "pulls_request",
    "read_connections",
    "read_page",
    "read_pulls",
    "read_refresh",
    "read_stream",
    "read_supplies",
    "refresh_request",
    "request",
    "stream_request",
    "supplies_request",
    "verify",
]
