"""Deliveries that killed their worker, in this process: whose crashes are counted, and when counts are cleared."""

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
from workers.aggregators import AGGREGATORS, junction
from workers.ingest.apply import Applier
from workers.ingest.crashes import MAX_CRASHES

SUSPECTS = "SELECT name, crashes FROM headrace.crash_counts"
LEDGER = "SELECT outcome FROM health.deliveries"
WORKOUTS = "SELECT user_id FROM health.workouts"


def message() -> list[Delivery]:
    """Five deliveries."""
    return [delivery(workout(f"u{n}")) for n in range(5)]


@pytest.fixture
def killers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ids of deliveries that end whoever opens them."""
    found: set[str] = set()

    def parse(given: Delivery, body: bytes, settings: Settings) -> Parsed:
        if given.message_id in found:
            raise Killed
        return junction.parse(given, body, settings)

    monkeypatch.setitem(AGGREGATORS, "junction", SimpleNamespace(parse=parse))
    return found


def test_what_workers_have_died_with_goes_last(engine: Engine, settings: Settings, killers: set[str]) -> None:
    """Breaks if a delivery that kills is tried before its innocent neighbours, each time anew."""
    sent = message()
    killers.add(sent[0].message_id)
    for again, landed in [(False, 0), (True, 0), (True, 4)]:
        with pytest.raises(Killed):
            Applier(engine, settings).apply(pack(sent), redelivered=again)
        assert len(rows(engine, WORKOUTS)) == landed
    assert rows(engine, SUSPECTS) == [{"name": sent[0].key, "crashes": MAX_CRASHES}]
    outcomes = Applier(engine, settings).apply(pack(sent), redelivered=True).outcomes
    assert outcomes == {"dead": 1, "duplicate": 4}
    assert rows(engine, SUSPECTS) == []


def test_only_what_was_at_hand_is_suspected(engine: Engine, settings: Settings, killers: set[str]) -> None:
    """Breaks if a neighbour that landed, or was not reached, is held against it."""
    sent = message()
    killers.add(sent[2].message_id)
    with pytest.raises(Killed):
        Applier(engine, settings).apply(pack(sent), redelivered=True)
    assert rows(engine, SUSPECTS) == [{"name": sent[2].key, "crashes": 1}]


def test_crashes_are_cleared_once_it_is_applied(engine: Engine, settings: Settings, killers: set[str]) -> None:
    """Breaks if a delivery is still suspected when a worker has come through with it alive."""
    sent = message()
    killers.add(sent[2].message_id)
    for again in (False, True, True):
        with pytest.raises(Killed):
            Applier(engine, settings).apply(pack(sent), redelivered=again)
    killers.clear()
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.crash_counts SET crashes = crashes - 1"))
    Applier(engine, settings).apply(pack(sent), redelivered=True)
    assert rows(engine, SUSPECTS) == []
    assert len(rows(engine, WORKOUTS)) == 5
    assert {row["outcome"] for row in rows(engine, LEDGER)} == {"applied"}


def test_a_delivery_that_is_refused_after_a_crash_is_no_suspect_any_more(engine: Engine, settings: Settings) -> None:
    """Breaks if what becomes a dead letter for its data stays suspected for ever."""
    bad = workout("u1", title="a\u0000b")
    Applier(engine, settings).apply(pack([delivery(bad), delivery(b"rubbish")]), redelivered=True)
    assert len(rows(engine, "SELECT 1 FROM headrace.dead_letters")) == 2
    assert rows(engine, SUSPECTS) == []


def away(engine: Engine, table: str) -> Callable[[], None]:
    """Takes a table away, as a migration that holds it would; returns what brings it back."""
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE headrace.{table} RENAME TO away"))

    def back() -> None:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE headrace.away RENAME TO {table}"))

    return back


def test_waiting_for_the_database_is_no_death(engine: Engine, settings: Settings) -> None:
    """Breaks if a delivery is set aside as a killer because PostgreSQL could not take it, and no worker died."""
    packed = pack([delivery(workout("u1"))])
    back = away(engine, "workouts")
    try:
        for _ in range(MAX_CRASHES + 2):
            with pytest.raises(TryLater):
                Applier(engine, settings).apply(packed, redelivered=True)
    finally:
        back()
    assert Applier(engine, settings).apply(packed, redelivered=True).outcomes == {"applied": 1}


def test_what_had_to_wait_is_no_suspect_in_the_end(engine: Engine, settings: Settings) -> None:
    """Breaks if the table of crashed_deliveries grows with every delivery that met a locked table after a crash."""
    packed = pack([delivery(workout("u1"))])
    back = away(engine, "workouts")
    try:
        with pytest.raises(TryLater):
            Applier(engine, settings).apply(packed, redelivered=True)
    finally:
        back()
    Applier(engine, settings).apply(packed)  # a task that is put back is a new message: nobody has died with it
    assert rows(engine, SUSPECTS) == []
