"""What the provider tells about itself: how far its history pulls are, and what it has of each resource."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from app.catalogue import Resource
from workers.simulator.conditions import Pull
from workers.simulator.data import World
from workers.simulator.events import supplied
from workers.simulator.people import Connection, User
from workers.simulator.query import Record, Slot
from workers.simulator.series import series_of


@dataclass(frozen=True, slots=True)
class Extent:
    """What the read API has of a connection's resource in a window."""

    oldest: datetime
    newest: datetime
    count: int
    days: int


def historical_pulls(world: World, user: User, provider: str | None) -> Record:
    """For each of a user's providers, how the pull of each resource's past went."""
    return {connection.provider.slug: _pulls(world, connection) for connection in _of(world, user, provider)}


def resource_statistics(world: World, user: User, provider: str | None) -> Record:
    """For each of a user's providers, the oldest and newest data of each resource."""
    return {
        connection.provider.slug: {each.name: _statistics(world, connection, each) for each in supplied(connection)}
        for connection in _of(world, user, provider)
    }


def extent(world: World, connection: Connection, resource: Resource, end: datetime) -> Extent | None:
    """What there is from the world's start to `end`, if anything. Costs the same for every length of time.

    Only the slots at both ends can be there in part, and a schedule is either several a day or one in some days.
    """
    numbers = world.numbers(resource, world.start, end)

    def there(number: int) -> list[datetime]:
        return _moments(world, Slot(connection, resource, number), end)

    oldest, newest = _first(map(there, numbers)), _first(map(there, reversed(numbers)))
    if oldest is None or newest is None:
        return None
    head, rest = numbers[:2], numbers[2:]
    edges = [moments for number in (*head, *rest[-2:]) if (moments := there(number))]
    full = len(rest[:-2])
    days = min(full + len(edges), (max(newest).date() - min(oldest).date()).days + 1)
    count = sum(map(len, edges)) + full * _samples_of_one(resource)
    return Extent(min(oldest), max(newest), count, days)


def _first(found: Iterable[list[datetime]]) -> list[datetime] | None:
    return next((moments for moments in found if moments), None)


def _moments(world: World, slot: Slot, end: datetime) -> list[datetime]:
    if slot.resource.kind == "timeseries":
        moments = [datetime.fromisoformat(sample["timestamp"]) for sample in world.burst(slot)]
        return [moment for moment in moments if world.start <= moment <= end]
    moment = world.moment(slot)
    return [moment] if world.start <= moment <= min(end, world.newest(slot.resource)) else []


def _samples_of_one(resource: Resource) -> int:
    series = series_of(resource)
    return series.count * max(1, len(series.subtypes)) if resource.kind == "timeseries" else 1


def _of(world: World, user: User, provider: str | None) -> list[Connection]:
    listed = world.conditions.listed(user)
    return [connection for connection in listed if provider in (None, connection.provider.slug)]


def _pulls(world: World, connection: Connection) -> Record:
    pulls = {each: world.conditions.pull(connection, each.name) for each in supplied(connection)}
    return {
        "pulled": {
            resource.name: _pull(world, connection, resource, pull)
            for resource, pull in pulls.items()
            if pull.status != "not_pulled"
        },
        "not_pulled": [resource.name for resource, pull in pulls.items() if pull.status == "not_pulled"],
    }


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


def _statistics(world: World, connection: Connection, resource: Resource) -> Record:
    found = extent(world, connection, resource, world.until)
    well = world.conditions.state(connection).status == "connected"
    return {
        "last_attempt": {"timestamp": world.until.isoformat(), "status": "success" if well else "failure"},
        "oldest_data": found.oldest.isoformat() if found else None,
        "newest_data": found.newest.isoformat() if found else None,
        "sent_count": found.count if found else 0,
    }
