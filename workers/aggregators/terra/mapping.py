"""What of Terra's objects has a place of its own, as tables. The rest stays in the payload, and in it nothing is lost.

Names and units are those of Terra's public document (info.version 2026.07.17.1), and of app/catalogue.toml. A path
leads from the object inwards; `[]` stands for each item of an array.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MINUTES = 1 / 60  # of seconds
KILOGRAMS = 1 / 1000  # of grams
MMOL_PER_L = 1 / 18.016  # of mg/dL of glucose

# Terra's sleep levels in Junction's numbers. Asleep in an unknown stage and out of bed have none of their own.
STAGES = {0: -1, 1: 4, 2: -1, 3: 4, 4: 2, 5: 1, 6: 3}
INEXACT_STAGES = (2, 3)


@dataclass(frozen=True)
class Scaled:
    """A number in another unit."""

    path: str
    factor: float


@dataclass(frozen=True)
class Newest:
    """Of an array, the value that was measured last."""

    path: str
    time: str
    factor: float = 1.0


Derived = Literal["offset", "seconds"]  # from when the object begins and ends


@dataclass(frozen=True)
class Derive:
    """What follows from when the object begins and ends: the offset of the first, or the seconds between."""

    what: Derived


Column = str | Scaled | Newest | Derive  # text: the path of the value, which is read as the column's type wants


@dataclass(frozen=True)
class Series:
    """Samples of a resource: the values of an array, or (a path without `[]`) one value for its whole time."""

    resource: str
    path: str
    unit: str
    factor: float = 1.0
    form: Literal["plain", "running total", "stages"] = "plain"
    time: str = "timestamp"
    subtype: str | None = None  # where the item says what tells it from others of the moment
    unless: tuple[str, float] | None = None  # a name, and the number that makes the item something else
    pair: tuple[str, str] | None = None  # names of two values, in the order of the resource's columns, at the path


@dataclass(frozen=True)
class DataType:
    """A type of Terra's: what tells its objects apart (4.1 of its dossier), what they are read for."""

    key: tuple[str, ...] = ()  # the first of these that is there
    otherwise: Literal["day", "times", "user", "nothing"] = "nothing"  # what stands for it, if none is
    columns: Mapping[str, Column] | None = None
    series: tuple[Series, ...] = ()
    start: str | None = "metadata.start_time"
    end: str | None = "metadata.end_time"
    retracted: tuple[str, float] | None = None  # a path, and the number there that takes the object back


def _heart(at: str) -> tuple[Series, ...]:
    """SDNN is another quantity than RMSSD, which is what `hrv` holds, so it has a resource of its own."""
    return (
        Series("heartrate", f"{at}.detailed.hr_samples[].bpm", "bpm"),
        Series("hrv", f"{at}.detailed.hrv_samples_rmssd[].hrv_rmssd", "rmssd"),
        Series("terra_hrv_sdnn", f"{at}.detailed.hrv_samples_sdnn[].hrv_sdnn", "ms"),
    )


MUSCLE = ("type", 1)  # oxygen in muscle, not in blood
OXYGEN = (
    Series("blood_oxygen", "oxygen_data.saturation_samples[].percentage", "%", unless=MUSCLE),
    Series("vo2_max", "oxygen_data.vo2_samples[].vo2max_ml_per_min_per_kg", "mL/kg/min"),
)
MOVEMENT = (
    Series("steps", "distance_data.detailed.step_samples[].steps", "count", form="running total"),
    Series("distance", "distance_data.detailed.distance_samples[].distance_meters", "m", form="running total"),
    Series(
        "floors_climbed",
        "distance_data.detailed.floors_climbed_samples[].floors_climbed",
        "count",
        form="running total",
    ),
    Series("calories_active", "calories_data.calorie_samples[].calories", "kcal"),
)


def _measured(resource: str, name: str, unit: str, factor: float = 1.0, subtype: str | None = None) -> Series:
    path = f"measurements_data.measurements[].{name}"
    return Series(resource, path, unit, factor, time="measurement_time", subtype=subtype)


def _last_measured(name: str, factor: float = 1.0) -> Newest:
    return Newest(f"measurements_data.measurements[].{name}", "measurement_time", factor)


