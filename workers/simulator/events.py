"""The webhook events that the simulated Junction sends: envelopes around the world's records."""

from collections.abc import Iterator
from datetime import datetime
from random import Random
from typing import Any

from app.catalogue import EventType, Resource, catalogue
from workers.simulator.data import World
from workers.simulator.labs import BODIES, WITHOUT_USER
from workers.simulator.people import Connection, Provider, User
from workers.simulator.query import Record, Slot
from workers.simulator.series import schedule_of
from workers.simulator.shapes import Context, fill

Event = dict[str, Any]

# The number of slots whose samples one event carries.
BATCH = 12


def envelope(world: World, user: User | None, event_type: str, data: Any) -> Event:
    """An event around its data."""
    event = {"event_type": event_type, "team_id": world.team_id, "data": data}
    return event if user is None else event | {"user_id": user.user_id, "client_user_id": user.client_user_id}


def daily(
    world: World,
    user: User,
    connection: Connection,
    resource: Resource,
    *,
    at: datetime | None = None,
    updated: bool = False,
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
    return envelope(world, user, event_type, _data(world, slot, slots, None if updated else at))


def changes(world: World, *, forget: bool = True) -> list[Event]:
    """The unsent events about revisions that a `changing` fault has made: one for each record or moment.

    A client that read the old version, and does not read it again, gets the new one only from these events.
    """
    return [
        envelope(world, world.user(slot.connection.user_id), name, _data(world, slot, [slot]))
        for slot in world.changed(forget=forget)
        if (name := f"daily.data.{slot.resource.name}.updated")
    ]


def historical(
    world: World,
    user: User,
    connection: Connection,
    resource: Resource,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    is_final: bool = True,
) -> Event:
    """The event that a resource's history can be fetched, by default for the whole world."""
    data = {
        "user_id": user.user_id,
        "start_date": (start or world.start).isoformat(),
        "end_date": (end or world.until).isoformat(),
        "is_final": is_final,
        "provider": connection.provider.slug,
    }
    return envelope(world, user, f"historical.data.{resource.name}.created", data)


def connected(world: World, user: User, connection: Connection) -> Event:
    """The event that a user has connected a provider."""
    described = connection.provider.described()
    data = {
        "user_id": user.user_id,
        "provider": described,
        "source": described,
        "external_user_id": connection.external_user_id,
        "resource_availability": availability(connection),
    }
    return envelope(world, user, "provider.connection.created", data)


def connection_error(world: World, user: User, connection: Connection) -> Event:
    """The event that a provider refuses access to the account. Its `provider` is a slug, not an object."""
    state = world.conditions.state(connection)
    data = {
        "user_id": user.user_id,
        "provider": connection.provider.slug,
        "error_type": state.error_type,
        "error_details": state.error_message,
        "message": "The connection needs the user's consent again.",
    }
    return envelope(world, user, "provider.connection.error", data)


def supplied(connection: Connection) -> list[Resource]:
    """The resources that a connection supplies and that have events in the catalogue."""
    return supplies(connection.provider)


def supplies(provider: Provider) -> list[Resource]:
    """The resources that a provider supplies and that have events in the catalogue."""
    kinds = catalogue().of_kind("summary", "stream", "timeseries")
    return [resource for resource in kinds if not resource.legacy and provider.has(resource)]


def availability(connection: Connection) -> Record:
    """The status of each resource that a connection supplies."""
    return {resource.name: {"status": "available"} for resource in supplied(connection)}


def every_type(world: World) -> Iterator[Event]:
    """One event of every type in the catalogue, all about the first user."""
    for name in catalogue().event_names:
        yield _example(world, world.members[0], catalogue().event(name))


def _example(world: World, user: User, event_type: EventType) -> Event:
    name, is_update = event_type.name, event_type.name.endswith(".updated")
    if event_type.does in ("query", "lab"):
        return _lab(world, user, name)
    if event_type.does == "connection":
        make = connected if name.endswith(".created") else connection_error
        return make(world, user, user.connections[0])
    if event_type.does == "device":
        slot = world.latest(user.connections[0], catalogue()["device"])
        return envelope(world, user, name, world.record(slot))
    assert event_type.resource is not None
    connection = world.connections(user, event_type.resource)[0]
    if event_type.does == "historical":
        return historical(world, user, connection, event_type.resource)
    return daily(world, user, connection, event_type.resource, updated=is_update)


def _lab(world: World, user: User, event_type: str) -> Event:
    name = event_type.rpartition(".")[0]
    variables = {"user_id": user.user_id, "team_id": world.team_id}
    rng = Random(world.seed)  # noqa: S311 - repeatable on purpose
    data = fill(BODIES[name], Context(rng, world.until, variables, lambda _resource: world.team_id))
    return envelope(world, None if name in WITHOUT_USER else user, event_type, data)


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
