"""Terra's objects with fields of other types than documented: read, NULL, or refused item by item."""

import json
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.cases import each
from tests.support.fuzzing import REPEATED, json_texts
from tests.support.terra import METADATA, NAMES, RECORDED, dead, event, item, of, parsed, recorded, series
from workers.actions import Record, Samples
from workers.aggregators.terra.shapes import Item, Owner

OWNER = Owner("t1", "garmin")
NOON = "2026-03-14T12:00:00+01:00"
BEATS = "heart_rate_data.detailed.hr_samples"
NOT_DOCUMENTED = "stored as NULL, because they cannot be read: "


def nested(path: str, value: Any) -> dict[str, Any]:
    """An object that has a value at a path; with metadata, unless the path changes them."""
    first, *others = path.split(".")
    for name in reversed(others):
        value = {name: value}
    return item(**{first: METADATA | value if first == "metadata" else value})


def columns_of(name: str, given: Any) -> dict[str, Any]:
    """The columns of the only record of an event, which refuses nothing."""
    found = parsed(event(name, given))
    (record,) = of(Record, found)
    assert found.refused == ()
    return dict(json.loads(record.columns or b""))


# Leaves


@each(
    ("daily", "distance_data.steps", "812", "steps", 812),
    ("daily", "distance_data.steps", "812.5", "steps", 813),
    ("daily", "distance_data.distance_meters", "12.5", "distance", 12.5),
    ("daily", "active_durations_data.low_intensity_seconds", "90", "low", 1.5),
    ("activity", "metadata.name", 17, "title", "17"),
    ("activity", "metadata.name", 146.5, "title", "146.5"),
    ("activity", "heart_rate_data.summary.avg_hr_bpm", "146.5", "average_hr", 147),
    ("activity", "metadata.end_time", 1773529200, "time_end", "2026-03-14T23:00:00+00:00"),
    ("activity", "metadata.end_time", "1773529200000", "time_end", "2026-03-14T23:00:00+00:00"),
    ("activity", "metadata.end_time", "20260315T000000+0100", "time_end", "2026-03-14T23:00:00+00:00"),
    ("menstruation", "menstruation_data.is_predicted_cycle", "true", "is_predicted", True),
    ("menstruation", "menstruation_data.is_predicted_cycle", 0, "is_predicted", False),
    ("menstruation", "menstruation_data.period_start_date", 1773489600, "period_start", "2026-03-14"),
    ("athlete", "date_of_birth", "1990-05-02T00:00:00", "birth_date", "1990-05-02"),
    ("athlete", "sex", 1, "sex", "1"),
    ("health_observation", "observation_data.severity", 3, "severity", 3),
)
def test_a_leaf_of_another_type_is_read(*case: Any) -> None:
    """Breaks if a value that can be read without loss is NULL, or costs its object."""
    name, path, given, column, expected = case
    assert columns_of(name, nested(path, given))[column] == expected
    assert parsed(event(name, nested(path, given))).notes == ()


@each(
    ("daily", "distance_data.steps", "many", "steps"),
    ("daily", "distance_data.steps", True, "steps"),
    ("daily", "distance_data.steps", ["canary"], "steps"),
    ("daily", "distance_data", "canary", "steps"),
    ("daily", "distance_data", ["canary"], "steps"),
    ("daily", "active_durations_data.low_intensity_seconds", {}, "low"),
    ("activity", "metadata.name", ["canary"], "title"),
    ("activity", "metadata.end_time", "canary", "time_end"),
    ("activity", "metadata.end_time", "2026-03-14T25:00:00", "time_end"),
    ("activity", "metadata.end_time", 20260314, "time_end"),
    ("menstruation", "menstruation_data.is_predicted_cycle", "perhaps", "is_predicted"),
    ("menstruation", "menstruation_data.is_predicted_cycle", 2, "is_predicted"),
    ("athlete", "date_of_birth", "none", "birth_date"),
    ("athlete", "date_of_birth", "1990-02-30", "birth_date"),
    ("athlete", "date_of_birth", "2.5.1990", "birth_date"),
    ("athlete", "date_of_birth", "", "birth_date"),
)
def test_a_leaf_that_cannot_be_read_is_null_and_noted(name: str, path: str, odd: Any, column: str) -> None:
    """Breaks if one field costs its object, or is NULL without a note."""
    found = parsed(event(name, nested(path, odd)))
    (record,) = of(Record, found)
    assert column not in json.loads(record.columns or b"")
    assert (found.refused, found.notes) == ((), (NOT_DOCUMENTED + path,))
    assert json.loads(record.payload) == nested(path, odd)


