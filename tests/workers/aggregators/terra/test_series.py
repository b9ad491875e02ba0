"""Terra's arrays as samples: units, running totals, stages of sleep, moments, and duplicates."""

import json
import math
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.support.cases import each, refusal
from tests.support.terra import END, METADATA, START, event, item, of, parsed, series
from workers.actions import Sample, Samples
from workers.aggregators.terra.mapping import Values
from workers.aggregators.terra.series import Clock, Instant, Point, Span, grown, stages

T0 = datetime(2026, 3, 14, 8, tzinfo=UTC)
MG_PER_DL = "blood_glucose_mg_per_dL"
NOON = "2026-03-14T12:00:00+01:00"
COUNTS = Values("steps", "", "", "count")
AT_NOON = datetime(2026, 3, 14, 11, tzinfo=UTC)


def nested(path: str, value: Any) -> dict[str, Any]:
    """An object that has a value at a path."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


# type, array, the item's fields, resource, value, unit
Case = tuple[str, str, Any, str, float, str]
PLAIN: list[Case] = [
    *(
        (name, f"{path}.detailed.{array}", {value: 61.5}, resource, 61.5, unit)
        for name in ("activity", "daily", "sleep", "body")
        for path in ("heart_data.heart_rate_data" if name == "body" else "heart_rate_data",)
        for array, value, resource, unit in (
            ("hr_samples", "bpm", "heartrate", "bpm"),
            ("hrv_samples_rmssd", "hrv_rmssd", "hrv", "rmssd"),
            ("hrv_samples_sdnn", "hrv_sdnn", "terra_hrv_sdnn", "ms"),
        )
    ),
    *(
        (name, f"oxygen_data.{array}", {value: 50}, resource, 50, unit)
        for name in ("activity", "daily", "body")
        for array, value, resource, unit in (
            ("saturation_samples", "percentage", "blood_oxygen", "%"),
            ("vo2_samples", "vo2max_ml_per_min_per_kg", "vo2_max", "mL/kg/min"),
        )
    ),
    ("activity", "calories_data.calorie_samples", {"calories": 3.5}, "calories_active", 3.5, "kcal"),
    ("daily", "calories_data.calorie_samples", {"calories": 3.5}, "calories_active", 3.5, "kcal"),
    ("daily", "stress_data.samples", {"level": 24}, "stress_level", 24, "%"),
    ("sleep", "respiration_data.breaths_data.samples", {"breaths_per_min": 14}, "respiratory_rate", 14, "bpm"),
    ("sleep", "respiration_data.oxygen_saturation_data.samples", {"percentage": 95}, "blood_oxygen", 95, "%"),
    ("body", "temperature_data.body_temperature_samples", {"temperature_celsius": 37}, "body_temperature", 37, "°C"),
    ("body", "glucose_data.blood_glucose_samples", {MG_PER_DL: 90.08}, "glucose", 5, "mmol/L"),
    ("body", "glucose_data.detailed_blood_glucose_samples", {MG_PER_DL: 90.08}, "glucose", 5, "mmol/L"),
]  # fmt: skip


@each(*PLAIN)
def test_values_at_moments(*case: Any) -> None:
    """Breaks if an array is not read, lands in another series, or keeps Terra's unit where ours differs."""
    name, path, fields, resource, value, unit = case
    body = event(name, item(**nested(path, [{"timestamp": NOON} | fields, {"timestamp": NOON, "more": 1}, None])))
    (found,) = of(Samples, parsed(body))
    assert (found.resource, found.source_type, found.subtype) == (resource, name, "")
    (sample,) = found.rows
    assert (sample.ts, sample.ts_end, sample.unit, sample.timezone_offset) == (AT_NOON, None, unit, 3600)
    assert math.isclose(sample.value or 0, value)
    assert sample.extra is None


