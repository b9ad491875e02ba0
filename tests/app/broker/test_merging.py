"""Merging messages: every delivery once, in order, first attempts only."""

import base64
import json
from typing import Any

import pytest

from app.broker.merging import first_attempts, is_first_attempt, merge_batches
from app.delivery import Delivery, pack, unpack
from app.errors import Unprocessable
from app.observability.tracing import MERGED_HEADERS
from tests.support import delivery, workout
from tests.support.cases import Failures

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def message(*deliveries: Delivery, arguments: Any = None, **headers: Any) -> dict[str, Any]:
    """A message as it is queued in a lane."""
    body = json.dumps([[pack(deliveries)], {}, {"callbacks": None}] if arguments is None else arguments)
    return {
        "body": base64.b64encode(body.encode()).decode(),
        "headers": {"task": "headrace.apply", "id": "1", "retries": 0, "eta": None, "argsrepr": "(1 deliveries)"}
        | headers,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "delivery_tag": "t1",
            "delivery_info": {"exchange": "live", "routing_key": "live"},
            "body_encoding": "base64",
        },
    }


def held(joined: dict[str, Any]) -> list[Delivery]:
    """The deliveries of a message."""
    (packed,), named, more = json.loads(base64.b64decode(joined["body"]))
    assert (named, more) == ({}, {"callbacks": None})
    return unpack(packed)


def test_every_delivery_is_in_it_once_and_in_order() -> None:
    """Breaks if merging drops, duplicates or reorders deliveries, or changes other parts of the first message."""
    sent = [delivery(workout(f"u{number}")) for number in range(5)]
    parts = [message(*sent[:2]), message(*sent[2:4], id="2", traceparent=PARENT), message(sent[4], id="3")]
    joined = merge_batches(parts)
    assert held(joined) == sent
    changed = {"argsrepr": "(5 deliveries)", MERGED_HEADERS: [{"traceparent": PARENT}]}
    assert joined["headers"] == parts[0]["headers"] | changed
    assert joined["properties"] == parts[0]["properties"]
    assert is_first_attempt(joined)


@pytest.mark.parametrize("odd", [{"traceparent": None}, {"tracestate": None}, {"tracer": {"a": 1}}])
def test_a_valid_message_stays_valid_with_others(odd: dict[str, Any]) -> None:
    """Breaks if a trace header of one message makes the merged one, with the deliveries of others, a dead letter."""
    parts = [message(delivery(workout("u1"))), message(delivery(workout("u2")), id="2", **odd)]
    assert all(map(is_first_attempt, parts))
    joined = merge_batches(parts)
    assert joined["headers"][MERGED_HEADERS] == []
    assert is_first_attempt(joined)


@pytest.mark.parametrize(
    ("headers", "properties"),
    [
        ({"task": "headrace.fetch"}, {}),
        ({"retries": 1}, {}),
        ({"eta": "2026-03-14T06:30:00+00:00"}, {}),
        ({}, {"delivery_info": {"exchange": "live", "routing_key": "live", "redelivered": True}}),
        ({"expires": "2026-03-14T06:30:00+00:00"}, {}),
        ({"headrace-sent-at": 1e300}, {}),
        ({"compression": "headrace"}, {}),
        ({}, {"delivery_info": {"exchange": "live", "routing_key": "elsewhere"}}),
        ({}, {"body_encoding": "utf-8"}),
    ],
)
def test_a_redelivered_message_is_not_a_first_attempt(headers: dict[str, Any], properties: dict[str, Any]) -> None:
    """Breaks if a redelivered, retried or delayed message is merged."""
    assert is_first_attempt(message())
    had = message(**headers)
    had["properties"] |= properties
    assert not is_first_attempt(had)


def test_an_unreadable_message_is_rejected() -> None:
    """Breaks if a foreign message is merged."""
    failures = Failures()
    one = pack([delivery(workout("u2"))])
    odd = ([[one], {"x": None}, {}], [[one], {}, {"chain": []}])  # the others would be lost or refused with it
    for arguments in (*odd, [], {}, [[]], [["x"], {}, {}], [[1], {}, {}], [["a", "b"], {}, {}], [None, {}, {}]):
        with failures.of(arguments):
            with pytest.raises(Unprocessable):
                merge_batches([message(delivery(workout("u1"))), message(arguments=arguments)])
            with pytest.raises(Unprocessable):
                merge_batches([message() | {"body": "no base64"}])
            with pytest.raises(Unprocessable):
                merge_batches([message() | {"body": base64.b64encode(b"[" * 100_000).decode()}])
    assert failures == {}


@pytest.mark.parametrize("odd", [b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, json.dumps(message(retries=1)).encode()])
def test_messages_up_to_one_that_is_not_merged(odd: bytes) -> None:
    """Breaks if bytes that are not a message are merged, end the worker, or change the order of the others."""
    sent = [message(delivery(workout(f"u{number}")), id=str(number)) for number in range(3)]
    first, second, third = (json.dumps(one).encode() for one in sent)
    assert first_attempts([first, second, odd, third]) == sent[:2]
