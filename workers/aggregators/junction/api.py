"""Junction's read API (Junction: API reference): requests for history, and the content of the answers."""

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec

from app.catalogue import Resource
from app.config.settings import Settings
from app.errors import Unprocessable
from workers.actions import Record, Samples
from workers.aggregators.common import decode, decode_or, read_each
from workers.aggregators.json import reject_duplicate_keys
from workers.aggregators.junction.shapes import SampleGroup, plain, record, samples
from workers.aggregators.requests import ApiLimits, DateRange, Page, Request

API_LIMITS = ApiLimits()  # one rate for the whole account, reported with 429 (Junction: rate limits)

_Group = TypeVar("_Group", bound=SampleGroup)


class _Groups(msgspec.Struct, Generic[_Group]):
    groups: dict[str, list[_Group]]
    next_cursor: str | None = None
    next: str | None = None  # the older name of the cursor


def connect(settings: Settings) -> tuple[str, Mapping[str, str]]:
    """The base URL and the headers of every request. Raises Misconfigured."""
    return settings.junction_api_url, {"X-Vital-API-Key": settings.need_junction_api_key()}


def request(resource: Resource, user_id: str, provider: str, part: DateRange, cursor: str | None = None) -> Request:
    """The request for a date range of a resource, or for its next page, which repeats the date range.

    The range is sent as instants: a bare end date means 23:59:59, which loses the last second's fractions. Three
    summaries accept only days.
    """
    query = {"provider": provider} if provider else {}
    if resource.dates == "day":
        query |= {"start_date": part.start.date().isoformat(), "end_date": part.end.date().isoformat()}
    elif resource.dates == "moment":
        query |= {"start_date": part.start.isoformat(), "end_date": part.end.isoformat()}
    if cursor:
        query["next_cursor"] = cursor
    return Request(resource.path.format(user_id=quote(user_id, safe="")), tuple(query.items()), bool(cursor))


def read_page(resource: Resource, user_id: str, body: bytes, asked_at: datetime, provider: str = "") -> Page:  # noqa: ARG001 - every aggregator has this signature
    """The content of an answer. A record or group that cannot be read is left out. Raises Unprocessable: no page."""
    reject_duplicate_keys(body, f"{resource.name}: a page")
    if resource.kind == "timeseries":
        return _read_groups(resource, user_id, body, asked_at)
    found, refused = read_each(_rows(resource, body), lambda row: record(resource, user_id, bytes(row), asked_at))
    return Page(tuple(found), len(found), refused=refused)


def _rows(resource: Resource, body: bytes) -> list[msgspec.Raw]:
    """The objects of a page: an array under a name, a bare array of devices, or the page itself."""
    what = f"{resource.name}: a page"
    if resource.kind != "device":
        document = decode(body, dict[str, msgspec.Raw], what)
        if resource.rows is None:
            return [msgspec.Raw(body)]
        if resource.rows not in document:
            raise Unprocessable(f"{what} without {resource.rows}")
        body = bytes(document[resource.rows])
    return decode(body, list[msgspec.Raw], what)  # type: ignore[no-any-return]


def _read_groups(resource: Resource, user_id: str, body: bytes, asked_at: datetime) -> Page:
    page = decode_or(_plain_groups(resource), body, _Groups[SampleGroup], f"{resource.name}: a page")

    def read(group: SampleGroup) -> tuple[list[Samples], int]:
        return samples(resource, user_id, group, asked_at)[0], len(group.data)

    found, refused = read_each((group for groups in page.groups.values() for group in groups), read)
    actions = tuple(one for series, _ in found for one in series)
    return Page(actions, sum(count for _, count in found), page.next_cursor or page.next or None, refused)


@cache
def _plain_groups(resource: Resource) -> Any:
    group = plain(resource)
    return group and _Groups[group]  # type: ignore[valid-type]


def stream_request(resource: Resource, identifier: str) -> Request:
    """The request for the stream of one workout or night."""
    return Request(resource.path.format(**{resource.identifier: quote(identifier, safe="")}))


def read_stream(resource: Resource, owner: Record, body: bytes, asked_at: datetime) -> Page:
    """A stream is stored as received, under the id and source of the record that it belongs to: it has neither."""
    reject_duplicate_keys(body, resource.name)
    decode(body, dict[str, msgspec.Raw], resource.name)
    found = Record(resource.name, owner.user_id, owner.id, owner.provider, owner.source_type, body, asked_at)
    return Page((found,), 1)
