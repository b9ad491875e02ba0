"""Terra's types: when their objects fall, and what they hold, as data. Names and units are those of its document."""

from dataclasses import dataclass, field
from typing import Any

from workers.simulator.shapes import At, Between, Day, Digits, Known, OneOf
from workers.simulator.terra.shapes import Added, Course, Mean, Only, Spent

DAY_HOURS = 24.0


@dataclass(frozen=True)
class Kind:
    """A type of object: one in `every` so many days, from `hour` of the day on and up to `jitter` hours later."""

    name: str
    description: Any = field(hash=False)
    every: int = 1
    hour: float = 0.0  # below 0: on the evening before
    jitter: float = 0.0
    lasts: tuple[float, float] = (DAY_HOURS, DAY_HOURS)  # hours
    is_running: bool = False  # told while it lasts, and not only when it is over
    extends: float = 0.0  # hours that each correction adds to it
    path: str = ""  # where the read API has it, if not under its name


METADATA = {"start_time": At(), "end_time": Known("end_time"), "timestamp_localization": 1}
SUMMARY_ID = {"summary_id": Known("summary_id")}
DEVICE = {"name": Known("device"), "manufacturer": Known("manufacturer"), "other_devices": []}


def _heart(hours: tuple[float, float], every: float, low: int, high: int, *, nightly: bool = False) -> dict[str, Any]:
    """Heart rates in bpm; in sleep also their variability, in milliseconds."""
    rates = Course("hr", every, {"bpm": Between(low, high)}, hours)
    changes = Course("rmssd", 1800, {"hrv_rmssd": Between(20, 110, 1)}, hours)
    return {
        "summary": {
            "avg_hr_bpm": Mean(rates, "bpm"),
            "max_hr_bpm": high,
            "min_hr_bpm": low,
            "resting_hr_bpm": Between(45, 58),
            "avg_hrv_rmssd": Mean(changes, "hrv_rmssd") if nightly else None,
            "avg_hrv_sdnn": None,
            "user_max_hr_bpm": None,
            "hr_zone_data": [],
        },
        "detailed": {
            "hr_samples": rates,
            "hrv_samples_rmssd": changes if nightly else [],
            "hrv_samples_sdnn": [],
        },
    }


def _saturation(hours: tuple[float, float]) -> dict[str, Any]:
    samples = Course("saturation", 3600, {"percentage": Between(92, 100), "type": 0}, hours)
    return {"avg_saturation_percentage": Mean(samples, "percentage"), "samples": samples}


AWAKE_HOURS = (7.0, 22.0)
STEPS = Course("steps", 900, {"steps": Between(0, 700), "timer_duration_seconds": 900}, AWAKE_HOURS, grows="steps")
METERS = Course("meters", 900, {"distance_meters": Between(0, 500, 1)}, AWAKE_HOURS, grows="distance_meters")
FLOORS = Course("floors", 7200, {"floors_climbed": Between(0, 3)}, AWAKE_HOURS, grows="floors_climbed")
STRESS = Course("stress", 3600, {"level": Between(5, 95)})
NIGHT_OXYGEN = _saturation((0.0, 7.0))

DAILY = {
    "metadata": METADATA | {"upload_type": 1},
    "device_data": DEVICE,
    "distance_data": {
        "steps": Added(STEPS, "steps"),
        "distance_meters": Added(METERS, "distance_meters"),
        "floors_climbed": Added(FLOORS, "floors_climbed"),
        "elevation": None,
        "swimming": None,
        "detailed": {
            "step_samples": STEPS,
            "distance_samples": METERS,
            "floors_climbed_samples": FLOORS,
            "elevation_samples": [],
        },
    },
    "calories_data": {
        "total_burned_calories": Between(1600, 3400, 1),
        "BMR_calories": Between(1100, 1900, 1),
        "net_activity_calories": Between(120, 1200, 1),
        "net_intake_calories": None,
        "calorie_samples": [],
    },
    "active_durations_data": {
        "activity_seconds": Between(1800, 9000),
        "low_intensity_seconds": Between(1200, 7200),
        "moderate_intensity_seconds": Between(600, 3600),
        "vigorous_intensity_seconds": Between(0, 1800),
        "activity_levels_samples": [],
    },
    "heart_rate_data": _heart((0.0, DAY_HOURS), 900, 45, 150),
    "stress_data": {
        "avg_stress_level": Mean(STRESS, "level"),
        "max_stress_level": 95,
        "samples": STRESS,
        "body_battery_samples": Course("battery", 7200, {"level": Between(5, 100)}),
    },
    "oxygen_data": {
        "avg_saturation_percentage": NIGHT_OXYGEN["avg_saturation_percentage"],
        "saturation_samples": NIGHT_OXYGEN["samples"],
        "vo2_samples": [],
        "vo2max_ml_per_min_per_kg": Between(32, 58, 1),
    },
    "data_enrichment": {"total_stress_score": Between(10, 90), "strain_traffic_light": OneOf("GREEN", "AMBER")},
    "scores": None,
    "MET_data": None,
    "strain_data": None,
    "tag_data": None,
}

