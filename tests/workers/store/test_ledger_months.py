"""The ledger by month: one entry per delivery, whatever months its attempts are applied in, and retention by month."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, seal
from app.errors import TryLater
from tests.support import apply, delivery, message_id, rows, until, workout
from tests.support.database import emptied, run
from tests.support.deliveries import SEALER, received
from workers.ingest.apply import Applier
from workers.ingest.replay import replay, replay_dead_letters
from workers.operate.erase import Eraser
from workers.store import dead_letters, retention
from workers.store.archive import ArchiveWindow
from workers.store.engine import make_writer, transaction
from workers.store.ledger import Attempt, OutcomeRow, first_arrivals, is_near_change_of_month, settle

CHANGE = datetime(2026, 11, 1, tzinfo=UTC)  # the end of October
BEFORE, AFTER = CHANGE - timedelta(minutes=1), CHANGE + timedelta(minutes=1)
LEDGER = "SELECT message_id, outcome, attempts, month::text FROM headrace.deliveries ORDER BY message_id"
# now() cannot be set. The session of a worker has its month.
MONTH = """
CREATE OR REPLACE FUNCTION headrace.ledger_month() RETURNS date LANGUAGE sql STABLE
RETURN CAST(current_setting('headrace.month') AS date)"""
# Plans of empty tables cost the same for every number of deliveries.
ENTRIES = """
INSERT INTO headrace.deliveries (month, aggregator, message_id, received_at, applied_at, outcome, digest)
SELECT month, 'terra', n || month::text, now(), now(), 'applied', decode(md5(n || month::text), 'hex')
FROM generate_series(1, 5000) AS n, generate_series('2026-08-01'::timestamp, '2026-11-01', '1 month') AS month;
ANALYZE headrace.deliveries"""
WAITING = """
SELECT count(*) AS n FROM pg_stat_activity
WHERE wait_event_type = 'Lock' AND wait_event = 'advisory' AND datname = current_database()"""


@pytest.fixture(scope="module")
def months(shared: Engine) -> list[str]:
    """The partitions of August to November 2026, and no other ones."""
    run(
        shared,
        MONTH,
        "ALTER TABLE headrace.deliveries DETACH PARTITION headrace.deliveries_before",
        "DROP TABLE headrace.deliveries_before",
        *(f"SELECT headrace.create_partition('deliveries', '2026-{month:02}-01')" for month in range(8, 12)),
    )
    return [f"deliveries_2026{month:02}" for month in range(8, 12)]


@pytest.fixture
def workers(shared: Engine, shared_settings: Settings, months: list[str]) -> Iterator[dict[int, Engine]]:
    """Engines of workers, by the month in which their transactions begin."""
    engines = {
        number: make_writer(shared_settings, session={"headrace.month": f"2026-{number:02}-01"})
        for number in range(8, 8 + len(months))
    }
    with emptied(shared):
        yield engines
    for engine in engines.values():
        engine.dispose()


def terra(name: str, at: datetime, digest: int = 1) -> Delivery:
    """A delivery of Terra's: its id is not signed."""
    day = {"start_time": "2026-10-31T00:00:00+00:00", "end_time": "2026-11-01T00:00:00+00:00", "upload_type": 1}
    user = {"user_id": "terra-1", "provider": "GARMIN"}
    body = {"type": "daily", "user": user, "data": [{"metadata": day, "calories_data": {"total_burned_calories": 1}}]}
    receipt = Receipt(name, 1_793_000_000_000, None, digest.to_bytes(16))
    return seal("terra", receipt, msgspec.json.encode(body), SEALER, received_at=at.timestamp())


def attempts(kind: str) -> tuple[Delivery, Delivery]:
    """Two attempts of one delivery, received before and after the change of month."""
    if kind == "digest":
        return terra("trace-1", BEFORE), terra("trace-2", AFTER)
    name = message_id(BEFORE) if kind == "svix" else "another-form"
    return received(delivery(workout("u1"), name=name), BEFORE), received(delivery(workout("u1"), name=name), AFTER)


@pytest.mark.parametrize("kind", ["svix", "other id", "digest"])
def test_an_attempt_of_the_next_month_is_counted_in_the_first(
    workers: dict[int, Engine], shared_settings: Settings, kind: str
) -> None:
    """Breaks if a delivery that is sent again after a change of month has two entries."""
    first, second = attempts(kind)
    assert apply(workers[10], shared_settings, first) == {"applied": 1}
    assert apply(workers[11], shared_settings, second) == {"duplicate": 1}
    apply(workers[11], shared_settings, second, delivery(workout("u2"), AFTER))
    found = {row["message_id"]: (row["attempts"], row["month"]) for row in rows(workers[11], LEDGER)}
    assert found.pop(first.message_id) == (3, "2026-10-01")
    assert [month for _, month in found.values()] == ["2026-11-01"]


