"""Junction's read API: the next request for a piece of history, and what its answer holds."""

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec

from app.catalogue import Resource
from app.config.settings import Settings
from app.errors import Unprocessable
from workers.actions import Action, Record
from workers.aggregators.common import decode, decode_or
from workers.aggregators.json import reject_duplicate_keys
from workers.aggregators.junction.shapes import SampleGroup, plain, record, samples
from workers.aggregators.requests import ApiLimits, DateRange, Page, Request

API_LIMITS = ApiLimits()  # a rate for the whole account, and 429 (Junction: rate limits)


_Kind = TypeVar("_Kind", bound=SampleGroup)


class _Groups(msgspec.Struct, Generic[_Kind]):
    groups: dict[str, list[_Kind]]
    next_cursor: str | None = None
    next: str | None = None  # the older name of the cursor


def connect(settings: Settings) -> tuple[str, Mapping[str, str]]:
    """The base URL and the headers that every request carries. Raises Misconfigured."""
    return settings.junction_api_url, {"X-Vital-API-Key": settings.need_junction_api_key()}


def request(resource: Resource, user_id: str, provider: str, part: DateRange, cursor: str | None = None) -> Request:
    """The request for a slice of a resource, or for its next page.

    Instants are sent as such, because a bare end date means 23:59:59 and loses the last second's fractions; three
    summaries take days only. A cursor goes with the same window as the page before.
    """
    query = {"provider": provider} if provider else {}
    if resource.dates == "day":
        query |= {"start_date": part.start.date().isoformat(), "end_date": part.end.date().isoformat()}
    elif resource.dates == "moment":
        query |= {"start_date": part.start.isoformat(), "end_date": part.end.isoformat()}
    if cursor:
        query["next_cursor"] = cursor
    return Request(resource.path.format(user_id=quote(user_id, safe="")), tuple(query.items()), bool(cursor))


def read_page(resource: Resource, user_id: str, body: bytes, asked_at: datetime, provider: str = "") -> Page:  # noqa: ARG001 - the shape of every provider
    """What an answer holds; a record that cannot be used is named and left out. Raises Unprocessable if it is none."""
    reject_duplicate_keys(body, f"{resource.name}: a page")
    if resource.kind == "timeseries":
        return _read_groups(resource, user_id, body, asked_at)
    found: list[Action] = []
    refused: list[str] = []
    for row in _rows(resource, body):
        try:
            found.append(record(resource, user_id, bytes(row), asked_at))
        except Unprocessable as reason:
            refused.append(str(reason))
    return Page(tuple(found), len(found), refused=tuple(refused))


def _rows(resource: Resource, body: bytes) -> list[msgspec.Raw]:
    """The objects of a page: an array under a name, a bare array of devices, or the page itself."""
    what = f"{resource.name}: a page"
    if resource.kind == "device":
        return decode(body, list[msgspec.Raw], what)  # type: ignore[no-any-return]
    document = decode(body, dict[str, msgspec.Raw], what)
    if resource.rows is None:
        return [msgspec.Raw(body)]
    if resource.rows not in document:
        raise Unprocessable(f"{what} without {resource.rows}")
    return decode(bytes(document[resource.rows]), list[msgspec.Raw], what)  # type: ignore[no-any-return]


@cache
def _plain_groups(resource: Resource) -> Any:
    kind = plain(resource)
    return kind and _Groups[kind]  # type: ignore[valid-type]


def _read_groups(resource: Resource, user_id: str, body: bytes, asked_at: datetime) -> Page:
    page: Any = decode_or(_plain_groups(resource), body, _Groups[SampleGroup], f"{resource.name}: a page")
    found: list[Action] = []
    refused: list[str] = []
    count = 0
    for group in (group for groups in page.groups.values() for group in groups):
        try:
            found += samples(resource, user_id, group, asked_at, [])
            count += len(group.data)
        except Unprocessable as reason:
            refused.append(str(reason))
    return Page(tuple(found), count, page.next_cursor or page.next or None, tuple(refused))


def stream_request(resource: Resource, identifier: str) -> Request:
    """The request for the stream of one workout."""
    return Request(resource.path.format(**{resource.identifier: quote(identifier, safe="")}))


def read_stream(resource: Resource, owner: Record, body: bytes, asked_at: datetime) -> Page:
    """A stream is stored as it came, under its workout's id and source; it has neither itself."""
    reject_duplicate_keys(body, resource.name)
    decode(body, dict[str, msgspec.Raw], resource.name)
    found = Record(resource.name, owner.user_id, owner.id, owner.provider, owner.source_type, body, asked_at)
    return Page((found,), 1)
