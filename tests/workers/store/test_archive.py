"""The archive: its deliveries, its partitions, and reading a window."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from sqlalchemy import Connection, Engine, text

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal
from tests.support import delivery, event, message_id, rows, until, workout
from tests.support.deliveries import SEALER, bodies, received
from workers.ingest.apply import Applier
from workers.store import dead_letters
from workers.store.archive import ArchiveWindow, count, read
from workers.store.engine import transaction
from workers.store.ledger import ArchivedDelivery, OutcomeRow, settle
from workers.store.partitions import maintain_partitions

TODAY = datetime(2026, 3, 14, tzinfo=UTC)
NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)
DAYS_AHEAD = 7
HOUR, DAY, TICK = timedelta(hours=1), timedelta(days=1), timedelta(microseconds=1)
KEPT = "SELECT message_id FROM headrace.archive ORDER BY 1"
CLEAR = text("""
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT inhrelid::regclass AS name FROM pg_inherits WHERE inhparent = 'headrace.archive'::regclass
        AND inhrelid <> 'headrace.archive_other'::regclass
    LOOP EXECUTE format('DROP TABLE %s', one.name); END LOOP;
    TRUNCATE headrace.archive, headrace.deliveries, headrace.dead_letters;
END $$""")


@pytest.fixture(autouse=True)
def empty(shared: Engine) -> None:
    """Begins with an empty archive that has only the default partition."""
    with shared.begin() as connection:
        connection.execute(CLEAR)


def keep(connection: Connection, *kept: ArchivedDelivery) -> None:
    """Settles deliveries as applied, and archives them."""
    deliveries = [one.delivery for one in kept]
    entries = [OutcomeRow(one.aggregator, one.message_id, None, None, one.received, "applied") for one in deliveries]
    settle(connection, entries, kept)


def put(engine: Engine, *moments: datetime, event_type: str = "daily.data.sleep.created") -> list[str]:
    """Archives a delivery at each of these moments; returns their ids."""
    found = [received(delivery(b"{}"), at) for at in moments]
    with transaction(engine) as connection:
        keep(connection, *(ArchivedDelivery(one, event_type, "u1") for one in found))
    return [one.message_id for one in found]


def partitions(engine: Engine) -> set[str]:
    query = "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = 'headrace.archive'::regclass"
    return {row["name"].removeprefix("headrace.") for row in rows(engine, query)}


def days(first: int, last: int) -> set[str]:
    """The partitions between two days, counted from today, and the default one."""
    return {f"archive_{TODAY + n * DAY:%Y%m%d}" for n in range(first, last + 1)} | {"archive_other"}


def where(engine: Engine) -> dict[str, str]:
    """The partition of every archived delivery."""
    query = "SELECT message_id, tableoid::regclass::text AS name FROM headrace.archive"
    return {row["message_id"]: row["name"].removeprefix("headrace.") for row in rows(engine, query)}


# Archived deliveries


def applied(engine: Engine, settings: Settings, *deliveries: Delivery, redelivered: bool = False) -> None:
    """Applies a message with a new worker."""
    Applier(engine, settings).apply(pack(deliveries), redelivered=redelivered)


def kept_ids(engine: Engine) -> list[str]:
    return [row["message_id"] for row in rows(engine, KEPT)]


@pytest.mark.parametrize("way", ["one message", "two messages", "after a crash"])
def test_a_delivery_is_archived_once(shared: Engine, shared_settings: Settings, way: str) -> None:
    """Breaks if a repeated delivery, in one message or in two, is archived twice."""
    one = delivery(workout("u1"))
    if way == "one message":
        applied(shared, shared_settings, one, one, one)
    else:
        applied(shared, shared_settings, one)
        applied(shared, shared_settings, one, redelivered=way == "after a crash")
    assert kept_ids(shared) == [one.message_id]


def test_concurrent_workers_archive_a_delivery_once(shared: Engine, shared_settings: Settings) -> None:
    """Breaks if two workers both treat a delivery as new."""
    sent = [delivery(workout(f"u{n}")) for n in range(30)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda message: applied(shared, shared_settings, *message), [sent, sent[::-1], sent]))
    assert kept_ids(shared) == sorted(one.message_id for one in sent)


def test_parsed_deliveries_are_archived_as_received(shared: Engine, shared_settings: Settings) -> None:
    """Breaks if a delivery without an effect cannot be replayed later, or a column of the archive is wrong."""
    stale = [delivery(workout("u1", updated_at=f"2026-03-0{n}T00:00:00Z")) for n in (2, 1)]
    body = event("raw.garmin.dailies", "u2", {"value": 7})
    receipt = Receipt("msg_ignored", 12, "r")
    ignored = seal("junction", receipt, msgspec.json.encode(body), SEALER, received_at=NOON.timestamp())
    for one in (*stale, ignored):
        applied(shared, shared_settings, one)
    (window,) = read(shared, ArchiveWindow(NOON, NOON + HOUR))
    assert window == [ignored]
    assert window[0].open(SEALER) == msgspec.json.encode(body)
    found = rows(shared, "SELECT event_type, user_id, sealed FROM headrace.archive ORDER BY 1, 2")
    assert [(row["event_type"], row["user_id"]) for row in found] == [
        *[("daily.data.workouts.created", "u1")] * 2,
        ("raw.garmin.dailies", "u2"),
    ]
    assert all(b"value" not in row["sealed"] for row in found)


def test_dead_letters_are_not_archived(shared: Engine, shared_settings: Settings) -> None:
    """Breaks if every replay meets deliveries that cannot be applied."""
    applied(shared, shared_settings, delivery(b"hello"), delivery(workout("u1", "")))
    assert kept_ids(shared) == []
    assert len(dead_letters.listed(shared)) == 2


def test_a_resolved_delivery_is_archived(shared: Engine, shared_settings: Settings) -> None:
    """Breaks if a delivery that was dead first cannot be replayed."""
    name = message_id(NOON)
    applied(shared, shared_settings, delivery(b"half", name=name))
    for _ in range(2):
        applied(shared, shared_settings, delivery(workout("u1"), name=name))
    assert kept_ids(shared) == [name]
    assert b"workouts" in bodies(shared, "archive")[0]


def test_a_delivery_resolved_after_a_drop_is_archived(shared: Engine, shared_settings: Settings) -> None:
    """Breaks if a delivery is applied, but cannot be replayed, because an operator dropped its dead letter."""
    name = message_id(NOON)
    applied(shared, shared_settings, delivery(b"half", name=name))
    dead_letters.drop(shared, dead_letters.listed(shared))
    applied(shared, shared_settings, delivery(workout("mended"), name=name))
    assert [row["outcome"] for row in rows(shared, "SELECT outcome FROM health.deliveries")] == ["applied"]
    assert kept_ids(shared) == [name]


def test_nothing_is_archived_with_zero_days(shared: Engine, shared_settings: Settings) -> None:
    """Breaks if bodies are archived although HEADRACE_KEEP_DAYS is 0, or the ledger is not written."""
    one, name = delivery(workout("u1")), message_id(NOON)
    for sent in (one, delivery(b"half", name=name), delivery(workout("u1"), name=name)):
        applied(shared, replace(shared_settings, keep_days=0), sent)
    assert kept_ids(shared) == []
    outcomes = rows(shared, "SELECT outcome FROM health.deliveries")
    assert len(outcomes) == 2
    assert "dead" not in {row["outcome"] for row in outcomes}


# Partitions


def test_partitions_are_created_ahead(shared: Engine) -> None:
    """Breaks if tomorrow's deliveries have no partition, so that their day must be deleted in batches."""
    assert maintain_partitions(shared, 30, TODAY) == []
    assert partitions(shared) == days(0, DAYS_AHEAD)
    midnight = datetime(2026, 3, 14, tzinfo=UTC)
    names = put(shared, midnight, midnight + DAY - TICK, midnight + DAY, midnight - TICK)
    expected = ["archive_20260314", "archive_20260314", "archive_20260315", "archive_other"]
    assert where(shared) == dict(zip(names, expected, strict=True))


