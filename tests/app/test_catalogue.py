"""The catalogue: resources, event names and validation."""

from collections import Counter

import pytest

from app.catalogue import catalogue, parse
from tests.support.cases import Failures

SUMMARIES = ["activity", "sleep", "sleep_cycle", "workouts", "body", "profile", "meal", "menstrual_cycle"]
SUMMARIES += ["electrocardiogram"]
KEYS = {
    "cholesterol": ("type",),
    "ige": ("type",),
    "igg": ("type",),
    "electrocardiogram_voltage": ("type",),
    "heart_rate_alert": ("type",),
    "insulin_injection": ("type",),
    "distance": ("source.sport",),
    "workout_duration": ("intensity",),
    "workout_distance": ("source.workout_id", "source.sport"),
    "workout_swimming_stroke": ("source.workout_id", "source.sport"),
}
PATH = 'path = "/v2/summary/x/{user_id}"'


def test_it_holds_sixty_resources_of_junction_and_three_legacy_ones() -> None:
    """Breaks if a resource is lost, added or changes its kind."""
    junctions = [resource for resource in catalogue().values() if resource.is_junctions]
    found = Counter((resource.kind, resource.legacy) for resource in junctions if resource.name != "device")
    assert found == {
        ("summary", False): 9,
        ("stream", False): 1,
        ("timeseries", False): 50,
        ("stream", True): 1,
        ("timeseries", True): 1,
    }
    assert len(junctions) == 63
    assert {name for name, resource in catalogue().items() if resource.legacy} == {"sleep_stream", "hypnogram"}
    assert [resource.name for resource in catalogue().of_kind("device")] == ["device"]
    assert [resource.name for resource in catalogue().of_kind("summary")] == SUMMARIES


def test_a_resource_of_terra_only_is_not_one_of_junction() -> None:
    """Breaks if a Terra type is fetched or simulated as one of Junction's, or its view is renamed."""
    found = {resource.name: resource for resource in catalogue().values() if not resource.is_junctions}
    records = {"terra_planned_workout", "terra_hormone", "terra_health_observation", "terra_lab_report"}
    assert {name for name, one in found.items() if not one.is_series} == records
    assert {name for name, one in found.items() if one.is_series} == {"terra_scores", "terra_hrv_sdnn"}
    assert not any(one.path or one.terra or one.has_history for one in found.values())
    assert not any("terra" in name for name in catalogue().event_names)
    assert catalogue().event("daily.data.terra_scores.created").does == "unknown"


def test_where_terras_types_land() -> None:
    """Breaks if Terra's `activity`, which is a workout, is stored as a daily summary, or the reverse."""
    failures = Failures()
    for name, resource, is_fetched in (
        ("activity", "workouts", True),
        ("daily", "activity", True),
        ("body", "body", True),
        ("sleep", "sleep", True),
        ("nutrition", "meal", True),
        ("menstruation", "menstrual_cycle", True),
        ("athlete", "profile", True),
        ("planned_workout", "terra_planned_workout", False),
        ("hormone", "terra_hormone", False),
        ("health_observation", "terra_health_observation", False),
        ("lab_report", "terra_lab_report", False),
    ):
        with failures.of(name, resource, is_fetched):
            assert catalogue().of_terra(name).name == resource
            assert catalogue().of_terra(name).terra == (name if is_fetched else None)
    assert failures == {}


def test_an_unknown_type_of_terra_has_no_resource() -> None:
    """Breaks if the name of a resource counts as a Terra type."""
    failures = Failures()
    for name in ("workouts", "heartrate", "terra_scores", "scores", "route", ""):
        with failures.of(name), pytest.raises(KeyError):
            catalogue().of_terra(name)
    assert failures == {}


def test_event_names_by_kind() -> None:
    """Breaks if an event of the public catalogue is missing or has another meaning."""
    failures = Failures()
    for does, kind, count in (
        ("data", "summary", 18),
        ("data", "stream", 2),
        ("data", "timeseries", 100),
        ("historical", "summary", 9),
        ("historical", "stream", 1),
        ("historical", "timeseries", 50),
        ("connection", None, 2),
        ("device", "device", 2),
        ("query", None, 1),
        ("lab", None, 9),
    ):
        with failures.of(does, kind, count):
            events = [catalogue().event(name) for name in catalogue().event_names]
            assert (
                sum(event.does == does and getattr(event.resource, "kind", None) == kind for event in events) == count
            )
    assert failures == {}


