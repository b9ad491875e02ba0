"""Limits of texts that PostgreSQL indexes, and of large documents."""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from tests.support import START, event, heartrate, workout
from tests.support.cases import each
from workers.actions import Parsed, Record, Samples
from workers.aggregators import json
from workers.aggregators.json import divided
from workers.aggregators.junction import api, introspection
from workers.aggregators.registry import AGGREGATORS

LONG = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=3000))  # does not compress
RECEIVED = START.timestamp()
USER = {"user_id": "t1", "provider": "GARMIN", "reference_id": "c1"}
TIMES = {"start_time": "2026-03-14T06:30:00+00:00", "end_time": "2026-03-14T07:00:00+00:00"}


def parsed(body: Any, aggregator: str = "junction", name: str = "msg_1") -> Parsed:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return AGGREGATORS[aggregator].parse(Delivery(aggregator, name, RECEIVED, b"", 1_773_512_405_000), raw, Settings())


def samples(resource: str, source: Any, **item: Any) -> dict[str, Any]:
    one = {"timestamp": START.isoformat(), "value": 1, "unit": "mg"} | item
    return event(f"daily.data.{resource}.created", "u1", {"source": source, "data": [one]})


GARMIN = {"provider": "garmin", "type": "watch"}


@each(
    (event("daily.data.workouts.created", LONG, {}), "user_id is longer than 256 characters"),
    (event("daily.data.workouts.created", "", {"user_id": LONG}), "user_id is longer than 256 characters"),
    (event(LONG, "u1", {}), "event_type is longer than 256 characters"),
    (workout("u1", LONG), "workouts: id: expected an id of 1 to 256 characters"),
    (workout("u1", source={"provider": LONG}), "source.provider is longer than 100 characters"),
    (workout("u1", source={"slug": LONG}), "source.slug is longer than 100 characters"),
    (workout("u1", source=GARMIN | {"type": LONG}), "source.type is longer than 100 characters"),
    (workout("u1", source=None, source_provider=LONG), "source_provider is longer than 100 characters"),
    (workout("u1", source=None, source_type=LONG), "source_type is longer than 100 characters"),
    (heartrate("u1", {1: 60}, provider=LONG), "source.provider is longer than 100 characters"),
    (heartrate("u1", {1: 60}, type=LONG), "source.type is longer than 100 characters"),
    (samples("heart_rate_recovery_one_minute", GARMIN | {"workout_id": LONG}), "workout_id is longer than 100"),
    (samples("insulin_injection", GARMIN, type=LONG), "insulin_injection: type: expected at most 100 characters"),
    (event("provider.connection.created", "u1", {"provider": LONG}), "source.provider is longer than 100 characters"),
    (
        event("historical.data.sleep.created", "u1", {"provider": LONG}),
        "source.provider is longer than 100 characters",
    ),
)
def test_a_long_text_in_a_key_of_junction_is_refused(body: Any, reason: Any) -> None:
    """Breaks if PostgreSQL refuses an index entry, which costs retries of the whole message."""
    with pytest.raises(Unprocessable) as error:
        parsed(body)
    assert reason in str(error.value)


@each(
    ({"user": USER | {"user_id": LONG}}, "user.user_id: expected a text of 1 to 256 characters"),
    ({"user": USER | {"provider": LONG}}, "user.provider: expected a text of 1 to 100 characters"),
    ({"data": [{"metadata": TIMES | {"summary_id": LONG}}]}, "activity: "),
)
def test_a_long_text_in_a_key_of_terra_is_refused(changes: Any, reason: Any) -> None:
    """As for Junction."""
    with pytest.raises(Unprocessable) as error:
        parsed({"type": "activity", "user": USER, "data": []} | changes, "terra")
    assert reason in str(error.value)


def test_long_names_of_terras_samples_are_refused_alone() -> None:
    """Breaks if the subtype of a series is too long for an index, or costs the object."""
    item = {"measurement_time": TIMES["start_time"], "insulin_units": 1, "insulin_type": LONG}
    one = {"metadata": TIMES, "measurements_data": {"measurements": [item]}, "data_enrichment": {LONG: 7}}
    found = parsed({"type": "body", "user": USER, "data": [one]}, "terra")
    assert sum(refused.items for refused in found.refused) == 2
    assert [type(action) for action in found.actions if isinstance(action, Record | Samples)] == [Record]


def test_a_long_key_of_times_is_refused() -> None:
    """Breaks if the digits of a second make a key of 3,000 characters."""
    start = f"2026-03-14T06:30:00.{'1' * 3000}+00:00"
    with pytest.raises(Unprocessable):
        parsed({"type": "sleep", "user": USER, "data": [{"metadata": TIMES | {"start_time": start}}]}, "terra")


@each(("junction", workout("u1"), "client_user_id"), ("terra", {"type": "activity", "data": []}, "reference_id"))
def test_a_long_name_of_a_client_is_null_with_a_note(aggregator: Any, body: Any, field: Any) -> None:
    """Breaks if a text that is in no key costs the data, or is dropped silently."""
    given = body | ({"client_user_id": LONG} if aggregator == "junction" else {"user": USER | {field: LONG}})
    found = parsed(given, aggregator)
    assert found.client_user_id is None
    assert found.notes == (f"stored as NULL, because they cannot be read: {field}",)


