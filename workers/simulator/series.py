"""When the records of each resource fall, and what the samples of each timeseries hold, as data."""

from dataclasses import dataclass, field
from typing import Any

from app.catalogue import Resource
from workers.simulator.shapes import Between, Draft, Known, Link, OneOf, Shape
from workers.simulator.summaries import WORKOUT_SPORT_SLUG

HOUR = 3600
DAY = 24 * HOUR


@dataclass(frozen=True, slots=True)
class Schedule:
    """When records fall: one per `every` seconds since 1970, `offset` after its beginning plus up to `jitter`.

    With `like`, at exactly the moments of that resource, to which such records belong.
    """

    every: int = 6 * HOUR
    offset: int = 0
    jitter: int = 0
    like: str | None = None


SCHEDULES: dict[str, Schedule] = {
    "activity": Schedule(DAY),
    "body": Schedule(DAY),
    "sleep": Schedule(DAY, offset=5 * HOUR, jitter=2 * HOUR),
    "sleep_cycle": Schedule(like="sleep"),
    "sleep_stream": Schedule(like="sleep"),
    "workouts": Schedule(2 * DAY, offset=7 * HOUR, jitter=10 * HOUR),
    "workout_stream": Schedule(like="workouts"),
    "workout_distance": Schedule(like="workouts"),
    "workout_swimming_stroke": Schedule(like="workouts"),
    "meal": Schedule(8 * HOUR, offset=HOUR, jitter=2 * HOUR),
    "menstrual_cycle": Schedule(28 * DAY),
    "electrocardiogram": Schedule(7 * DAY, offset=9 * HOUR, jitter=2 * HOUR),
    "electrocardiogram_voltage": Schedule(like="electrocardiogram"),
    "heartrate": Schedule(300),
    "glucose": Schedule(900),
    "calories_active": Schedule(900),
    "distance": Schedule(900),
    "steps": Schedule(900),
    "calories_basal": Schedule(HOUR),
    "hrv": Schedule(HOUR),
    "respiratory_rate": Schedule(HOUR),
    "stress_level": Schedule(HOUR),
    "blood_oxygen": Schedule(HOUR),
    "hypnogram": Schedule(HOUR),
    "stand_hour": Schedule(HOUR),
    "weight": Schedule(DAY, offset=6 * HOUR, jitter=HOUR),
    "fat": Schedule(DAY, offset=6 * HOUR, jitter=HOUR),
    "cholesterol": Schedule(7 * DAY, offset=8 * HOUR, jitter=HOUR),
    "ige": Schedule(7 * DAY, offset=8 * HOUR, jitter=HOUR),
    "igg": Schedule(7 * DAY, offset=8 * HOUR, jitter=HOUR),
}
FALLBACK_SCHEDULE = Schedule(jitter=HOUR)


@dataclass(frozen=True, slots=True)
class Series:
    """The samples of one timeseries.

    Each time there are `count` of them, `step` seconds apart, and at each such moment one for every subtype: the
    values of the key part that tells them apart. `source` is what the sample's source says beside the usual.
    """

    value: Any
    unit: str = "count"
    subtypes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    count: int = 1
    step: float = 0
    lasts: int = 300

    @property
    def body(self) -> dict[str, Any]:
        """The value, under the name or names that the sample gives it, and what else it says."""
        values = self.value if isinstance(self.value, dict) else {"value": self.value}
        return {**values, **self.extra}


_OF_WORKOUT = {"workout_id": Link("workouts"), "sport": WORKOUT_SPORT_SLUG}
_SENSOR: dict[str, Shape] = {"sensor_location": OneOf("wrist", "forehead", None)}