@each(
    ("weight_kg", 71.35, "weight", 71.35, "kg"),
    ("bodyfat_percentage", 19.2, "fat", 19.2, "%"),
    ("BMI", 23.1, "body_mass_index", 23.1, "index"),
    ("lean_mass_g", 57_650, "lean_body_mass", 57.65, "kg"),
    ("insulin_units", 4, "insulin_injection", 4, "unit"),
)
def test_measurements_of_a_body(field: str, given: float, resource: str, value: float, unit: str) -> None:
    """Breaks if one of several values of a measurement is lost or stored as another one."""
    body = event("body", item(measurements_data={"measurements": [{"measurement_time": NOON, field: given}]}))
    (found,) = of(Samples, parsed(body))
    assert (found.resource, found.rows[0].ts, found.rows[0].unit) == (resource, AT_NOON, unit)
    assert math.isclose(found.rows[0].value or 0, value)


@each(
    ("sleep", "temperature_data.delta", -0.1, "body_temperature_delta", -0.1, "°C"),
    ("body", "hydration_data.day_total_water_consumption_ml", 1500, "water", 1500, "ml"),
    ("nutrition", "summary.water_ml", 1900, "water", 1900, "ml"),
    ("nutrition", "summary.micros.caffeine_mg", 80, "caffeine", 0.08, "g"),
    ("nutrition", "summary.macros.carbohydrates_g", 220, "carbohydrates", 220, "g"),
)
def test_one_value_for_all_of_the_time(*case: Any) -> None:
    """Breaks if a day's sum has no moment, or no end."""
    name, path, given, resource, value, unit = case
    (sample,) = series(event(name, item(**nested(path, given))), resource)
    times = (datetime.fromisoformat(START), datetime.fromisoformat(END))
    assert (sample.ts, sample.ts_end, sample.unit) == (*times, unit)
    assert math.isclose(sample.value or 0, value)


@each(None, METADATA["start_time"], "2020-01-01T00:00:00Z")
def test_a_time_without_an_end(end: str | None) -> None:
    """Breaks if an object that ends before it begins makes such a sample."""
    day = {"metadata": METADATA | {"end_time": end}, "summary": {"water_ml": 1}}
    (sample,) = series(event("nutrition", day), "water")
    assert sample.ts_end is None


def test_water_in_the_body_is_not_water_that_was_drunk() -> None:
    """Breaks if kilograms of body water are added to millilitres."""
    samples = [{"timestamp": NOON, "hydration_kg": 40}]
    assert of(Samples, parsed(event("body", item(hydration_data={"hydration_amount_samples": samples})))) == []


def test_blood_pressure_is_a_pair() -> None:
    """Breaks if systole and diastole lose each other, or one alone is stored."""
    given = [
        {"timestamp": NOON, "systolic_bp": 118, "diastolic_bp": 76},
        {"timestamp": "2026-03-14T12:01:00+01:00", "systolic_bp": 118, "diastolic_bp": None},
        {"timestamp": None, "systolic_bp": 118, "diastolic_bp": 76},
    ]
    body = event("body", item(blood_pressure_data={"blood_pressure_samples": given}))
    (sample,) = series(body, "blood_pressure")
    pair = {"systolic": 118, "diastolic": 76}
    assert (sample.value, sample.unit, json.loads(sample.extra or b"")) == (None, "mmHg", pair)
    assert parsed(body).samples_without_timestamp == 1


@each((0, 1), (None, 1), (1, 0), (1.0, 0), (2, 1))
def test_oxygen_in_muscle_is_not_oxygen_in_blood(kind: float | None, count: int) -> None:
    """Breaks if SmO2, which is far lower, is stored as SpO2."""
    given = [{"timestamp": NOON, "percentage": 60, "type": kind}]
    assert len(series(event("body", item(oxygen_data={"saturation_samples": given})), "blood_oxygen")) == count


