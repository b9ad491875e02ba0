"""The proof: everything that was answered 202, held against everything that is stored. What the demo ends with."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, text

from app.actions import Action, Record, Samples
from app.catalogue import catalogue
from app.config import Settings
from app.delivery import Delivery
from app.providers import PROVIDERS

OUTCOMES = text("SELECT outcome, count(*) FROM health.deliveries GROUP BY outcome")
SETTLED = text("SELECT message_id, outcome FROM health.deliveries")

Key = tuple[Any, ...]
Newest = dict[Key, tuple[datetime, list[Any]]]


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


def expected(accepted: Mapping[str, Any]) -> Newest:
    """The newest version of every record and sample in these events, by message id. Plain Python, no SQL.

    Where two are equally new (ids carry steps of 4 ms) both are named, and the store may hold either.
    """
    newest: Newest = {}
    for message_id, event in accepted.items():
        delivery = Delivery("junction", message_id, time.time(), b"")
        parsed = PROVIDERS["junction"].parse(delivery, msgspec.json.encode(event), Settings())
        for action in parsed.actions:
            for key, version, content in _contents(action):
                known = newest.get(key)
                if known is None or version > known[0]:
                    newest[key] = (version, [content])
                elif version == known[0]:
                    known[1].append(content)
    return newest


def _contents(action: Action) -> Iterator[tuple[Key, datetime, Any]]:
    if isinstance(action, Record):
        yield (action.resource, action.user_id, action.id), action.version, msgspec.json.decode(action.payload)
    elif isinstance(action, Samples):
        for row in action.rows:
            source = (action.provider, action.source_type, action.subtype)
            yield (action.resource, action.user_id, *source, row.ts.astimezone(UTC)), action.version, row.value


def stored(connection: Connection) -> Iterator[tuple[Key, Any]]:
    """Every row of every view, as a reader finds it."""
    for resource in catalogue().values():
        columns = "user_id, id, payload"
        if resource.kind == "timeseries":
            columns = "user_id, provider, source_type, subtype, ts, value"
        for row in connection.execute(text(f"SELECT {columns} FROM health.{resource.name}")):  # noqa: S608 - catalogue
            *key, content = row
            yield (resource.name, *key), content


def prove(engine: Engine, accepted: Mapping[str, Any], seconds: float) -> Proof:
    """Waits until every accepted delivery has an outcome, then compares."""
    deadline = time.monotonic() + seconds
    while True:
        with engine.connect() as connection:
            outcomes = {row.message_id: row.outcome for row in connection.execute(SETTLED)}
            unsettled = accepted.keys() - outcomes.keys()
            if unsettled and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            return _compare(connection, accepted, outcomes, len(unsettled))


def _compare(connection: Connection, accepted: Mapping[str, Any], outcomes: Mapping[str, str], unsettled: int) -> Proof:
    newest = expected(accepted)
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
