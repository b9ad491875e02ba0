"""Terra's objects as records: keys, columns, retractions, and every schema."""

import copy
import json
from itertools import product
from typing import Any

import hypothesis
import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from app.catalogue import catalogue
from tests.support.cases import each
from tests.support.terra import METADATA, NAMES, columns, dead, event, item, of, parsed, record, recorded, series
from workers.actions import Record
from workers.aggregators.terra.mapping import TYPES

PERSON = {"sex": "female", "gender": "other", "date_of_birth": "1990-05-02"}


def at(**times: Any) -> dict[str, Any]:
    """An object with some of its metadata changed."""
    return {"metadata": METADATA | times}


# Keys


@each(
    ("activity", item(), "s1"),
    ("sleep", item(), "s1"),
    ("sleep", at(summary_id=None), "2026-03-14T00:00:00+01:00|2026-03-15T00:00:00+01:00"),
    ("sleep", at(summary_id="", end_time=None), "2026-03-14T00:00:00+01:00|"),
    ("daily", item(), "2026-03-14"),
    ("body", item(), "2026-03-14"),
    ("nutrition", at(start_time="2026-04-02T00:00:00.000000+14:00"), "2026-04-02"),
    ("menstruation", at(start_time="2026-04-02T23:59:59-11:00"), "2026-04-02"),
    ("athlete", PERSON, "t1"),
    ("planned_workout", {"planned_workout_id": "1", "provider_workout_id": "2"}, "1"),
    ("planned_workout", {"provider_workout_id": "2", "metadata": {"id": "3"}}, "2"),
    ("planned_workout", {"metadata": {"id": "3", "summary_id": "4"}}, "3"),
    ("planned_workout", {"planned_workout_id": "", "metadata": {"summary_id": "4"}}, "4"),
    ("planned_workout", {"summary_id": "5"}, "5"),
    ("hormone", {"timestamp": "2026-03-14T08:00:00+02:00"}, "2026-03-14T08:00:00+02:00"),
    ("health_observation", item(), "s1"),
)
def test_the_identity_of_an_object(name: Any, given: Any, expected: Any) -> None:
    """Breaks if two objects share a row, an update makes a second one, or a day is turned into UTC's."""
    assert record(name, given).id == expected


@each(
    ("activity", at(summary_id=None)),
    ("activity", at(summary_id="")),
    ("activity", {}),
    ("daily", at(start_time=None)),
    ("daily", at(start_time="0001-01-01T00:00:00Z")),
    ("sleep", {"metadata": {}}),
    ("planned_workout", {"planned_date": "2026-03-14"}),
    ("hormone", {"lh_mIU_per_ml": 1}),
    ("health_observation", at(summary_id=None)),
)
def test_an_object_without_an_identity_is_a_dead_letter(name: Any, given: Any) -> None:
    """Breaks if objects without an id overwrite each other under an empty one."""
    assert dead(event(name, given)).startswith(f"{name}: without ")


# Their columns


@each(*NAMES)
def test_columns_are_of_the_catalogue(name: Any) -> None:
    """Breaks if a column is named that the resource does not have, and its value gets lost."""
    known = {field.name for field in catalogue().of_terra(name).fields}
    assert set(TYPES[name].columns) <= known
    assert {one.resource for one in TYPES[name].series} <= set(catalogue())


def test_every_type_of_terras_is_mapped() -> None:
    """Breaks if a type that has a place in the catalogue is not read."""
    assert set(TYPES) == set(NAMES)
    assert {one.terra for one in catalogue().values() if one.terra} <= set(TYPES)


@each(*NAMES)
def test_the_payload_is_the_object_as_it_was_received(name: Any) -> None:
    """Breaks if a payload is written anew: another number, another order, another space."""
    body = b'{ "type":"%s","user":{"user_id":"t1","provider":"X"}, "%s": %s }'
    thing = b'{ "metadata" : {"summary_id":"s1","start_time":"2026-03-14T00:00:00Z"},'
    thing += b'"timestamp":"2026-03-14T00:00:00Z","planned_workout_id":"1", "more" : [1.50, 1e3 ,null,"\\u00e9"] }'
    content = (name.encode(), *((b"athlete", thing) if name == "athlete" else (b"data", b"[%s]" % thing)))
    assert of(Record, parsed(body % content))[0].payload == thing


