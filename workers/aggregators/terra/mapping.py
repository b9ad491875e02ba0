"""The fields of Terra's objects that become columns and samples, as tables. All other fields stay in the payload only.

Names and units are those of Terra's public document (info.version 2026.07.17.1) and of app/catalogue.toml. A path leads
from the object inwards. The tables follow sections 4.1 (keys) and 5 (resources) of the notes on Terra.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Literal

MINUTES = 1 / 60  # of seconds
KILOGRAMS = 1 / 1000  # of grams
GRAMS = 1 / 1000  # of milligrams
MMOL_PER_L = 1 / 18.016  # of mg/dL of glucose

# Terra's sleep levels in Junction's numbers. Junction has no number for "asleep, stage unknown" and "out of bed".
STAGES = {0: -1, 1: 4, 2: -1, 3: 4, 4: 2, 5: 1, 6: 3}
INEXACT_STAGES = (2, 3)

START, END, SUMMARY_ID = "metadata.start_time", "metadata.end_time", "metadata.summary_id"
PRESSURE, PAIR = "blood_pressure_data.blood_pressure_samples", ("systolic_bp", "diastolic_bp")
MEASUREMENTS, MEASURED_AT = "measurements_data.measurements", "measurement_time"


class Derived(Enum):
    """A column that follows from the start and end of the object."""

    OFFSET = "seconds east of UTC at the start"
    DURATION = "seconds from the start to the end"


@dataclass(frozen=True)
class Scaled:
    """A number in another unit."""

    path: str
    factor: float


@dataclass(frozen=True)
class Newest:
    """The value in an array that was measured last."""

    array: str
    time: str
    value: str
    factor: float = 1.0


Column = str | Scaled | Newest | Derived  # a text is the path of the value


@dataclass(frozen=True)
class Values:
    """Samples of a resource: one for each item of an array."""

    resource: str
    array: str
    value: str | tuple[str, str]  # two values of one moment, in the order of the resource's columns
    unit: str
    factor: float = 1.0
    form: Literal["plain", "running total", "stages", "pairs"] = "plain"
    time: str = "timestamp"
    subtype: str | None = None  # the field that distinguishes items of one moment
    unless: tuple[str, float] | None = None  # a field, and its number in items that are another quantity

    @property
    def names(self) -> tuple[str, ...]:
        """The fields of an item that hold its value or values."""
        return (self.value,) if isinstance(self.value, str) else self.value


@dataclass(frozen=True)
class Whole:
    """One sample that covers the time of the object."""

    resource: str
    path: str
    unit: str
    factor: float = 1.0


Series = Values | Whole


@dataclass(frozen=True)
class DataType:
    """One of Terra's types: the key of its objects, their columns and their samples."""

    columns: Mapping[str, Column]
    series: tuple[Series, ...] = ()
    key: tuple[str, ...] = ()  # paths; the first that has a value is the key
    otherwise: Literal["day", "times", "user", "nothing"] = "nothing"  # the key if no path has a value
    start: str | None = START
    end: str | None = END
    retracted: tuple[str, float] | None = None  # a path, and its number in an object that Terra retracts


def _heart(at: str) -> tuple[Series, ...]:
    """SDNN is another quantity than RMSSD, which `hrv` holds, so it has a resource of its own."""
    return (
        Values("heartrate", f"{at}.detailed.hr_samples", "bpm", "bpm"),
        Values("hrv", f"{at}.detailed.hrv_samples_rmssd", "hrv_rmssd", "rmssd"),
        Values("terra_hrv_sdnn", f"{at}.detailed.hrv_samples_sdnn", "hrv_sdnn", "ms"),
    )


_total = partial(Values, form="running total")
_oxygen = partial(Values, "blood_oxygen", value="percentage", unit="%", unless=("type", 1))  # 1: in muscle, not blood
_glucose = partial(Values, "glucose", value="blood_glucose_mg_per_dL", unit="mmol/L", factor=MMOL_PER_L)
_measured = partial(Values, array=MEASUREMENTS, time=MEASURED_AT)
_newest = partial(Newest, MEASUREMENTS, MEASURED_AT)

OXYGEN: tuple[Series, ...] = (
    _oxygen("oxygen_data.saturation_samples"),
    Values("vo2_max", "oxygen_data.vo2_samples", "vo2max_ml_per_min_per_kg", "mL/kg/min"),
)
MOVEMENT: tuple[Series, ...] = (
    _total("steps", "distance_data.detailed.step_samples", "steps", "count"),
    _total("distance", "distance_data.detailed.distance_samples", "distance_meters", "m"),
    _total("floors_climbed", "distance_data.detailed.floors_climbed_samples", "floors_climbed", "count"),
    Values("calories_active", "calories_data.calorie_samples", "calories", "kcal"),
)

