"""The schedule of each resource, and descriptions of the samples of each timeseries."""

from dataclasses import dataclass, field
from typing import Any

from app.catalogue import Resource
from workers.simulator.shapes import Shape, between, draft, link, one_of, variable
from workers.simulator.summaries import WORKOUT_SPORT_SLUG

HOUR = 3600
DAY = 24 * HOUR


@dataclass(frozen=True, slots=True)
class Schedule:
    """One record per period of `every` seconds since 1970, `offset` seconds after its start plus up to `jitter`.

    With `like`, the records share the moments of that resource, to which they belong.
    """

    every: int = 6 * HOUR
    offset: int = 0
    jitter: int = 0
    like: str | None = None


SCHEDULES: dict[str, Schedule] = {
    **dict.fromkeys(("activity", "body"), Schedule(DAY)),
    "sleep": Schedule(DAY, offset=5 * HOUR, jitter=2 * HOUR),
    **dict.fromkeys(("sleep_cycle", "sleep_stream"), Schedule(like="sleep")),
    "workouts": Schedule(2 * DAY, offset=7 * HOUR, jitter=10 * HOUR),
    **dict.fromkeys(("workout_stream", "workout_distance", "workout_swimming_stroke"), Schedule(like="workouts")),
    "meal": Schedule(8 * HOUR, offset=HOUR, jitter=2 * HOUR),
    "menstrual_cycle": Schedule(28 * DAY),
    "electrocardiogram": Schedule(7 * DAY, offset=9 * HOUR, jitter=2 * HOUR),
    "electrocardiogram_voltage": Schedule(like="electrocardiogram"),
    "heartrate": Schedule(300),
    "glucose": Schedule(900),
    **dict.fromkeys(("calories_active", "distance", "steps"), Schedule(HOUR)),
    "floors_climbed": Schedule(2 * HOUR),
    **dict.fromkeys(("calories_basal", "hrv", "respiratory_rate", "stress_level"), Schedule(HOUR)),
    **dict.fromkeys(("blood_oxygen", "hypnogram", "stand_hour"), Schedule(HOUR)),
    **dict.fromkeys(("weight", "fat"), Schedule(DAY, offset=6 * HOUR, jitter=HOUR)),
    **dict.fromkeys(("cholesterol", "ige", "igg"), Schedule(7 * DAY, offset=8 * HOUR, jitter=HOUR)),
}
FALLBACK_SCHEDULE = Schedule(jitter=HOUR)


@dataclass(frozen=True, slots=True)
class Series:
    """The samples of one timeseries.

    Each record has `count` moments, `step` seconds apart, with one sample per subtype: a value of the first part of the
    resource's key. `source` has further fields of the sample's source. An interval without `step` `lasts` so many
    seconds. A series that `is_counted` measures the user's movement, see `World.counted`.
    """

    value: Any
    unit: str = "count"
    subtypes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    count: int = 1
    step: float = 0
    lasts: int = 300
    is_counted: bool = False

    @property
    def body(self) -> dict[str, Any]:
        """The named values of a sample (`value` unless named otherwise) and its further fields."""
        return {**(self.value if isinstance(self.value, dict) else {"value": self.value}), **self.extra}


_OF_WORKOUT = {"workout_id": link("workouts"), "sport": WORKOUT_SPORT_SLUG}
_QUARTERS: dict[str, Any] = {"count": 4, "step": 900, "is_counted": True}
_SENSOR: dict[str, Shape] = {"sensor_location": one_of("wrist", "forehead", None)}