def test_there_are_194_event_names() -> None:
    """Breaks if an event name is not in the public catalogue, or is listed twice."""
    names = catalogue().event_names
    assert len(names) == len(set(names)) == 194
    assert "message.attempt.exhausted" not in names
    assert not any("hypnogram" in name or "sleep_stream" in name for name in names)


def test_where_a_resource_is_fetched() -> None:
    """Breaks if a fetch path, a date format or the key of a page's rows is wrong."""
    failures = Failures()
    for name, path, rows, dates in (
        ("activity", "/v2/summary/activity/{user_id}", "activity", "moment"),
        ("workouts", "/v2/summary/workouts/{user_id}", "workouts", "moment"),
        ("meal", "/v2/summary/meal/{user_id}", "meals", "moment"),
        ("profile", "/v2/summary/profile/{user_id}", None, "none"),
        ("sleep_cycle", "/v2/summary/sleep_cycle/{user_id}", "sleep_cycle", "day"),
        ("menstrual_cycle", "/v2/summary/menstrual_cycle/{user_id}", "menstrual_cycle", "day"),
        ("electrocardiogram", "/v2/summary/electrocardiogram/{user_id}", "electrocardiogram", "day"),
        ("workout_stream", "/v2/timeseries/workouts/{workout_id}/stream", None, "moment"),
        ("sleep_stream", "/v2/timeseries/sleep/{sleep_id}/stream", None, "moment"),
        ("weight", "/v2/timeseries/{user_id}/body_weight/grouped", "groups", "moment"),
        ("fat", "/v2/timeseries/{user_id}/body_fat/grouped", "groups", "moment"),
        ("heartrate", "/v2/timeseries/{user_id}/heartrate/grouped", "groups", "moment"),
        ("body_temperature", "/v2/timeseries/{user_id}/body_temperature/grouped", "groups", "moment"),
    ):
        with failures.of(name, path, rows, dates):
            resource = catalogue()[name]
            assert (resource.path, resource.rows, resource.dates) == (path, rows, dates)
    assert failures == {}


def test_only_weight_and_fat_are_fetched_under_another_name() -> None:
    """Breaks if the fetch path of a timeseries has another name."""
    series = catalogue().of_kind("timeseries")
    assert {one.name for one in series if f"/{one.name}/grouped" not in one.path} == {"weight", "fat"}


def test_key_parts() -> None:
    """Breaks if samples with equal times overwrite each other, or a changed `type` duplicates a sample."""
    failures = Failures()
    for name in [resource.name for resource in catalogue().of_kind("timeseries")]:
        with failures.of(name):
            assert catalogue()[name].key == KEYS.get(name, ())
    assert failures == {}


def test_values_that_are_not_one_number() -> None:
    """Breaks if a blood pressure is stored without its two numbers, or a note without its text."""
    several = {one.name: one.fields for one in catalogue().of_kind("timeseries") if one.fields}
    assert {name: [(field.name, field.type) for field in fields] for name, fields in several.items()} == {
        "blood_pressure": [("systolic", "number"), ("diastolic", "number")],
        "note": [("text", "text")],
    }


@pytest.mark.parametrize("name", ["calories_basal", "floors_climbed", "water", "heartrate", "igg"])
def test_instants_that_the_documentation_calls_intervals(name: str) -> None:
    """Breaks if a series without start and end counts as intervals."""
    assert not catalogue()[name].interval


def test_every_summary_has_an_id_and_a_version() -> None:
    """Breaks if a summary has no identifier or no version."""
    failures = Failures()
    for name in [resource.name for resource in catalogue().of_kind("summary")]:
        with failures.of(name):
            assert (catalogue()[name].identifier, catalogue()[name].has_version) == ("id", True)
    assert failures == {}


