"""Terra's read API: the next request for a piece of history, and what its answer holds."""

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec

from app.catalogue import Resource
from app.config.settings import Settings
from app.errors import NotYet, Unprocessable
from workers.aggregators.common import decode
from workers.aggregators.json import reject_duplicate_keys
from workers.aggregators.requests import ApiLimits, DateRange, Page, Request
from workers.aggregators.terra.shapes import NOTHING, Batch, Owner

MAX_WINDOW = timedelta(days=28)  # beyond a calendar month Terra answers in webhooks, whatever it was told
API_LIMITS = ApiLimits(  # Terra: rate limits
    max_slice_days=MAX_WINDOW.days,
    user_rate="206/hour",  # of 6,000 days of history: 28 and the second of the exclusive end may count as 29
    split_on_status=frozenset({413, 500, 504}),
    rule_header="x-terra-ratelimit-rule",
    rules={"r1": "request", "r2": "user"},
    default_scope="user",  # the provider's own quota, which is a person's, passed on
)
FIRST_SECOND = 1_000_000_000  # Terra takes unix seconds of ten digits
NOT_READY_SECONDS: Mapping[str, float] = {
    "processing": 60.0,
    "rate_limit": 900.0,
    "no_data": 900.0,
    "accepted": 900.0,
}
MAX_NOT_READY_SECONDS = 6 * 3600.0


class _User(msgspec.Struct):
    provider: str | None = None


class _Answer(msgspec.Struct):
    type: str | None = None
    status: str | None = None
    user: _User | None = None
    data: msgspec.Raw = NOTHING
    athlete: msgspec.Raw = NOTHING
    reference: str | None = None
    retry_after_seconds: float | None = None


def connect(settings: Settings) -> tuple[str, Mapping[str, str]]:
    """The base URL and the headers that every request carries. Raises Misconfigured."""
    headers = {"dev-id": settings.need_terra_dev_id(), "x-api-key": settings.need_terra_api_key()}
    return settings.terra_base_url.rstrip("/"), headers


def request(resource: Resource, user_id: str, provider: str, part: DateRange, cursor: str | None = None) -> Request:  # noqa: ARG001 - the shape of every provider
    """The request for a slice of a resource, which must not be longer than MAX_WINDOW; there are no pages.

    `to_webhook` is always said, because Terra's documents disagree on what it is otherwise. The end is exclusive, so
    it lies a second after the last one of the slice. An object that crosses the edge comes with both slices.
    """
    if part.end - part.start > MAX_WINDOW:
        raise ValueError("a longer window is answered in webhooks")
    query = {"user_id": user_id}
    if resource.dates != "none":
        start = max(math.floor(part.start.timestamp()), FIRST_SECOND)
        end = max(math.floor(part.end.timestamp()), start) + 1
        query |= {"start_date": str(start), "end_date": str(end), "with_samples": "true"}
    return Request(f"/{resource.terra}", (*query.items(), ("to_webhook", "false")))


def read_page(resource: Resource, user_id: str, body: bytes, asked_at: datetime, provider: str = "") -> Page:
    """What an answer holds; an object that cannot be used is named and left out. There is never a cursor.

    Raises NotYet for an answer of status 200 that is none, and DeadLetter for anything else. Only an array of data
    closes a window, even if it is empty: "no data" said in another way may mean that Terra has not looked yet.
    """
    reject_duplicate_keys(body, f"{resource.name}: a page")
    answer = decode(body, _Answer, f"{resource.name}: a page")
    name = resource.terra or ""
    raw = answer.athlete if name == "athlete" else answer.data
    if raw == NOTHING:
        raise _why_not(resource, answer)
    what = f"{resource.name}: a page"
    items: Any = [raw] if name == "athlete" else decode(bytes(raw), list[msgspec.Raw], what)
    told = answer.user.provider if answer.user else None
    batch = Batch(Owner(user_id, (told or provider).lower()), asked_at)
    refused: list[str] = []
    count = 0
    for item in items:
        try:
            if item != NOTHING:
                batch.add(name, bytes(item))
                count += 1
        except Unprocessable as reason:
            refused.append(str(reason))
    return Page(batch.actions(), count, refused=tuple(refused))


def _why_not(resource: Resource, answer: _Answer) -> NotYet | Unprocessable:
    """What an answer without data says: the sort of it, and when to ask again."""
    said = {answer.type, answer.status}
    if answer.reference is not None or "large_request_processing" in said:
        what = "accepted"
    else:
        what = next((one for one in NOT_READY_SECONDS if one in said), "")
    if not what:
        return Unprocessable(f"{resource.name}: a page without data")
    asked = answer.retry_after_seconds
    return NotYet(what, NOT_READY_SECONDS[what] if asked is None else min(max(asked, 1.0), MAX_NOT_READY_SECONDS))