def test_a_number_beyond_bigint_is_null_and_noted() -> None:
    """Breaks if an integer that no column holds costs its object."""
    found = parsed(event("activity", nested("heart_rate_data.summary.avg_hr_bpm", 1e300)))
    (record,) = of(Record, found)
    assert "average_hr" not in json.loads(record.columns or b"")
    assert found.notes == (NOT_DOCUMENTED + "average_hr",)


@each(b"1e999", b"-1e999", b"1" + b"0" * 400, b"1" + b"0" * 5000)
def test_a_number_beyond_double_precision_costs_only_its_field(number: bytes) -> None:
    """Breaks if such a number costs its object, its neighbours, or becomes the word `inf`."""
    beats = [{"timestamp": NOON, "bpm": 70}]
    day = item(distance_data={"steps": "here"}, heart_rate_data={"detailed": {"hr_samples": beats}})
    walk = nested("metadata.name", "here")
    for name, odd, note in (("daily", day, "distance_data.steps"), ("activity", walk, "metadata.name")):
        found = parsed(msgspec.json.encode(event(name, odd)).replace(b'"here"', number))
        assert len(of(Record, found)) == 1
        assert found.notes == (NOT_DOCUMENTED + note,)
        assert [[row.value for row in one.rows] for one in of(Samples, found)] == ([[70]] if name == "daily" else [])


def test_a_score_beyond_double_precision_costs_only_itself() -> None:
    """Breaks if one of Terra's own scores costs its object or another score, or is lost without a note."""
    scores = {"strain_index": "here", "stress_level": 3, "contributors": {"sleep": "here"}}
    body = msgspec.json.encode(event("daily", item(data_enrichment=scores))).replace(b'"here"', b"1e999", 1)
    found = parsed(body)
    assert {one.subtype: one.rows[0].value for one in of(Samples, found)} == {"stress_level": 3, "contributors": None}
    assert found.notes == (NOT_DOCUMENTED + "data_enrichment",)


@each("canary", [1], 7)
def test_scores_that_are_no_object(scores: Any) -> None:
    """Breaks if an odd form of the scores costs the object."""
    found = parsed(event("daily", item(data_enrichment=scores)))
    assert (len(of(Record, found)), of(Samples, found), found.refused) == (1, [], ())
    assert found.notes == (NOT_DOCUMENTED + "data_enrichment",)


# Keys


@each(
    ("activity", item(metadata=METADATA | {"summary_id": 17}), "17"),
    ("activity", item(metadata=METADATA | {"summary_id": 1.5}), "1.5"),
    ("sleep", item(metadata=METADATA | {"summary_id": ["canary"]}), f"{METADATA['start_time']}|{METADATA['end_time']}"),
    ("daily", item(metadata=METADATA | {"start_time": 1773489600}), "2026-03-14"),
    ("daily", item(metadata=METADATA | {"start_time": "1773489600000"}), "2026-03-14"),
    ("daily", item(metadata=METADATA | {"end_time": ["canary"]}), "2026-03-14"),
    ("daily", item(metadata=METADATA | {"timestamp_localization": "canary", "upload_type": {}}), "2026-03-14"),
    ("planned_workout", {"planned_workout_id": ["canary"], "metadata": {"id": 3}}, "3"),
    ("hormone", {"timestamp": 1773489600}, "2026-03-14T12:00:00+00:00"),
    ("athlete", {"date_of_birth": ["canary"]}, "t1"),
)
def test_the_key_of_an_object_with_odd_fields(name: str, given: Any, key: str) -> None:
    """Breaks if an object is refused although it has a key, or gets another key."""
    found = parsed(event(name, given))
    assert [one.id for one in of(Record, found)] == [key]
    assert found.refused == ()