TYPES: Mapping[str, DataType] = {
    "activity": DataType(
        key=("metadata.summary_id",),
        columns={
            "title": "metadata.name",
            "timezone_offset": Derive("offset"),
            "average_hr": "heart_rate_data.summary.avg_hr_bpm",
            "max_hr": "heart_rate_data.summary.max_hr_bpm",
            "distance": "distance_data.summary.distance_meters",
            "calendar_date": "metadata.start_time",
            "time_start": "metadata.start_time",
            "time_end": "metadata.end_time",
            "calories": "calories_data.total_burned_calories",
            "moving_time": "active_durations_data.activity_seconds",
            "total_elevation_gain": "distance_data.summary.elevation.gain_actual_meters",
            "elev_high": "distance_data.summary.elevation.max_meters",
            "elev_low": "distance_data.summary.elevation.min_meters",
            "average_speed": "movement_data.avg_speed_meters_per_second",
            "max_speed": "movement_data.max_speed_meters_per_second",
            "average_watts": "power_data.avg_watts",
            "max_watts": "power_data.max_watts",
            "steps": "distance_data.summary.steps",
        },
        series=(*_heart("heart_rate_data"), *OXYGEN, *MOVEMENT),
        retracted=("metadata.upload_type", 4),
    ),
    "daily": DataType(  # the same enumeration; that a day was deleted is said nowhere, so it is not believed
        otherwise="day",
        columns={
            "calendar_date": "metadata.start_time",
            "calories_total": "calories_data.total_burned_calories",
            "calories_active": "calories_data.net_activity_calories",
            "steps": "distance_data.steps",
            "distance": "distance_data.distance_meters",
            "low": Scaled("active_durations_data.low_intensity_seconds", MINUTES),
            "medium": Scaled("active_durations_data.moderate_intensity_seconds", MINUTES),
            "high": Scaled("active_durations_data.vigorous_intensity_seconds", MINUTES),
            "floors_climbed": "distance_data.floors_climbed",
            "timezone_offset": Derive("offset"),
        },
        series=(
            *_heart("heart_rate_data"),
            *OXYGEN,
            *MOVEMENT,
            Series("stress_level", "stress_data.samples[].level", "%"),
        ),
    ),
    "sleep": DataType(  # its upload_type is another enumeration, in which nothing means "deleted"
        key=("metadata.summary_id",),
        otherwise="times",
        columns={
            "calendar_date": "metadata.end_time",  # Junction's is the day on which one wakes up
            "bedtime_start": "metadata.start_time",
            "bedtime_stop": "metadata.end_time",
            "timezone_offset": Derive("offset"),
            "duration": Derive("seconds"),
            "total": "sleep_durations_data.asleep.duration_asleep_state_seconds",
            "awake": "sleep_durations_data.awake.duration_awake_state_seconds",
            "light": "sleep_durations_data.asleep.duration_light_sleep_state_seconds",
            "rem": "sleep_durations_data.asleep.duration_REM_sleep_state_seconds",
            "deep": "sleep_durations_data.asleep.duration_deep_sleep_state_seconds",
            "score": "scores.sleep",
            "recovery_readiness_score": "readiness_data.readiness",
            "hr_lowest": "heart_rate_data.summary.min_hr_bpm",
            "hr_average": "heart_rate_data.summary.avg_hr_bpm",
            "hr_resting": "heart_rate_data.summary.resting_hr_bpm",
            "efficiency": "sleep_durations_data.sleep_efficiency",
            "latency": "sleep_durations_data.awake.sleep_latency_seconds",
            "temperature_delta": "temperature_data.delta",
            "average_hrv": "heart_rate_data.summary.avg_hrv_rmssd",
            "respiratory_rate": "respiration_data.breaths_data.avg_breaths_per_min",
        },
        series=(
            *_heart("heart_rate_data"),
            Series("respiratory_rate", "respiration_data.breaths_data.samples[].breaths_per_min", "bpm"),
            Series(
                "blood_oxygen",
                "respiration_data.oxygen_saturation_data.samples[].percentage",
                "%",
                unless=MUSCLE,
            ),
            Series("hypnogram", "sleep_durations_data.hypnogram_samples[].level", "", form="stages"),
            Series("body_temperature_delta", "temperature_data.delta", "°C"),
        ),
    ),
    "body": DataType(
        otherwise="day",
        columns={
            "calendar_date": "metadata.start_time",
            "weight": _last_measured("weight_kg"),
            "fat": _last_measured("bodyfat_percentage"),
            "water_percentage": _last_measured("water_percentage"),
            "body_mass_index": _last_measured("BMI"),
            "lean_body_mass_kilogram": _last_measured("lean_mass_g", KILOGRAMS),
        },
        series=(
            *_heart("heart_data.heart_rate_data"),
            *OXYGEN,
            Series(
                "blood_pressure",
                "blood_pressure_data.blood_pressure_samples[]",
                "mmHg",
                pair=("systolic_bp", "diastolic_bp"),
            ),
            # Both may hold the same moments: what is sampled more often is taken then.
            Series("glucose", "glucose_data.blood_glucose_samples[].blood_glucose_mg_per_dL", "mmol/L", MMOL_PER_L),
            Series(
                "glucose",
                "glucose_data.detailed_blood_glucose_samples[].blood_glucose_mg_per_dL",
                "mmol/L",
                MMOL_PER_L,
            ),
            Series("body_temperature", "temperature_data.body_temperature_samples[].temperature_celsius", "°C"),
            Series("water", "hydration_data.day_total_water_consumption_ml", "ml"),
            _measured("weight", "weight_kg", "kg"),
            _measured("fat", "bodyfat_percentage", "%"),
            _measured("body_mass_index", "BMI", "index"),
            _measured("lean_body_mass", "lean_mass_g", "kg", KILOGRAMS),
            _measured("insulin_injection", "insulin_units", "unit", subtype="insulin_type"),
        ),
    ),
    "nutrition": DataType(  # what was eaten is told by the food, several at one moment: the day's sums are taken
        otherwise="day",
        columns={"calendar_date": "metadata.start_time", "timestamp": "metadata.start_time"},
        series=(
            Series("water", "summary.water_ml", "ml"),
            Series("caffeine", "summary.micros.caffeine_mg", "g", 1 / 1000),
            Series("carbohydrates", "summary.macros.carbohydrates_g", "g"),
        ),
    ),
    "menstruation": DataType(
        otherwise="day",
        columns={
            "period_start": "menstruation_data.period_start_date",
            "is_predicted": "menstruation_data.is_predicted_cycle",
        },
    ),
    "athlete": DataType(
        otherwise="user",
        columns={"birth_date": "date_of_birth", "gender": "gender", "sex": "sex"},
        start=None,
        end=None,
    ),
    "planned_workout": DataType(  # three of Terra's own sources name three ids
        key=(
            "planned_workout_id",
            "provider_workout_id",
            "metadata.id",
            "metadata.summary_id",
            "summary_id",
        ),
        columns={
            "planned_date": "planned_date",
            "title": "details.metadata.name",
            "workout_id": "workout_id",
            "provider_workout_id": "provider_workout_id",
            "is_external": "is_external",
            "coercion_warnings": "coercion_warnings",
            "created_at": "created_at",
            "updated_at": "last_updated_at",
        },
        start=None,
        end=None,
    ),
    "hormone": DataType(
        key=("timestamp",),
        columns={
            "timestamp": "timestamp",
            "lh_miu_per_ml": "lh_mIU_per_ml",
            "e3g_ng_per_ml": "e3g_ng_per_ml",
            "pdg_ug_per_ml": "pdg_ug_per_ml",
            "hcg_miu_per_ml": "hcg_mIU_per_ml",
            "fsh_miu_per_ml": "fsh_mIU_per_ml",
        },
        start="timestamp",
        end=None,
    ),
    "health_observation": DataType(
        key=("metadata.summary_id",),
        columns={
            "time_start": "metadata.start_time",
            "time_end": "metadata.end_time",
            "observation_type": "observation_data.observation_type",
            "category": "observation_data.category",
            "severity": "observation_data.severity",
            "status": "observation_data.status",
            "quantity": "observation_data.value.quantity",
            "unit": "observation_data.value.unit",
            "notes": "observation_data.notes",
        },
        retracted=("observation_data.status", 3),
    ),
}
