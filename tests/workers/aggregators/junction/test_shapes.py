"""The records, samples and sources of Junction, in every shape that was ever documented."""

import copy
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from app.catalogue import Resource, catalogue
from app.errors import Unprocessable
from tests.support import START, event, heartrate, workout
from tests.support.cases import each
from tests.support.junction import MOMENT, RECORDED, dead, only, parsed, sample, series, survives
from workers.actions import Sample, Samples
from workers.aggregators.junction.samples import SampleReader, plain_items
from workers.aggregators.junction.shapes import Source


@each(
    ({"provider": "garmin", "type": "watch"}, "garmin", "watch"),
    ({"provider": "garmin"}, "garmin", "unknown"),
    ({"provider": "garmin", "type": None}, "garmin", "unknown"),
    ({"provider": "garmin", "type": ""}, "garmin", "unknown"),
    ({"provider": "garmin", "slug": "", "name": "", "logo": ""}, "garmin", "unknown"),
    ({"provider": "garmin", "slug": "other"}, "garmin", "unknown"),
    ({"provider": "", "slug": "garmin"}, "garmin", "unknown"),
    ({"name": "Garmin", "slug": "garmin", "logo": "x"}, "garmin", "unknown"),
    ({"source_name": "Garmin", "source_slug": "garmin"}, "garmin", "unknown"),
    ({"provider": "GARMIN"}, "garmin", "unknown"),
    ({}, "", "unknown"),
    (None, "", "unknown"),
)
def test_sources_of_all_eras(source: Any, provider: Any, kind: Any) -> None:
    """Breaks if one provider gets two names, or an empty string counts as one."""
    records, samples = workout("u1"), heartrate("u1", {0: 70})
    records["data"]["source"] = samples["data"]["source"] = source
    assert (only(records).provider, only(records).source_type) == (provider, kind)
    assert (only(samples).provider, only(samples).source_type) == (provider, kind)


def test_summaries_that_repeat_the_source_do_without_it() -> None:
    """Breaks if a sleep cycle without `source` has no provider."""
    body = copy.deepcopy(RECORDED["today_sleep_cycle"])
    del body["data"]["source"]
    assert (only(body).provider, only(body).source_type) == ("oura", "ring")


# Records


def test_unknown_fields_are_kept_and_null_ones_allowed() -> None:
    """Breaks if a field that Junction adds tomorrow is refused, or today's are all required."""
    fields = {field.name: None for field in catalogue()["workouts"].fields}
    body = workout("u1", **fields, tomorrow={"a": [1]})
    assert json.loads(only(body).payload)["tomorrow"] == {"a": [1]}


def test_a_record_needs_nothing_but_an_id() -> None:
    """Breaks if an old object that lacks today's fields is refused."""
    assert only(event("daily.data.sleep.created", "u1", {"id": "s1"})).id == "s1"


# Samples


@each(
    ("cholesterol", [{"type": "a"}, {"type": "b"}], {}, {"a", "b"}),
    ("ige", [{"type": "a"}, {"type": "b"}, {}], {}, {"a", "b", ""}),
    ("igg", [{"type": "a"}, {"type": None}], {}, {"a", ""}),
    ("heart_rate_alert", [{"type": "low"}, {"type": "high"}], {}, {"low", "high"}),
    ("insulin_injection", [{"type": "rapid_acting"}, {"type": "long_acting"}], {}, {"rapid_acting", "long_acting"}),
    ("electrocardiogram_voltage", [{"type": "lead_1"}, {"type": "lead_2"}], {}, {"lead_1", "lead_2"}),
    (
        "workout_duration",
        [{"intensity": "low"}, {"intensity": "high"}, {"intensity": None}],
        {},
        {"low", "high", ""},
    ),
    ("workout_distance", [{}], {"workout_id": "w", "sport": "running"}, {"w/running"}),
    ("workout_distance", [{}], {"workout_id": "w"}, {"w/"}),
    ("workout_swimming_stroke", [{}], {"sport": "swimming", "workout_id": None}, {"/swimming"}),
    ("distance", [{}], {"sport": "wheelchair_push"}, {"wheelchair_push"}),
    ("distance", [{"type": "a"}], {}, {""}),
    ("stand_hour", [{"type": "stood"}], {}, {""}),
    ("sleep_breathing_disturbance", [{"type": "elevated"}], {}, {""}),
    ("glucose", [{"type": "automatic"}], {}, {""}),
    ("heartrate", [{"type": "a"}], {"workout_id": "w", "sport": "x", "device_id": "d", "app_id": "a"}, {""}),
)
def test_subtypes(resource: Any, points: Any, source: Any, subtypes: Any) -> None:
    """Breaks if facts that coincide overwrite each other, or a mutable attribute doubles a sample."""
    found = parsed(series(resource, *(sample(**point) for point in points), **source))
    assert {action.subtype for action in found.actions} == subtypes  # type: ignore[union-attr]
    assert sum(len(action.rows) for action in found.actions) == len(points)  # type: ignore[union-attr]
    assert found.duplicate_samples == 0


