"""Writing a batch: new samples are copied, others merged, with the same result."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from app.config.settings import Settings
from app.delivery import Delivery, pack
from tests.support import START, delivery, heartrate, rows, until, workout
from tests.support.cases import Failures
from tests.support.database import emptied
from workers.ingest.apply import Applier
from workers.store import replaced, samples, writer
from workers.store.replaced import ReplacedRange
from workers.store.samples import Written

MINUTE = timedelta(minutes=1)
WAITING = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def sent(user: str, minutes: range, value: float = 60, at: datetime = START) -> Delivery:
    return delivery(heartrate(user, {minute: value + minute % 7 for minute in minutes}), at)


@contextmanager
def merges(engine: Engine) -> Iterator[list[str]]:
    """Records the merges of samples."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "staged_samples" in statement and "INSERT INTO headrace.samples" in statement:
            seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine, "before_cursor_execute", note)


def stored(engine: Engine, user: str) -> list[dict[str, Any]]:
    """The samples of a user, without the time of storage."""
    columns = "ts, ts_end, value, unit, timezone_offset, extra, origin"
    return rows(engine, f"SELECT {columns} FROM health.heartrate WHERE user_id = :user ORDER BY ts", user=user)


def test_new_samples_are_copied_directly(engine: Engine, settings: Settings) -> None:
    """Breaks if new samples are staged and merged: three times the work for PostgreSQL."""
    applier = Applier(engine, settings)
    with merges(engine) as made:
        message = [sent("u1", range(300)), sent("u1", range(300, 600)), sent("u2", range(300))]
        assert applier.apply(pack(message)).outcomes == {"applied": 3}
    assert made == []
    assert [len(stored(engine, user)) for user in ("u1", "u2")] == [600, 300]
    assert {row["origin"] for row in stored(engine, "u1")} == {"webhook"}


def test_overlapping_samples_are_merged(engine: Engine, settings: Settings) -> None:
    """Breaks if samples that overlap stored ones, or those of another delivery of the message, are not compared."""
    applier = Applier(engine, settings)
    applier.apply(pack([sent("u1", range(300))]))
    newer, older = START + timedelta(hours=1), START - timedelta(hours=1)
    with merges(engine) as made:
        assert applier.apply(pack([sent("u1", range(299, 600), 80, newer)])).outcomes == {"applied": 1}
        both = [sent("u2", range(0, 300, 2), 80, newer), sent("u2", range(300), 60, older)]
        assert applier.apply(pack(both)).outcomes == {"applied": 2}
    assert len(made) == 2
    assert [row["value"] >= 80 for row in stored(engine, "u1")] == [False] * 299 + [True] * 301
    assert [row["value"] >= 80 for row in stored(engine, "u2")] == [True, False] * 150


def test_a_run_inside_another_is_found(engine: Engine, settings: Settings) -> None:
    """Breaks if only adjacent runs are compared: the third lies within the first, but is not next to it."""
    message = [sent("u1", range(0, 300, 3), 80), sent("u1", range(10, 20)), sent("u1", range(200, 290))]
    Applier(engine, settings).apply(pack(message))
    assert len(stored(engine, "u1")) == len({*range(0, 300, 3), *range(10, 20), *range(200, 290)})


def test_a_concurrent_writer_of_the_same_samples(engine: Engine, settings: Settings) -> None:
    """Breaks if two workers with the same new samples lose a delivery or a newer value."""
    applier = Applier(engine, settings)
    applier.apply(pack([sent("u1", range(1))]))
    (series,) = rows(engine, "SELECT id FROM headrace.series")
    outcomes = []
    with engine.connect() as other:
        other.execute(
            text("""INSERT INTO headrace.samples (series_id, ts, value, unit, version, origin, stored_at)
                    VALUES (:series, :ts, 99, 'bpm', now() + interval '1 year', 'webhook', now())"""),
            {"series": series["id"], "ts": START + 100 * MINUTE},
        )
        message = pack([sent("u1", range(50, 350))])
        thread = threading.Thread(target=lambda: outcomes.append(applier.apply(message).outcomes))
        thread.start()
        until(lambda: rows(engine, WAITING))  # the writer waits for that row
        assert thread.is_alive()
        other.commit()
        thread.join(30)
    assert outcomes == [{"applied": 1}]
    values = {row["ts"]: row["value"] for row in stored(engine, "u1")}
    assert (len(values), values[START + 100 * MINUTE]) == (301, 99)