def test_an_id_without_a_time_is_found_in_any_month(workers: dict[int, Engine], shared_settings: Settings) -> None:
    """Breaks if only recent months are searched for ids that do not contain their time of creation."""
    for month in (8, 11, 9):
        apply(workers[month], shared_settings, delivery(workout("u1"), name="another-form"))
    (row,) = rows(workers[11], LEDGER)
    assert (row["attempts"], row["month"]) == (3, "2026-08-01")


def test_a_message_that_is_sent_again_in_another_month_is_one_dead_letter(
    workers: dict[int, Engine], shared_settings: Settings
) -> None:
    """Breaks if invalid messages are not looked up: each month would have an entry of the same message."""
    for month in (10, 11):
        Applier(workers[month], shared_settings).dead_letter_raw(b"no message", "not a message of deliveries")
    (row,) = rows(workers[11], LEDGER)
    assert (row["attempts"], row["month"]) == (2, "2026-10-01")


def test_the_plan_of_the_lookup_is_stored(workers: dict[int, Engine]) -> None:
    """Breaks if PostgreSQL plans the look-up of every message: with 14 months, this takes 1.5 ms of its CPU."""
    with transaction(workers[11]) as connection:
        connection.exec_driver_sql(ENTRIES)
        for number in range(20):
            first_arrivals(connection, [Attempt("terra", f"trace-{number}", AFTER, number.to_bytes(16))])
        (stored,) = connection.exec_driver_sql(
            "SELECT generic_plans > 0 FROM pg_prepared_statements WHERE statement LIKE '%%is_dead%%'"
        ).scalars()
    assert stored


def test_new_ids_of_junction_are_not_looked_up() -> None:
    """Breaks if a delivery of the present month costs a look-up, or one of an earlier month is not found."""
    now = datetime.now(UTC)
    named = {
        "new": Attempt("junction", message_id(now + timedelta(hours=2)), now, None),
        "old": Attempt("junction", message_id(now - timedelta(days=32)), now, None),
        "without a time": Attempt("junction", "another-form", now, None),
        "not signed": Attempt("terra", message_id(now + timedelta(hours=2)), now, None),
    }
    assert [name for name, one in named.items() if not one.may_be_of_earlier_month()] == ["new"]


def outcome(name: str, digest: str | None = None) -> OutcomeRow:
    aggregator = "terra" if digest else "junction"
    return OutcomeRow(aggregator, name, "daily", "u1", BEFORE, "applied", digest=digest)


def settled_beside(first: Engine, second: Engine, *entries: OutcomeRow) -> Future[None]:
    """Settles the first entry, and before its transaction ends the second one in a thread, which must wait."""

    def settle_second() -> None:
        started.set()
        with transaction(second) as connection:
            settle(connection, [entries[1]], now=AFTER)

    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with transaction(first) as connection:
            settle(connection, [entries[0]], now=BEFORE)
            waiting = pool.submit(settle_second)
            started.wait(10)
            until(lambda: waiting.done() or rows(first, WAITING) == [{"n": 1}], 10)
            assert not waiting.done()
        waiting.exception(20)
    return waiting


@pytest.mark.parametrize(("first", "second"), [(10, 11), (11, 10)])
def test_transactions_on_both_sides_of_the_change_insert_one_entry(
    workers: dict[int, Engine], first: int, second: int
) -> None:
    """Breaks if two workers that apply attempts at once, in two months, both insert an entry."""
    entry = outcome(message_id(BEFORE))
    assert settled_beside(workers[first], workers[second], entry, entry).exception() is None
    (row,) = rows(workers[11], LEDGER)
    assert (row["attempts"], row["month"]) == (2, f"2026-{first}-01")


@pytest.mark.parametrize(("first", "second"), [(10, 11), (11, 10)])
def test_a_digest_that_was_just_stored_in_the_other_month_is_retried(
    workers: dict[int, Engine], first: int, second: int
) -> None:
    """Breaks if a captured request that is sent again at the change of month under another id has its own entry."""
    digest = bytes(16).hex()
    waiting = settled_beside(workers[first], workers[second], outcome("a", digest), outcome("b", digest))
    assert isinstance(waiting.exception(), TryLater)
    assert [row["message_id"] for row in rows(workers[11], LEDGER)] == ["a"]


def test_many_workers_at_the_change_of_month(workers: dict[int, Engine]) -> None:
    """Breaks if the locks of two batches deadlock, or a batch is applied without them."""
    entries = [outcome(message_id(BEFORE)) for _ in range(200)]

    def one(number: int) -> None:
        with transaction(workers[10 + number % 2]) as connection:
            connection.exec_driver_sql("SET LOCAL lock_timeout = '20s'")
            settle(connection, entries[:: 1 if number % 3 else -1], now=(BEFORE, AFTER)[number % 2])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(12)))
    assert {row["attempts"] for row in rows(workers[11], LEDGER)} == {12}
    assert len(rows(workers[11], LEDGER)) == 200


