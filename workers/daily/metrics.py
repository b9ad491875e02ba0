"""What is derived from which resource: the metrics, and the resources whose changes touch them."""

from functools import cache
from typing import NamedTuple

from app.catalogue import Resource, catalogue
from workers.daily.sessions import SLEEP, WORKOUTS

SESSIONS = ("sleep", "workouts")
SUMMARY = "activity"  # the daily summary of a source, with a field for each of some counters


class Part(NamedTuple):
    """A number that samples of a resource have: `value`, or one of several fields."""

    metric: str
    field: str | None


@cache
def derived() -> dict[str, tuple[str, ...]]:
    """The metrics of each resource, in the order of the catalogue."""
    found = {name: metrics_of(one) for name, one in catalogue().items() if one.day}
    found["sleep"] = (*SLEEP, "nap_total")
    found["workouts"] = ("workouts_count", "workouts_duration", *WORKOUTS)
    return found


@cache
def summarised() -> tuple[str, ...]:
    """The counters that the daily summary contains."""
    fields = {field.name for field in catalogue()[SUMMARY].fields}
    return tuple(name for name in derived() if name in fields and catalogue()[name].day == "counter")


def parts_of(resource: Resource) -> list[Part]:
    """The numbers of a resource's samples; blood pressure has two."""
    numbers = [field.name for field in resource.fields if field.type == "number"]
    return [Part(f"{resource.name}_{name}", name) for name in numbers] or [Part(resource.name, None)]


def metrics_of(resource: Resource) -> tuple[str, ...]:
    """The metrics of a timeseries."""
    suffixes = ("_avg", "_min", "_max") if resource.day == "gauge" else ("",)
    return tuple(part.metric + suffix for part in parts_of(resource) for suffix in suffixes)


def resource_of(metric: str) -> str | None:
    """The resource of a metric; None for an unknown one."""
    return next((name for name, metrics in derived().items() if metric in metrics), None)