@each(
    ("activity", item(metadata=METADATA | {"summary_id": ["canary"]}), "metadata.summary_id"),
    ("activity", item(metadata=METADATA | {"summary_id": "s" * 257}), "metadata.summary_id"),
    ("activity", item(metadata="canary"), "metadata.summary_id"),
    ("daily", item(metadata=METADATA | {"start_time": "canary"}), "metadata.start_time"),
    ("daily", item(metadata=METADATA | {"start_time": "2026-02-30T00:00:00Z"}), "metadata.start_time"),
    ("daily", item(metadata=METADATA | {"start_time": "2026-03-14 canary"}), "metadata.start_time"),
    ("daily", item(metadata=METADATA | {"start_time": 20260314}), "metadata.start_time"),
    ("hormone", {"timestamp": "soon"}, "timestamp"),
)
def test_an_object_whose_key_cannot_be_read_is_refused_whole(name: str, given: Any, field: str) -> None:
    """Breaks if objects without a key overwrite each other, or the reason quotes a value."""
    reason = f"{name}: without {field} the object has no key"
    assert dead(event(name, given)) == reason
    good = recorded(f"generated/{name}.full")
    found = parsed(event(name, good, given))
    assert [(one.reason, one.items) for one in found.refused] == [(reason, 1)]
    assert len(of(Record, found)) == 1


# Items of arrays


@each(
    ({"timestamp": 1773486000, "bpm": 70}, 70),
    ({"timestamp": "1773486000000", "bpm": "70"}, 70),
    ({"timestamp": NOON, "bpm": "70.5"}, 70.5),
    ({"timestamp": "20260314T120000+0100", "bpm": "70"}, 70),
)
def test_an_item_of_other_types_is_read(odd: Any, value: float) -> None:
    """Breaks if a value whose time or number has another type is refused."""
    (sample,) = series(event("daily", nested(BEATS, [odd])), "heartrate")
    assert (sample.ts, sample.value) == (datetime(2026, 3, 14, 11, tzinfo=UTC), value)


@each(
    ({"timestamp": NOON, "bpm": "canary"}, "bpm: expected a number"),
    ({"timestamp": NOON, "bpm": True}, "bpm: expected a number"),
    ({"timestamp": NOON, "bpm": [70]}, "bpm: expected a number"),
    ({"timestamp": "canary", "bpm": 70}, "timestamp: expected an ISO 8601 date and time"),
    ({"timestamp": ["canary"], "bpm": 70}, "timestamp: expected an ISO 8601 date and time"),
    ({"timestamp": 20260314, "bpm": 70}, "timestamp: expected an ISO 8601 date and time"),
    ({"timestamp": "9999-12-31T23:59:59Z", "bpm": 70}, "timestamp: expected a time between the years 1 and 9999"),
    ("canary", "expected an object whose names are unique"),
    (70, "expected an object whose names are unique"),
    ([{"timestamp": NOON, "bpm": 70}], "expected an object whose names are unique"),
)
def test_an_item_that_cannot_be_read_is_refused_alone(bad: Any, reason: str) -> None:
    """Breaks if one item costs its object, the other items, or the value is in the reason."""
    good = [{"timestamp": f"2026-03-14T08:{minute:02}:00+01:00", "bpm": 60 + minute} for minute in range(50)]
    given = nested(BEATS, [*good[:20], bad, *good[20:]])
    found = parsed(event("daily", given))
    assert [one.value for one in of(Samples, found)[0].rows] == [60 + minute for minute in range(50)]
    (refused,) = found.refused
    assert (refused.reason, refused.items, found.notes) == (f"daily: {BEATS}: {reason}", 1, ())
    assert msgspec.json.decode(refused.event)["data"] == [given]
    again = parsed(refused.event)
    assert again.refused == found.refused
    assert of(Samples, again) == of(Samples, found)


def test_a_null_or_unknown_time_beside_a_bad_item_is_still_left_out() -> None:
    """Breaks if values without a time, which are counted, are refused as soon as another item is odd."""
    beats = [{"timestamp": text, "bpm": 70} for text in (None, "", "0001-01-01T00:00:00Z", "1800-01-01T00:00:00Z")]
    for more, count in (([], 0), ([{"timestamp": NOON, "bpm": "fast"}], 1)):
        found = parsed(event("daily", nested(BEATS, [*beats, None, {"timestamp": NOON, "bpm": 71}, *more])))
        assert [one.value for one in of(Samples, found)[0].rows] == [71]
        assert (found.samples_without_timestamp, len(found.refused)) == (4, count)