def test_what_an_event_name_means() -> None:
    """Breaks if the old spelling is unknown, or an unknown name counts as data."""
    failures = Failures()
    for name, does, resource in (
        ("daily.data.workouts.created", "data", "workouts"),
        ("daily.data.workouts.updated", "data", "workouts"),
        ("daily.timeseries.hypnogram.created", "data", "hypnogram"),
        ("daily.timeseries.hypnogram.updated", "data", "hypnogram"),
        ("daily.timeseries.heartrate.created", "data", "heartrate"),
        ("historical.timeseries.heartrate.created", "historical", "heartrate"),
        ("historical.data.workout_stream.created", "historical", "workout_stream"),
        ("historical.data.sleep_stream.created", "historical", "sleep_stream"),
        ("provider.device.updated", "device", "device"),
        ("provider.connection.error", "connection", None),
        ("continuous_query.result_table.changed", "query", None),
        ("labtest.match_review.updated", "lab", None),
        ("historical.data.workouts.updated", "unknown", None),
        ("historical.data.device.created", "unknown", None),
        ("daily.data.meals.created", "unknown", None),
        ("daily.data.workouts.deleted", "unknown", None),
        ("daily.data.workouts.created.x", "unknown", None),
        ("daily.data.workouts.created\n", "unknown", None),
        ("Daily.Data.Workouts.Created", "unknown", None),
        ("daily.workout_stream.unavailable", "unknown", None),
        ("provider.connection.updated", "unknown", None),
        ("message.attempt.exhausted", "unknown", None),
        ("raw.garmin.dailies", "unknown", None),
        ("daily.data..created", "unknown", None),
        ("", "unknown", None),
    ):
        with failures.of(name, does, resource):
            event = catalogue().event(name)
            assert (event.name, event.does, getattr(event.resource, "name", None)) == (name, does, resource)
    assert failures == {}


def test_a_contradiction_is_refused_by_name() -> None:
    """Breaks if an error in the file is not detected at start, or its message does not name the row."""
    failures = Failures()
    for toml, named in (
        (f"[summary.Bad]\n{PATH}", "'Bad' is not a resource name"),
        (f'[summary."a;b"]\n{PATH}', "'a;b' is not a resource name"),
        ('[summary.x]\npath = "/v1/x/{user_id}"', "x: '/v1/x/{user_id}' is not a fetch path"),
        ('[summary.x]\npath = "/v2/x"', "x: '/v2/x' is not a fetch path"),
        (f'[summary.x]\n{PATH}\ndates = "week"', "x: dates cannot be 'week'"),
        (f'[summary.x]\n{PATH}\nunit = "kg"', "x: key, unit, interval and day belong to timeseries"),
        (f"[stream.x]\n{PATH}\ninterval = true", "x: key, unit, interval and day belong to timeseries"),
        (f'[device.x]\n{PATH}\nkey = ["type"]', "x: key, unit, interval and day belong to timeseries"),
        (f"[terra.x]\n{PATH}", "terra_x: Junction does not have it"),
        (f'[stream.x]\n{PATH}\nterra = "x"', "x: terra is the type of a summary's objects"),
        (f'[summary.x]\n{PATH}\nterra = "/x"', "x: terra is the type of a summary's objects"),
        (f'[summary.x]\n{PATH}\nfields = ["deleted boolean"]', "'deleted' cannot be a column"),
        ('[timeseries]\nx = { key = ["device_id"] }', "x: no such key part: device_id"),
        (f'[summary.x]\n{PATH}\nfields = ["a text", "a number"]', "x: a field is named twice"),
        (f'[summary.x]\n{PATH}\nfields = ["payload text"]', "'payload' cannot be a column"),
        (f'[summary.x]\n{PATH}\nfields = ["A text"]', "'A' cannot be a column"),
        (f'[summary.x]\n{PATH}\nfields = ["a json"]', "a: 'json' is not a field type"),
        (f"[summary.x]\n{PATH}\n[timeseries]\nx = {{}}", "twice in the catalogue: x"),
    ):
        with failures.of(toml, named):
            with pytest.raises(ValueError, match=r".") as refused:
                parse(toml)
            assert named in str(refused.value)
    assert failures == {}


def test_every_refusal_names_the_row() -> None:
    """Breaks if the error does not name the row."""
    failures = Failures()
    for toml in (
        f'[summary.culprit]\n{PATH}\nfields = ["payload text"]',
        f'[summary.culprit]\n{PATH}\nfields = ["a json"]',
        f'[summary.culprit]\n{PATH}\nfields = ["a"]',
        f'[summary.culprit]\n{PATH}\nfields = ["a text b"]',
        f"[summary.culprit]\n{PATH}\nx = 1",
        '[summary.culprit]\nrows = "x"',
        f"[summary.culprit]\n{PATH}\n[timeseries]\nculprit = {{}}",
    ):
        with failures.of(toml):
            with pytest.raises((ValueError, TypeError)) as refused:
                parse(toml)
            assert "culprit" in str(refused.value)
    assert failures == {}


def test_an_event_of_unknown_meaning_is_refused() -> None:
    """Breaks if a typing error in [events] is accepted, so that workers ignore those events."""
    with pytest.raises(ValueError, match="conection"):
        parse('[events]\n"provider.connection.created" = "conection"')
