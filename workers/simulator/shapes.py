"""Descriptions of generated values, and `fill`, which turns a description into a value.

A description is JSON-ready data in which some leaves are shapes: functions from a `Context` to a value. Random values
come from the context's own generator, so the same context always gives the same value. A higher `revision` moves every
`between` on by one step and every `draft` to its next text; this is how a corrected record differs from the original.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Any


@dataclass(frozen=True, slots=True)
class Context:
    """What a shape can use: a seeded generator, a moment, named variables, and ids of related records."""

    rng: Random
    instant: datetime
    variables: Mapping[str, Any]
    link: Callable[[str], str]
    revision: int = 0


Shape = Callable[[Context], Any]


def seeded(*parts: object) -> Random:
    """A generator that gives the same numbers for the same parts."""
    return Random("/".join(map(str, parts)))  # noqa: S311 - not for secrets


def between(low: float, high: float, digits: int = 0) -> Shape:
    """A number in this range; an integer if `digits` is 0."""
    scale = 10**digits
    steps = round((high - low) * scale) + 1

    def value(context: Context) -> float:
        step = (context.rng.randrange(steps) + context.revision) % steps
        number = round(low + step / scale, digits)
        return number if digits else int(number)

    return value


def one_of(*options: Any) -> Shape:
    """One of these; a revision does not change the choice."""
    return lambda context: fill(context.rng.choice(options), context)


def draft(*options: Any) -> Shape:
    """The first of these; each revision moves to the next."""
    return lambda context: options[min(context.revision, len(options) - 1)]


def at(seconds: float = 0, step: float = 0) -> Shape:
    """A moment `seconds` after the context's; each revision adds `step` seconds."""
    return lambda context: (context.instant + timedelta(seconds=seconds + step * context.revision)).isoformat()


def midnight(context: Context) -> str:
    """The beginning of the context's day."""
    return context.instant.replace(hour=0, minute=0, second=0, microsecond=0).isoformat()


def day(days: int = 0) -> Shape:
    """A date `days` after the context's."""
    return lambda context: (context.instant + timedelta(days=days)).date().isoformat()


def unix_seconds(context: Context) -> int:
    """The context's moment in whole seconds since 1970."""
    return int(context.instant.timestamp())


def digits(count: int = 11) -> Shape:
    """A random number of `count` digits, as text."""
    return lambda context: str(context.rng.randrange(10 ** (count - 1), 10**count))


def variable(name: str) -> Shape:
    return lambda context: context.variables[name]


def link(resource: str) -> Shape:
    """The id of the user's record of another resource at the same moment."""
    return lambda context: context.link(resource)


def linked_choice(resource: str, options: tuple[Any, ...]) -> Shape:
    """One of these, chosen by the id of the linked record: all contexts of that record choose the same."""
    return lambda context: fill(options[int(context.link(resource)[:8], 16) % len(options)], context)


def many(count: int, step: float, item: Any) -> Shape:
    """A list of `count` items, `step` seconds apart."""
    return lambda context: [fill(item, later(context, number * step)) for number in range(count)]


def nulls(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def empty_lists(*names: str) -> dict[str, list[Any]]:
    return {name: [] for name in names}


def later(context: Context, seconds: float) -> Context:
    """The same context `seconds` later. Called for each sample: `dataclasses.replace` takes four times as long."""
    moment = context.instant + timedelta(seconds=seconds)
    return Context(context.rng, moment, context.variables, context.link, context.revision)


def fill(description: Any, context: Context) -> Any:
    if callable(description):
        return description(context)
    if isinstance(description, dict):
        return {name: fill(part, context) for name, part in description.items()}
    if isinstance(description, list):
        return [fill(part, context) for part in description]
    return description
