"""Poison messages, in this process: which crashes are counted, and when counts are cleared."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.delivery import Delivery, pack
from app.errors import TryLater
from tests.support import delivery, rows, workout
from tests.support.provider import Killed
from workers.actions import Parsed
from workers.aggregators import junction
from workers.aggregators.registry import AGGREGATORS
from workers.ingest.apply import Applier
from workers.ingest.crashes import MAX_CRASHES

CRASHES = "SELECT name, crashes FROM headrace.crash_counts"
LEDGER = "SELECT outcome FROM health.deliveries"
WORKOUTS = "SELECT user_id FROM health.workouts"


def five_deliveries() -> list[Delivery]:
    return [delivery(workout(f"u{n}")) for n in range(5)]


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ids of deliveries that crash the worker that parses them."""
    found: set[str] = set()

    def parse(given: Delivery, body: bytes, settings: Settings) -> Parsed:
        if given.message_id in found:
            raise Killed
        return junction.parse(given, body, settings)

    monkeypatch.setitem(AGGREGATORS, "junction", SimpleNamespace(parse=parse))
    return found


def test_a_delivery_with_crashes_is_applied_last(engine: Engine, settings: Settings, crashing: set[str]) -> None:
    """Breaks if a delivery that crashes workers is tried before its valid neighbours every time."""
    sent = five_deliveries()
    crashing.add(sent[0].message_id)
    for again, landed in [(False, 0), (True, 0), (True, 4)]:
        with pytest.raises(Killed):
            Applier(engine, settings).apply(pack(sent), redelivered=again)
        assert len(rows(engine, WORKOUTS)) == landed
    assert rows(engine, CRASHES) == [{"name": sent[0].key, "crashes": MAX_CRASHES}]
    outcomes = Applier(engine, settings).apply(pack(sent), redelivered=True).outcomes
    assert outcomes == {"dead": 1, "duplicate": 4}
    assert rows(engine, CRASHES) == []


def test_only_the_current_delivery_is_counted(engine: Engine, settings: Settings, crashing: set[str]) -> None:
    """Breaks if a crash is counted for a neighbour that was applied before, or not reached."""
    sent = five_deliveries()
    crashing.add(sent[2].message_id)
    with pytest.raises(Killed):
        Applier(engine, settings).apply(pack(sent), redelivered=True)
    assert rows(engine, CRASHES) == [{"name": sent[2].key, "crashes": 1}]


def test_crashes_are_cleared_once_it_is_applied(engine: Engine, settings: Settings, crashing: set[str]) -> None:
    """Breaks if a crash count remains after a worker has applied the delivery."""
    sent = five_deliveries()
    crashing.add(sent[2].message_id)
    for again in (False, True, True):
        with pytest.raises(Killed):
            Applier(engine, settings).apply(pack(sent), redelivered=again)
    crashing.clear()
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.crash_counts SET crashes = crashes - 1"))
    Applier(engine, settings).apply(pack(sent), redelivered=True)
    assert rows(engine, CRASHES) == []
    assert len(rows(engine, WORKOUTS)) == 5
    assert {row["outcome"] for row in rows(engine, LEDGER)} == {"applied"}


def test_crashes_are_cleared_when_the_delivery_becomes_a_dead_letter(engine: Engine, settings: Settings) -> None:
    """Breaks if the crash count of a delivery with invalid data remains for ever."""
    bad = workout("u1", "")
    Applier(engine, settings).apply(pack([delivery(bad), delivery(b"rubbish")]), redelivered=True)
    assert len(rows(engine, "SELECT 1 FROM headrace.dead_letters")) == 2
    assert rows(engine, CRASHES) == []


def away(engine: Engine, table: str) -> Callable[[], None]:
    """Renames a table, so that queries fail; returns a function that restores it."""
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE headrace.{table} RENAME TO away"))

    def back() -> None:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE headrace.away RENAME TO {table}"))

    return back


def test_an_unavailable_database_is_not_a_crash(engine: Engine, settings: Settings) -> None:
    """Breaks if a delivery becomes a dead letter because PostgreSQL was unavailable."""
    packed = pack([delivery(workout("u1"))])
    back = away(engine, "workouts")
    try:
        for _ in range(MAX_CRASHES + 2):
            with pytest.raises(TryLater):
                Applier(engine, settings).apply(packed, redelivered=True)
    finally:
        back()
    assert Applier(engine, settings).apply(packed, redelivered=True).outcomes == {"applied": 1}


def test_a_retried_delivery_keeps_no_crash_count(engine: Engine, settings: Settings) -> None:
    """Breaks if the crash counts grow with every delivery that met a locked table after a crash."""
    packed = pack([delivery(workout("u1"))])
    back = away(engine, "workouts")
    try:
        with pytest.raises(TryLater):
            Applier(engine, settings).apply(packed, redelivered=True)
    finally:
        back()
    Applier(engine, settings).apply(packed)  # a retried task is a new message, not a redelivered one
    assert rows(engine, CRASHES) == []