def test_glucose_in_both_arrays_is_stored_once() -> None:
    """Breaks if a moment that both arrays have is stored twice, or the one that both lack is lost."""
    early, late = NOON, "2026-03-14T12:05:00+01:00"
    rare = [{"timestamp": early, MG_PER_DL: 90.08}]
    dense = [{"timestamp": early, MG_PER_DL: 90.08}, {"timestamp": late, MG_PER_DL: 108.096}]
    body = event("body", item(glucose_data={"blood_glucose_samples": rare, "detailed_blood_glucose_samples": dense}))
    assert [round(sample.value or 0, 6) for sample in series(body, "glucose")] == [5, 6]
    assert parsed(body).duplicate_samples == 0


def test_insulin_is_distinguished_by_its_kind() -> None:
    """Breaks if two kinds of insulin at one moment overwrite each other."""
    kinds = {4: "long", 2: None}
    given = [{"measurement_time": NOON, "insulin_units": n, "insulin_type": kind} for n, kind in kinds.items()]
    body = event("body", item(measurements_data={"measurements": given}))
    assert [one.value for one in series(body, "insulin_injection", "long")] == [4]
    assert [one.value for one in series(body, "insulin_injection")] == [2]


# Running totals


@each(
    ("daily", "step_samples", "steps", "steps", "count"),
    ("activity", "step_samples", "steps", "steps", "count"),
    ("activity", "distance_samples", "distance_meters", "distance", "m"),
    ("daily", "distance_samples", "distance_meters", "distance", "m"),
    ("daily", "floors_climbed_samples", "floors_climbed", "floors_climbed", "count"),
)
def test_a_running_total_becomes_increments(name: str, array: str, field: str, resource: str, unit: str) -> None:
    """Breaks if totals are stored as amounts, so that a sum counts every step many times."""
    given = [
        {"timestamp": "2026-03-14T08:15:00+01:00", field: 640},
        {"timestamp": "2026-03-14T08:00:00+01:00", field: 112},
        {"timestamp": "2026-03-14T08:30:00+01:00", field: None},
        {"timestamp": "2026-03-14T09:00:00+01:00", field: 640},
    ]
    found = series(event(name, item(distance_data={"detailed": {array: given}})), resource)
    start = datetime(2026, 3, 13, 23, tzinfo=UTC)
    times = [start, *(datetime(2026, 3, 14, 7, minute, tzinfo=UTC) for minute in (0, 15)), T0]
    assert [(one.ts, one.ts_end, one.value) for one in found] == [
        (times[0], times[1], 112),
        (times[1], times[2], 528),
        (times[2], times[3], 0),
    ]
    assert {one.unit for one in found} == {unit}


def points(given: list[tuple[float, float]]) -> list[Point]:
    """Values at these offsets in seconds."""
    return [Point(Instant(T0 + timedelta(seconds=seconds), 0, None), float(value)) for seconds, value in given]


def differences(given: list[tuple[float, float]], start: datetime | None = T0) -> list[Sample]:
    """The growth of a running total."""
    span = Span(Instant(start, 0, None) if start else None, None)
    return list(grown(points(given), span, COUNTS))


def test_a_total_that_falls_has_begun_again() -> None:
    """Breaks if a counter that was reset subtracts steps."""
    assert [one.value for one in differences([(60, 100), (120, 150), (180, 30), (240, 50)])] == [100, 50, 30, 20]


@each(T0, T0 + timedelta(hours=1), None)
def test_a_total_at_the_beginning_is_not_lost(start: datetime | None) -> None:
    """Breaks if the first value has no place beside the second, or is counted twice."""
    found = differences([(0, 5), (60, 12)], start)
    assert [(one.ts_end, one.value) for one in found] == [(T0, 5), (T0 + timedelta(seconds=60), 7)]
    assert found[0].ts < T0 == found[1].ts


seconds = st.integers(1, 86_400)
amounts = st.lists(st.tuples(seconds, st.integers(0, 1000)), min_size=1, unique_by=lambda one: one[0])


