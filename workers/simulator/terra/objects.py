"""Terra's types: schedules and descriptions of their objects, with the names and units of Terra's API document."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from workers.simulator.shapes import (
    Context,
    Shape,
    at,
    between,
    day,
    digits,
    empty_lists,
    fill,
    later,
    nulls,
    one_of,
    seeded,
    variable,
)

HOUR = 3600
DAY_HOURS = 24.0


@dataclass(frozen=True)
class Kind:
    """A type of object: one per `every` days, starting at `hour` of the day plus up to `jitter` hours."""

    name: str
    description: Any = field(hash=False)
    every: int = 1
    hour: float = 0.0  # below 0: the evening before
    jitter: float = 0.0
    lasts: tuple[float, float] = (DAY_HOURS, DAY_HOURS)  # hours
    is_running: bool = False  # sent while it lasts, not only after its end
    extends: float = 0.0  # hours that each correction adds to it
    path: str = ""  # in the read API, if it differs from the name


@dataclass(frozen=True)
class Samples:
    """A shape: the samples of an array, from the object's start to its end, or to the end of the measurement.

    Each array has its own random generator, so measured samples stay the same while more are added. The array is empty
    if the request did not ask for samples.
    """

    name: str
    every: float  # seconds
    item: Mapping[str, Any]
    hours: tuple[float, float] = (0, 24)  # of the object, between which samples exist
    running_total: str = ""  # the field that holds a running total since the object's start
    time: str = "timestamp"

    def __call__(self, context: Context) -> list[dict[str, Any]]:
        return self.all(context) if context.variables["with_samples"] else []

    def all(self, context: Context) -> list[dict[str, Any]]:
        """All samples, whether or not the request asked for them."""
        rng = seeded(context.variables["seed"], self.name)
        begin = later(replace(context, rng=rng), self.hours[0] * HOUR)
        last = min(context.variables["until"], context.instant + timedelta(hours=self.hours[1]))
        found: list[dict[str, Any]] = []
        total, item = 0.0, dict(self.item)
        while (moment := later(begin, len(found) * self.every)).instant < last:
            sample = {self.time: moment.instant.isoformat(), **fill(item, moment)}
            if self.running_total:
                total = sample[self.running_total] = round(total + sample[self.running_total], 1)
            found.append(sample)
        return found


def total(samples: Samples, name: str) -> Shape:

    def value(context: Context) -> float:
        values: list[float] = [sample[name] for sample in samples.all(context)]
        if samples.running_total == name:
            return values[-1] if values else 0
        return round(sum(values), 1)

    return value


def mean(samples: Samples, name: str) -> Shape:
    """The mean of a field of the samples; None if there are none."""

    def value(context: Context) -> float | None:
        values = [sample[name] for sample in samples.all(context)]
        return round(sum(values) / len(values), 1) if values else None

    return value


def seconds_in(samples: Samples, *stages: int) -> Shape:
    """The seconds during which an array of sleep stages shows one of these stages."""
    return lambda context: samples.every * sum(sample["level"] in stages for sample in samples.all(context))


def only(*providers: str, **fields: Any) -> Shape:
    """An object that only these providers measure; None for the others."""
    return lambda context: fill(fields, context) if context.variables["provider"] in providers else None


METADATA = {"start_time": at(), "end_time": variable("end_time"), "timestamp_localization": 1}
SUMMARY_ID = {"summary_id": variable("summary_id")}
DEVICE = {"name": variable("device"), "manufacturer": variable("manufacturer"), "other_devices": []}


def _heart(every: float, low: int, high: int, *, nightly: bool = False) -> dict[str, Any]:
    """Heart rates in bpm; during sleep also their variability in milliseconds."""
    rates = Samples("hr", every, {"bpm": between(low, high)})
    changes = Samples("rmssd", 1800, {"hrv_rmssd": between(20, 110, 1)})
    return {
        "summary": {
            "avg_hr_bpm": mean(rates, "bpm"),
            "max_hr_bpm": high,
            "min_hr_bpm": low,
            "resting_hr_bpm": between(45, 58),
            "avg_hrv_rmssd": mean(changes, "hrv_rmssd") if nightly else None,
            **nulls("avg_hrv_sdnn", "user_max_hr_bpm"),
            "hr_zone_data": [],
        },
        "detailed": {"hr_samples": rates, "hrv_samples_rmssd": changes if nightly else [], "hrv_samples_sdnn": []},
    }


SATURATION = {"percentage": between(92, 100), "type": 0}
OXYGEN = Samples("saturation", 3600, SATURATION)
NIGHT_OXYGEN = Samples("saturation", 3600, SATURATION, hours=(0, 7))
AWAKE_HOURS = (7.0, 22.0)
STEP_COUNT = {"steps": between(0, 700), "timer_duration_seconds": 900}
STEPS = Samples("steps", 900, STEP_COUNT, AWAKE_HOURS, running_total="steps")
METERS = Samples("meters", 900, {"distance_meters": between(0, 500, 1)}, AWAKE_HOURS, running_total="distance_meters")
FLOORS = Samples("floors", 7200, {"floors_climbed": between(0, 3)}, AWAKE_HOURS, running_total="floors_climbed")
CALORIES = Samples("calories", 900, {"calories": between(0, 24, 1)}, AWAKE_HOURS)
STRESS = Samples("stress", 3600, {"level": between(5, 95)})

DAILY: dict[str, Any] = {
    "metadata": METADATA | {"upload_type": 1},
    "device_data": DEVICE,
    "distance_data": {
        "steps": total(STEPS, "steps"),
        "distance_meters": total(METERS, "distance_meters"),
        "floors_climbed": total(FLOORS, "floors_climbed"),
        **nulls("elevation", "swimming"),
        "detailed": {"step_samples": STEPS, "distance_samples": METERS, "floors_climbed_samples": FLOORS}
        | empty_lists("elevation_samples"),
    },
    "calories_data": {
        "total_burned_calories": between(1600, 3400, 1),
        "BMR_calories": between(1100, 1900, 1),
        "net_activity_calories": total(CALORIES, "calories"),
        "net_intake_calories": None,
        "calorie_samples": CALORIES,
    },
    "active_durations_data": {
        "activity_seconds": between(1800, 9000),
        "low_intensity_seconds": between(1200, 7200),
        "moderate_intensity_seconds": between(600, 3600),
        "vigorous_intensity_seconds": between(0, 1800),
        "activity_levels_samples": [],
    },
    "heart_rate_data": _heart(900, 45, 150),
    "stress_data": {
        "avg_stress_level": mean(STRESS, "level"),
        "max_stress_level": 95,
        "samples": STRESS,
        "body_battery_samples": Samples("battery", 7200, {"level": between(5, 100)}),
    },
    "oxygen_data": {
        "avg_saturation_percentage": mean(NIGHT_OXYGEN, "percentage"),
        "saturation_samples": NIGHT_OXYGEN,
        "vo2_samples": [],
        "vo2max_ml_per_min_per_kg": between(32, 58, 1),
    },
    "data_enrichment": {"total_stress_score": between(10, 90), "strain_traffic_light": one_of("GREEN", "AMBER")},
    **nulls("scores", "MET_data", "strain_data", "tag_data"),
}

# 1 awake, 4 light, 5 deep, 6 REM
HYPNOGRAM = Samples("hypnogram", 900, {"level": one_of(1, 4, 4, 4, 5, 5, 6)})
IN_BED_SECONDS = seconds_in(HYPNOGRAM, 1, 4, 5, 6)
BREATHS = Samples("breaths", 1800, {"breaths_per_min": between(11, 18, 1)})

SLEEP = {
    "metadata": METADATA | SUMMARY_ID | {"is_nap": False, "upload_type": 2},
    "device_data": DEVICE,
    "sleep_durations_data": {
        "asleep": {
            "duration_asleep_state_seconds": seconds_in(HYPNOGRAM, 4, 5, 6),
            "duration_light_sleep_state_seconds": seconds_in(HYPNOGRAM, 4),
            "duration_deep_sleep_state_seconds": seconds_in(HYPNOGRAM, 5),
            "duration_REM_sleep_state_seconds": seconds_in(HYPNOGRAM, 6),
            "num_REM_events": between(2, 6),
        },
        "awake": {
            "duration_awake_state_seconds": seconds_in(HYPNOGRAM, 1),
            "num_wakeup_events": between(0, 6),
            "sleep_latency_seconds": between(120, 1800),
        },
        "other": {"duration_in_bed_seconds": IN_BED_SECONDS, "duration_unmeasurable_sleep_seconds": 0},
        "sleep_efficiency": between(80, 98, 1),
        "hypnogram_samples": HYPNOGRAM,
    },
    "heart_rate_data": _heart(600, 42, 68, nightly=True),
    "respiration_data": {
        "breaths_data": {
            "avg_breaths_per_min": mean(BREATHS, "breaths_per_min"),
            "min_breaths_per_min": 11.0,
            "max_breaths_per_min": 18.0,
            "on_demand_reading": False,
            "samples": BREATHS,
        },
        "oxygen_saturation_data": {"avg_saturation_percentage": mean(OXYGEN, "percentage"), "samples": OXYGEN},
        "snoring_data": None,
    },
    "temperature_data": {"delta": between(-1, 1, 2)},
    "readiness_data": {"readiness": between(40, 99), "recovery_level": None},
    "scores": {"sleep": between(40, 99)},
    "data_enrichment": {"sleep_score": between(40, 99)},
}

RIDDEN_METERS = {"distance_meters": between(80, 600, 1), "timer_duration_seconds": 60}
RIDDEN = Samples("ridden", 60, RIDDEN_METERS, running_total="distance_meters")
WATTS = Samples("watts", 60, {"watts": between(80, 320)})
CADENCE = Samples("cadence", 60, {"cadence_rpm": between(60, 100)})
SPEED = Samples("speed", 60, {"speed_meters_per_second": between(1.5, 10, 2)})

ACTIVITY = {
    "metadata": {
        **METADATA,
        **SUMMARY_ID,
        "name": one_of("Morning session", "Lunch break", "Evening session"),
        "type": one_of(0, 1, 7, 8, 18, 82),
        "upload_type": 1,
        **nulls("city", "state", "country"),
    },
    "device_data": DEVICE,
    "active_durations_data": {
        "activity_seconds": between(1500, 3600),
        "low_intensity_seconds": between(100, 600),
        "moderate_intensity_seconds": between(300, 1200),
        "vigorous_intensity_seconds": between(0, 600),
        "rest_seconds": 0,
        "activity_levels_samples": [],
    },
    "calories_data": {
        "total_burned_calories": between(150, 900, 1),
        "net_activity_calories": between(100, 800, 1),
        "BMR_calories": between(20, 90, 1),
        "calorie_samples": [],
    },
    "distance_data": {
        "summary": nulls("steps", "floors_climbed", "elevation", "swimming")
        | {"distance_meters": total(RIDDEN, "distance_meters")},
        "detailed": {"distance_samples": RIDDEN}
        | empty_lists("elevation_samples", "floors_climbed_samples", "step_samples"),
    },
    "heart_rate_data": _heart(60, 90, 185),
    "movement_data": {
        "avg_cadence_rpm": mean(CADENCE, "cadence_rpm"),
        "max_cadence_rpm": 100.0,
        "avg_speed_meters_per_second": mean(SPEED, "speed_meters_per_second"),
        "max_speed_meters_per_second": 10.0,
        "cadence_samples": CADENCE,
        "speed_samples": SPEED,
        "torque_samples": [],
    },
    "power_data": {"avg_watts": mean(WATTS, "watts"), "max_watts": 320.0, "power_samples": WATTS},
    "work_data": {"work_kilojoules": between(120, 900, 1)},
    "data_enrichment": None,
}

SCALE = {
    "weight_kg": between(48, 120, 2),
    "bodyfat_percentage": between(8, 38, 1),
    "BMI": between(18, 34, 1),
    "height_cm": None,
    "bone_mass_g": between(2200, 3600),
    "muscle_mass_g": between(38000, 64000),
    "lean_mass_g": between(38000, 80000),
    "water_percentage": between(45, 65, 1),
}
PRESSURE = {"systolic_bp": between(100, 150), "diastolic_bp": between(60, 95)}
TWICE_A_DAY = (6.5, 22.0)
ON_SCALE = Samples("scale", 14 * 3600, SCALE, TWICE_A_DAY, time="measurement_time")
PRESSURES = Samples("pressure", 14 * 3600, PRESSURE, TWICE_A_DAY)
TEMPERATURES = Samples("temperature", 12 * 3600, {"temperature_celsius": between(36, 37.4, 1)}, TWICE_A_DAY)
GLUCOSE = {"blood_glucose_mg_per_dL": between(65, 190), "glucose_level_flag": 0, "trend_arrow": one_of(2, 3, 4)}
GLUCOSES = Samples("glucose", 900, GLUCOSE)

BODY = {
    "metadata": METADATA,
    "device_data": DEVICE,
    "measurements_data": only("WITHINGS", measurements=ON_SCALE),
    "blood_pressure_data": only("WITHINGS", blood_pressure_samples=PRESSURES),
    "glucose_data": only(
        "FREESTYLELIBRE",
        blood_glucose_samples=GLUCOSES,
        detailed_blood_glucose_samples=[],
        day_avg_blood_glucose_mg_per_dL=mean(GLUCOSES, "blood_glucose_mg_per_dL"),
    ),
    "temperature_data": only(
        "GARMIN",
        "WITHINGS",
        body_temperature_samples=TEMPERATURES,
        **empty_lists("ambient_temperature_samples", "skin_temperature_samples"),
    ),
    "hydration_data": only("GARMIN", day_total_water_consumption_ml=1800, hydration_amount_samples=[]),
    **nulls("heart_data", "oxygen_data", "ketone_data"),
}

MACROS = {
    "calories": between(180, 900),
    "protein_g": between(5, 50, 1),
    "carbohydrates_g": between(10, 90, 1),
    "fat_g": between(3, 40, 1),
}
MEAL = {
    "id": digits(),
    "name": one_of("Porridge", "Soup", "Curry", "Salad"),
    "type": one_of(1, 3, 5),
    "quantity": {"unit": 1, "amount": between(80, 500)},
    "macros": MACROS,
    "micros": {"calcium_mg": between(20, 300)},
}
DRINK = {"drink_name": one_of("Water", "Coffee"), "drink_volume": between(150, 400), "drink_unit": 8}
DRINKS = Samples("drinks", 4 * 3600, DRINK, hours=(8, 21))

NUTRITION = {
    "metadata": METADATA,
    "meals": Samples("meals", 5.5 * 3600, MEAL, hours=(8, 20)),
    "drink_samples": DRINKS,
    "summary": {
        "macros": {name: between(100, 250, 1) for name in ("protein_g", "carbohydrates_g", "fat_g")},
        "micros": {"caffeine_mg": between(0, 300)},
        "water_ml": total(DRINKS, "drink_volume"),
        "drink_ml": total(DRINKS, "drink_volume"),
    },
}

MENSTRUATION = {
    "metadata": METADATA,
    "menstruation_data": {
        "period_start_date": variable("period_start"),
        "day_in_cycle": variable("day_in_cycle"),
        "period_length_days": 5,
        "cycle_length_days": 28,
        "predicted_cycle_length_days": 28,
        "is_predicted_cycle": False,
        "menstruation_flow": [{"timestamp": at(), "flow": one_of(2, 3, 4)}],
        "intervals": [],
    },
}

PLANNED_WORKOUT = {
    "planned_workout_id": variable("object_id"),
    "workout_id": digits(18),
    "planned_date": day(1),
    "provider_workout_id": digits(6),
    "coercion_warnings": None,
    "created_at": at(),
    "last_updated_at": at(step=60),
    "is_external": False,
    **nulls("athlete_metrics", "details"),
}

ATHLETE = {
    "first_name": one_of("Ada", "Bo", "Chi"),
    "last_name": "Example",
    "sex": one_of("female", "male"),
    "gender": one_of("female", "male", "other"),
    "date_of_birth": one_of("1961-11-30", "1978-02-14", "1990-05-17", "2001-08-03"),
    "city": one_of("Leeds", "Ghent", None),
    "provider_user_id": digits(),
    **nulls("age", "email", "state", "country", "bio", "account_creation_date"),
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
