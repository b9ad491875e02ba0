"""Shapes that only Terra's objects use: sample arrays that grow during the day, and their sums."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from random import Random
from typing import Any

from workers.simulator.shapes import Context, Shape, fill, later

HOUR = 3600


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
        rng = Random(f"{context.variables['seed']}/{self.name}")  # noqa: S311 - repeatable on purpose
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
    """The sum of a field of the samples."""

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
