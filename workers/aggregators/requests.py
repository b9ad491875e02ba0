"""What an aggregator module says of its read API: the next request, and what a page holds. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from workers.actions import Action


@dataclass(frozen=True)
class DateRange:
    """A part of a window that one request, or one request a page, can answer. Both edges belong to it."""

    start: datetime
    end: datetime


@dataclass(frozen=True)
class Request:
    """One request to an aggregator's API."""

    path: str
    query: tuple[tuple[str, str], ...] = ()
    has_cursor: bool = False  # it goes on where an earlier answer ended
    method: str = "GET"
    body: bytes | None = None  # JSON


LimitScope = Literal["account", "user", "request"]


@dataclass(frozen=True)
class ApiLimits:
    """What an aggregator's read API allows, and how it says that something was too much."""

    max_slice_days: int = 366  # days that one request may ask for
    user_rate: str | None = None  # requests about one person, such as 200/hour
    split_on_status: frozenset[int] = frozenset({413, 504})  # statuses that mean: ask for less at once
    rule_header: str = ""  # of a 429: names the rule that was broken
    rules: Mapping[str, LimitScope] = field(default_factory=dict)  # whom such a rule limits
    default_scope: LimitScope = "account"  # whom a 429 limits that names none of them

    def limited(self, headers: Mapping[str, str]) -> LimitScope:
        """Whom a 429 is about: everybody, one person, or the size of this request, which is then not sent again."""
        return self.rules.get(headers.get(self.rule_header, ""), self.default_scope)


@dataclass(frozen=True)
class Page:
    """What an answer holds. A cursor means that more of the slice is to come."""

    actions: tuple[Action, ...]
    records: int
    cursor: str | None = None
    refused: tuple[str, ...] = ()  # why some of its records cannot be used
