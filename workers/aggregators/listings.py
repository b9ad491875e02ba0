"""Reads an aggregator's listings entry by entry: history pulls, coverage, connections, sent deliveries, users.

An entry with a null, a type or a value that the aggregator does not document is left out and counted, so that it cannot
stop the comparison of the other entries.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec

from app.errors import Unprocessable
from workers.aggregators import scalars
from workers.aggregators.common import MAX_ID, cursor_of, decode, or_none
from workers.aggregators.json import read_leniently, storable

T = TypeVar("T")
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)  # before any wearable; year 1 stands for "unknown"


@dataclass(frozen=True)
class Listing(Generic[T]):
    """One page about some users. A cursor means that there are more pages, even if this one is short or empty.

    `unread` is the number of entries that could not be read and are left out, `unread_parts` that of parts of entries
    that are kept.
    """

    rows: tuple[T, ...]
    users: tuple[str, ...] = ()
    cursor: str | None = None
    unread: int = 0
    unread_parts: int = 0


class _Page(msgspec.Struct):
    data: list[msgspec.Raw] | None
    next_cursor: Any = None
    next: Any = None  # the older name of Junction's cursor
    has_more: Any = None  # Terra's


def answer(body: bytes, kind: Any, what: str) -> Any:
    """As `decode`, without characters and literals that PostgreSQL cannot store."""
    return read_leniently(storable(body)[0], partial(decode, kind=kind, what=what))[0]


@dataclass
class EntryReader:
    """Reads the entries of one answer; counts those that cannot be read."""

    unread: int = 0
    users: list[str] = field(default_factory=list)  # of the answer

    def each(self, entries: Iterable[msgspec.Raw], kind: Any, build: Callable[[Any], T]) -> Iterator[T]:
        """The results of `build`. An entry that does not fit `kind`, or that `build` refuses, is counted."""
        for entry in entries:
            try:
                found = build(decode(bytes(entry), kind, "an entry"))
            except Unprocessable:
                self.unread += 1
                continue
            yield found

    def named(self, entries: dict[str, msgspec.Raw], kind: Any, build: Callable[[str, Any], T]) -> Iterator[T]:
        """As `each`, for entries with names, which are checked as well."""
        for name, raw in entries.items():
            if not 1 <= len(name) <= MAX_ID:
                self.unread += 1
                continue
            yield from self.each((raw,), kind, partial(build, name))


def read_listing(
    body: bytes, what: str, rows: Callable[[EntryReader, Sequence[msgspec.Raw]], Iterable[T]]
) -> Listing[T]:
    """One page. Raises Unprocessable for a body without a list of entries.

    A value that is no cursor is counted and ends the listing: its other pages stay readable.
    """
    page, reader, cursor = answer(body, _Page, what), EntryReader(), None
    found = tuple(rows(reader, page.data or ()))
    try:
        cursor = cursor_of(page.next_cursor, page.next) if page.has_more is not False else None
    except Unprocessable:
        reader.unread += 1
    return Listing(found, tuple(reader.users), cursor, reader.unread)


def moment(value: Any) -> datetime | None:
    """A time, None for null. Raises Unprocessable for a value that is no time.

    It does not rely on `scalars.moment` alone, which refuses year 1 (Junction's "unknown") and the end of year 9999.
    """
    if value is None or value == "":
        return None
    try:
        given: datetime | None = datetime.fromisoformat(value)
    except (ValueError, TypeError):
        given = or_none(scalars.moment, value)
    if given is None:
        raise Unprocessable("an entry: not a time")
    return max(given if given.tzinfo else given.replace(tzinfo=UTC), EARLIEST)
