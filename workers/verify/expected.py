"""The expected rows of the views after a run, and the actual rows."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, text

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from workers.actions import Action, Record, Samples
from workers.aggregators import junction, terra
from workers.aggregators.registry import AGGREGATORS
from workers.simulator.data import World
from workers.simulator.events import supplied
from workers.simulator.people import Query
from workers.simulator.terra.data import TerraUser, TerraWorld
from workers.simulator.terra.events import Message, envelope

NEVER = datetime.max.replace(tzinfo=UTC)
RowKey = tuple[Any, ...]
NewestVersions = dict[RowKey, tuple[datetime, list[Any]]]  # by key: version and accepted contents


def expected(accepted: Mapping[str, Any]) -> NewestVersions:
    """The newest version of every record and sample in these events by message id. In plain Python, without SQL.

    If two versions are equally new (message ids have steps of 4 ms), both are listed: either may be stored.
    """
    newest: NewestVersions = {}
    for message_id, event in accepted.items():
        delivery, body = _delivered(message_id, event)
        for action in AGGREGATORS[delivery.aggregator].parse(delivery, body, Settings()).actions:
            for key, version, content in contents(action):
                known = newest.get(key)
                if known is None or version > known[0]:
                    newest[key] = (version, [content])
                elif version == known[0]:
                    known[1].append(content)
    return newest


def _delivered(message_id: str, event: Any) -> tuple[Delivery, bytes]:
    """An event as its aggregator delivers it. Terra's time and reference are in headers."""
    if isinstance(event, Message):
        delivery = Delivery("terra", message_id, time.time(), b"", event.ordering_ms, event.reference)
        return delivery, msgspec.json.encode(event.event)
    return Delivery("junction", message_id, time.time(), b""), msgspec.json.encode(event)


def wanted(accepted: Mapping[str, Any], truth: Mapping[RowKey, Any]) -> NewestVersions:
    """The expected rows: the final state of the provider (`truth`), and for other keys the newest accepted version."""
    newest = expected(accepted)
    for key, content in truth.items():
        equal = newest[key][1] if key in newest else []
        newest[key] = (NEVER, [content, *equal] if len(equal) > 1 else [content])
    return newest


def contents(action: Action) -> Iterator[tuple[RowKey, datetime, Any]]:
    """The key, version and content of each row that an action would store."""
    if isinstance(action, Record):
        yield (action.resource, action.user_id, action.id), action.version, msgspec.json.decode(action.payload)
    elif isinstance(action, Samples):
        for row in action.rows:
            source = (action.provider, action.source_type, action.subtype)
            yield (action.resource, action.user_id, *source, row.ts.astimezone(UTC)), action.version, row.value


def _rows(actions: Iterable[Action]) -> dict[RowKey, Any]:
    return {key: content for action in actions for key, _, content in contents(action)}


def history(world: World) -> dict[RowKey, Any]:
    """All data of the simulated Junction, by the key of its row."""
    found: dict[RowKey, Any] = {}
    for user in world.members:
        for connection in user.connections:
            for resource in supplied(connection):
                query = Query(user, resource, world.start, world.until, connection.provider.slug)
                found |= _history_of(world, query)
    return found


def terra_history(twin: TerraWorld) -> dict[RowKey, Any]:
    """All data of the simulated Terra, by the key of its row."""
    found: dict[RowKey, Any] = {}
    for account in twin.accounts():
        for resource in catalogue().values():
            for page in _pages_of(twin, account, resource):
                body = msgspec.json.encode(page)
                found |= _rows(terra.read_page(resource, account.user_id, body, twin.world.until).actions)
    return found


def _pages_of(twin: TerraWorld, account: TerraUser, resource: Resource) -> Iterator[Any]:
    """The responses of the read API: one page for the whole world."""
    about = envelope(twin, account, resource.terra or "", [])
    if resource.terra == "athlete":
        yield about | {"athlete": twin.athlete(account)}
    for kind in twin.kinds(account):
        if kind.name == resource.terra:
            yield about | {"data": twin.objects(account, kind, twin.world.start, twin.world.until)}


def _history_of(world: World, query: Query) -> dict[RowKey, Any]:
    resource, user_id = query.resource, query.user.user_id
    if resource.kind == "stream":
        workouts = world.summaries(replace(query, resource=catalogue()[resource.of or ""]))
        streams = {workout["id"]: world.stream(resource, workout["id"]) for workout in workouts}
        return {(resource.name, user_id, name): stream for name, stream in streams.items() if stream}
    pages: list[Any] = [{"groups": {"all": world.groups(query)}}]
    if resource.kind != "timeseries":
        records = world.summaries(query)
        pages = [{resource.rows: records}] if resource.rows else records
    found: dict[RowKey, Any] = {}
    for page in pages:
        found |= _rows(junction.read_page(resource, user_id, msgspec.json.encode(page), world.until).actions)
    return found


def stored(connection: Connection) -> Iterator[tuple[RowKey, Any]]:
    """The key and content of every row of every view."""
    for resource in catalogue().values():
        columns = "user_id, id, payload"
        if resource.is_series:
            columns = "user_id, provider, source_type, subtype, ts, value"
        for row in connection.execute(text(f"SELECT {columns} FROM health.{resource.name}")):  # noqa: S608 - catalogue
            *key, content = row
            yield (resource.name, *key), content
