"""What can be asked of the simulated world, and the parts an answer is made of."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.catalogue import Resource
from workers.simulator.people import Connection, User

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Slot:
    """One stretch of a resource's schedule: what names a record, or the samples of one moment."""

    connection: Connection
    resource: Resource
    number: int


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where a sample stands in the fixed order of all samples of a query; what a page's cursor holds."""

    connection: int = 0
    slot: int = 0
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample with its source and the position it stands at."""

    position: Position
    source: Record
    body: Record


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked of the world: a user's records of a resource in a window, both ends included."""

    user: User
    resource: Resource
    start: datetime
    end: datetime
    provider: str | None = None


def grouped(samples: Iterable[Sample]) -> list[Record]:
    """Samples put together by source, in the order in which the sources first appear."""
    groups: dict[tuple[Any, ...], Record] = {}
    for sample in samples:
        key = tuple(sorted((name, value or "") for name, value in sample.source.items()))
        groups.setdefault(key, {"source": sample.source, "data": []})["data"].append(sample.body)
    return list(groups.values())
