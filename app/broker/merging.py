"""Several messages of deliveries as one: what waits together is applied together, for the price of one transaction."""

import base64
import json
from collections.abc import Sequence
from typing import Any

from app.broker.lanes import APPLY
from app.delivery import Delivery, pack, unpack
from app.errors import Unprocessable
from app.observability.tracing import MERGED_HEADERS

Message = dict[str, Any]  # as kombu's virtual transports have it


def is_first_attempt(message: Message) -> bool:
    """Whether it is a message of deliveries that nobody has had yet. Whatever was tried before goes alone."""
    headers, properties = message["headers"], message["properties"]
    was_had = headers.get("retries") or headers.get("eta") or properties["delivery_info"].get("redelivered")
    return headers.get("task") == APPLY and not was_had and properties.get("body_encoding") == "base64"


def merge_batches(messages: Sequence[Message]) -> Message:
    """One message with the deliveries of all of these, which is otherwise the first. Raises Unprocessable.

    A message costs a worker 4 ms, of which its deliveries are the smaller part: when a lane fills, the endpoint's own
    messages of ten are too small.
    """
    first, headers = messages[0], messages[0]["headers"]
    deliveries = [delivery for message in messages for delivery in _deliveries(message)]
    others = [{key: value for key, value in one["headers"].items() if key.startswith("trace")} for one in messages[1:]]
    headers = headers | {"argsrepr": f"({len(deliveries)} deliveries)", MERGED_HEADERS: [one for one in others if one]}
    (_, *rest) = _body(first)
    body = json.dumps([[pack(deliveries)], *rest]).encode()
    return first | {"headers": headers, "body": base64.b64encode(body).decode()}


def _deliveries(message: Message) -> list[Delivery]:
    arguments, *_ = _body(message)
    try:
        (packed,) = arguments
        return unpack(packed)
    except (TypeError, ValueError):
        raise Unprocessable("not a message of deliveries") from None


def _body(message: Message) -> list[Any]:
    try:
        found = json.loads(base64.b64decode(message["body"]))
    except (LookupError, RecursionError, TypeError, ValueError):
        raise Unprocessable("not a message of deliveries") from None
    if not isinstance(found, list) or len(found) != 3:
        raise Unprocessable("not a message of deliveries")
    return found
