"""The webhook events that the simulated Junction sends: envelopes around the world's records."""

from collections.abc import Iterator
from datetime import UTC, datetime
from random import Random
from typing import Any

from app.catalogue import EventType, Resource, catalogue
from workers.simulator.data import World
from workers.simulator.labs import BODIES, WITHOUT_USER
from workers.simulator.people import Connection, Provider, Record, Slot
from workers.simulator.series import schedule_of
from workers.simulator.shapes import Context, fill

Event = dict[str, Any]

BATCH = 12  # slots whose samples one event carries
SHARE_OF_UPDATES = 0.3


def first_events(world: World) -> Iterator[Event]:
    """The events of all connections: each connection's own event, then one per resource that has history."""
    for connection in world.all_connections:
        yield from _arrival(world, connection)


def live_events(world: World, seed: int = 0) -> Iterator[Event]:
    """Endless events about the newest data of random users and resources; some correct earlier events.

    Each event moves the world's end to the present. Events about new connections and about revisions by the fault
    `changing` come first. The events end when no user has a connection.
    """
    rng = Random(seed)  # noqa: S311 - repeatable on purpose
    while True:
        world.until = max(world.until, datetime.now(UTC))
        for connection in world.arrived():
            yield from _arrival(world, connection)
        yield from changes(world)
        connected_users = [member for member in world.members if member.connections]
        if not connected_users:
            return
        connection = rng.choice(rng.choice(connected_users).connections)
        resource = rng.choice([each for each in supplied(connection) if world.has(connection, each)])
        yield daily(world, connection, resource, updated=rng.random() < SHARE_OF_UPDATES)


def _arrival(world: World, connection: Connection) -> Iterator[Event]:
    yield connected(world, connection)
    yield from (historical(world, connection, resource) for resource in supplied(connection))


def envelope(world: World, connection: Connection | None, event_type: str, data: Any) -> Event:
    """An event around its data, about the user of the connection, if one is given."""
    event = {"event_type": event_type, "team_id": world.team_id, "data": data}
    if connection is None:
        return event
    user = world.owner(connection)
    return event | {"user_id": user.user_id, "client_user_id": user.client_user_id}


def daily(
    world: World, connection: Connection, resource: Resource, *, at: datetime | None = None, updated: bool = False
) -> Event:
    """An event with the newest record of a resource, or its newest samples, as of `at` (default: now).

    With `updated` the records are revised first: the event carries other values than before, a summary's `updated_at`
    is later, and the read API returns the new version from now on.
    """
    slot = world.latest(connection, resource, at)
    slots = _batch(world, slot) if resource.kind == "timeseries" else [slot]
    if updated:
        for each in slots:
            world.revise(each)
    event_type = f"daily.data.{resource.name}.{'updated' if updated else 'created'}"
    return envelope(world, connection, event_type, _data(world, slot, slots, None if updated else at))


def changes(world: World, *, forget: bool = True) -> list[Event]:
    """The unsent events about revisions that a `changing` fault has made: one for each record or moment.

    A client that read the old version, and does not read it again, gets the new one only from these events.
    """
    return [
        envelope(world, slot.connection, f"daily.data.{slot.resource.name}.updated", _data(world, slot, [slot]))
        for slot in world.changed(forget=forget)
    ]


def historical(world: World, connection: Connection, resource: Resource) -> Event:
    """The event that a resource's history can be fetched, for the whole world."""
    data = {
        "user_id": connection.user_id,
        "start_date": world.start.isoformat(),
        "end_date": world.until.isoformat(),
        "is_final": True,
        "provider": connection.provider.slug,
    }
    return envelope(world, connection, f"historical.data.{resource.name}.created", data)


def connected(world: World, connection: Connection) -> Event:
    """The event that a user has connected a provider."""
    described = connection.provider.described()
    data = {
        "user_id": connection.user_id,
        "provider": described,
        "source": described,
        "external_user_id": connection.external_user_id,
        "resource_availability": availability(connection),
    }
    return envelope(world, connection, "provider.connection.created", data)


def connection_error(world: World, connection: Connection) -> Event:
    """The event that a provider refuses access to the account. Its `provider` is a slug, not an object."""
    state = world.conditions.state(connection)
    data = {
        "user_id": connection.user_id,
        "provider": connection.provider.slug,
        "error_type": state.error_type,
        "error_details": state.error_message,
        "message": "The connection needs the user's consent again.",
    }
    return envelope(world, connection, "provider.connection.error", data)


def supplied(connection: Connection) -> list[Resource]:
    """The resources that a connection supplies and that have events in the catalogue."""
    return supplies(connection.provider)


def supplies(provider: Provider) -> list[Resource]:
    """The resources that a provider supplies and that have events in the catalogue."""
    kinds = catalogue().of_kind("summary", "stream", "timeseries")
    return [resource for resource in kinds if not resource.legacy and provider.has(resource)]


def availability(connection: Connection) -> Record:
    return {resource.name: {"status": "available"} for resource in supplied(connection)}


def every_type(world: World) -> Iterator[Event]:
    """One event of every type in the catalogue, all about the first user."""
    for name in catalogue().event_names:
        yield _example(world, catalogue().event(name))


def _example(world: World, event_type: EventType) -> Event:
    name, connection = event_type.name, world.members[0].connections[0]
    if event_type.does in ("query", "lab"):
        return _lab(world, connection, name)
    if event_type.does == "connection":
        return (connected if name.endswith(".created") else connection_error)(world, connection)
    if event_type.does == "device":
        return envelope(world, connection, name, world.record(world.latest(connection, catalogue()["device"])))
    assert event_type.resource is not None
    connection = world.connections(world.members[0], event_type.resource)[0]
    if event_type.does == "historical":
        return historical(world, connection, event_type.resource)
    return daily(world, connection, event_type.resource, updated=name.endswith(".updated"))


def _lab(world: World, connection: Connection, event_type: str) -> Event:
    name = event_type.rpartition(".")[0]
    variables = {"user_id": connection.user_id, "team_id": world.team_id}
    rng = Random(world.seed)  # noqa: S311 - repeatable on purpose
    data = fill(BODIES[name], Context(rng, world.until, variables, lambda _resource: world.team_id))
    return envelope(world, None if name in WITHOUT_USER else connection, event_type, data)


def _batch(world: World, slot: Slot) -> list[Slot]:
    """A slot and up to BATCH - 1 before it that have the same source."""
    source = world.source(slot)
    start = world.moment(slot).timestamp() - BATCH * schedule_of(slot.resource).every
    earliest = max(datetime.fromtimestamp(start, world.until.tzinfo), world.start)
    near = world.slots(slot.connection, slot.resource, earliest, world.moment(slot))
    same = [each for each in near if each.number < slot.number and world.source(each) == source]
    return [*(each for each in same if world.moment(each) >= world.start), slot][-BATCH:]


def _data(world: World, slot: Slot, slots: list[Slot], at: datetime | None = None) -> Record:
    """The data of an event. A correction has all samples of its slots, other events those that are known `at`."""
    if slot.resource.kind == "stream":
        return world.notice(slot)
    if slot.resource.kind != "timeseries":
        return world.record(slot)
    samples = [sample for each in slots for sample in world.burst(each)]
    known = [sample for sample in samples if datetime.fromisoformat(sample["timestamp"]) <= (at or world.until)]
    return {"source": world.source(slot), "data": known}
