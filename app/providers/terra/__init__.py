"""Terra. Pure: no socket is opened here."""

from app.providers.terra.api import LONGEST_WINDOW, connect, read_page, request
from app.providers.terra.events import parse
from app.providers.terra.signature import verify

__all__ = ["LONGEST_WINDOW", "connect", "parse", "read_page", "request", "verify"]
