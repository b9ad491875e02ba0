"""Descriptions of the fields of summaries, streams and devices."""

from typing import Any

from app.catalogue import Field, Resource
from workers.simulator.shapes import (
    at,
    between,
    day,
    digits,
    draft,
    empty_lists,
    link,
    linked_choice,
    many,
    midnight,
    one_of,
    unix_seconds,
    variable,
)

SPORTS: tuple[dict[str, Any], ...] = (
    {"id": 1, "name": "Running", "slug": "running"},
    {"id": 2, "name": "Cycling", "slug": "cycling"},
    {"id": 3, "name": "Swimming", "slug": "swimming"},
    {"id": 4, "name": "Walking", "slug": "walking"},
)
WORKOUT_SPORT = linked_choice("workouts", SPORTS)
WORKOUT_SPORT_SLUG = linked_choice("workouts", tuple(sport["slug"] for sport in SPORTS))

# Seconds after which a summary is known, and seconds by which a correction moves its `updated_at`. A day's totals are
# known after the day ends.
KNOWN_AFTER = 7200
DAY_KNOWN_AFTER = 86400 + KNOWN_AFTER
CORRECTION = 10

# Looked up by "resource.field", then by "field"; BY_TYPE is the fallback.
FIELDS: dict[str, Any] = {
    "created_at": at(KNOWN_AFTER),
    "updated_at": at(KNOWN_AFTER, step=CORRECTION),
    "activity.created_at": at(DAY_KNOWN_AFTER),
    "activity.updated_at": at(DAY_KNOWN_AFTER, step=CORRECTION),
    "date": midnight,
    "calendar_date": day(),
    "time_zone": variable("time_zone"),
    "timezone_offset": variable("timezone_offset"),
    "source_provider": variable("provider"),
    "source_type": variable("source_type"),
    "source_app_id": None,
    "source_device_id": variable("device_id"),
    "source_device_model": variable("device_model"),
    "provider_id": digits(),
    "wheelchair_use": one_of(None, None, True),
    "calories_total": between(1600, 3400, 1),
    **dict.fromkeys(("activity.steps", "activity.distance", "activity.floors_climbed"), None),  # see TOTALS
    **dict.fromkeys(("calories_active", "daily_movement"), None),
    "distance": between(900, 14000, 1),
    "low": between(100, 400, 1),
    "medium": between(10, 120, 1),
    "high": between(0, 60, 1),
    "wheelchair_push": between(0, 2500),
    "sleep.bedtime_start": at(-28800),
    "sleep.bedtime_stop": at(),
    "sleep.type": "long_sleep",
    "sleep.light": between(10800, 14400),
    "sleep.rem": between(3600, 6600),
    "sleep.deep": between(2400, 5400),
    "sleep.awake": between(600, 2400),
    "sleep.total": None,  # see SUMS
    "sleep.duration": None,
    "sleep.state": draft("tentative", "confirmed"),
    **dict.fromkeys(("score", "recovery_readiness_score"), between(40, 99)),
    "hr_lowest": between(40, 52),
    "hr_average": between(53, 68),
    "hr_resting": between(48, 58),
    "hr_dip": between(5, 20, 1),
    "efficiency": between(80, 98, 1),
    "latency": between(120, 1800),
    "temperature_delta": between(-1, 1, 2),
    "skin_temperature": between(33, 36, 1),
    "average_hrv": between(20, 110, 1),
    "respiratory_rate": between(11, 19, 1),
    "sleep_cycle.sleep_id": link("sleep"),
    "sleep_cycle.session_start": at(-28800),
    "sleep_cycle.session_end": at(),
    "workouts.title": one_of("Morning session", "Lunch break", "Evening session"),
    "workouts.time_start": at(),
    "workouts.time_end": at(3600),
    "workouts.moving_time": between(2400, 3500),
    "workouts.steps": between(0, 9000),
    "average_hr": between(105, 150),
    "max_hr": between(155, 190),
    "calories": between(150, 900, 1),
    "total_elevation_gain": between(0, 600, 1),
    "elev_high": between(150, 900, 1),
    "elev_low": between(0, 140, 1),
    "average_speed": between(1.5, 8, 2),
    "max_speed": between(8.5, 16, 2),
    **dict.fromkeys(("average_watts", "device_watts"), between(80, 260, 1)),
    "max_watts": between(300, 900, 1),
    "weighted_average_watts": between(90, 280, 1),
    "body.weight": between(48, 120, 1),
    "body.fat": between(8, 38, 1),
    "water_percentage": between(45, 65, 1),
    "muscle_mass_percentage": between(30, 55, 1),
    "visceral_fat_index": between(1, 15, 1),
    "bone_mass_percentage": between(2, 5, 1),
    "body_mass_index": between(18, 34, 1),
    "lean_body_mass_kilogram": between(38, 80, 1),
    "waist_circumference_centimeter": between(62, 115, 1),
    "profile.height": between(150, 198),
    "profile.birth_date": one_of("1961-11-30", "1978-02-14", "1990-05-17", "2001-08-03"),
    "profile.gender": one_of("female", "male", "other"),
    "profile.sex": one_of("female", "male"),
    "meal.priority_id": 1,
    "meal.source_id": 10,
    "meal.timestamp": at(),
    "meal.name": one_of("Breakfast", "Lunch", "Dinner", "Snack"),
    "menstrual_cycle.period_start": day(),
    "menstrual_cycle.period_end": day(5),
    "menstrual_cycle.cycle_end": day(27),
    "menstrual_cycle.is_predicted": one_of(False, False, True),
    "electrocardiogram.session_start": at(),
    "electrocardiogram.session_end": at(30),
    "electrocardiogram.classification": one_of("sinus_rhythm", "sinus_rhythm", "atrial_fibrillation"),
    "electrocardiogram.inconclusive_cause": None,
    "electrocardiogram.algorithm_version": "2",
    "electrocardiogram.sampling_frequency_hz": 512.0,
    "electrocardiogram.voltage_sample_count": 15360,
    "heart_rate_mean": between(52, 110),
    "device.app_id": None,
    "device_manufacturer": variable("device_manufacturer"),
    "device_model": variable("device_model"),
    "device_version": "3.2",
    "device_id": variable("device_id"),
}

