"""Terra's read API (Terra: API reference): requests for history, and the content of the answers."""

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec

from app.catalogue import Resource
from app.config.settings import Settings
from app.errors import NotYet, Unprocessable
from workers.actions import Record
from workers.aggregators.common import MAX_AHEAD, MAX_NAME, NULL, decode, optional_text
from workers.aggregators.json import checked
from workers.aggregators.requests import ApiLimits, DateRange, Page, Request
from workers.aggregators.scalars import number
from workers.aggregators.terra.shapes import Batch, Owner, as_event

MAX_WINDOW = timedelta(days=28)  # Terra answers more than a calendar month in webhooks, whatever `to_webhook` is
API_LIMITS = ApiLimits(  # Terra: rate limits
    max_slice_days=MAX_WINDOW.days,
    user_rate="206/hour",  # of 6,000 days of history: 28 days and the second of the exclusive end may count as 29
    split_on_status=frozenset({413, 500, 504}),
    rule_header="x-terra-ratelimit-rule",
    rules={"r1": "request", "r2": "user"},
    default_scope="user",  # Terra passes on the provider's own quota, which is per user
)
FIRST_SECOND = 1_000_000_000  # Terra takes unix seconds of ten digits
NOT_READY_SECONDS = {"processing": 60.0, "rate_limit": 900.0, "no_data": 900.0, "accepted": 900.0}
MAX_NOT_READY_SECONDS = 6 * 3600.0


class _Answer(msgspec.Struct):
    type: Any = None
    status: Any = None
    user: Any = None
    data: msgspec.Raw = NULL
    athlete: msgspec.Raw = NULL
    reference: Any = None
    retry_after_seconds: Any = None


def connect(settings: Settings) -> tuple[str, Mapping[str, str]]:
    headers = {"dev-id": settings.need_terra_dev_id(), "x-api-key": settings.need_terra_api_key()}
    return settings.terra_base_url.rstrip("/"), headers


def request(resource: Resource, user_id: str, provider: str, part: DateRange, cursor: str | None = None) -> Request:  # noqa: ARG001 - every aggregator has this signature
    """The request for a date range of a resource, of at most MAX_WINDOW. Terra has no pages.

    `to_webhook` is always sent, because Terra's documents disagree on its default. Terra's end is exclusive, so it is
    one second after the range. An object that crosses the edge of two ranges is in both answers.
    """
    if part.end - part.start > MAX_WINDOW:
        raise ValueError("Terra answers a longer window in webhooks")
    query = {"user_id": user_id}
    if resource.dates != "none":
        start = max(math.floor(part.start.timestamp()), FIRST_SECOND)
        end = max(math.floor(part.end.timestamp()), start) + 1
        query |= {"start_date": str(start), "end_date": str(end), "with_samples": "true"}
    return Request(f"/{resource.terra}", (*query.items(), ("to_webhook", "false")))


def read_page(resource: Resource, user_id: str, body: bytes, asked_at: datetime, provider: str = "") -> Page:
    """The content of an answer, without a cursor. An object that cannot be read is left out.

    Raises NotYet for an answer of status 200 without data, Unprocessable for any other body. Only an array of data
    closes a window, even an empty one: other forms of "no data" may mean that Terra has not asked the provider yet.
    """
    what = f"{resource.name}: a page"
    body, is_unique, notes = checked(body, what)
    answer = decode(body, _Answer, what)
    name = resource.terra or ""
    raw = answer.athlete if name == "athlete" else answer.data
    if raw == NULL:
        raise _without_data(resource, answer)
    items: Any = [raw] if name == "athlete" else decode(bytes(raw), list[msgspec.Raw], what)
    named = optional_text(answer.user.get("provider"), MAX_NAME) if isinstance(answer.user, dict) else None
    batch = Batch(Owner(user_id, (named or provider).lower()), asked_at, asked_at + MAX_AHEAD)
    for item in items:
        if item != NULL:
            batch.add(name, bytes(item), is_unique=is_unique)
    actions = batch.actions()
    return Page(
        actions=actions,
        records=batch.records,
        refused=tuple(batch.refused),
        notes=batch.notes + notes,
        duplicate_samples=batch.duplicate_samples,
    )


def event_of(record: Record) -> bytes:
    return as_event(record.source_type, Owner(record.user_id, record.provider), record.payload)


def _without_data(resource: Resource, answer: _Answer) -> NotYet | Unprocessable:
    given = {optional_text(answer.type), optional_text(answer.status)}
    if optional_text(answer.reference) or "large_request_processing" in given:
        what = "accepted"
    else:
        what = next((one for one in NOT_READY_SECONDS if one in given), "")
    if not what:
        return Unprocessable(f"{resource.name}: a page without data")
    try:
        seconds = min(max(number(answer.retry_after_seconds), 1.0), MAX_NOT_READY_SECONDS)
    except ValueError:
        seconds = NOT_READY_SECONDS[what]
    return NotYet(what, seconds)
