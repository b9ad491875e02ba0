"""Junction's events with scalars of other types than documented: read where that loses nothing, otherwise NULL."""

import json
from typing import Any

from tests.support import START, event, heartrate, workout
from tests.support.cases import each
from tests.support.junction import MOMENT, USER, dead, only, parsed, sample, series
from workers.actions import Notes, Record, Samples

# The envelope


@each(
    *((text, text) for text in ("01HW3FSNVCHC3B2QB5N0ZAAAVG", "member 1", "\u00e9")),
    *((17, "17"), (1.5, "1.5"), (True, "true"), ("a\u0000b", "a\ufffdb")),
    *((odd, None) for odd in ("", None, {"id": "member-1"}, ["member-1"])),
)
def test_a_client_user_id_is_any_scalar(given: Any, client_user_id: str | None) -> None:
    """Breaks if a customer's own id has to be a UUID or a text, or one of another type costs the data."""
    found = parsed(workout("u1") | {"client_user_id": given})
    assert (found.client_user_id, len(found.actions), found.refused) == (client_user_id, 1, ())


@each((None, ()), ("", ()), ("m", ()), *((odd, ("client_user_id",)) for odd in ({}, [], ["m"], {"id": "m"})))
def test_a_client_user_id_that_cannot_be_read_is_noted(given: Any, names: tuple[str, ...]) -> None:
    """Breaks if a client_user_id is lost without a word in the ledger, or an absent one is noted."""
    assert parsed(workout("u1") | {"client_user_id": given}).notes == Notes(names).sentences()


@each(
    (17, "17"),
    ("0AACA0C5-CCF3-5E68-9BFE-E22FA6A0D79A", USER),
    (USER, USER),
    ("Member-A", "Member-A"),
    ("0AACA0C5CCF35E689BFEE22FA6A0D79A", "0AACA0C5CCF35E689BFEE22FA6A0D79A"),
)
def test_a_user_id_is_one_user_in_any_spelling(given: Any, user_id: str) -> None:
    """Breaks if a UUID in capitals is another user, or an id that is no UUID is written in another way."""
    inside = workout("u1") | {"user_id": None}
    inside["data"]["user_id"] = given
    for body in (workout("u1") | {"user_id": given}, heartrate("u1", {0: 70}) | {"user_id": given}, inside):
        assert {parsed(body).user_id, only(body).user_id} == {user_id}


# Records


@each(None, "", "x" * 257, [1], {"canary": 1})
def test_a_record_without_an_id_is_a_dead_letter(identifier: Any) -> None:
    """Breaks if records without an id overwrite each other, or the dead letter's reason quotes a value."""
    reason = "workouts: id: expected an id of 1 to 256 characters"
    assert dead(workout("u1") | {"data": {"id": identifier, "title": "canary"}}) == reason
    assert dead(workout("u1") | {"data": {"title": "canary"}}) == reason


@each((17, "17"), (146.0, "146.0"), (True, "true"), ("\u00e9", "\u00e9"), (10**30, "1" + "0" * 30))
def test_an_id_is_any_scalar(given: Any, identifier: str) -> None:
    """Breaks if a numeric id costs the record."""
    assert only(event("daily.data.workouts.created", "u1", {"id": given})).id == identifier


@each(
    ({"average_hr": "146.5"}, {"average_hr": 147}),
    ({"average_hr": "-2.5"}, {"average_hr": -3}),
    ({"average_hr": True}, None),
    ({"average_hr": "canary"}, None),
    ({"average_hr": 1e300}, None),
    ({"distance": "12.5"}, {"distance": 12.5}),
    ({"distance": {"canary": 1}}, None),
    ({"title": 17}, {"title": "17"}),
    ({"title": 146.5}, {"title": "146.5"}),
    ({"title": ["canary"]}, None),
    ({"time_start": 1773469800}, {"time_start": MOMENT}),
    ({"time_start": "1773469800000"}, {"time_start": MOMENT}),
    ({"time_start": "20260314T073000+0100"}, {"time_start": MOMENT}),
    ({"time_start": "canary"}, None),
    ({"time_start": "2026-02-30T00:00:00Z"}, None),
    ({"time_start": "9999-12-31T23:59:59Z"}, None),
    ({"calendar_date": "14.3.2026"}, None),
    ({"calendar_date": "2026-03-14 canary"}, {"calendar_date": "2026-03-14"}),
    ({"calendar_date": 1773469800}, {"calendar_date": "2026-03-14"}),
    ({"updated_at": "2026-99-99"}, None),
)
def test_an_odd_scalar_is_read_or_stored_as_null(changes: Any, read: dict[str, Any] | None) -> None:
    """Breaks if one field costs its record, is stored as another value, or is NULL without a note."""
    found = parsed(workout("u1", **changes))
    (record,) = found.actions
    assert isinstance(record, Record)
    (name,) = changes
    columns = json.loads(record.columns or b"{}")
    assert {key: value for key, value in columns.items() if key == name} == (read or {})
    assert columns["time_end"] == "2026-03-14T07:15:00+00:00"
    note = f"stored as NULL, because they cannot be read: {name}"
    assert found.notes == (() if read else (note,))
    assert json.loads(record.payload)[name] == changes[name]


def test_several_odd_fields_are_in_one_note() -> None:
    """Breaks if only the first field that cannot be read is named."""
    (note,) = parsed(workout("u1", title=[1], distance="far", average_hr="12")).notes
    assert note.endswith((": title, distance", ": distance, title"))