def test_old_partitions_are_dropped(shared: Engine) -> None:
    """Breaks if bodies are kept longer or shorter than HEADRACE_KEEP_DAYS."""
    maintain_partitions(shared, 30, TODAY)
    put(shared, *(NOON + n * DAY for n in range(8)))
    assert maintain_partitions(shared, 3, TODAY + 3 * DAY) == []
    assert maintain_partitions(shared, 3, TODAY + 5 * DAY) == ["archive_20260314", "archive_20260315"]
    assert partitions(shared) == days(2, DAYS_AHEAD + 5)
    assert len(kept_ids(shared)) == 6
    assert count(shared, ArchiveWindow(NOON, NOON + 100 * DAY)) == 6


def test_without_a_number_of_days_nothing_is_dropped(shared: Engine) -> None:
    """Breaks if `headrace migrate` without HEADRACE_KEEP_DAYS deletes archived deliveries."""
    maintain_partitions(shared, 30, TODAY)
    put(shared, NOON)
    assert maintain_partitions(shared, None, TODAY + 400 * DAY) == []
    assert len(kept_ids(shared)) == 1


def test_zero_days_drop_every_earlier_day(shared: Engine) -> None:
    """Breaks if partitions from before HEADRACE_KEEP_DAYS was set to 0 remain."""
    maintain_partitions(shared, 30, TODAY)
    put(shared, *(NOON + n * DAY for n in range(3)))
    assert len(maintain_partitions(shared, 0, TODAY + 3 * DAY)) == 3
    assert kept_ids(shared) == []


