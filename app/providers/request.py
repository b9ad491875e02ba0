"""What a provider module says of its read API: the next request, and what a page holds. Values only."""

from dataclasses import dataclass
from datetime import datetime

from app.actions import Action


@dataclass(frozen=True)
class Slice:
    """A part of a window that one request, or one request a page, can answer. Both edges belong to it."""

    start: datetime
    end: datetime


@dataclass(frozen=True)
class Request:
    """What is asked of a provider."""

    path: str
    query: tuple[tuple[str, str], ...] = ()
    has_cursor: bool = False  # it goes on where an earlier answer ended
    method: str = "GET"
    days: int = 0  # of history that is asked for, where an account has only so many


@dataclass(frozen=True)
class Page:
    """What an answer holds. A cursor means that more of the slice is to come."""

    actions: tuple[Action, ...]
    records: int
    cursor: str | None = None
    refused: tuple[str, ...] = ()  # why some of its records cannot be used
