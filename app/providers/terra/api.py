"""Terra's read API: the next request for a piece of history, and what its answer holds."""

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec

from app.catalogue import Resource
from app.config import Settings
from app.errors import DeadLetter, NotYet
from app.providers.common import decode
from app.providers.request import Page, Request, Slice
from app.providers.terra.shapes import NOTHING, Batch, Owner
from app.strict import refuse_doubles

LONGEST_WINDOW = timedelta(days=28)  # beyond a calendar month Terra answers in webhooks, whatever it was told
FIRST_SECOND = 1_000_000_000  # Terra takes unix seconds of ten digits
DAY_SECONDS = 86_400
NOT_YET_SECONDS: Mapping[str, float] = {
    "processing": 60.0,
    "rate_limit": 900.0,
    "no_data": 900.0,
    "accepted": 900.0,
}
LONGEST_WAIT_SECONDS = 6 * 3600.0


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


def request(resource: Resource, user_id: str, provider: str, part: Slice, cursor: str | None = None) -> Request:  # noqa: ARG001 - the shape of every provider
    """The request for a slice of a resource, which must not be longer than LONGEST_WINDOW; there are no pages.

    `to_webhook` is always said, because Terra's documents disagree on what it is otherwise. The end is exclusive, so
    it lies a second after the last one of the slice. An object that crosses the edge comes with both slices.
    """
    if part.end - part.start > LONGEST_WINDOW:
        raise ValueError("a longer window is answered in webhooks")
    query, days = {"user_id": user_id}, 1
    if resource.dates != "none":
        start = max(math.floor(part.start.timestamp()), FIRST_SECOND)
        end = max(math.floor(part.end.timestamp()), start) + 1
        query |= {"start_date": str(start), "end_date": str(end), "with_samples": "true"}
        days = math.ceil((end - 1 - start) / DAY_SECONDS) or 1
    return Request(f"/{resource.terra}", (*query.items(), ("to_webhook", "false")), days=days)


def read_page(resource: Resource, user_id: str, body: bytes, asked_at: datetime, provider: str = "") -> Page:
    """What an answer holds; an object that cannot be used is named and left out. There is never a cursor.

    Raises NotYet for an answer of status 200 that is none, and DeadLetter for anything else. Only an array of data
    closes a window, even if it is empty: "no data" said in another way may mean that Terra has not looked yet.
    """
    refuse_doubles(body, f"{resource.name}: a page")
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
        except DeadLetter as reason:
            refused.append(str(reason))
    return Page(batch.actions(), count, refused=tuple(refused))


def _why_not(resource: Resource, answer: _Answer) -> NotYet | DeadLetter:
    """What an answer without data says: the sort of it, and when to ask again."""
    said = {answer.type, answer.status}
    if answer.reference is not None or "large_request_processing" in said:
        what = "accepted"
    else:
        what = next((one for one in NOT_YET_SECONDS if one in said), "")
    if not what:
        return DeadLetter(f"{resource.name}: a page without data")
    asked = answer.retry_after_seconds
    return NotYet(what, NOT_YET_SECONDS[what] if asked is None else min(max(asked, 1.0), LONGEST_WAIT_SECONDS))