@given(amounts=amounts, order=st.randoms(use_true_random=False))
def test_differences_add_up_to_the_last_total(amounts: list[tuple[int, int]], order: Any) -> None:
    """Breaks if a step is lost or doubled, whatever the order, or two intervals overlap."""
    total, totals = 0, []
    for second, amount in sorted(amounts):
        total += amount
        totals.append((float(second), float(total)))
    shuffled = list(totals)
    order.shuffle(shuffled)
    found = differences(shuffled)
    assert sum(one.value or 0 for one in found) == total
    assert found[0].ts == T0
    assert all(one.ts < (one.ts_end or one.ts) for one in found)
    assert all(one.ts_end == after.ts for one, after in pairwise(found))


@given(totals=st.lists(st.tuples(seconds, st.floats(0, 1e6))))
def test_no_difference_is_negative(totals: list[tuple[float, float]]) -> None:
    """Breaks if a reset or a repeated time makes a difference negative, or one time has two samples."""
    found = differences(totals)
    assert all((one.value or 0) >= 0 for one in found)
    assert len({one.ts for one in found}) == len(found) == len({second for second, _ in totals})


# Stages of sleep


@each(
    *((0, -1, False), (1, 4, False), (4, 2, False), (5, 1, False), (6, 3, False)),
    *((2, -1, True), (3, 4, True), (7, -1, True), (-1, -1, True)),
)
def test_stages_have_junctions_numbers(level: Any, value: Any, is_kept: Any) -> None:
    """Breaks if deep sleep becomes light sleep, or information that our numbers lose is not kept in `extra`."""
    body = event("sleep", item(sleep_durations_data={"hypnogram_samples": [{"timestamp": NOON, "level": level}]}))
    (sample,) = series(body, "hypnogram")
    assert sample.value == value
    assert sample.extra == (b'{"level":%d.0}' % level if is_kept else None)
    assert (sample.ts, sample.ts_end) == (AT_NOON, datetime.fromisoformat(END))


@given(
    given=st.lists(st.tuples(seconds, st.integers(-2, 9)), min_size=1), end=st.one_of(st.none(), st.integers(0, 90_000))
)
def test_stages_follow_each_other_without_a_gap(given: list[tuple[float, float]], end: int | None) -> None:
    """Breaks if a night has holes or overlaps, or a stage ends before it begins."""
    span = Span(None, None if end is None else Instant(T0 + timedelta(seconds=end), 0, None))
    found = list(stages(points(given), span, COUNTS))
    assert all(one.ts_end == after.ts for one, after in pairwise(found))
    assert len(found) == len({second for second, _ in given})
    assert found[-1].ts_end is None or found[-1].ts_end > found[-1].ts
    assert {one.value for one in found} <= {-1, 1, 2, 3, 4}


# Moments


BEATS = "heart_rate_data.detailed.hr_samples"


def beats(*given: tuple[str | None, float | None], localization: int | None = None) -> dict[str, Any]:
    """A day with a heart rate."""
    metadata = METADATA | {"timestamp_localization": localization}
    samples = [{"timestamp": text, "bpm": value} for text, value in given]
    return event("daily", {"metadata": metadata} | nested(BEATS, samples))


@each(
    ("2026-03-14T11:00:00", None, None, b'{"is_floating":true}'),
    ("2026-03-14T11:00:00.000000", 1, None, b'{"is_floating":true}'),
    ("2026-03-14T11:00:00", 0, None, None),
    ("2026-03-14T11:00:00Z", 1, 0, None),
    ("2026-03-14T11:00:00Z", 0, None, None),
    ("2026-03-14T13:00:00+02:00", None, 7200, None),
    ("2026-03-14T05:30:00-05:30", 1, -19_800, None),
)
def test_the_offset_of_a_timestamp(text: Any, localization: Any, offset: Any, extra: Any) -> None:
    """Breaks if a local time without an offset passes for a known instant, or UTC for the user's own time."""
    (sample,) = series(beats((text, 70), localization=localization), "heartrate")
    assert (sample.ts, sample.timezone_offset, sample.extra) == (AT_NOON, offset, extra)


