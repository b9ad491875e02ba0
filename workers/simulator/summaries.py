"""What the fields of summaries, streams and devices plausibly hold, as data."""

from typing import Any

from app.catalogue import Field, Resource
from workers.simulator.shapes import (
    At,
    Between,
    Day,
    Digits,
    Draft,
    Known,
    Link,
    LinkedChoice,
    Many,
    Midnight,
    OneOf,
    Sum,
    Unix,
)

SPORTS: tuple[dict[str, Any], ...] = (
    {"id": 1, "name": "Running", "slug": "running"},
    {"id": 2, "name": "Cycling", "slug": "cycling"},
    {"id": 3, "name": "Swimming", "slug": "swimming"},
    {"id": 4, "name": "Walking", "slug": "walking"},
)
WORKOUT_SPORT = LinkedChoice("workouts", SPORTS)
WORKOUT_SPORT_SLUG = LinkedChoice("workouts", tuple(sport["slug"] for sport in SPORTS))

# How long after the moment it is about a summary is known, and how much later each correction of it says it is.
KNOWN_AFTER = 7200
CORRECTION = 10

# Looked up as "resource.field", then as "field", then by the field's type.
FIELDS: dict[str, Any] = {
    "created_at": At(KNOWN_AFTER),
    "updated_at": At(KNOWN_AFTER, step=CORRECTION),
    "date": Midnight(),
    "calendar_date": Day(),
    "time_zone": Known("time_zone"),
    "timezone_offset": Known("timezone_offset"),
    "source_provider": Known("provider"),
    "source_type": Known("source_type"),
    "source_app_id": None,
    "source_device_id": Known("device_id"),
    "source_device_model": Known("device_model"),
    "provider_id": Digits(),
    "wheelchair_use": OneOf(None, None, True),
    "calories_total": Between(1600, 3400, 1),
    "calories_active": Between(120, 1200, 1),
    "steps": Between(1500, 18000),
    "daily_movement": Between(900, 14000, 1),
    "distance": Between(900, 14000, 1),
    "low": Between(100, 400, 1),
    "medium": Between(10, 120, 1),
    "high": Between(0, 60, 1),
    "floors_climbed": Between(0, 30),
    "wheelchair_push": Between(0, 2500),
    "sleep.bedtime_start": At(-28800),
    "sleep.bedtime_stop": At(),
    "sleep.type": "long_sleep",
    "sleep.light": Between(10800, 14400),
    "sleep.rem": Between(3600, 6600),
    "sleep.deep": Between(2400, 5400),
    "sleep.awake": Between(600, 2400),
    "sleep.total": Sum("light", "rem", "deep"),
    "sleep.duration": Sum("light", "rem", "deep", "awake"),
    "sleep.state": Draft("tentative", "confirmed"),
    "score": Between(40, 99),
    "recovery_readiness_score": Between(40, 99),
    "hr_lowest": Between(40, 52),
    "hr_average": Between(53, 68),
    "hr_resting": Between(48, 58),
    "hr_dip": Between(5, 20, 1),
    "efficiency": Between(80, 98, 1),
    "latency": Between(120, 1800),
    "temperature_delta": Between(-1, 1, 2),
    "skin_temperature": Between(33, 36, 1),
    "average_hrv": Between(20, 110, 1),
    "respiratory_rate": Between(11, 19, 1),
    "sleep_cycle.sleep_id": Link("sleep"),
    "sleep_cycle.session_start": At(-28800),
    "sleep_cycle.session_end": At(),
    "workouts.title": OneOf("Morning session", "Lunch break", "Evening session"),
    "workouts.time_start": At(),
    "workouts.time_end": At(3600),
    "workouts.moving_time": Between(2400, 3500),
    "workouts.steps": Between(0, 9000),
    "average_hr": Between(105, 150),
    "max_hr": Between(155, 190),
    "calories": Between(150, 900, 1),
    "total_elevation_gain": Between(0, 600, 1),
    "elev_high": Between(150, 900, 1),
    "elev_low": Between(0, 140, 1),
    "average_speed": Between(1.5, 8, 2),
    "max_speed": Between(8.5, 16, 2),
    "average_watts": Between(80, 260, 1),
    "device_watts": Between(80, 260, 1),
    "max_watts": Between(300, 900, 1),
    "weighted_average_watts": Between(90, 280, 1),
    "body.weight": Between(48, 120, 1),
    "body.fat": Between(8, 38, 1),
    "water_percentage": Between(45, 65, 1),
    "muscle_mass_percentage": Between(30, 55, 1),
    "visceral_fat_index": Between(1, 15, 1),
    "bone_mass_percentage": Between(2, 5, 1),
    "body_mass_index": Between(18, 34, 1),
    "lean_body_mass_kilogram": Between(38, 80, 1),
    "waist_circumference_centimeter": Between(62, 115, 1),
    "profile.height": Between(150, 198),
    "profile.birth_date": OneOf("1961-11-30", "1978-02-14", "1990-05-17", "2001-08-03"),
    "profile.gender": OneOf("female", "male", "other"),
    "profile.sex": OneOf("female", "male"),
    "meal.priority_id": 1,
    "meal.source_id": 10,
    "meal.timestamp": At(),
    "meal.name": OneOf("Breakfast", "Lunch", "Dinner", "Snack"),
    "menstrual_cycle.period_start": Day(),
    "menstrual_cycle.period_end": Day(5),
    "menstrual_cycle.cycle_end": Day(27),
    "menstrual_cycle.is_predicted": OneOf(False, False, True),
    "electrocardiogram.session_start": At(),
    "electrocardiogram.session_end": At(30),
    "electrocardiogram.classification": OneOf("sinus_rhythm", "sinus_rhythm", "atrial_fibrillation"),
    "electrocardiogram.inconclusive_cause": None,
    "electrocardiogram.algorithm_version": "2",
    "electrocardiogram.sampling_frequency_hz": 512.0,
    "electrocardiogram.voltage_sample_count": 15360,
    "heart_rate_mean": Between(52, 110),
    "device.app_id": None,
    "device_manufacturer": Known("device_manufacturer"),
    "device_model": Known("device_model"),
    "device_version": "3.2",
    "device_id": Known("device_id"),
}