def test_a_workout() -> None:
    """Breaks if a column of a workout is read from elsewhere, in another unit, or is not rounded where it must be."""
    given = recorded("generated/activity.full")
    given["metadata"] |= METADATA | {"timestamp_localization": 1, "name": "Ride"}
    given["heart_rate_data"]["summary"] |= {"avg_hr_bpm": 146.5, "max_hr_bpm": 171.6}
    given["distance_data"]["summary"] |= {"distance_meters": 15220.4, "steps": 12}
    elevation = {"gain_actual_meters": 550, "max_meters": 1200.5, "min_meters": 800}
    given["distance_data"]["summary"]["elevation"] = elevation
    given["movement_data"] |= {"avg_speed_meters_per_second": 8.46, "max_speed_meters_per_second": 11.9}
    given["power_data"] = {"avg_watts": 176, "max_watts": 395}
    given["calories_data"]["total_burned_calories"] = 402
    given["active_durations_data"]["activity_seconds"] = 1799.6
    assert columns("activity", given) == {
        "title": "Ride",
        "timezone_offset": 3600,
        "average_hr": 147,
        "max_hr": 172,
        "distance": 15220.4,
        "calendar_date": "2026-03-14",
        "time_start": "2026-03-13T23:00:00+00:00",
        "time_end": "2026-03-14T23:00:00+00:00",
        "calories": 402,
        "moving_time": 1800,
        "total_elevation_gain": 550,
        "elev_high": 1200.5,
        "elev_low": 800,
        "average_speed": 8.46,
        "max_speed": 11.9,
        "average_watts": 176,
        "max_watts": 395,
        "steps": 12,
    }


def test_a_day() -> None:
    """Breaks if the totals of a day are in wrong columns, or seconds of activity are read as minutes."""
    durations = {"low_intensity_seconds": 90, "moderate_intensity_seconds": 900, "vigorous_intensity_seconds": 0}
    calories = {"total_burned_calories": 1480, "net_activity_calories": 360, "BMR_calories": 1120}
    distance = {"steps": 6120, "distance_meters": 4702.5, "floors_climbed": 4}
    given = item(active_durations_data=durations, calories_data=calories, distance_data=distance)
    assert columns("daily", given) == {
        "calendar_date": "2026-03-14",
        "calories_total": 1480,
        "calories_active": 360,
        "steps": 6120,
        "distance": 4702.5,
        "low": 1.5,
        "medium": 15,
        "high": 0,
        "floors_climbed": 4,
        "timezone_offset": 3600,
    }


def test_a_night_belongs_to_the_day_on_which_one_wakes_up() -> None:
    """Breaks if Terra's nights and Junction's stand under different days, or their durations differ in meaning."""
    given = recorded("events/sleep")["data"][0]
    found = columns("sleep", given)
    assert (found["calendar_date"], found["bedtime_start"]) == ("2026-03-14", "2026-03-13T23:04:00+00:00")
    assert (found["duration"], found["total"]) == (28_080, 26_280)
    assert found["rem"] + found["light"] + found["deep"] == found["total"]
    assert (found["efficiency"], found["score"], found["recovery_readiness_score"]) == (93.6, 82, 78)


def test_a_body_has_the_latest_measurements() -> None:
    """Breaks if which of a day's measurements is shown depends on their order, or a null hides an older value."""
    first = {"measurement_time": "2026-03-14T07:00:00Z", "weight_kg": 71, "lean_mass_g": 57_650, "BMI": 23}
    second = {"measurement_time": "2026-03-14T21:00:00Z", "weight_kg": 72, "lean_mass_g": None}
    unknown = {"measurement_time": None, "weight_kg": 99}
    for measurements in ([first, second, unknown], [unknown, second, first, None]):
        found = columns("body", item(measurements_data={"measurements": measurements}))
        assert found == {
            "calendar_date": "2026-03-14",
            "weight": 72,
            "lean_body_mass_kilogram": 57.65,
            "body_mass_index": 23,
        }


def test_a_person() -> None:
    """Breaks if personal data does not reach the profile."""
    given = PERSON | {"date_of_birth": "1990-05-02T00:00:00Z"}
    assert columns("athlete", given) == {"birth_date": "1990-05-02", "gender": "other", "sex": "female"}


@each("planned_workout", "hormone", "health_observation", "menstruation", "nutrition")
def test_all_columns_can_be_filled(name: str) -> None:
    """Breaks if a column is read from a path that Terra's schema does not have."""
    assert set(columns(name, recorded(f"generated/{name}.full"))) == set(TYPES[name].columns)


@each("", "0001-01-01T00:00:00Z")
def test_a_placeholder_time_is_null(text: str) -> None:
    """Breaks if year one gets into a column."""
    given = {"planned_workout_id": "1", "created_at": text} if text else {"planned_workout_id": "1", "created_at": None}
    assert columns("planned_workout", given).get("created_at") is None