@each(None, "", "0001-01-01T00:00:00Z", "1899-12-31T23:59:59Z")
def test_values_without_a_time_are_left_out_and_counted(text: str | None) -> None:
    """Breaks if one null among 1,000 values rejects a delivery, or becomes a sample."""
    found = parsed(beats((text, 70), (NOON, 71), (text, None)))
    assert [one.value for one in of(Samples, found)[0].rows] == [71]
    assert found.samples_without_timestamp == 1


def test_of_duplicate_timestamps_the_last_value_wins() -> None:
    """Breaks if which of two wins is left to chance, or is not counted."""
    found = parsed(beats((NOON, 70), ("2026-03-14T11:00:00Z", 75), (NOON, 72)))
    assert [one.value for one in of(Samples, found)[0].rows] == [72]
    assert found.duplicate_samples == 2


def test_objects_of_one_event_share_their_series() -> None:
    """Breaks if a series occurs twice in a delivery with a common timestamp."""
    days = [beats((NOON, value))["data"][0] for value in (70, 71)]
    found = parsed(event("daily", *days))
    assert [[one.value for one in action.rows] for action in of(Samples, found)] == [[71]]


@each([], None, [None], [{"timestamp": NOON}], [{"bpm": 70}], [{}])
def test_an_array_without_values_changes_nothing(array: Any) -> None:
    """Breaks if an empty array, which a snapshot may have, changes stored samples."""
    assert of(Samples, parsed(event("daily", item(**nested(BEATS, array))))) == []


@each("soon", "2026-13-01T00:00:00Z", "0000-01-01T00:00:00Z", "2026-03-14T25:00:00", "now")
def test_a_time_that_cannot_be_read_is_refused(text: str) -> None:
    """Breaks if a time is guessed, costs its neighbours, or its text is in the reason."""
    found = parsed(beats((NOON, 69), (text, 70)))
    assert [one.value for one in of(Samples, found)[0].rows] == [69]
    (refused,) = found.refused
    assert (refused.reason, refused.items) == (f"daily: {BEATS}: timestamp: expected an ISO 8601 date and time", 1)


@each(
    *(
        f"2026-03-14T12:00:00{offset}"
        for offset in ("", "Z", "+00:00", "-00:00", "+01:00", "-05:30", "+14:00", "+23:59")
    ),
    *(f"2026-03-14T12:00:00.1234567{offset}" for offset in ("+01:00", "+0100", "+01", "+01:00:30", "-11:00")),
    *("2026-03-14", "2026-03-14T12", "2026-03-14T12:00+01:00", "20260314T120000+01:00", "2026-03-14-05:00"),
    *("2026-03-14 12:00+01:00", "1900-01-01T00:00:00+01:00", "9998-12-31T23:59:59-14:00", "9999-06-01T00:00:00+01:00"),
)
def test_a_time_is_the_instant_that_python_reads(text: str) -> None:
    """Breaks if the quick way to read an offset finds another instant or offset than Python does."""
    given, found = datetime.fromisoformat(text), Clock().read(text, "")
    assert found is not None
    assert found.at == (given if given.tzinfo else given.replace(tzinfo=UTC))
    assert found.at.tzinfo is UTC
    offset = given.utcoffset()
    assert found.offset == (None if offset is None else offset.total_seconds())
    assert (found.extra is None) is (given.tzinfo is not None)


@each("9999-12-31T00:00:00Z", "9999-12-31T23:59:59-14:00", "9999-12-31T23:59:59", "9999-12-30T23:00:00-02:00")
def test_a_time_that_psycopg_cannot_read_is_no_time(text: str) -> None:
    """Breaks if such a time is stored, or raises an unexpected error at the edge of the calendar."""
    assert refusal(Clock().read, text, "x") == "x: expected a time before the year 9999"