def part(chance: random.Random) -> tuple[str, range, int]:
    """The user, the minutes and the age of a random delivery."""
    first = chance.randrange(100)
    minutes = range(first, first + chance.randint(1, 40), chance.randint(1, 3))
    return chance.choice("ab"), minutes, chance.randint(0, 9)


def test_both_paths_have_the_same_result(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Breaks if the rows or the ledger show whether samples were copied or merged."""
    failures = Failures()
    for seed in range(25 if full else 8):
        with failures.of(seed), emptied(engine):
            chance = random.Random(seed)
            plan = [[part(chance) for _ in range(chance.randint(1, 5))] for _ in range(4)]
            found = {}
            for way, threshold in (("filled", 1), ("merged", 10**9)):
                monkeypatch.setattr(samples, "DIRECT_COPY_MIN_ROWS", threshold)
                applier, outcomes = Applier(engine, settings), []
                for message in plan:
                    deliveries = [
                        sent(f"{way}-{user}", minutes, 60 + age, START + age * MINUTE) for user, minutes, age in message
                    ]
                    by_id = {s.message_id: s.outcome for s in applier.apply(pack(deliveries)).settled}
                    outcomes.append([by_id[one.message_id] for one in deliveries])
                found[way] = (outcomes, [stored(engine, f"{way}-{user}") for user in "ab"])
            assert found["filled"] == found["merged"]
    assert failures == {}


def test_a_large_merge_is_split(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if one statement merges all samples of a delivery: 700,000 reached the statement timeout of 45 s.

    Deliveries that overlap in time are cut at the same samples, so that the newest of them wins.
    """
    monkeypatch.setattr(samples, "MAX_ROWS", 100)
    applier = Applier(engine, settings)
    applier.apply(pack([sent("u1", range(700))]))
    with merges(engine) as made:
        later = [sent("u1", range(700), 80, START + MINUTE), sent("u1", range(300, 900), 90, START + 2 * MINUTE)]
        assert applier.apply(pack(later)).outcomes == {"applied": 2}
    assert len(made) == 13  # of 1,300 rows
    expected = [80 + minute % 7 for minute in range(300)] + [90 + minute % 7 for minute in range(300, 900)]
    assert [row["value"] for row in stored(engine, "u1")] == expected
    assert applier.apply(pack(later)).outcomes == {"duplicate": 1, "stale": 1}


def test_a_large_copy_is_split(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if parts of new samples are lost, or copied twice."""
    monkeypatch.setattr(samples, "MAX_ROWS", 100)
    with merges(engine) as made:
        assert Applier(engine, settings).apply(pack([sent("u1", range(950))])).outcomes == {"applied": 1}
    assert made == []
    assert [row["value"] for row in stored(engine, "u1")] == [60 + minute % 7 for minute in range(950)]


def test_large_records_are_merged_in_parts(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if one statement passes more payload than jsonb holds, or a part of the records is lost."""
    monkeypatch.setattr(writer, "MAX_PAYLOAD_BYTES", 2000)
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    message = [delivery(workout("u1", f"w{number}", note="x" * 500)) for number in range(9)]
    assert Applier(engine, settings).apply(pack(message)).outcomes == {"applied": 9}
    event.remove(engine, "before_cursor_execute", note)
    assert len([one for one in seen if 'INSERT INTO headrace."workouts"' in one]) == 5
    assert len(rows(engine, "SELECT id FROM health.workouts")) == 9


def test_replaced_samples_are_deleted_in_parts(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a sample of a replaced range stays, or one of a newer version is deleted."""
    monkeypatch.setattr(replaced, "MAX_ROWS", 7)
    Applier(engine, settings).apply(pack([sent("u1", range(100))]))
    Applier(engine, settings).apply(pack([sent("u1", range(40, 50), 90, START + 2 * MINUTE)]))
    (row,) = rows(engine, "SELECT id FROM headrace.series")
    last = START + timedelta(minutes=89)
    with engine.begin() as connection:
        range_ = ReplacedRange(row["id"], "w1", START + MINUTE, START, last)
        assert replaced.remove(connection, [range_], "webhook") == (80, Written())
    assert len(stored(engine, "u1")) == 20
