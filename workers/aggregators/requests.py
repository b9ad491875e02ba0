"""How an aggregator module describes its read API: requests, limits and pages. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal
from urllib.parse import quote

from app.errors import Unprocessable
from workers.actions import NO_NOTES, Action, Notes, Refused


@dataclass(frozen=True)
class DateRange:
    """The part of a window that one request, or one request per page, asks for. Both edges are included."""

    start: datetime
    end: datetime


def segment(identifier: str) -> str:
    """An id as one segment of a path, percent-encoded. Raises Unprocessable for an id that would be another path.

    Clients and servers remove the segments "." and ".." (RFC 3986, section 5.2.4), also if their dots are encoded.
    """
    if identifier in ("", ".", ".."):
        raise Unprocessable(f"the id {identifier!r} cannot be a part of a path")
    return quote(identifier, safe="")


@dataclass(frozen=True)
class Request:
    """One request to an aggregator's API. Ids are in `path` by `segment` only."""

    path: str
    query: tuple[tuple[str, str], ...] = ()
    has_cursor: bool = False  # it asks for a page after the first
    method: str = "GET"
    body: bytes | None = None  # JSON


LimitScope = Literal["account", "user", "request"]


@dataclass(frozen=True)
class ApiLimits:
    """The limits of an aggregator's read API, and the statuses and headers that report them."""

    max_slice_days: int = 366  # per request
    user_rate: str | None = None  # requests per user, for example 200/hour
    split_on_status: frozenset[int] = frozenset({413, 504})  # ask again for a shorter date range
    rule_header: str = ""  # of a 429: names the rule that was broken
    rules: Mapping[str, LimitScope] = field(default_factory=dict)  # the scope of each rule
    default_scope: LimitScope = "account"  # of a 429 that names no known rule

    def limited(self, headers: Mapping[str, str]) -> LimitScope:
        """The scope of a 429: the account, one user, or this request, which is then not sent again."""
        return self.rules.get(headers.get(self.rule_header, ""), self.default_scope)


@dataclass(frozen=True)
class Page:
    """The content of an answer. A cursor means that the date range has more pages."""

    actions: tuple[Action, ...]
    records: int
    cursor: str | None = None
    asked_at: datetime | None = None
    refused: tuple[Refused, ...] = ()  # records and samples that cannot be used
    notes: Notes = NO_NOTES
    duplicate_samples: int = 0  # as in `Parsed`