def test_a_long_unit_is_empty_with_a_note() -> None:
    """As for a client's name."""
    (action,) = (found := parsed(samples("heartrate", GARMIN, unit=LONG))).actions
    assert isinstance(action, Samples)
    assert (action.rows[0].unit, found.notes) == ("", ("stored as NULL, because they cannot be read: unit",))


def test_long_texts_of_pages_are_refused() -> None:
    """Breaks if history is stored under a key that PostgreSQL refuses."""
    group = {"source": {"provider": LONG, "type": "watch"}, "data": [{"timestamp": START.isoformat(), "value": 1}]}
    page = api.read_page(catalogue()["heartrate"], "u1", msgspec.json.encode({"groups": {"x": [group]}}), START)
    assert [one.reason for one in page.refused] == ["source.provider is longer than 100 characters"]
    body = msgspec.json.encode({"workouts": [workout("u1", LONG)["data"]]})
    assert len(api.read_page(catalogue()["workouts"], "u1", body, START).refused) == 1


def test_long_texts_of_listings_are_left_out() -> None:
    """Breaks if a comparison stores a provider or user whose name is too long for an index."""
    body = msgspec.json.encode({"providers": [{"slug": LONG, "status": "connected"}]})
    found = introspection.read_connections("u1", body, START)
    assert (found.rows, found.unread) == ((), 1)


# Large documents


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats documents of a few bytes as large."""
    monkeypatch.setattr(json, "LARGE_BYTES", 60)
    monkeypatch.setattr(json, "PART_BYTES", 20)


ITEMS = st.recursive(
    st.integers() | st.text(alphabet='{}[],: "\\a'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=12,
)


@given(st.lists(ITEMS, max_size=30))
def test_the_parts_of_an_array_are_its_items(items: list[Any]) -> None:
    """Breaks if an array is cut inside a text or an item: a sample would be lost or another one invented."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "LARGE_BYTES", 40)
        patch.setattr(json, "PART_BYTES", 10)
        found = [one for part in json.parts(msgspec.json.encode(items)) for one in msgspec.json.decode(part)]
    assert found == items


@pytest.mark.usefixtures("small_parts")
@each(
    (b'{"a":{"b":[%b],"b":1}}' % b",".join([b'{"x":1}'] * 20), None),
    (b'{"a":{"b":[%b,{"x":1,"x":2}]}}' % b",".join([b'{"x":1}'] * 20), False),
    (b'[[%b,{"x":1,"x":2}]]' % b",".join([b'{"x":1}'] * 20), False),
    (b'{"a":{"b":[%b]}}' % b",".join([b'{"x":1}'] * 20), True),
    (b'{"a":[%b],"a":[]}' % b",".join([b'{"x":1}'] * 20), None),
    (b'{"a":[%b],"b":NaN}' % b",".join([b'{"x":-Infinity}'] * 20), True),
    (b'[%b,{"x":1,"x":NaN}]' % b",".join([b'{"x":1}'] * 20), False),
    (b'{"a":[%b],"a":NaN}' % b",".join([b'{"x":1}'] * 20), None),
)
def test_repeated_names_of_large_documents(raw: bytes, is_unique: Any) -> None:
    """Breaks if a large document is checked otherwise than a small one."""
    if is_unique is None:
        with pytest.raises(Unprocessable, match="repeats a name"):
            json.checked(raw, "what")
    else:
        assert json.checked(raw, "what").is_unique is is_unique


def test_a_document_of_too_many_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if millions of empty arrays are decoded, or stored as jsonb, which PostgreSQL refuses (XX000)."""
    monkeypatch.setattr(json, "MAX_VALUES", 2_000_000)
    with pytest.raises(Unprocessable, match="more than 2,000,000 values"):
        parsed(b'{"event_type":"daily.data.workouts.created","data":[%b]}' % b",".join([b"[]"] * 2_100_000))


@pytest.mark.usefixtures("small_parts")
def test_an_odd_sample_of_a_large_event_is_refused_alone() -> None:
    """Breaks if a large event is read otherwise than a small one."""
    body = heartrate("u1", {minute: 60 + minute for minute in range(50)})
    body["data"]["data"][7]["value"] = "n/a"
    found = parsed(body)
    (action,) = found.actions
    assert isinstance(action, Samples)
    assert (len(action.rows), len(found.refused), action.rows[-1].value) == (49, 1, 109)


def test_too_many_odd_samples_are_refused_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a million odd samples are refused one by one, which takes 12 s and a dead letter's memory each."""
    monkeypatch.setattr("workers.aggregators.common.MAX_REFUSED", 3)
    body = heartrate("u1", dict.fromkeys(range(9), 60))
    for item in body["data"]["data"][:5]:
        item["value"] = "n/a"
    with pytest.raises(Unprocessable, match="heartrate: more than 3 refused, first: heartrate: value"):
        parsed(body)


@each(b"", b"[", b"nonsense", b'{"a":' + b" " * 100)
def test_what_cannot_be_divided_is_one_part(raw: bytes) -> None:
    """Breaks if text that is no JSON raises here: the decoder after this refuses it."""
    assert list(divided(raw)) == [(raw, False)]