@each(
    ("garmin", "garmin", "unknown"),
    ({"provider": 7, "type": 1}, "7", "1"),
    ({"provider": ["canary"], "slug": "garmin", "type": "watch"}, "garmin", "watch"),
    ({"provider": "garmin", "type": {"canary": 1}, "device_id": [1]}, "garmin", "unknown"),
    (["garmin"], "", "unknown"),
    (7, "7", "unknown"),
    (True, "true", "unknown"),
)
def test_a_source_of_another_shape_costs_no_data(source: Any, provider: str, kind: str) -> None:
    """Breaks if an odd source costs the record or its samples, or its readable parts are lost."""
    records, samples = workout("u1"), heartrate("u1", {0: 70})
    records["data"]["source"] = samples["data"]["source"] = source
    for body in (records, samples):
        assert (only(body).provider, only(body).source_type) == (provider, kind)


def test_a_number_beyond_double_precision_in_a_source_costs_nothing_else() -> None:
    """Breaks if a part of the source that nothing uses hides the provider."""
    body = heartrate("u1", {0: 70, 1: 71}, serial=12345)
    body["data"]["data"][0]["value"] = "canary"
    found = parsed(json.dumps(body).replace("12345", "1e999").encode())
    assert [one.provider for one in found.actions if isinstance(one, Samples)] == ["garmin"]


# Samples


@each(
    ("heartrate", {"value": "60.5"}, {"value": 60.5}),
    ("heartrate", {"timestamp": 1773469800}, {"ts": START}),
    ("heartrate", {"timestamp": 1773469800000}, {"ts": START}),
    ("heartrate", {"timestamp": "1773469800"}, {"ts": START}),
    ("heartrate", {"end": "2026-03-14T06:30:00Z"}, {"ts_end": START}),
    ("heartrate", {"unit": 7}, {"unit": "7"}),
    ("heartrate", {"timezone_offset": "3600"}, {"timezone_offset": 3600}),
    ("heartrate", {"timezone_offset": 1.5}, {"timezone_offset": 2}),
    ("note", {"value": 1}, {"extra": b'{"text":"1"}'}),
    ("blood_pressure", {"systolic": "120", "diastolic": 80}, {"extra": b'{"systolic":120.0,"diastolic":80.0}'}),
)
def test_a_sample_with_an_odd_scalar_is_read(resource: Any, changes: Any, expected: dict[str, Any]) -> None:
    """Breaks if a value that can be read without loss costs its sample."""
    found = parsed(series(resource, sample(**changes)))
    (samples,) = found.actions
    assert isinstance(samples, Samples)
    assert expected.items() <= samples.rows[0]._asdict().items()
    assert (found.refused, found.notes) == ((), ())


@each(
    ({"end": "canary"}, {"ts_end": None}),
    ({"end": 7}, {"ts_end": None}),
    ({"unit": ["canary"]}, {"unit": ""}),
    ({"timezone_offset": "canary"}, {"timezone_offset": None}),
    ({"timezone_offset": True}, {"timezone_offset": None}),
    ({"timezone_offset": 86_401}, {"timezone_offset": None}),
)
def test_a_part_without_which_a_sample_has_its_meaning_is_null(changes: Any, expected: dict[str, Any]) -> None:
    """Breaks if the end, unit or offset of a sample costs its value, or is NULL without a note."""
    found = parsed(series("heartrate", sample(**changes)))
    (samples,) = found.actions
    assert isinstance(samples, Samples)
    assert expected.items() <= samples.rows[0]._asdict().items()
    note = f"stored as NULL, because they cannot be read: {next(iter(changes))}"
    assert (found.refused, found.notes) == ((), (note,))


def test_a_numeric_discriminator_is_a_subtype() -> None:
    """Breaks if samples whose type is a number are lost or become one series."""
    found = parsed(series("cholesterol", sample(type=1), sample(type="2"), sample()))
    assert [one.subtype for one in found.actions if isinstance(one, Samples)] == ["1", "2", ""]


# Characters


@each(
    (b'{"event_type":"daily.data.sleep.created","user_id":"u1","data":{"id":"\x80"}}', "u1", "\ufffd"),
    (b'{"event_type":"daily.data.sleep.created","data":{"user_id":"\x80","id":"1"}}', "\ufffd", "1"),
    (b'{"event_type":"daily.data.sleep.created","user_id":"u1","data":{"id":"1","title":"\xed\xa0\x80"}}', "u1", "1"),
    (b'{"event_type":"daily.data.sleep.created","user_id":"u1","data":{"id":"1","title":"a\\u0000b"}}', "u1", "1"),
    (b'{"event_type":"daily.data.sleep.created","user_id":"u1","data":{"id":"1","title":"\\uD83Dx"}}', "u1", "1"),
)
def test_characters_that_postgresql_refuses_are_replaced_and_noted(body: bytes, user_id: str, identifier: str) -> None:
    """Breaks if a character in a title costs the record, or is replaced without a note."""
    found = parsed(body)
    (record,) = found.actions
    assert isinstance(record, Record)
    assert (found.user_id, record.id) == (user_id, identifier)
    assert found.notes == ("characters that PostgreSQL cannot store were replaced by U+FFFD",)
    assert b"\\u0000" not in record.payload
    assert "\ufffd" in json.dumps(json.loads(record.payload), ensure_ascii=False) or user_id == "\ufffd"