def test_an_offset_of_utc_is_not_stored_as_the_users() -> None:
    """Breaks if UTC is stored as the user's own offset."""
    assert "timezone_offset" not in columns("daily", at(timestamp_localization=0))


# Deletions


@each(
    ("activity", at(upload_type=4), True),
    ("activity", at(upload_type=4.0), True),
    ("activity", at(upload_type=3), False),
    ("activity", at(upload_type=None), False),
    ("daily", at(upload_type=4), False),
    ("sleep", at(upload_type=4), False),
    ("health_observation", item(observation_data={"status": 3}), True),
    ("health_observation", item(observation_data={"status": 2}), False),
    ("health_observation", item(observation_data=None), False),
)
def test_deletions(name: Any, given: Any, is_deleted: Any) -> None:
    """Breaks if a deletion is not seen, or a number of another enumeration deletes a night."""
    assert record(name, given).is_deleted == is_deleted


def test_a_deletion_has_no_samples() -> None:
    """Breaks if a deleted workout leaves its heart rate behind."""
    beats = {"detailed": {"hr_samples": [{"timestamp": "2026-03-14T08:00:00Z", "bpm": 70}]}}
    body = event("activity", at(upload_type=4) | {"heart_rate_data": beats, "data_enrichment": {"strain_score": 1}})
    assert len(parsed(body).actions) == 2
    assert len(parsed(event("activity", item() | {"heart_rate_data": beats})).actions) == 3


# Scores


def test_scores_are_samples_of_their_own() -> None:
    """Breaks if a score is not kept beside the object, where a null that comes later cannot reach it."""
    scores = {
        "sleep_score": 80,
        "readiness_score": None,
        "sleep_contributors": {"hrv": 0.5},
        "strain_traffic_light": "GREEN",
    }
    body = event("sleep", item(data_enrichment=scores))
    (score,) = series(body, "terra_scores", "sleep_score")
    assert (score.value, score.ts.isoformat()) == (80.0, "2026-03-13T23:00:00+00:00")
    assert json.loads(score.extra or b"") == {"type": "sleep", "summary_id": "s1"}
    assert series(body, "terra_scores", "readiness_score") == []
    for name in ("sleep_contributors", "strain_traffic_light"):
        (other,) = series(body, "terra_scores", name)
        assert (other.value, json.loads(other.extra or b"")["content"]) == (None, scores[name])


@each(None, {}, {"sleep_score": None})
def test_without_scores_nothing_is_said_of_them(scores: Any) -> None:
    """Breaks if scores that are null now erase those that are stored."""
    assert len(parsed(event("sleep", item(data_enrichment=scores))).actions) == 2


# Every schema


def absences(given: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of an object that may be null: all but the metadata of its key."""
    found: list[tuple[Any, ...]] = []
    for name, value in given.items() if isinstance(given, dict) else enumerate(given):
        if name not in ("metadata", "planned_workout_id", "timestamp") or path:
            found.append((*path, name))
        if isinstance(value, dict | list) and name != "metadata":
            found += absences(value, (*path, name))
    return found


@each(*product(NAMES, ("full", "bare")))
def test_everything_and_nothing_of_a_schema_is_read(name: str, kind: str) -> None:
    """Breaks if an object with every field of Terra's document, or with none that it may leave out, is refused."""
    given = recorded(f"generated/{name}.{kind}")
    found = record(name, given)
    assert json.loads(found.payload) == given
    assert found.resource == catalogue().of_terra(name).name


@hypothesis.given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.parametrize("name", NAMES)
def test_whatever_may_be_null_or_absent_is_tolerated(name: str, data: st.DataObject) -> None:
    """Breaks if any optional part of Terra's document, null or left out, kills a delivery; or an unknown name does."""
    thing = copy.deepcopy(recorded(f"generated/{name}.full"))
    for path in data.draw(st.lists(st.sampled_from(absences(thing)), max_size=20)):
        owner = thing
        for step in path[:-1]:
            owner = owner[step] if owner and (isinstance(owner, list) or step in owner) else None
        if owner is None or (isinstance(owner, dict) and path[-1] not in owner):
            continue
        if isinstance(owner, list) or data.draw(st.booleans()):
            owner[path[-1]] = None
        else:
            del owner[path[-1]]
    thing["something_new"] = {"a": [None]}
    assert record(name, thing).payload == msgspec.json.encode(thing)
