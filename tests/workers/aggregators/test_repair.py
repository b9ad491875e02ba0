"""Columns of records with odd fields, and payloads that PostgreSQL has refused."""

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalogue import Resource, catalogue
from tests.support.cases import each, refusal
from workers.actions import Record
from workers.aggregators.repair import columns_of, repaired, value_of
from workers.aggregators.scalars import Unreadable

CHARACTERS = st.text(st.characters(codec="utf-8"), max_size=4)
WORKOUTS = catalogue()["workouts"]


def record(payload: bytes, columns: bytes | None = None) -> Record:
    """A workout."""
    return Record("workouts", "u1", "w1", "garmin", "watch", payload, datetime(2026, 3, 14, tzinfo=UTC), columns)


def columns(raw: bytes, resource: Resource = WORKOUTS) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The columns of an object, and the names of its fields that cannot be read."""
    encoded, unreadable = columns_of(resource, msgspec.json.decode(raw, type=dict[str, msgspec.Raw]))
    return json.loads(encoded), unreadable


@each((None, None), (b"null", None), (b"1.50", 1.5), (b'"a"', "a"), (b"[1]", [1]), (b"{}", {}))
def test_the_value_of_a_part(raw: bytes | None, expected: Any) -> None:
    """Breaks if an absent field and null differ, or a number is read as another one."""
    assert value_of(raw) == expected


@each(b"1e999", b"-1e999", b"1" + b"0" * 5000, b"[" * 100_000 + b"]" * 100_000)
def test_a_part_without_a_value(raw: bytes) -> None:
    """Breaks if a number that no double holds, or deep nesting, raises an error that costs the record."""
    with pytest.raises(Unreadable):
        value_of(raw)


@each(
    (b"{}", {}, ()),
    (b'{"title":null,"tomorrow":[1]}', {}, ()),
    (b'{"title":"a","distance":12.5,"average_hr":146}', {"title": "a", "distance": 12.5, "average_hr": 146}, ()),
    (b'{"title":7,"distance":"12.5","average_hr":146.5}', {"title": "7", "distance": 12.5, "average_hr": 147}, ()),
    (b'{"title":[],"distance":1e999,"average_hr":1}', {"average_hr": 1}, {"title", "distance"}),
    (b'{"title":"\\u00e9","time_start":"soon"}', {"title": "\u00e9"}, {"time_start"}),
    (b'{"average_hr":9300000000000000000}', {}, {"average_hr"}),
)
def test_columns(raw: bytes, expected: dict[str, Any], unreadable: Any) -> None:
    """Breaks if one field costs the columns of the others, or is NULL without being named."""
    found, names = columns(raw)
    assert (found, set(names)) == (expected, set(unreadable))


@each(*catalogue().values())
def test_every_field_of_the_catalogue_has_a_reader(resource: Any) -> None:
    """Breaks if a field has a type that no reader knows, so that one odd field of the resource raises."""
    for odd in ([], {}, "canary", True, 1, 1e300, -1):
        names = [field.name for field in resource.fields]
        encoded, unreadable = columns_of(resource, {name: msgspec.Raw(msgspec.json.encode(odd)) for name in names})
        assert sorted([*json.loads(encoded), *unreadable]) == sorted(names)


# Payloads that PostgreSQL has refused


@each(
    (b'{"a":1}', b'{"a":1}'),
    (b'{"a":1.50,"b":[-0.0,1E5,{"c":1e-07}]}', b'{"a":1.50,"b":[-0.0,1E5,{"c":1e-07}]}'),
    (b'{ "a" : 123456789012345678901234567890 }', b'{"a":123456789012345678901234567890}'),
    (b'{"a":1e999}', b'{"a":1e999}'),
    (b'{"a":1e1000}', b'{"a":"1e1000"}'),
    (b'{"a":-1.5E+999999999}', b'{"a":"-1.5E+999999999"}'),
    (b'{"a":1e-999999}', b'{"a":"1e-999999"}'),
    (b'{"a":1e000999}', b'{"a":1e000999}'),
    (b'{"a":[{"b":1e0001000}]}', b'{"a":[{"b":"1e0001000"}]}'),
    (b'{"a":' + b"1" * 1000 + b"}", b'{"a":' + b"1" * 1000 + b"}"),
    (b'{"a":' + b"1" * 1001 + b"}", b'{"a":"' + b"1" * 1001 + b'"}'),
    ('{"a":"\u00e9\\u00e9"}'.encode(), '{"a":"\u00e9\u00e9"}'.encode()),
)
def test_a_repaired_payload(payload: bytes, expected: bytes) -> None:
    """Breaks if a number that numeric cannot hold costs its record, or another number loses a digit."""
    assert repaired(record(payload)).payload == expected


def test_the_columns_of_a_repaired_record() -> None:
    """Breaks if PostgreSQL reads the columns from the rewritten payload, or columns that were read are lost."""
    found = repaired(record(b'{"average_hr":146.5,"distance":1e9999,"title":"a"}'))
    assert json.loads(found.columns or b"") == {"average_hr": 147, "title": "a"}
    assert repaired(record(b'{"average_hr":1}', b'{"title":"b"}')).columns == b'{"title":"b"}'


@each(b"[]", b"1", b"{", b"\xff", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
def test_a_payload_that_is_no_object_cannot_be_repaired(payload: bytes) -> None:
    """Breaks if a payload that cannot be repaired raises an unexpected error, so that the delivery is retried."""
    refusal(repaired, record(payload))


@given(
    st.dictionaries(
        CHARACTERS, st.recursive(st.none() | st.integers(-(10**30), 10**30) | CHARACTERS, st.lists, max_leaves=5)
    )
)
def test_a_repair_changes_no_value(document: dict[str, Any]) -> None:
    """Breaks if a payload that PostgreSQL can store is changed by the repair of another field."""
    assert json.loads(repaired(record(json.dumps(document).encode())).payload) == document
