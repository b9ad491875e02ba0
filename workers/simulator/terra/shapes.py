"""What Terra's objects have beside the common shapes: arrays that grow while they are measured, and their sums."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from random import Random
from typing import Any

from workers.simulator.shapes import Place, Shape, fill, later

HOUR = 3600


@dataclass(frozen=True)
class Course(Shape):
    """The samples of an array, from an object's beginning to its end, or as far as it was measured.

    Each array has dice of its own, so that what was measured stays the same while more comes.
    """

    name: str
    every: float  # seconds
    item: Mapping[str, Any]
    hours: tuple[float, float] = (0, 24)  # of the object, between which anything is measured
    grows: str = ""  # the value that is a running total since the object's beginning
    time: str = "timestamp"

    def value(self, place: Place) -> list[dict[str, Any]]:
        """None of them where they were not asked for."""
        return self.samples(place) if place.known["with_samples"] else []

    def samples(self, place: Place) -> list[dict[str, Any]]:
        """All of them."""
        dice = Random(f"{place.known['seed']}/{self.name}")  # noqa: S311 - repeatable on purpose
        begin = later(replace(place, dice=dice), self.hours[0] * HOUR)
        last = min(place.known["until"], place.instant + timedelta(hours=self.hours[1]))
        found: list[dict[str, Any]] = []
        total, item = 0.0, dict(self.item)
        while (moment := later(begin, len(found) * self.every)).instant < last:
            sample = {self.time: moment.instant.isoformat(), **fill(item, moment)}
            if self.grows:
                total = round(total + sample[self.grows], 1)
                sample[self.grows] = total
            found.append(sample)
        return found


@dataclass(frozen=True)
class Added(Shape):
    """What the samples of an array come to, whether they were asked for or not."""

    course: Course
    name: str

    def value(self, place: Place) -> float:
        values: list[float] = [sample[self.name] for sample in self.course.samples(place)]
        if self.course.grows == self.name:
            return values[-1] if values else 0
        return round(sum(values), 1)


@dataclass(frozen=True)
class Mean(Shape):
    """The mean of an array's samples; None if there are none."""

    course: Course
    name: str

    def value(self, place: Place) -> float | None:
        values = [sample[self.name] for sample in self.course.samples(place)]
        return round(sum(values) / len(values), 1) if values else None


@dataclass(frozen=True)
class Spent(Shape):
    """The seconds for which an array of stages says one of these."""

    course: Course
    stages: tuple[int, ...]

    def value(self, place: Place) -> float:
        return self.course.every * sum(sample["level"] in self.stages for sample in self.course.samples(place))


@dataclass(frozen=True)
class Only(Shape):
    """Something that only these providers measure."""

    providers: tuple[str, ...]
    description: Any

    def value(self, place: Place) -> Any:
        return fill(self.description, place) if place.known["provider"] in self.providers else None
