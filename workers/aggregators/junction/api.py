"""Junction's read API (Junction: API reference): requests for history, and the content of the answers."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import msgspec

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.errors import Unprocessable
from workers.actions import Notes, Record, Refused
from workers.aggregators.common import MAX_AHEAD, cursor_of, decode
from workers.aggregators.json import checked, read_leniently, reject_duplicate_keys, storable
from workers.aggregators.junction.samples import GroupContent, GroupReader
from workers.aggregators.junction.shapes import as_event, record
from workers.aggregators.requests import ApiLimits, DateRange, Page, Request, segment

API_LIMITS = ApiLimits()  # one rate for the whole account, reported with 429 (Junction: rate limits)


class _Groups(msgspec.Struct):
    groups: dict[str, msgspec.Raw]  # by provider
    next_cursor: Any = None
    next: Any = None  # the older name of the cursor


def connect(settings: Settings) -> tuple[str, Mapping[str, str]]:
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
    return Request(resource.path.format(user_id=segment(user_id)), tuple(query.items()), bool(cursor))


def read_page(resource: Resource, user_id: str, body: bytes, asked_at: datetime, provider: str = "") -> Page:  # noqa: ARG001 - every aggregator has this signature
    """The content of an answer, without the records and samples that cannot be used. Raises Unprocessable: no page."""
    body, is_unique, notes = checked(body, f"{resource.name}: a page")
    page = _read_page(resource, user_id, body, asked_at, is_unique=is_unique)
    return replace(page, notes=page.notes + notes)


def _read_page(resource: Resource, user_id: str, body: bytes, asked_at: datetime, *, is_unique: bool) -> Page:
    if resource.kind == "timeseries":
        reader = GroupReader(resource, user_id, asked_at, asked_at + MAX_AHEAD, _event_name(resource))
        return _read_groups(reader, body, is_unique=is_unique)
    found: list[Record] = []
    refused: list[Refused] = []
    unreadable: set[str] = set()
    for row in _rows(resource, body):
        try:
            if not is_unique:
                reject_duplicate_keys(bytes(row), resource.name)
            one, fields = record(resource, user_id, bytes(row), asked_at)
            found.append(one)
            unreadable.update(fields)
        except Unprocessable as reason:
            refused.append(Refused(str(reason), as_event(_event_name(resource), user_id, row)))
    return Page(tuple(found), len(found), refused=tuple(refused), notes=Notes(tuple(sorted(unreadable))))


def _event_name(resource: Resource) -> str:
    """The event in which Junction would send an item of a page."""
    return f"daily.data.{resource.name}.created"


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


def _read_groups(reader: GroupReader, body: bytes, *, is_unique: bool) -> Page:
    page = decode(body, _Groups, f"{reader.resource.name}: a page")
    found: list[GroupContent] = []
    refused: list[Refused] = []
    for raw in (raw for groups in page.groups.values() for raw in _groups_of(groups)):
        try:
            found.append(reader.read(bytes(raw), is_unique=is_unique))
        except Unprocessable as reason:
            refused.append(reader.refusal(reason, raw))
    return Page(
        actions=tuple(series for one in found for series in one.series),
        records=sum(one.read for one in found),
        cursor=cursor_of(page.next_cursor, page.next),
        refused=(*refused, *(item for one in found for item in one.refused)),
        notes=Notes(tuple(sorted({name for one in found for name in one.unreadable}))),
        duplicate_samples=sum(one.duplicates for one in found),
    )


def _groups_of(raw: msgspec.Raw) -> list[msgspec.Raw]:
    """The groups of a provider. A value that is no list is put into one, which is refused because it is no group."""
    try:
        return msgspec.json.decode(raw, type=list[msgspec.Raw] | None) or []
    except msgspec.DecodeError:
        return [msgspec.Raw(b"[%b]" % bytes(raw))]


def event_of(record: Record) -> bytes:
    return as_event(_event_name(catalogue()[record.resource]), record.user_id, record.payload)


def stream_request(resource: Resource, identifier: str) -> Request:
    """The request for the stream of one workout or night."""
    return Request(resource.path.format(**{resource.identifier: segment(identifier)}))


def read_stream(resource: Resource, owner: Record, body: bytes, asked_at: datetime) -> Page:
    """A stream is stored as received, under the id and source of the record that it belongs to: it has neither.

    Raises Unprocessable for a body that is no object.
    """
    body, is_replaced = storable(body)
    _, body, has_nulls = read_leniently(body, partial(decode, kind=dict[str, msgspec.Raw], what=resource.name))
    found = Record(resource.name, owner.user_id, owner.id, owner.provider, owner.source_type, body, asked_at)
    try:
        reject_duplicate_keys(body, resource.name)
    except Unprocessable as reason:
        return Page((), 0, refused=(Refused(str(reason), event_of(found)),))
    return Page((found,), 1, notes=Notes(is_replaced=is_replaced, has_nulls=has_nulls))