# 1 awake, 4 light, 5 deep, 6 REM
HYPNOGRAM = Course("hypnogram", 900, {"level": OneOf(1, 4, 4, 4, 5, 5, 6)})
BREATHS = Course("breaths", 1800, {"breaths_per_min": Between(11, 18, 1)})

SLEEP = {
    "metadata": METADATA | SUMMARY_ID | {"is_nap": False, "upload_type": 2},
    "device_data": DEVICE,
    "sleep_durations_data": {
        "asleep": {
            "duration_asleep_state_seconds": Spent(HYPNOGRAM, (4, 5, 6)),
            "duration_light_sleep_state_seconds": Spent(HYPNOGRAM, (4,)),
            "duration_deep_sleep_state_seconds": Spent(HYPNOGRAM, (5,)),
            "duration_REM_sleep_state_seconds": Spent(HYPNOGRAM, (6,)),
            "num_REM_events": Between(2, 6),
        },
        "awake": {
            "duration_awake_state_seconds": Spent(HYPNOGRAM, (1,)),
            "num_wakeup_events": Between(0, 6),
            "sleep_latency_seconds": Between(120, 1800),
        },
        "other": {"duration_in_bed_seconds": Spent(HYPNOGRAM, (1, 4, 5, 6)), "duration_unmeasurable_sleep_seconds": 0},
        "sleep_efficiency": Between(80, 98, 1),
        "hypnogram_samples": HYPNOGRAM,
    },
    "heart_rate_data": _heart((0.0, DAY_HOURS), 600, 42, 68, nightly=True),
    "respiration_data": {
        "breaths_data": {
            "avg_breaths_per_min": Mean(BREATHS, "breaths_per_min"),
            "min_breaths_per_min": 11.0,
            "max_breaths_per_min": 18.0,
            "on_demand_reading": False,
            "samples": BREATHS,
        },
        "oxygen_saturation_data": _saturation((0.0, DAY_HOURS)),
        "snoring_data": None,
    },
    "temperature_data": {"delta": Between(-1, 1, 2)},
    "readiness_data": {"readiness": Between(40, 99), "recovery_level": None},
    "scores": {"sleep": Between(40, 99)},
    "data_enrichment": {"sleep_score": Between(40, 99)},
}

RIDDEN = Course(
    "ridden",
    60,
    {"distance_meters": Between(80, 600, 1), "timer_duration_seconds": 60},
    grows="distance_meters",
)
WATTS = Course("watts", 60, {"watts": Between(80, 320)})
CADENCE = Course("cadence", 60, {"cadence_rpm": Between(60, 100)})
SPEED = Course("speed", 60, {"speed_meters_per_second": Between(1.5, 10, 2)})

ACTIVITY = {
    "metadata": METADATA
    | SUMMARY_ID
    | {
        "name": OneOf("Morning session", "Lunch break", "Evening session"),
        "type": OneOf(0, 1, 7, 8, 18, 82),
        "upload_type": 1,
        "city": None,
        "state": None,
        "country": None,
    },
    "device_data": DEVICE,
    "active_durations_data": {
        "activity_seconds": Between(1500, 3600),
        "low_intensity_seconds": Between(100, 600),
        "moderate_intensity_seconds": Between(300, 1200),
        "vigorous_intensity_seconds": Between(0, 600),
        "rest_seconds": 0,
        "activity_levels_samples": [],
    },
    "calories_data": {
        "total_burned_calories": Between(150, 900, 1),
        "net_activity_calories": Between(100, 800, 1),
        "BMR_calories": Between(20, 90, 1),
        "calorie_samples": [],
    },
    "distance_data": {
        "summary": {
            "distance_meters": Added(RIDDEN, "distance_meters"),
            "steps": None,
            "floors_climbed": None,
            "elevation": None,
            "swimming": None,
        },
        "detailed": {
            "distance_samples": RIDDEN,
            "elevation_samples": [],
            "floors_climbed_samples": [],
            "step_samples": [],
        },
    },
    "heart_rate_data": _heart((0.0, DAY_HOURS), 60, 90, 185),
    "movement_data": {
        "avg_cadence_rpm": Mean(CADENCE, "cadence_rpm"),
        "max_cadence_rpm": 100.0,
        "avg_speed_meters_per_second": Mean(SPEED, "speed_meters_per_second"),
        "max_speed_meters_per_second": 10.0,
        "cadence_samples": CADENCE,
        "speed_samples": SPEED,
        "torque_samples": [],
    },
    "power_data": {"avg_watts": Mean(WATTS, "watts"), "max_watts": 320.0, "power_samples": WATTS},
    "work_data": {"work_kilojoules": Between(120, 900, 1)},
    "data_enrichment": None,
}

ON_A_SCALE = {
    "weight_kg": Between(48, 120, 2),
    "bodyfat_percentage": Between(8, 38, 1),
    "BMI": Between(18, 34, 1),
    "height_cm": None,
    "bone_mass_g": Between(2200, 3600),
    "muscle_mass_g": Between(38000, 64000),
    "lean_mass_g": Between(38000, 80000),
    "water_percentage": Between(45, 65, 1),
}
PRESSURE = {"systolic_bp": Between(100, 150), "diastolic_bp": Between(60, 95)}
GLUCOSE = Course(
    "glucose",
    900,
    {"blood_glucose_mg_per_dL": Between(65, 190), "glucose_level_flag": 0, "trend_arrow": OneOf(2, 3, 4)},
)
TWICE_A_DAY = (6.5, 22.0)

