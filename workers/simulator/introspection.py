"""What the provider tells about itself: how far its history pulls are, and what it has of each resource."""

from app.catalogue import Resource
from workers.simulator.data import World
from workers.simulator.events import supplied
from workers.simulator.people import Connection, User
from workers.simulator.query import Record
from workers.simulator.series import schedule_of


def historical_pulls(world: World, user: User, provider: str | None) -> Record:
    """For each of a user's providers, how the pull of each resource's past went."""
    timeline = {"scheduled_at": world.start.isoformat(), "started_at": None, "ended_at": world.start.isoformat()}
    pull = {
        "status": "success",
        "range_start": world.start.isoformat(),
        "range_end": world.until.isoformat(),
        "timeline": timeline,
        "days_with_data": world.days,
        "release": "simulated",
        "trace_id": None,
        "error_details": None,
    }
    return {
        connection.provider.slug: {"pulled": {each.name: pull for each in supplied(connection)}, "not_pulled": []}
        for connection in _of(user, provider)
    }


def resource_statistics(world: World, user: User, provider: str | None) -> Record:
    """For each of a user's providers, the oldest and newest data of each resource."""
    return {
        connection.provider.slug: {each.name: _statistics(world, connection, each) for each in supplied(connection)}
        for connection in _of(user, provider)
    }


def _of(user: User, provider: str | None) -> list[Connection]:
    return [connection for connection in user.connections if provider in (None, connection.provider.slug)]


def _statistics(world: World, connection: Connection, resource: Resource) -> Record:
    slots = world.slots(connection, resource, world.start, world.until)
    oldest = next((moment for slot in slots if (moment := world.moment(slot)) >= world.start), None)
    newest = world.moment(world.latest(connection, resource))
    statistics: Record = {"oldest_data": None, "newest_data": None, "sent_count": 0}
    if oldest is not None and oldest <= newest:
        count = (newest - oldest).total_seconds() // schedule_of(resource).every + 1
        statistics = {"oldest_data": oldest.isoformat(), "newest_data": newest.isoformat(), "sent_count": int(count)}
    return {"last_attempt": {"timestamp": world.until.isoformat(), "status": "success"}, **statistics}
