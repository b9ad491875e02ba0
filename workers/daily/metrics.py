"""The metrics that are derived from each resource."""

from functools import cache

from app.catalogue import Resource, catalogue
from workers.daily.sessions import COUNT, DURATION, NAPS, SLEEP, WORKOUTS

SESSIONS = ("sleep", "workouts")
SUMMARY = "activity"  # the daily summary of a source, with a field for each of some counters


@cache
def derived() -> dict[str, tuple[str, ...]]:
    """The metrics of each resource, in the order of the catalogue."""
    found = {name: metrics_of(one) for name, one in catalogue().items() if one.day}
    found["sleep"] = (*SLEEP, NAPS)
    found["workouts"] = (COUNT, DURATION, *WORKOUTS)
    return found


@cache
def summarised() -> tuple[str, ...]:
    """The counters that the daily summary contains."""
    fields = {field.name for field in catalogue()[SUMMARY].fields}
    return tuple(name for name in derived() if name in fields and catalogue()[name].day == "counter")


def parts_of(resource: Resource) -> dict[str, str | None]:
    """The numbers of a resource's samples by metric: their `value` (None), or fields; blood pressure has two."""
    numbers = [field.name for field in resource.fields if field.type == "number"]
    return {f"{resource.name}_{name}": name for name in numbers} or {resource.name: None}


def metrics_of(resource: Resource) -> tuple[str, ...]:
    """The metrics of a timeseries."""
    suffixes = ("_avg", "_min", "_max") if resource.day == "gauge" else ("",)
    return tuple(metric + suffix for metric in parts_of(resource) for suffix in suffixes)


def resource_of(metric: str) -> str | None:
    """The resource of a metric; None for an unknown one."""
    return next((name for name, metrics in derived().items() if metric in metrics), None)
