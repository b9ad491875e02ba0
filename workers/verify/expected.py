"""The proof: everything that was answered 202, held against everything that is stored. What the demo ends with."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, text

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from workers.actions import Action, Record, Samples
from workers.aggregators import AGGREGATORS, junction, terra
from workers.simulator.data import World
from workers.simulator.events import supplied
from workers.simulator.query import Query
from workers.simulator.terra.data import TerraWorld
from workers.simulator.terra.events import Message, envelope
from workers.simulator.terra.people import TerraUser

OUTCOMES = text("SELECT outcome, count(*) FROM health.deliveries GROUP BY outcome")
SETTLED = text("SELECT message_id, outcome FROM health.deliveries")

NEVER = datetime.max.replace(tzinfo=UTC)
RowKey = tuple[Any, ...]
NewestVersions = dict[RowKey, tuple[datetime, list[Any]]]


@dataclass(frozen=True)
class Proof:
    """What was accepted, what became of it, and where the store differs from what it must hold."""

    accepted: int  # distinct delivery ids that were answered 202
    settled: Counter[str]
    unsettled: int  # of those, how many have no outcome
    expected: int  # distinct records and samples in what was accepted
    missing: int
    outdated: int
    unexpected: int  # rows that nothing accepted explains, a second row of one key among them

    @property
    def holds(self) -> bool:
        """Whether the account is exact."""
        return not (self.unsettled or self.missing or self.outdated or self.unexpected or self.settled["dead"])


def expected(accepted: Mapping[str, Any]) -> NewestVersions:
    """The newest version of every record and sample in these events, by message id. Plain Python, no SQL.

    Where two are equally new (ids carry steps of 4 ms) both are named, and the store may hold either.
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
    """An event as its aggregator delivers it: Terra's brings its own clock and reference in headers."""
    if isinstance(event, Message):
        delivery = Delivery("terra", message_id, time.time(), b"", event.ordering_ms, event.reference)
        return delivery, msgspec.json.encode(event.event)
    return Delivery("junction", message_id, time.time(), b""), msgspec.json.encode(event)


def wanted(accepted: Mapping[str, Any], truth: Mapping[RowKey, Any]) -> NewestVersions:
    """What the views must hold: the newest that was accepted, and before that what the provider has at the end."""
    newest = expected(accepted)
    for key, content in truth.items():
        equal = newest[key][1] if key in newest else []
        newest[key] = (NEVER, [content, *equal] if len(equal) > 1 else [content])
    return newest


def contents(action: Action) -> Iterator[tuple[RowKey, datetime, Any]]:
    """What an action would store: key, version and content of each row."""
    if isinstance(action, Record):
        yield (action.resource, action.user_id, action.id), action.version, msgspec.json.decode(action.payload)
    elif isinstance(action, Samples):
        for row in action.rows:
            source = (action.provider, action.source_type, action.subtype)
            yield (action.resource, action.user_id, *source, row.ts.astimezone(UTC)), action.version, row.value


def history(world: World) -> dict[RowKey, Any]:
    """Everything that the simulated provider has, by the keys under which it must be stored."""
    found: dict[RowKey, Any] = {}
    for user in world.members:
        for connection in user.connections:
            for resource in supplied(connection):
                query = Query(user, resource, world.start, world.until, connection.provider.slug)
                found |= dict(_history_of(world, query))
    return found


def terra_history(twin: TerraWorld) -> dict[RowKey, Any]:
    """The same of everything that its people have at Terra."""
    found: dict[RowKey, Any] = {}
    for account in twin.accounts():
        for resource in catalogue().values():
            for page in _pages_of(twin, account, resource):
                body = msgspec.json.encode(page)
                for action in terra.read_page(resource, account.user_id, body, twin.world.until).actions:
                    found |= {key: content for key, _, content in contents(action)}
    return found


def _pages_of(twin: TerraWorld, account: TerraUser, resource: Resource) -> Iterator[Any]:
    """What the read API answers where Headrace asks it: one page for all of the world."""
    about = envelope(twin, account, resource.terra or "", [])
    if resource.terra == "athlete":
        yield about | {"athlete": twin.athlete(account)}
    for kind in twin.kinds(account):
        if kind.name == resource.terra:
            yield about | {"data": twin.objects(account, kind, twin.world.start, twin.world.until)}


def _history_of(world: World, query: Query) -> Iterator[tuple[RowKey, Any]]:
    resource, user_id = query.resource, query.user.user_id
    if resource.kind == "stream":
        for workout in world.summaries(replace(query, resource=catalogue()[resource.of or ""])):
            if stream := world.stream(resource, workout["id"]):
                yield (resource.name, user_id, workout["id"]), stream
        return
    pages: list[Any] = [{"groups": {"all": world.groups(query)}}]
    if resource.kind != "timeseries":
        records = world.summaries(query)
        pages = [{resource.rows: records}] if resource.rows else records
    for page in pages:
        for action in junction.read_page(resource, user_id, msgspec.json.encode(page), world.until).actions:
            yield from ((key, content) for key, _, content in contents(action))


def stored(connection: Connection) -> Iterator[tuple[RowKey, Any]]:
    """Every row of every view, as a reader finds it."""
    for resource in catalogue().values():
        columns = "user_id, id, payload"
        if resource.is_series:
            columns = "user_id, provider, source_type, subtype, ts, value"
        for row in connection.execute(text(f"SELECT {columns} FROM health.{resource.name}")):  # noqa: S608 - catalogue
            *key, content = row
            yield (resource.name, *key), content


def prove(engine: Engine, accepted: Mapping[str, Any], truth: Mapping[RowKey, Any], seconds: float) -> Proof:
    """Waits until every accepted delivery has an outcome, then compares. `truth` goes before what events said."""
    deadline = time.monotonic() + seconds
    while True:
        with engine.connect() as connection:
            outcomes = {row.message_id: row.outcome for row in connection.execute(SETTLED)}
            unsettled = accepted.keys() - outcomes.keys()
            if unsettled and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            return _compare(connection, accepted, truth, outcomes, len(unsettled))


def _compare(
    connection: Connection,
    accepted: Mapping[str, Any],
    truth: Mapping[RowKey, Any],
    outcomes: Mapping[str, str],
    unsettled: int,
) -> Proof:
    newest = wanted(accepted, truth)
    found, seen, outdated, unexpected = 0, set(), 0, 0
    for key, content in stored(connection):
        if key in seen or key not in newest:
            unexpected += 1
            continue
        seen.add(key)
        found += 1
        outdated += content not in newest[key][1]
    settled = Counter(outcome for name, outcome in outcomes.items() if name in accepted)
    return Proof(len(accepted), settled, unsettled, len(newest), len(newest) - found, outdated, unexpected)
