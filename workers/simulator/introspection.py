"""Junction's introspection: the state of history pulls, and the coverage of each resource."""

from dataclasses import dataclass
from datetime import datetime

from app.catalogue import Resource
from workers.simulator.conditions import Pull
from workers.simulator.data import World
from workers.simulator.events import supplied
from workers.simulator.people import Connection, Record, Slot
from workers.simulator.series import series_of


@dataclass(frozen=True, slots=True)
class Extent:
    """The data of a connection's resource in a window."""

    oldest: datetime
    newest: datetime
    count: int
    days: int


def extent(world: World, connection: Connection, resource: Resource, end: datetime) -> Extent | None:
    """The data from the world's start to `end`, None without data. The cost does not depend on the window's length.

    Only the first and last slots can be incomplete, and a schedule has either several records a day or one in several
    days, so that the rest can be counted.
    """
    numbers = world.numbers(resource, world.start, end)

    def moments(number: int) -> list[datetime]:
        return _moments(world, Slot(connection, resource, number), end)

    oldest, newest = (next(filter(None, map(moments, order)), []) for order in (numbers, reversed(numbers)))
    if not oldest:
        return None
    head, rest = numbers[:2], numbers[2:]
    edges = [found for number in (*head, *rest[-2:]) if (found := moments(number))]
    full = len(rest[:-2])
    days = min(full + len(edges), (max(newest).date() - min(oldest).date()).days + 1)
    count = sum(map(len, edges)) + full * _samples_per_slot(resource)
    return Extent(min(oldest), max(newest), count, days)


def _moments(world: World, slot: Slot, end: datetime) -> list[datetime]:
    if slot.resource.kind == "timeseries":
        moments = [datetime.fromisoformat(sample["timestamp"]) for sample in world.burst(slot)]
        return [moment for moment in moments if world.start <= moment <= end]
    moment = world.moment(slot)
    return [moment] if world.start <= moment <= min(end, world.newest(slot.resource)) else []


def _samples_per_slot(resource: Resource) -> int:
    series = series_of(resource)
    return series.count * max(1, len(series.subtypes)) if resource.kind == "timeseries" else 1


def pulls(world: World, connection: Connection) -> Record:
    """The state of each resource's history pull."""
    pulled, not_pulled = {}, []
    for resource in supplied(connection):
        pull = world.conditions.pull(connection, resource.name)
        if pull.status == "not_pulled":
            not_pulled.append(resource.name)
        else:
            pulled[resource.name] = _pull(world, connection, resource, pull)
    return {"pulled": pulled, "not_pulled": not_pulled}


def _pull(world: World, connection: Connection, resource: Resource, pull: Pull) -> Record:
    at = world.connected_at.isoformat()
    begun, ended = pull.status != "scheduled", pull.status in ("success", "failure")
    found = extent(world, connection, resource, world.connected_at) if begun else None
    return {
        "status": pull.status,
        "range_start": world.start.isoformat(),
        "range_end": at,
        "timeline": {"scheduled_at": at, "started_at": at if begun else None, "ended_at": at if ended else None},
        "days_with_data": found.days if found else 0,
        "release": "simulated",
        "trace_id": None,
        "error_details": pull.details,
    }


def statistics(world: World, connection: Connection) -> Record:
    """The coverage of each resource."""
    return {resource.name: _coverage(world, connection, resource) for resource in supplied(connection)}


def _coverage(world: World, connection: Connection, resource: Resource) -> Record:
    found = extent(world, connection, resource, world.until)
    status = "success" if world.conditions.state(connection).status == "connected" else "failure"
    return {
        "last_attempt": {"timestamp": world.until.isoformat(), "status": status},
        "oldest_data": found.oldest.isoformat() if found else None,
        "newest_data": found.newest.isoformat() if found else None,
        "sent_count": found.count if found else 0,
    }