def test_two_samples_with_one_key_are_counted_and_the_last_wins() -> None:
    """Breaks if one statement writes a row twice, which PostgreSQL refuses, or a gap in the key stays unnoticed."""
    found = parsed(series("heartrate", sample(value=1), sample(value=2), sample(value=2), sample(value=3)))
    (samples,) = found.actions
    assert isinstance(samples, Samples)
    assert ([row.value for row in samples.rows], found.duplicate_samples) == ([3.0], 2)


def test_one_instant_in_two_offsets_is_one_sample() -> None:
    """Breaks if the key is wall time rather than the instant."""
    summer = sample(timestamp="2026-10-25T02:30:00+02:00")
    for other, count in (("2026-10-25T00:30:00Z", 1), ("2026-10-25T02:30:00+01:00", 2)):
        assert len(only(series("heartrate", sample(timestamp=other), summer)).rows) == count


@each(
    ({"timestamp": MOMENT}, START, None),
    ({"timestamp": None, "start": MOMENT, "end": "2026-03-14T06:45:00Z"}, START, START + timedelta(minutes=15)),
    ({"timestamp": "", "start": MOMENT}, START, None),
    ({"timestamp": MOMENT, "start": "2020-01-01T00:00:00Z", "end": None}, START, None),
    ({"timestamp": "2026-03-14T06:30:00"}, START, None),
    ({"timestamp": "2026-03-14T06:30:00Z"}, START, None),
    ({"timestamp": "2026-03-14T07:30:00+01:00"}, START, None),
    ({"timestamp": "2026-03-14T06:30:00.001953+00:00"}, START + timedelta(microseconds=1953), None),
    ({"timestamp": "2026-03-14"}, datetime(2026, 3, 14, tzinfo=UTC), None),
)
def test_times(times: Any, ts: Any, end: Any) -> None:
    """Breaks if an interval without a timestamp is lost, a naive time is refused, or a fraction of a second cut off."""
    (row,) = only(series("steps", sample(**times))).rows
    assert (row.ts, row.ts_end) == (ts, end)


def test_extra_holds_what_has_no_column() -> None:
    """Breaks if tomorrow's fields of a sample are lost, or the value of a column is duplicated there."""
    point = sample(
        id=17, start=MOMENT, end=MOMENT, timezone_offset=3600, type=None, sensor_location="wrist", tags=["a"]
    )
    (row,) = only(series("body_temperature", point)).rows
    assert row == Sample(START, START, 1.0, "x", 3600, b'{"sensor_location":"wrist","tags":["a"]}')
    assert only(series("heartrate", sample())).rows[0].extra is None


def test_what_is_part_of_the_key_is_not_extra() -> None:
    """Breaks if a discriminator is stored once more with each sample; an unrelated `type` is lost."""
    assert only(series("ige", sample(type="a"))).rows[0].extra is None
    assert only(series("workout_duration", sample(intensity="low"))).rows[0].extra is None
    assert only(series("stand_hour", sample(type="idle"))).rows[0].extra == b'{"type":"idle"}'