def test_maintenance_is_idempotent(shared: Engine) -> None:
    """Breaks if every sweep creates or drops partitions again."""
    for _ in range(3):
        assert maintain_partitions(shared, 30, TODAY) == []
    assert partitions(shared) == days(0, DAYS_AHEAD)


def test_maintenance_resumes_after_a_pause(shared: Engine) -> None:
    """Breaks if a stack that was stopped for two weeks creates no more partitions."""
    maintain_partitions(shared, 30, TODAY - 20 * DAY)
    maintain_partitions(shared, 30, TODAY)
    assert partitions(shared) == days(-20, -20 + DAYS_AHEAD) | days(0, DAYS_AHEAD)


def test_rows_of_the_default_partition_move_to_their_day(shared: Engine) -> None:
    """Breaks if rows that came before their partition prevent it, are lost, or are never deleted."""
    late, tomorrow = put(shared, NOON, NOON + DAY)
    assert set(where(shared).values()) == {"archive_other"}
    maintain_partitions(shared, 3, TODAY)
    assert where(shared) == {late: "archive_20260314", tomorrow: "archive_20260315"}
    assert [one.message_id for hour in read(shared, ArchiveWindow(NOON, NOON + 2 * DAY)) for one in hour] == [
        late,
        tomorrow,
    ]
    maintain_partitions(shared, 3, TODAY + 5 * DAY)
    assert kept_ids(shared) == []


def test_rows_of_the_default_partition_expire_too(shared: Engine) -> None:
    """Breaks if a row for which no partition can be created, because its time is wrong, is never deleted."""
    put(shared, datetime(1999, 12, 31, tzinfo=UTC))
    maintain_partitions(shared, None, TODAY)
    assert set(where(shared).values()) == {"archive_other"}
    maintain_partitions(shared, 3, TODAY)
    assert kept_ids(shared) == []


WAITING = text("SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted")


def test_concurrent_maintenance_is_safe(shared: Engine) -> None:
    """Breaks if concurrent runs of `headrace migrate` fail."""
    with ThreadPoolExecutor(2) as pool:
        with shared.begin() as connection:
            connection.execute(text("LOCK TABLE headrace.archive IN ROW EXCLUSIVE MODE"))  # as a worker does
            both = [pool.submit(maintain_partitions, shared, 30, TODAY) for _ in range(2)]
            until(lambda: connection.scalar(WAITING) == 2, 15)
        found = [one.exception(30) for one in both]
    assert found == [None, None]
    assert partitions(shared) == days(0, DAYS_AHEAD)


# Windows


def counted(engine: Engine, glob: str | None) -> int:
    """The number of deliveries that match a glob."""
    return count(engine, ArchiveWindow(NOON - DAY, NOON + DAY, glob))


NAMES = ("daily.data.sleep.created", "daily.data.sleep_cycle.created", "daily.data.sleepXcycle.created", "a%b", "a\\b")


@pytest.mark.parametrize(
    ("glob", "meant"),
    [
        (None, NAMES),
        ("*", NAMES),
        ("", ()),
        ("daily.data.sleep.created", NAMES[:1]),
        ("daily.data.sleep.*", NAMES[:1]),
        ("daily.data.sleep*", NAMES[:3]),
        ("daily.data.sleep?cycle.*", NAMES[1:3]),
        ("daily.data.sleep_cycle.*", NAMES[1:2]),
        ("*_*", NAMES[1:2]),
        ("*.data.*.created", NAMES[:3]),
        ("sleep", ()),
        ("DAILY.*", ()),
        ("%", ()),
        ("a%b", NAMES[3:4]),
        ("a?b", NAMES[3:]),
        ("a\\b", NAMES[4:]),
        ("a\\%b", ()),
        ("*\\*", NAMES[4:]),
        ("a\\", ()),
        ("a[%]b", ()),
    ],
)
def test_a_glob_is_not_a_like_pattern(shared: Engine, glob: str | None, meant: tuple[str, ...]) -> None:
    """Breaks if a wildcard of LIKE is one in a glob, or an event type with such a character is not found."""
    for name in NAMES:
        put(shared, NOON, event_type=name)
    assert counted(shared, glob) == len(meant)
    query = "SELECT event_type FROM headrace.archive JOIN unnest(CAST(:ids AS text[])) AS id ON id = message_id"
    window = ArchiveWindow(NOON - DAY, NOON + DAY, glob)
    ids = [one.message_id for hour in read(shared, window) for one in hour]
    assert {row["event_type"] for row in rows(shared, query, ids=ids)} == set(meant)


