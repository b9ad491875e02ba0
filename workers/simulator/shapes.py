"""The small language in which generated values are described, and how a description becomes a value.

A description is plain JSON-ready data in which some leaves are one of the classes here. What varies is decided by the
place's own dice, so that the same place always gives the same value. A higher `revision` of the place moves every
`Between` on by one step and every `Draft` to its next text: that is how a corrected record differs from its first form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value is wanted: its dice and moment, and what is known about its surroundings."""

    dice: Random
    instant: datetime
    known: Mapping[str, Any]
    link: Callable[[str], str]
    revision: int = 0


class Shape:
    """A description that has to be asked for its value."""

    def value(self, place: Place) -> Any:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Between(Shape):
    """A number of this range; an integer if no digits are asked for."""

    low: float
    high: float
    digits: int = 0

    def value(self, place: Place) -> float:
        scale = 10**self.digits
        steps = round((self.high - self.low) * scale) + 1
        step = (place.dice.randrange(steps) + place.revision) % steps
        number = round(self.low + step / scale, self.digits)
        return number if self.digits else int(number)


@dataclass(frozen=True)
class OneOf(Shape):
    """One of these; a revision does not change which."""

    options: tuple[Any, ...]

    def __init__(self, *options: Any) -> None:
        object.__setattr__(self, "options", options)

    def value(self, place: Place) -> Any:
        return fill(place.dice.choice(self.options), place)


@dataclass(frozen=True)
class Draft(Shape):
    """The first of these until it is revised, then the next."""

    options: tuple[Any, ...]

    def __init__(self, *options: Any) -> None:
        object.__setattr__(self, "options", options)

    def value(self, place: Place) -> Any:
        return self.options[min(place.revision, len(self.options) - 1)]


@dataclass(frozen=True, slots=True)
class At(Shape):
    """A moment, so many seconds after the place's; each revision moves it on by `step` seconds."""

    seconds: float = 0
    step: float = 0

    def value(self, place: Place) -> str:
        return (place.instant + timedelta(seconds=self.seconds + self.step * place.revision)).isoformat()


@dataclass(frozen=True, slots=True)
class Midnight(Shape):
    """The beginning of the place's day."""

    def value(self, place: Place) -> str:
        return place.instant.replace(hour=0, minute=0, second=0, microsecond=0).isoformat()


@dataclass(frozen=True, slots=True)
class Day(Shape):
    """A date, so many days after the place's."""

    days: int = 0

    def value(self, place: Place) -> str:
        return (place.instant + timedelta(days=self.days)).date().isoformat()


@dataclass(frozen=True, slots=True)
class Unix(Shape):
    """The place's moment in whole seconds since 1970."""

    def value(self, place: Place) -> int:
        return int(place.instant.timestamp())


@dataclass(frozen=True, slots=True)
class Digits(Shape):
    """A provider's own number for something, as text."""

    count: int = 11

    def value(self, place: Place) -> str:
        return str(place.dice.randrange(10 ** (self.count - 1), 10**self.count))


@dataclass(frozen=True, slots=True)
class Known(Shape):
    """What the place knows under this name."""

    name: str

    def value(self, place: Place) -> Any:
        return place.known[self.name]


@dataclass(frozen=True, slots=True)
class Link(Shape):
    """The id of the user's record of another resource at the same moment."""

    resource: str

    def value(self, place: Place) -> str:
        return place.link(self.resource)


@dataclass(frozen=True)
class LinkedChoice(Shape):
    """One of these, decided by the record it belongs to: every place of one record gives the same."""

    resource: str
    options: tuple[Any, ...]

    def value(self, place: Place) -> Any:
        return fill(self.options[int(place.link(self.resource)[:8], 16) % len(self.options)], place)


@dataclass(frozen=True)
class Many(Shape):
    """A list of so many, `step` seconds apart."""

    count: int
    step: float
    item: Any

    def value(self, place: Place) -> list[Any]:
        return [fill(self.item, later(place, number * self.step)) for number in range(self.count)]


@dataclass(frozen=True)
class Sum:
    """The sum of other fields of the same record; whoever holds the whole record makes it."""

    fields: tuple[str, ...]

    def __init__(self, *fields: str) -> None:
        object.__setattr__(self, "fields", fields)


def later(place: Place, seconds: float) -> Place:
    """The same place, so many seconds later. Called for each sample: `dataclasses.replace` takes four times as long."""
    return Place(place.dice, place.instant + timedelta(seconds=seconds), place.known, place.link, place.revision)


def fill(description: Any, place: Place) -> Any:
    """The value of a description at a place."""
    if isinstance(description, Shape):
        return description.value(place)
    if isinstance(description, dict):
        return {name: fill(part, place) for name, part in description.items()}
    if isinstance(description, list):
        return [fill(part, place) for part in description]
    return description
