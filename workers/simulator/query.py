"""Queries to the simulated world, and the parts of a result."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.catalogue import Resource
from workers.simulator.people import Connection, User

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Slot:
    """One period of a resource's schedule. It identifies a record, or the samples of one moment."""

    connection: Connection
    resource: Resource
    number: int


# A sample's place in the fixed order of a query's samples, as in a page's cursor: connection, slot and sample.
Position = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample with its source and position."""

    position: Position
    source: Record
    body: Record


@dataclass(frozen=True, slots=True)
class Query:
    """A user's records of a resource in a window, both ends included."""

    user: User
    resource: Resource
    start: datetime
    end: datetime
    provider: str | None = None


def grouped(samples: Iterable[Sample]) -> list[Record]:
    """Samples grouped by source, in the order in which the sources first appear."""
    groups: dict[tuple[Any, ...], Record] = {}
    for sample in samples:
        key = tuple(sorted((name, value or "") for name, value in sample.source.items()))
        groups.setdefault(key, {"source": sample.source, "data": []})["data"].append(sample.body)
    return list(groups.values())