EDGES = [NOON + n * HOUR + tick for n in range(4) for tick in (-TICK, timedelta(0), TICK)]


@pytest.mark.parametrize("partitioned", [True, False])
@pytest.mark.parametrize(
    ("since", "until"),
    [
        (NOON - DAY, NOON + DAY),
        (NOON, NOON + 3 * HOUR),
        (NOON - TICK, NOON + 2 * HOUR + TICK),
        (NOON + TICK, NOON + HOUR),
        (NOON + HOUR, NOON + HOUR + TICK),
        (NOON + HOUR, NOON + HOUR),
        (NOON + HOUR / 2, NOON + 2 * HOUR + HOUR / 2),
        (NOON + 2 * HOUR, NOON),
    ],
)
def test_every_hour_is_read_once(shared: Engine, since: datetime, until: datetime, *, partitioned: bool) -> None:
    """Breaks if deliveries at the edge of an hour, a day or the window are read twice, or skipped."""
    if partitioned:
        maintain_partitions(shared, 30, TODAY)
    names = dict(zip(put(shared, *EDGES), EDGES, strict=True))
    window = ArchiveWindow(since, until)
    found = [one.message_id for hour in read(shared, window) for one in hour]
    wanted = [name for name, at in names.items() if since <= at < until]
    assert found == wanted
    assert count(shared, window) == len(wanted)


def test_midnight_is_read_once(shared: Engine) -> None:
    """Breaks if deliveries at the edge of a partition are read twice, or skipped."""
    maintain_partitions(shared, 30, TODAY)
    midnight = datetime(2026, 3, 15, tzinfo=UTC)
    names = put(shared, midnight - HOUR, midnight - TICK, midnight, midnight + TICK)
    assert [one.message_id for hour in read(shared, ArchiveWindow(NOON, NOON + DAY)) for one in hour] == names


def test_hours_are_read_in_order_across_a_gap(shared: Engine) -> None:
    """Breaks if deliveries after a pause of days are skipped, or hours are not in order."""
    names = put(shared, NOON, NOON + 9.75 * HOUR, NOON + 9.25 * HOUR, NOON + 50 * HOUR)
    hours = [
        [one.message_id for one in hour] for hour in read(shared, ArchiveWindow(NOON - 100 * DAY, NOON + 100 * DAY))
    ]
    assert [hour for hour in hours if hour] == [[names[0]], [names[2], names[1]], [names[3]]]


def test_a_wide_window_costs_no_more_than_its_deliveries(shared: Engine) -> None:
    """Breaks if a replay of everything runs a query for every hour of a hundred years."""
    put(shared, NOON, NOON + 2 * HOUR)
    assert len(list(read(shared, ArchiveWindow(NOON - 36_500 * DAY, NOON + 36_500 * DAY)))) == 3


def test_an_empty_window_costs_one_query(shared: Engine) -> None:
    """Breaks if a replay of an empty window runs a query for every hour."""
    put(shared, NOON)
    assert list(read(shared, ArchiveWindow(NOON + HOUR, NOON + 5 * HOUR))) == []


def test_read_returns_the_archived_deliveries(shared: Engine) -> None:
    """Breaks if a delivery is read with another body, clock or reference, or with a rounded timestamp."""
    moment = NOON.timestamp() + 0.123_456
    sent = [
        Delivery("junction", "m1", moment, b""),
        Delivery("terra", "m2", moment + 1, b"\x00\xff", 1_773_489_600_123, "ref"),
    ]
    with transaction(shared) as connection:
        keep(connection, *(ArchivedDelivery(one, None, None) for one in sent))
    (found,) = read(shared, ArchiveWindow(NOON, NOON + HOUR))
    assert found == sent
    assert [one.received for one in found] == [one.received for one in sent]


def test_a_message_without_archived_deliveries(shared: Engine) -> None:
    """Breaks if a message of dead deliveries fails."""
    with transaction(shared) as connection:
        keep(connection)
        settle(connection, [OutcomeRow("junction", "m1", None, None, NOON, "dead")])
    assert kept_ids(shared) == []


def test_the_default_partition_always_exists(shared: Engine) -> None:
    """Breaks if a worker that starts before the first maintenance, or with a wrong clock, cannot archive a delivery."""
    names = put(shared, datetime(1999, 1, 1, tzinfo=UTC), datetime(2999, 1, 1, tzinfo=UTC))
    assert where(shared) == dict.fromkeys(names, "archive_other")
    maintain_partitions(shared, None)
    assert where(shared) == dict.fromkeys(names, "archive_other")
    assert f"archive_{datetime.now(UTC):%Y%m%d}" in partitions(shared)