def test_devices_are_attributes() -> None:
    """Breaks if the app or the device, which come and go, are lost or become part of the key."""
    (row,) = only(series("heartrate", sample(), app_id="com.apple", device_id="d1")).rows
    assert json.loads(row.extra) == {"app_id": "com.apple", "device_id": "d1"}
    assert only(series("heartrate", sample(), app_id=None, device_id="")).rows[0].extra is None


@each(("freestyle_libre", True), ("abbott_libreview", True), ("Freestyle_Libre", True), ("dexcom", False))
def test_floating_time_is_kept_as_it_came_and_marked(provider: str, floating: Any) -> None:
    """Breaks if local time that is marked as UTC looks like real UTC, or is converted."""
    for moment in (MOMENT, "2026-03-14T06:30:00"):
        (row,) = only(series("glucose", sample(timestamp=moment), provider=provider)).rows
        assert row.ts == START
        assert (row.extra == b'{"is_floating":true}') is floating


def test_blood_pressure_has_two_numbers() -> None:
    """Breaks if systolic and diastolic are lost, or their group."""
    (row, *_) = only(RECORDED["today_blood_pressure"]).rows
    assert row.value is None
    assert json.loads(row.extra) == {"systolic": 122.0, "diastolic": 78.0, "grouping": ["cuff", None, None, None]}


def test_a_note_is_text() -> None:
    """Breaks if a note's text, which is in place of a number, is rejected or lost."""
    (row,) = only(RECORDED["today_note"]).rows
    assert row.value is None
    assert json.loads(row.extra) == {"text": "Felt shaky before lunch", "tags": ["food"], "is_floating": True}


@each(
    ("heartrate", {"value": "canary"}, "heartrate: value: expected a number"),
    ("heartrate", {"value": None}, "heartrate: value: expected a number"),
    ("heartrate", {"value": True}, "heartrate: value: expected a number"),
    ("heartrate", {"value": [1]}, "heartrate: value: expected a number"),
    ("heartrate", {"value": "1e999"}, "heartrate: value: expected a number in the range of double precision"),
    ("heartrate", {"timestamp": None}, "heartrate: a sample has neither timestamp nor start"),
    ("heartrate", {"timestamp": "canary"}, "heartrate: timestamp: expected an ISO 8601 date and time"),
    ("heartrate", {"timestamp": 20260314}, "heartrate: timestamp: expected an ISO 8601 date and time"),
    ("heartrate", {"timestamp": ["canary"]}, "heartrate: timestamp: expected an ISO 8601 date and time"),
    (
        "heartrate",
        {"timestamp": "0001-01-01T00:00:00Z"},
        "heartrate: timestamp: expected a time between the years 1 and 9999",
    ),
    ("heartrate", {"timestamp": "2199-01-01"}, "heartrate: timestamp: more than two days after the receipt"),
    ("cholesterol", {"type": ["canary"]}, "cholesterol: type: expected text"),
    ("blood_pressure", {"systolic": 120}, "blood_pressure: diastolic: expected a number"),
    ("note", {"value": ["canary"]}, "note: value: expected text"),
)
def test_a_sample_that_does_not_fit_says_why(resource: Any, changes: Any, reason: Any) -> None:
    """Breaks if a wrong type reaches the database, or the dead letter's reason quotes a value."""
    assert dead(series(resource, sample(**changes))) == reason


@each(None, [], "canary", 1, {"data": {}}, {"data": "canary"})
def test_data_that_is_no_group_is_a_dead_letter(data: Any) -> None:
    """Breaks if a timeseries event of another form raises something else, or is silently empty."""
    assert dead(event("daily.data.heartrate.created", "u1", data)).startswith("heartrate: data: Expected a")