def test_a_local_time_beside_a_bad_item_still_floats() -> None:
    """Breaks if a time without an offset becomes one in UTC as soon as another item is odd."""
    for text in ("2026-03-14T12:00:00", "20260314T120000"):
        beats = [{"timestamp": text, "bpm": 71}, {"timestamp": NOON, "bpm": "fast"}]
        (sample,) = series(event("daily", nested(BEATS, beats)), "heartrate")
        assert (sample.ts.hour, sample.timezone_offset, sample.extra) == (12, None, b'{"is_floating":true}')


@each("canary", 7, True, {"timestamp": NOON, "bpm": 70})
def test_an_array_that_is_none_is_refused(odd: Any) -> None:
    """Breaks if an array of another form costs its object or other arrays, or cannot be replayed after an update."""
    steps = {"detailed": {"step_samples": [{"timestamp": NOON, "steps": 3}]}}
    found = parsed(event("daily", nested(BEATS, odd) | {"distance_data": steps}))
    assert [one.resource for one in of(Samples, found)] == ["steps"]
    assert (len(of(Record, found)), found.notes) == (1, ())
    assert [(one.reason, one.items) for one in found.refused] == [(f"daily: {BEATS}: expected an array", 1)]


def test_items_of_several_arrays_are_one_refusal() -> None:
    """Breaks if one object becomes several dead letters, each with all of its values."""
    beats = [{"timestamp": NOON, "bpm": bpm} for bpm in ("x", 70, "y")]
    stress = [{"timestamp": NOON, "level": level} for level in ("z", 20)]
    given = nested(BEATS, beats) | {"stress_data": {"samples": stress}}
    found = parsed(event("daily", given))
    (refused,) = found.refused
    assert (refused.items, [row.value for one in of(Samples, found) for row in one.rows]) == (3, [70, 20])


def test_a_repeated_name_in_an_array_costs_only_its_item() -> None:
    """Breaks if a repeated name costs the object, or one of two values is silently dropped."""
    beats = [{"timestamp": NOON, "bpm": 70}, "here", {"timestamp": "2026-03-14T12:01:00Z", "bpm": 72}]
    next_day = item(metadata=METADATA | {"start_time": "2026-03-15T00:00:00Z"})
    body = msgspec.json.encode(event("daily", nested(BEATS, beats), next_day))
    found = parsed(body.replace(b'"here"', b'{"timestamp":"2026-03-14T12:00:30Z","bpm":1,"bpm":2}'))
    assert [one.value for one in of(Samples, found)[0].rows] == [70, 72]
    assert len(of(Record, found)) == 2
    assert [one.reason for one in found.refused] == [f"daily: {BEATS}: expected an object whose names are unique"]


def test_a_repeated_name_outside_of_arrays_costs_its_object() -> None:
    """Breaks if one of two values of an object is silently dropped, or the object costs others."""
    next_day = item(metadata=METADATA | {"start_time": "2026-03-15T00:00:00Z"})
    body = msgspec.json.encode(event("daily", next_day, item(distance_data={"steps": "here"})))
    found = parsed(body.replace(b'"here"', b'1,"steps":2'))
    assert [one.id for one in of(Record, found)] == ["2026-03-15"]
    assert [one.reason for one in found.refused] == ["daily: an object repeats a name"]


def test_a_running_total_with_one_bad_item() -> None:
    """Breaks if a total that cannot be read is counted as zero, as a reset, or twice."""
    totals = [100, 150, "many", 230, None, 300]
    given = [{"timestamp": f"2026-03-14T08:{n:02}:00+01:00", "steps": total} for n, total in enumerate(totals)]
    body = event("daily", item(distance_data={"detailed": {"step_samples": given}}))
    found = series(body, "steps")
    assert [one.value for one in found] == [100, 50, 80, 70]
    assert all(one.ts_end == after.ts for one, after in pairwise(found))
    assert [one.items for one in parsed(body).refused] == [1]


def test_a_pair_with_one_bad_half() -> None:
    """Breaks if half of a blood pressure is stored, or costs the others."""
    given = [{"timestamp": NOON, "systolic_bp": 118, "diastolic_bp": low} for low in ("76", "low")]
    body = event("body", item(blood_pressure_data={"blood_pressure_samples": given}))
    (sample,) = series(body, "blood_pressure")
    assert sample.extra == b'{"systolic":118.0,"diastolic":76.0}'
    assert [one.items for one in parsed(body).refused] == [1]