TYPES: Mapping[str, DataType] = {
    "activity": DataType(
        key=(SUMMARY_ID,),
        columns={
            "title": "metadata.name",
            "timezone_offset": Derived.OFFSET,
            "average_hr": "heart_rate_data.summary.avg_hr_bpm",
            "max_hr": "heart_rate_data.summary.max_hr_bpm",
            "distance": "distance_data.summary.distance_meters",
            "calendar_date": START,
            "time_start": START,
            "time_end": END,
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
    "daily": DataType(  # has the same upload_type, of which 4 says that a workout was deleted (OpenAPI), so not the day
        otherwise="day",
        columns={
            "calendar_date": START,
            "calories_total": "calories_data.total_burned_calories",
            "calories_active": "calories_data.net_activity_calories",
            "steps": "distance_data.steps",
            "distance": "distance_data.distance_meters",
            "low": Scaled("active_durations_data.low_intensity_seconds", MINUTES),
            "medium": Scaled("active_durations_data.moderate_intensity_seconds", MINUTES),
            "high": Scaled("active_durations_data.vigorous_intensity_seconds", MINUTES),
            "floors_climbed": "distance_data.floors_climbed",
            "timezone_offset": Derived.OFFSET,
        },
        series=(
            *_heart("heart_rate_data"),
            *OXYGEN,
            *MOVEMENT,
            Values("stress_level", "stress_data.samples", "level", "%"),
        ),
    ),
    "sleep": DataType(  # its upload_type is another enumeration, without a number for "deleted"
        key=(SUMMARY_ID,),
        otherwise="times",
        columns={
            "calendar_date": END,  # Junction's is the day of waking up
            "bedtime_start": START,
            "bedtime_stop": END,
            "timezone_offset": Derived.OFFSET,
            "duration": Derived.DURATION,
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
            Values("respiratory_rate", "respiration_data.breaths_data.samples", "breaths_per_min", "bpm"),
            _oxygen("respiration_data.oxygen_saturation_data.samples"),
            Values("hypnogram", "sleep_durations_data.hypnogram_samples", "level", "", form="stages"),
            Whole("body_temperature_delta", "temperature_data.delta", "°C"),
        ),
    ),
    "body": DataType(
        otherwise="day",
        columns={
            "calendar_date": START,
            "weight": _newest("weight_kg"),
            "fat": _newest("bodyfat_percentage"),
            "water_percentage": _newest("water_percentage"),
            "body_mass_index": _newest("BMI"),
            "lean_body_mass_kilogram": _newest("lean_mass_g", KILOGRAMS),
        },
        series=(
            *_heart("heart_data.heart_rate_data"),
            *OXYGEN,
            Values("blood_pressure", PRESSURE, PAIR, "mmHg", form="pairs"),
            _glucose("glucose_data.blood_glucose_samples"),
            _glucose("glucose_data.detailed_blood_glucose_samples"),  # sampled more often; wins, as it is the last
            Values("body_temperature", "temperature_data.body_temperature_samples", "temperature_celsius", "°C"),
            Whole("water", "hydration_data.day_total_water_consumption_ml", "ml"),
            _measured("weight", value="weight_kg", unit="kg"),
            _measured("fat", value="bodyfat_percentage", unit="%"),
            _measured("body_mass_index", value="BMI", unit="index"),
            _measured("lean_body_mass", value="lean_mass_g", unit="kg", factor=KILOGRAMS),
            _measured("insulin_injection", value="insulin_units", unit="unit", subtype="insulin_type"),
        ),
    ),
    "nutrition": DataType(  # several foods share a moment, so the samples are the sums of the day
        otherwise="day",
        columns={"calendar_date": START, "timestamp": START},
        series=(
            Whole("water", "summary.water_ml", "ml"),
            Whole("caffeine", "summary.micros.caffeine_mg", "g", GRAMS),
            Whole("carbohydrates", "summary.macros.carbohydrates_g", "g"),
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
    "planned_workout": DataType(  # three of Terra's documents name three different ids
        key=("planned_workout_id", "provider_workout_id", "metadata.id", SUMMARY_ID, "summary_id"),
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
        key=(SUMMARY_ID,),
        columns={
            "time_start": START,
            "time_end": END,
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