def test_a_group_of_items_that_are_no_samples_is_a_dead_letter() -> None:
    """Breaks if a delivery of which nothing can be used counts as applied."""
    one, two = (dead(event("daily.data.heartrate.created", "u1", {"data": data})) for data in (["canary"], [None, 1]))
    assert one == "heartrate: Expected an object, got text"
    assert two == "heartrate: all refused, first: heartrate: Expected an object, got null"


@each({"data": []}, {"data": None}, {})
def test_a_group_without_samples_does_nothing(data: Any) -> None:
    """Breaks if an empty group is a dead letter, or counted as left out."""
    found = parsed(event("daily.data.heartrate.created", "u1", data))
    assert (found.actions, found.ignored, found.refused) == ((), None, ())


# Any input


@each("1e400", "-1e400", "1" + "0" * 6000, "7" * 400, "NaN", "9223372036854775808", "1e-400")
def test_no_number_raises(number: str) -> None:
    """Breaks if a number that no float holds raises an unexpected error."""
    for body in (
        heartrate("u1", {0: 70}),
        series("heartrate", sample(more=70)),
        series("heartrate", sample(timezone_offset=70)),
        workout("u1", distance=70),
    ):
        survives(json.dumps(body).replace("70", number).encode())


@each("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-03-14T24:00:00Z")
def test_no_time_raises(moment: str) -> None:
    """Breaks if a time at the edge of the calendar raises an unexpected error."""
    survives(msgspec.json.encode(series("steps", sample(timestamp=moment, end=moment))))
    survives(msgspec.json.encode(workout("u1", updated_at=moment)))
    window = {"start_date": moment, "end_date": MOMENT}
    survives(msgspec.json.encode(event("historical.data.sleep.created", "u1", window)))


# Plain samples, which are decoded in another way

LATEST = START + timedelta(days=2)
PLAIN = [resource for resource in catalogue().values() if resource.kind == "timeseries" and not resource.fields]
ODD: dict[str, list[Any]] = {
    "timestamp": [MOMENT, "2026-03-14T06:30:00.1234567Z", "2026-03-14", "20260314T063000Z", "", None, 5, "never"],
    "start": [MOMENT, None, ""],
    "end": [MOMENT, None, "", 3],
    "value": [1, 1.5, -0.0, 2**70, True, None, "1", [1]],
    "unit": ["x", "", None, 7],
    "timezone_offset": [0, -3600, 86_401, 3600.0, True, None, "0"],
    "id": [1, "1", None],
    "type": ["a", "", None, 4],
    "intensity": ["low", None, 1],
    "grouping": [{"a": 1}, None],
}
items = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in ODD.items()}).map(
    lambda item: {"timestamp": MOMENT, "value": 1} | item
)


@given(st.sampled_from(PLAIN), st.lists(items, max_size=3), st.sampled_from(["watch", "a/b", None]))
def test_plain_samples_mean_what_any_others_do(
    resource: Resource, data: list[dict[str, Any]], kind: str | None
) -> None:
    """Breaks if the quick way to read samples stores another value, moment or series, or refuses less."""
    decoder = plain_items(resource)
    assert decoder is not None
    try:
        quick = decoder.decode(msgspec.json.encode(data))
    except msgspec.ValidationError:
        return  # which is read in the other way then

    def meant(read: Callable[[SampleReader, Any], Any], found: list[Any]) -> Any:
        reader = SampleReader(resource, Source(provider="garmin", type=kind, device_id="d"), LATEST)
        try:
            return reader.content([read(reader, one) for one in found], "u1", START, [])
        except Unprocessable as reason:
            return str(reason)

    assert meant(SampleReader.plain, quick) == meant(SampleReader.mapping, data)


def test_samples_as_they_come_every_day_are_plain() -> None:
    """Breaks if the quick way is never taken."""
    for resource in PLAIN:
        data = [sample(timezone_offset=0, type=None), {"start": MOMENT, "end": MOMENT, "value": 2.5, "unit": ""}]
        decoder = plain_items(resource)
        assert decoder is not None
        assert len(decoder.decode(msgspec.json.encode(data))) == 2, resource.name