# Good objects


@each(*sorted((RECORDED / "generated").glob("*.json")), *sorted((RECORDED / "events").glob("*.json")))
def test_a_good_object_means_the_same_in_the_lenient_way(path: Any) -> None:
    """Breaks if one odd field of an object changes the key, columns or samples that its other fields have."""
    given, name = json.loads(path.read_text(encoding="utf-8")), path.stem.partition(".")[0]
    for one in given.get("data", [given.get("athlete", given)]) if path.parent.name == "events" else [given]:
        if name not in NAMES or one is None:
            continue
        strict, lenient = (Item(name, msgspec.json.encode(one), is_lenient=flag) for flag in (False, True))
        key = strict.key(OWNER)
        assert (lenient.key(OWNER), lenient.columns()) == (key, strict.columns())
        assert list(lenient.samples()) == list(strict.samples())
        assert list(lenient.scores(key)) == list(strict.scores(key))
        assert (lenient.refused, lenient.unreadable, lenient.is_retracted) == ([], set(), strict.is_retracted)


# Any input

TIMES = [
    b'"0001-01-01"',
    b'"2026-W11-6T10:00:00"',
    b'"20260314T100000"',
    b'"9999-12-31T23:59:59"',
    b'"2026-03-14"',
    b"1773489600",
]
PARTS = json_texts(*TIMES)
ARRAYS = [
    ("daily", BEATS, "bpm"),
    ("daily", "stress_data.samples", "level"),
    ("body", "measurements_data.measurements", "weight_kg"),
    ("sleep", "sleep_durations_data.hypnogram_samples", "level"),
    ("daily", "distance_data.detailed.step_samples", "steps"),
]


@given(array=st.sampled_from(ARRAYS), at=st.integers(0, 4), field=st.sampled_from([None, "time", "value"]), part=PARTS)
@example(array=ARRAYS[0], at=2, field=None, part=b'{"timestamp":null,"timestamp":1}')
def test_any_item_leaves_its_neighbours(array: tuple[str, str, str], at: int, field: str | None, part: bytes) -> None:
    """Breaks if some value in some place of one item costs another item, or raises an unexpected error."""
    name, path, value = array
    time = "measurement_time" if name == "body" else "timestamp"
    items: list[Any] = [{time: f"2026-03-14T08:0{n}:00+01:00", value: n + 1} for n in range(5)]
    items[at] = "here" if field is None else items[at] | {time if field == "time" else value: "here"}
    found = parsed(msgspec.json.encode(event(name, nested(path, items))).replace(b'"here"', part))
    (record,) = of(Record, found)
    times = {
        (row.ts_end if path.endswith("step_samples") else row.ts) for one in of(Samples, found) for row in one.rows
    }
    assert {f"{one:%H:%M}" for one in times if one} >= {f"07:0{n}" for n in range(5) if n != at}
    assert all(one.first <= one.last for one in record.sample_ranges)
    for refused in found.refused:
        assert parsed(refused.event).refused[0].reason == refused.reason


@given(name=st.sampled_from([name for name in NAMES if name != "athlete"]), data=st.data(), part=PARTS)
def test_any_field_leaves_its_object(name: str, data: st.DataObject, part: bytes) -> None:
    """Breaks if some value of some field costs its object, another object, or raises an unexpected error."""
    given_object = recorded(f"generated/{name}.full")
    other = recorded(f"generated/{name}.full")
    owner, path = given_object, []
    while True:
        key = data.draw(st.sampled_from(sorted(owner)))
        path.append(key)
        if not isinstance(owner[key], dict) or not owner[key] or data.draw(st.booleans()):
            break
        owner = owner[key]
    owner[key] = "here"
    body = msgspec.json.encode(event(name, given_object)).replace(b'"here"', part)
    whole = msgspec.json.encode(event(name, given_object, other)).replace(b'"here"', part)
    assert of(Record, parsed(whole))
    is_of_key = path[0] in ("metadata", "timestamp") or "id" in path[-1]
    if not is_of_key and part != REPEATED:
        assert len(of(Record, parsed(body))) == 1