SERIES: dict[str, Series] = {
    "calories_active": Series(Between(0, 60, 1), lasts=900),
    "calories_basal": Series(Between(50, 85, 1)),
    "blood_pressure": Series(
        {"systolic": Between(100, 150), "diastolic": Between(60, 95)},
        "mmHg",
        extra={"grouping": [Known("source_type"), None, None, None]},
    ),
    "blood_oxygen": Series(Between(92, 100), "%"),
    "weight": Series(Between(48, 120, 1), "kg"),
    "fat": Series(Between(8, 38, 1), "%"),
    "body_temperature": Series(Between(36, 38, 1), extra=_SENSOR),
    "body_temperature_delta": Series(Between(-1, 1, 2), extra=_SENSOR),
    "caffeine": Series(Between(0.02, 0.2, 3), "g"),
    "cholesterol": Series(
        Between(0.6, 6, 1),
        "mmol/L",
        ("cholesterol/ldl", "cholesterol/hdl", "cholesterol/total", "cholesterol/triglycerides"),
    ),
    "distance": Series(Between(0, 900, 1), source={"sport": OneOf(None, None, None, "wheelchair_pushing")}, lasts=900),
    "floors_climbed": Series(Between(0, 6)),
    "glucose": Series(Between(3.5, 11, 1), "mmol/L"),
    "heartrate": Series(Between(40, 190), "bpm"),
    "hrv": Series(Between(15, 120), "rmssd"),
    "ige": Series(Between(0, 90, 1), "FSU", ("baha_grass", "bermuda_grass", "cat_dander")),
    "igg": Series(Between(0, 40, 1), "FSU", ("dairy", "egg_white", "wheat")),
    "mindfulness_minutes": Series(Between(1, 40), "min", lasts=2400),
    "respiratory_rate": Series(Between(11, 19, 1), "bpm"),
    "steps": Series(Between(0, 1800), lasts=900),
    "stress_level": Series(Between(5, 95), "%"),
    "vo2_max": Series(Between(28, 62, 1), "mL/kg/min"),
    "water": Series(Between(100, 600), "ml"),
    "electrocardiogram_voltage": Series(
        Between(-600, 1200), "mV", ("lead_1",), count=128, step=1 / 512
    ),  # fractions of a second on purpose: whole seconds would fold them into one
    "afib_burden": Series(Between(0, 10, 1)),
    "heart_rate_alert": Series(1, subtypes=("high_heart_rate", "irregular_rhythm")),
    "workout_duration": Series(Between(1, 30), subtypes=("low", "medium", "high"), lasts=1800),
    "insulin_injection": Series(
        Between(1, 20),
        subtypes=("rapid_acting", "long_acting"),
        extra={"delivery_mode": "bolus", "delivery_form": "standard", "bolus_purpose": OneOf("meal", "correction")},
    ),
    "carbohydrates": Series(Between(5, 90), "g"),
    "note": Series(
        Draft("Felt shaky before lunch", "Felt shaky before lunch; better after juice"),
        "text",
        extra={"tags": ["food"]},
    ),
    "stand_hour": Series(Between(0, 1), extra={"type": OneOf("stood", "idle")}, lasts=HOUR),
    "stand_duration": Series(Between(0, 30), lasts=1800),
    "sleep_apnea_alert": Series(Between(1, 3)),
    "sleep_breathing_disturbance": Series(Between(0, 9), extra={"type": OneOf("elevated", "not_elevated")}),
    "wheelchair_push": Series(Between(0, 300)),
    "forced_expiratory_volume_1": Series(Between(2, 5, 2)),
    "forced_vital_capacity": Series(Between(3, 6, 2)),
    "peak_expiratory_flow_rate": Series(Between(300, 650)),
    "inhaler_usage": Series(Between(1, 4)),
    "fall": Series(Between(1, 2)),
    "uv_exposure": Series(Between(0, 11)),
    "daylight_exposure": Series(Between(0, 60), lasts=HOUR),
    "handwashing": Series(Between(1, 5)),
    "basal_body_temperature": Series(Between(36, 37.2, 2)),
    "body_mass_index": Series(Between(18, 34, 1)),
    "lean_body_mass": Series(Between(38, 80, 1)),
    "waist_circumference": Series(Between(62, 115, 1)),
    "heart_rate_recovery_one_minute": Series(Between(12, 55)),
    "workout_distance": Series(Between(0, 400, 1), source=_OF_WORKOUT, count=12, step=300),
    "workout_swimming_stroke": Series(Between(0, 120), source=_OF_WORKOUT, count=12, step=300),
    "hypnogram": Series(Between(1, 4), "stage", lasts=HOUR),
}
FALLBACK_SERIES = Series(Between(1, 100, 1))


def timing_of(resource: Resource) -> str:
    """The resource at whose moments this one's records fall: itself, unless its schedule names another."""
    return SCHEDULES.get(resource.name, FALLBACK_SCHEDULE).like or resource.name


def schedule_of(resource: Resource) -> Schedule:
    """When the records of a resource fall."""
    return SCHEDULES.get(timing_of(resource), FALLBACK_SCHEDULE)


def series_of(resource: Resource) -> Series:
    """What the samples of a resource are like."""
    return SERIES.get(resource.name, FALLBACK_SERIES)