# Fields that are the sum of other fields of the record.
SUMS: dict[str, dict[str, tuple[str, ...]]] = {
    "sleep": {"total": ("light", "rem", "deep"), "duration": ("light", "rem", "deep", "awake")}
}

# Fields that are the total of the day's samples: the timeseries by field.
TOTALS: dict[str, dict[str, str]] = {
    "activity": {
        "steps": "steps",
        "distance": "distance",
        "daily_movement": "distance",
        "calories_active": "calories_active",
        "floors_climbed": "floors_climbed",
    }
}

# For a field not listed above, so that a new row of the catalogue needs no change here.
BY_TYPE: dict[str, Any] = {
    "text": one_of("first", "second", "third"),
    "integer": between(1, 100),
    "number": between(1, 100, 1),
    "boolean": one_of(False, True),
    "date": day(),
    "datetime": at(),
}

# Objects and lists of a record: they have no column of their own.
EXTRAS: dict[str, dict[str, Any]] = {
    "activity": {
        "heart_rate": {
            "avg_bpm": between(62, 92),
            "avg_walking_bpm": between(85, 110),
            "max_bpm": between(130, 185),
            "min_bpm": between(40, 55),
            "resting_bpm": between(48, 62),
        }
    },
    "workouts": {
        "sport": WORKOUT_SPORT,
        "hr_zones": [between(0, 900) for _ in range(6)],
        "map": {"summary_polyline": "agn~Ftb{uOvr@daBunBjdBkHwiD", "polyline": None},
    },
    "sleep_cycle": {
        "stage_start_offset_second": [number * 3600 for number in range(8)],
        "stage_end_offset_second": [(number + 1) * 3600 for number in range(8)],
        "stage_type": [between(1, 4) for _ in range(8)],
    },
    "meal": {
        "energy": {"unit": "kcal", "value": between(180, 900, 1)},
        "macros": {"carbs": between(10, 90, 1), "protein": between(5, 50, 1), "fats": {"total": between(3, 40, 1)}},
        "micros": {"minerals": {"iron": between(0, 8, 1)}, "trace_elements": None, "vitamins": None},
        "data": {"Oat porridge": {"energy": {"unit": "kcal", "value": between(150, 400, 1)}}},
    },
    "menstrual_cycle": {
        "menstrual_flow": [{"date": day(), "flow": "medium"}, {"date": day(1), "flow": "heavy"}],
        "sexual_activity": [],
        "basal_body_temperature": [{"date": day(), "value": between(36, 37, 2)}],
    },
}

# Responses of the stream endpoints, as columns or lists.
STREAMS: dict[str, dict[str, Any]] = {
    "workout_stream": {
        "time": many(120, 30, unix_seconds),
        "heartrate": many(120, 30, one_of(*[between(100, 185)] * 9, None)),
        "distance": many(120, 30, between(0, 12000, 1)),
        "cadence": many(120, 30, one_of(*[between(70, 95, 1)] * 9, None)),
        "velocity_smooth": many(120, 30, between(1.5, 8, 2)),
        "altitude": many(120, 30, between(20, 300, 1)),
        **empty_lists("power", "lat", "lng", "resistance", "temperature"),
    },
    "sleep_stream": {
        "hrv": many(16, 1800, {"timestamp": at(-28800), "unit": "rmssd", "value": between(20, 110)}),
        "heartrate": many(96, 300, {"timestamp": at(-28800), "unit": "bpm", "value": between(42, 68)}),
        "respiratory_rate": many(16, 1800, {"timestamp": at(-28800), "unit": "bpm", "value": between(11, 19, 1)}),
        "hypnogram": None,
    },
}

# Further fields of a stream's event: it announces the stream, which has to be fetched.
NOTICES: dict[str, dict[str, Any]] = {
    "workout_stream": {"provider_id": digits(), "sport": WORKOUT_SPORT, "message": "available through the API"}
}


def known_after(resource: Resource) -> int:
    """The seconds from a summary's moment until it is known."""
    return DAY_KNOWN_AFTER if resource.name in TOTALS else KNOWN_AFTER


def shape_of(resource: Resource, column: Field) -> Any:
    fallback = FIELDS.get(column.name, BY_TYPE[column.type])
    return FIELDS.get(f"{resource.name}.{column.name}", fallback)