# For a field that stands nowhere above, so that a new row of the catalogue is served without a change here.
BY_TYPE: dict[str, Any] = {
    "text": OneOf("first", "second", "third"),
    "integer": Between(1, 100),
    "number": Between(1, 100, 1),
    "boolean": OneOf(False, True),
    "date": Day(),
    "datetime": At(),
}

# The parts of a record that are no scalars, and so have no column of their own.
EXTRAS: dict[str, dict[str, Any]] = {
    "activity": {
        "heart_rate": {
            "avg_bpm": Between(62, 92),
            "avg_walking_bpm": Between(85, 110),
            "max_bpm": Between(130, 185),
            "min_bpm": Between(40, 55),
            "resting_bpm": Between(48, 62),
        }
    },
    "workouts": {
        "sport": WORKOUT_SPORT,
        "hr_zones": [Between(0, 900) for _ in range(6)],
        "map": {"summary_polyline": "agn~Ftb{uOvr@daBunBjdBkHwiD", "polyline": None},
    },
    "sleep_cycle": {
        "stage_start_offset_second": [number * 3600 for number in range(8)],
        "stage_end_offset_second": [(number + 1) * 3600 for number in range(8)],
        "stage_type": [Between(1, 4) for _ in range(8)],
    },
    "meal": {
        "energy": {"unit": "kcal", "value": Between(180, 900, 1)},
        "macros": {"carbs": Between(10, 90, 1), "protein": Between(5, 50, 1), "fats": {"total": Between(3, 40, 1)}},
        "micros": {"minerals": {"iron": Between(0, 8, 1)}, "trace_elements": None, "vitamins": None},
        "data": {"Oat porridge": {"energy": {"unit": "kcal", "value": Between(150, 400, 1)}}},
    },
    "menstrual_cycle": {
        "menstrual_flow": [{"date": Day(), "flow": "medium"}, {"date": Day(1), "flow": "heavy"}],
        "sexual_activity": [],
        "basal_body_temperature": [{"date": Day(), "value": Between(36, 37, 2)}],
    },
}

# What a stream endpoint answers, as columns or lists.
STREAMS: dict[str, dict[str, Any]] = {
    "workout_stream": {
        "time": Many(120, 30, Unix()),
        "heartrate": Many(120, 30, OneOf(*[Between(100, 185)] * 9, None)),
        "distance": Many(120, 30, Between(0, 12000, 1)),
        "cadence": Many(120, 30, OneOf(*[Between(70, 95, 1)] * 9, None)),
        "velocity_smooth": Many(120, 30, Between(1.5, 8, 2)),
        "altitude": Many(120, 30, Between(20, 300, 1)),
        "power": [],
        "lat": [],
        "lng": [],
        "resistance": [],
        "temperature": [],
    },
    "sleep_stream": {
        "hrv": Many(16, 1800, {"timestamp": At(-28800), "unit": "rmssd", "value": Between(20, 110)}),
        "heartrate": Many(96, 300, {"timestamp": At(-28800), "unit": "bpm", "value": Between(42, 68)}),
        "respiratory_rate": Many(16, 1800, {"timestamp": At(-28800), "unit": "bpm", "value": Between(11, 19, 1)}),
        "hypnogram": None,
    },
}

# What a stream's notice carries, beside its source: the stream itself is only ever fetched.
NOTICES: dict[str, dict[str, Any]] = {
    "workout_stream": {"provider_id": Digits(), "sport": WORKOUT_SPORT, "message": "available through the API"},
}


def shape_of(resource: Resource, column: Field) -> Any:
    """What a field of a resource holds."""
    fallback = FIELDS.get(column.name, BY_TYPE[column.type])
    return FIELDS.get(f"{resource.name}.{column.name}", fallback)