BODY = {
    "metadata": METADATA,
    "device_data": DEVICE,
    "measurements_data": Only(
        ("WITHINGS",),
        {"measurements": Course("scale", 14 * 3600, ON_A_SCALE, TWICE_A_DAY, time="measurement_time")},
    ),
    "blood_pressure_data": Only(
        ("WITHINGS",), {"blood_pressure_samples": Course("pressure", 14 * 3600, PRESSURE, TWICE_A_DAY)}
    ),
    "glucose_data": Only(
        ("FREESTYLELIBRE",),
        {
            "blood_glucose_samples": GLUCOSE,
            "detailed_blood_glucose_samples": [],
            "day_avg_blood_glucose_mg_per_dL": Mean(GLUCOSE, "blood_glucose_mg_per_dL"),
        },
    ),
    "temperature_data": Only(
        ("GARMIN", "WITHINGS"),
        {
            "body_temperature_samples": Course(
                "temperature", 12 * 3600, {"temperature_celsius": Between(36, 37.4, 1)}, TWICE_A_DAY
            ),
            "ambient_temperature_samples": [],
            "skin_temperature_samples": [],
        },
    ),
    "hydration_data": Only(("GARMIN",), {"day_total_water_consumption_ml": 1800, "hydration_amount_samples": []}),
    "heart_data": None,
    "oxygen_data": None,
    "ketone_data": None,
}

MACROS = {
    "calories": Between(180, 900),
    "protein_g": Between(5, 50, 1),
    "carbohydrates_g": Between(10, 90, 1),
    "fat_g": Between(3, 40, 1),
}
MEAL = {
    "id": Digits(),
    "name": OneOf("Porridge", "Soup", "Curry", "Salad"),
    "type": OneOf(1, 3, 5),
    "quantity": {"unit": 1, "amount": Between(80, 500)},
    "macros": MACROS,
    "micros": {"calcium_mg": Between(20, 300)},
}
DRINKS = Course(
    "drinks",
    4 * 3600,
    {"drink_name": OneOf("Water", "Coffee"), "drink_volume": Between(150, 400), "drink_unit": 8},
    (8.0, 21.0),
)

NUTRITION = {
    "metadata": METADATA,
    "meals": Course("meals", 5.5 * 3600, MEAL, (8.0, 20.0)),
    "drink_samples": DRINKS,
    "summary": {
        "macros": {name: Between(100, 250, 1) for name in ("protein_g", "carbohydrates_g", "fat_g")},
        "micros": {"caffeine_mg": Between(0, 300)},
        "water_ml": Added(DRINKS, "drink_volume"),
        "drink_ml": Added(DRINKS, "drink_volume"),
    },
}

MENSTRUATION = {
    "metadata": METADATA,
    "menstruation_data": {
        "period_start_date": Known("period_start"),
        "day_in_cycle": Known("day_in_cycle"),
        "period_length_days": 5,
        "cycle_length_days": 28,
        "predicted_cycle_length_days": 28,
        "is_predicted_cycle": False,
        "menstruation_flow": [{"timestamp": At(), "flow": OneOf(2, 3, 4)}],
        "intervals": [],
    },
}

PLANNED_WORKOUT = {
    "planned_workout_id": Known("summary_id"),
    "workout_id": Digits(18),
    "planned_date": Day(1),
    "provider_workout_id": Digits(6),
    "coercion_warnings": None,
    "created_at": At(),
    "last_updated_at": At(step=60),
    "is_external": False,
    "athlete_metrics": None,
    "details": None,
}

ATHLETE = {
    "first_name": OneOf("Ada", "Bo", "Chi"),
    "last_name": "Example",
    "sex": OneOf("female", "male"),
    "gender": OneOf("female", "male", "other"),
    "date_of_birth": OneOf("1961-11-30", "1978-02-14", "1990-05-17", "2001-08-03"),
    "age": None,
    "email": None,
    "city": OneOf("Leeds", "Ghent", None),
    "state": None,
    "country": None,
    "bio": None,
    "account_creation_date": None,
    "provider_user_id": Digits(),
}

KINDS = {
    kind.name: kind
    for kind in (
        Kind("activity", ACTIVITY, every=2, hour=7, jitter=11, lasts=(0.5, 1.0)),
        Kind("daily", DAILY, is_running=True),
        Kind("sleep", SLEEP, hour=-1.5, jitter=1.5, lasts=(6.5, 8.5), extends=0.25),
        Kind("body", BODY, is_running=True),
        Kind("nutrition", NUTRITION, is_running=True),
        Kind("menstruation", MENSTRUATION),
        Kind("planned_workout", PLANNED_WORKOUT, every=3, hour=9, lasts=(1.0, 1.0), path="plannedWorkouts"),
    )
}
