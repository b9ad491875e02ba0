"""Checks the envelope of a task: the headers, properties and arguments that a message in a lane may have.

A client of the broker could otherwise let a worker drop a delivery (`expires`), hold it for years (`eta`), run
another task (`callbacks`, `chain`, `task`) or end with an exception (a header of another type).
"""

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import msgspec

from app.broker import lanes
from app.errors import Unprocessable
from app.observability.tracing import MERGED_HEADERS

TASKS = {
    "live": (lanes.APPLY,),
    "download": (lanes.DOWNLOAD,),
    "backfill": (lanes.FETCH, lanes.RECONCILE),
    "maintenance": (lanes.SWEEP,),
    "notify": (lanes.NOTIFY,),
    "derive": (lanes.DERIVE,),
}
REPEATED = (lanes.SWEEP, lanes.NOTIFY, lanes.DERIVE)  # may expire, because they are sent again while there is work
MAX_DELAY_SECONDS = 3600.0  # a retry waits 30 s at most, a backfill 50 s
CONTENT = ("application/json", "utf-8")

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Moment = Annotated[float, msgspec.Meta(ge=1_577_836_800, le=4_102_444_800)]  # 2020 to 2100, unix seconds
Count = Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]
BackfillId = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Aware = Annotated[datetime, msgspec.Meta(tz=True)]
NoKeywords = Annotated[dict[str, None], msgspec.Meta(max_length=0)]
Callbacks = dict[str, None]  # Celery writes every callback of a task that has none as null

_NAMES = {
    "sent_at": lanes.SENT_AT,
    "failures": lanes.FAILURES,
    "lost": lanes.LOST,
    "failing_since": lanes.FAILING_SINCE,
    "retry_reason": lanes.RETRY_REASON,
    "merged": MERGED_HEADERS,
}


class _Headers(msgspec.Struct, rename=_NAMES):
    """The headers of a task that are used. All others are removed, because Celery sets each as an attribute."""

    task: Id
    id: Id
    lang: Text | None = None
    eta: Aware | None = None
    expires: Aware | None = None
    retries: Count | None = None
    timelimit: tuple[None, None] | None = None
    root_id: Id | None = None
    parent_id: Id | None = None
    argsrepr: Text | None = None
    kwargsrepr: Text | None = None
    origin: Text | None = None
    ignore_result: bool | None = None
    redelivered: bool | None = None
    sent_at: Moment | None = None
    failures: Count | None = None
    lost: Count | None = None
    failing_since: Moment | None = None
    retry_reason: Text | None = None
    traceparent: Text | None = None
    tracestate: Text | None = None
    merged: list[dict[str, Text]] | None = None


class _Properties(msgspec.Struct):
    reply_to: Id | None = None
    correlation_id: Id | None = None
    priority: int | None = None


class _DeliveryInfo(msgspec.Struct):
    exchange: str
    routing_key: str
    redelivered: bool | None = None


HEADERS = frozenset(_Headers.__struct_encode_fields__)
# The arguments, keyword arguments and callbacks of a task, as Celery writes them: here one text of packed deliveries.
Body = tuple[tuple[str], NoKeywords, Callbacks]
DELIVERIES_BODY: msgspec.json.Decoder[Body] = msgspec.json.Decoder(Body)
_BODIES: dict[str, msgspec.json.Decoder[Any]] = {
    **dict.fromkeys((lanes.APPLY, lanes.DOWNLOAD), DELIVERIES_BODY),
    lanes.FETCH: msgspec.json.Decoder(tuple[tuple[BackfillId], NoKeywords, Callbacks]),
    **dict.fromkeys((lanes.RECONCILE, *REPEATED), msgspec.json.Decoder(tuple[tuple[()], NoKeywords, Callbacks])),
}


def checked_headers(headers: Mapping[str, Any], properties: Any, delivery_info: Any, lane: str) -> dict[str, Any]:
    """The headers that a task in this lane uses. Raises Unprocessable."""
    if "task" not in headers:
        raise Unprocessable("not a Celery message")
    if "compression" in headers:  # merged with others, it would make all of them unreadable
        raise Unprocessable("a message that cannot be decoded: compressed")
    try:
        found = msgspec.convert(headers, _Headers)
        msgspec.convert(properties, _Properties)
        info = msgspec.convert(delivery_info, _DeliveryInfo)
    except (msgspec.ValidationError, RecursionError, UnicodeError):  # a lone surrogate is a UnicodeError
        raise Unprocessable("not a valid task: a header or property has another type or is out of range") from None
    if found.task not in TASKS[lane]:
        raise Unprocessable("a task unknown to this worker")
    if info.routing_key != lane or info.exchange not in ("", lane):  # "": the default exchange
        raise Unprocessable("not a valid task: it names another lane, to which a retry would be sent")
    if found.expires is not None and found.task not in REPEATED:
        raise Unprocessable("not a valid task: it would expire")
    if found.eta is not None and found.eta.timestamp() > time.time() + MAX_DELAY_SECONDS:
        raise Unprocessable("not a valid task: its eta is more than an hour ahead")
    return {name: headers[name] for name in HEADERS if name in headers}


def check_arguments(task: str, body: Any, content_type: Any, content_encoding: Any) -> None:
    """Raises Unprocessable unless the body is JSON with exactly the arguments of the task, and without callbacks."""
    if (content_type, content_encoding) != CONTENT:
        raise Unprocessable("a message that cannot be decoded: not application/json in UTF-8")
    try:
        _BODIES[task].decode(body)
    except (msgspec.DecodeError, RecursionError, TypeError, UnicodeError):
        raise Unprocessable("not a valid task: other arguments, or callbacks") from None