def test_only_the_change_of_month_is_locked() -> None:
    """Breaks if every transaction takes the locks, or none does."""
    around = [CHANGE + timedelta(minutes=minutes) for minutes in (-11, -9, 0, 9, 11)]
    assert [is_near_change_of_month(one) for one in around] == [False, True, True, True, False]


def test_a_replay_of_an_old_month_changes_its_entry(workers: dict[int, Engine], shared_settings: Settings) -> None:
    """Breaks if `headrace replay` or `dead replay` of an old month inserts entries, or leaves the old ones dead."""
    dead = received(delivery(workout("u2", ""), name="dead"), BEFORE)
    ignored = received(delivery(workout("u1"), BEFORE), BEFORE)
    assert apply(workers[10], shared_settings, dead, ignored) == {"dead": 1, "applied": 1}
    run(workers[10], "UPDATE headrace.deliveries SET outcome = 'ignored' WHERE outcome = 'applied'",
        "DELETE FROM headrace.workouts")  # fmt: skip
    window = ArchiveWindow(BEFORE - timedelta(hours=1), AFTER)
    replay(workers[11], Applier(workers[11], shared_settings), window, "oldest", lambda _: None)
    entries = dead_letters.listed(workers[11])
    assert replay_dead_letters(workers[11], Applier(workers[11], shared_settings), entries) == {"dead": 1}
    assert {(row["outcome"], row["attempts"], row["month"]) for row in rows(workers[11], LEDGER)} == {
        ("dead", 1, "2026-10-01"),
        ("applied", 1, "2026-10-01"),
    }
    resolved = received(delivery(workout("u2"), name="dead"), BEFORE)
    assert apply(workers[11], shared_settings, resolved) == {"applied": 1}
    assert [row["outcome"] for row in rows(workers[11], LEDGER)] == ["applied", "applied"]
    assert dead_letters.listed(workers[11]) == []


def test_an_erasure_includes_all_months(workers: dict[int, Engine], shared_settings: Settings) -> None:
    """Breaks if the ledger names an erased user in an old month."""
    for month, engine in workers.items():
        apply(engine, shared_settings, delivery(workout("u1", f"w{month}")), delivery(workout("u2", f"w{month}")))
    receipt = Eraser(workers[11], shared_settings).erase("u1", lambda _: None)
    assert receipt.removed["deliveries"] == 4
    assert rows(workers[11], "SELECT user_id, count(*) AS n FROM headrace.deliveries GROUP BY 1 ORDER BY 1") == [
        {"user_id": "u2", "n": 4},
        {"user_id": None, "n": 4},
    ]


def fill(workers: dict[int, Engine], settings: Settings) -> datetime:
    """Entries of August, September and October, each received in its month. Returns the end of September."""
    for month in (8, 9, 10):
        for day in (3, 20):
            at = datetime(2026, month, day, tzinfo=UTC)
            apply(workers[month], settings, received(delivery(workout(f"u{month}", f"w{day}"), at), at))
    return datetime(2026, 10, 1, 2, tzinfo=UTC)


def present(engine: Engine, months: list[str]) -> list[str]:
    """Those of the months that exist."""
    found = rows(engine, "SELECT name FROM headrace.partitions WHERE parent = 'deliveries'")
    return sorted({row["name"] for row in found}.intersection(months))


def test_old_months_are_dropped(workers: dict[int, Engine], shared: Engine, shared_settings: Settings,
                                months: list[str]) -> None:  # fmt: skip
    """Breaks if old entries are deleted one by one, a month is dropped too early, or with a dead letter's entry."""
    before = fill(workers, shared_settings)
    at = datetime(2026, 9, 5, tzinfo=UTC)
    dead = received(delivery(workout("u1", "")), at)
    apply(workers[9], shared_settings, dead)
    try:
        assert list(retention._remove_entries(shared, before - timedelta(hours=2))) == [2, 2]
        assert present(shared, months) == months[1:]  # September ends too late, so its entries were deleted
        assert [row["month"] for row in rows(shared, LEDGER)].count("2026-09-01") == 1
        assert list(retention._remove_entries(shared, before)) == [0, 0]
        assert present(shared, months) == months[1:]
        dead_letters.drop(shared, dead_letters.listed(shared))
        assert list(retention._remove_entries(shared, before)) == [1, 0]
        assert present(shared, months) == months[2:]
        assert {row["month"] for row in rows(shared, LEDGER)} == {"2026-10-01"}
    finally:
        run(shared, *(f"SELECT headrace.create_partition('deliveries', '2026-{month:02}-01')" for month in (8, 9)))


def test_a_locked_month_is_left_to_the_next_run(
    workers: dict[int, Engine], shared: Engine, shared_settings: Settings, months: list[str]
) -> None:
    """Breaks if retention stops all workers behind a long query, or deletes a month row by row."""
    before = fill(workers, shared_settings)
    with shared.begin() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM headrace.deliveries")
        assert list(retention._remove_entries(workers[11], before)) == []
    assert present(shared, months) == months
    assert len(rows(shared, LEDGER)) == 6