SERIES: dict[str, Series] = {
    "calories_active": Series(between(0, 24, 1), **_QUARTERS),
    "calories_basal": Series(between(50, 85, 1)),
    "blood_pressure": Series(
        {"systolic": between(100, 150), "diastolic": between(60, 95)},
        "mmHg",
        extra={"grouping": [variable("source_type"), None, None, None]},
    ),
    "blood_oxygen": Series(between(92, 100), "%"),
    "weight": Series(between(48, 120, 1), "kg"),
    "fat": Series(between(8, 38, 1), "%"),
    "body_temperature": Series(between(36, 38, 1), extra=_SENSOR),
    "body_temperature_delta": Series(between(-1, 1, 2), extra=_SENSOR),
    "caffeine": Series(between(0.02, 0.2, 3), "g"),
    "cholesterol": Series(
        between(0.6, 6, 1),
        "mmol/L",
        ("cholesterol/ldl", "cholesterol/hdl", "cholesterol/total", "cholesterol/triglycerides"),
    ),
    "distance": Series(
        between(0, 320, 1), source={"sport": one_of(None, None, None, "wheelchair_pushing")}, **_QUARTERS
    ),
    "floors_climbed": Series(between(0, 4), count=2, step=HOUR, is_counted=True),
    "glucose": Series(between(3.5, 11, 1), "mmol/L"),
    "heartrate": Series(between(40, 190), "bpm"),
    "hrv": Series(between(15, 120), "rmssd"),
    "ige": Series(between(0, 90, 1), "FSU", ("baha_grass", "bermuda_grass", "cat_dander")),
    "igg": Series(between(0, 40, 1), "FSU", ("dairy", "egg_white", "wheat")),
    "mindfulness_minutes": Series(between(1, 40), "min", lasts=2400),
    "respiratory_rate": Series(between(11, 19, 1), "bpm"),
    "steps": Series(between(0, 420), **_QUARTERS),
    "stress_level": Series(between(5, 95), "%"),
    "vo2_max": Series(between(28, 62, 1), "mL/kg/min"),
    "water": Series(between(100, 600), "ml"),
    "electrocardiogram_voltage": Series(
        between(-600, 1200), "mV", ("lead_1",), count=128, step=1 / 512
    ),  # fractions of a second on purpose: in whole seconds the samples would share one key
    "afib_burden": Series(between(0, 10, 1)),
    "heart_rate_alert": Series(1, subtypes=("high_heart_rate", "irregular_rhythm")),
    "workout_duration": Series(between(1, 30), subtypes=("low", "medium", "high"), lasts=1800),
    "insulin_injection": Series(
        between(1, 20),
        subtypes=("rapid_acting", "long_acting"),
        extra={"delivery_mode": "bolus", "delivery_form": "standard", "bolus_purpose": one_of("meal", "correction")},
    ),
    "carbohydrates": Series(between(5, 90), "g"),
    "note": Series(
        draft("Felt shaky before lunch", "Felt shaky before lunch; better after juice"),
        "text",
        extra={"tags": ["food"]},
    ),
    "stand_hour": Series(between(0, 1), extra={"type": one_of("stood", "idle")}, lasts=HOUR),
    "stand_duration": Series(between(0, 30), lasts=1800),
    "sleep_apnea_alert": Series(between(1, 3)),
    "sleep_breathing_disturbance": Series(between(0, 9), extra={"type": one_of("elevated", "not_elevated")}),
    "wheelchair_push": Series(between(0, 300)),
    "forced_expiratory_volume_1": Series(between(2, 5, 2)),
    "forced_vital_capacity": Series(between(3, 6, 2)),
    "peak_expiratory_flow_rate": Series(between(300, 650)),
    "inhaler_usage": Series(between(1, 4)),
    "fall": Series(between(1, 2)),
    "uv_exposure": Series(between(0, 11)),
    "daylight_exposure": Series(between(0, 60), lasts=HOUR),
    "handwashing": Series(between(1, 5)),
    "basal_body_temperature": Series(between(36, 37.2, 2)),
    "body_mass_index": Series(between(18, 34, 1)),
    "lean_body_mass": Series(between(38, 80, 1)),
    "waist_circumference": Series(between(62, 115, 1)),
    "heart_rate_recovery_one_minute": Series(between(12, 55)),
    "workout_distance": Series(between(0, 400, 1), source=_OF_WORKOUT, count=12, step=300),
    "workout_swimming_stroke": Series(between(0, 120), source=_OF_WORKOUT, count=12, step=300),
    "hypnogram": Series(between(1, 4), "stage", lasts=HOUR),
}
FALLBACK_SERIES = Series(between(1, 100, 1))


def timing_of(resource: Resource) -> str:
    """The name of the resource whose schedule this one shares: its own, unless the schedule names another."""
    return SCHEDULES.get(resource.name, FALLBACK_SCHEDULE).like or resource.name


def schedule_of(resource: Resource) -> Schedule:
    return SCHEDULES.get(timing_of(resource), FALLBACK_SCHEDULE)


def series_of(resource: Resource) -> Series:
    return SERIES.get(resource.name, FALLBACK_SERIES)
