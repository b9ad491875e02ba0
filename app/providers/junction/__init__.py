"""Junction (formerly Vital). Pure: no socket is opened here."""

from app.providers.junction.api import connect, read_page, read_stream, request, stream_request
from app.providers.junction.events import parse
from app.providers.junction.signature import verify

__all__ = ["connect", "parse", "read_page", "read_stream", "request", "stream_request", "verify"]
