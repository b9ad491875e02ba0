"""Partitions of samples: created ahead and on demand by the writer, and dropped by retention."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import START, apply, delivery, heartrate, rows
from tests.support.database import run
from workers.actions import Sample, Samples
from workers.store import retention
from workers.store.engine import SESSION, make_writer
from workers.store.partitions import SampleMonths, create_ahead, maintain_partitions
from workers.store.roles import script

MINUTES_OF_A_DAY = 24 * 60
NOW = datetime.now(UTC)
WHERE = """SELECT c.relname AS name, count(*) AS n FROM headrace.samples s JOIN pg_class c ON c.oid = s.tableoid
GROUP BY 1 ORDER BY 1"""
INSERT = """INSERT INTO headrace.samples (ts, value, version, stored_at, series_id, origin, unit)
SELECT CAST('{at}' AS timestamptz) + n * interval '1 s', n, now(), now(), 1, 'backfill', 'bpm'
FROM generate_series(1, {rows}) n"""
WRITER, PASSWORD = "partitions_writer", "tests"


@pytest.fixture(scope="module")
def writer(shared: Engine) -> Iterator[Engine]:
    """An engine of the role of the workers, which may not create tables."""
    owner = shared.url
    run(shared, f"CREATE ROLE {WRITER} LOGIN PASSWORD '{PASSWORD}'")
    with psycopg.connect(owner.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
        connection.execute(script(WRITER, WRITER).encode())
    url = owner.set(username=WRITER, password=PASSWORD).render_as_string(hide_password=False)
    engine = make_writer(Settings(database_url=url))
    yield engine
    engine.dispose()
    with psycopg.connect(owner.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
        connection.execute(sql.SQL("DROP OWNED BY {}; DROP ROLE {}").format(*[sql.Identifier(WRITER)] * 2).as_string())


@pytest.fixture(autouse=True)
def empty(shared: Engine) -> None:
    """Begins with the default partition only."""
    found = rows(shared, "SELECT name FROM headrace.partitions WHERE parent = 'samples'")
    run(shared, *(f"DROP TABLE headrace.{row['name']}" for row in found), "DELETE FROM headrace.samples")


def names(engine: Engine) -> list[str]:
    found = rows(engine, "SELECT name FROM headrace.partitions WHERE parent = 'samples' ORDER BY 1")
    return [row["name"] for row in found]


def where(engine: Engine) -> dict[str, int]:
    """The number of rows in each partition."""
    return {row["name"]: row["n"] for row in rows(engine, WHERE)}


def name_of(month: datetime, later: int = 0) -> str:
    number = month.year * 12 + month.month - 1 + later
    return f"samples_{number // 12}{number % 12 + 1:02}"


def test_months_are_created_ahead_by_the_writer(writer: Engine) -> None:
    """Breaks if the next months have no partition, or need a command of the owner."""
    create_ahead(writer)
    assert names(writer) == [name_of(NOW, later) for later in range(3)]
    create_ahead(writer)
    assert len(names(writer)) == 3


def test_a_month_is_created_by_its_first_sample(writer: Engine, shared_settings: Settings) -> None:
    """Breaks if samples of the past are in the default partition, or one event creates months without samples."""
    days = [0, 1, 40 * MINUTES_OF_A_DAY, 200 * MINUTES_OF_A_DAY]
    assert apply(writer, shared_settings, delivery(heartrate("months", dict.fromkeys(days, 60)))) == {"applied": 1}
    wanted = {name_of(START): 2, name_of(START + timedelta(days=40)): 1, name_of(START + timedelta(days=200)): 1}
    assert where(writer) == wanted
    assert set(names(writer)) == set(wanted)


def test_implausible_months_have_no_partition(writer: Engine, shared_settings: Settings) -> None:
    """Breaks if a device with a wrong clock can create tables, or its samples are lost."""
    epoch, future = datetime(1970, 1, 1, tzinfo=UTC), NOW + timedelta(days=2000)
    minutes = [int((moment - START).total_seconds()) // 60 for moment in (epoch, future, START)]
    assert apply(writer, shared_settings, delivery(heartrate("clock", dict.fromkeys(minutes, 60)))) == {"applied": 1}
    assert names(writer) == [name_of(START)]
    assert where(writer)[name_of(START)] == 1
    assert sum(where(writer).values()) == len(rows(writer, "SELECT 1 FROM health.heartrate WHERE user_id = 'clock'"))
    for moment in (epoch, future):
        query = "SELECT headrace.create_partition('samples', :moment) AS made"
        with writer.begin() as connection:
            assert connection.scalar(text(query), {"moment": moment}) is False


def test_rows_of_the_future_do_not_block_a_partition(writer: Engine) -> None:
    """Breaks if rows in the default partition prevent the partition of their month, or are lost when it is created."""
    run(writer, INSERT.format(at="2105-01-01", rows=5), INSERT.format(at=NOW.replace(day=1).isoformat(), rows=30_000))
    assert where(writer) == {"samples_other": 30_005}
    create_ahead(writer)
    assert where(writer) == {name_of(NOW): 30_000, "samples_other": 5}


def test_a_lock_delays_only_the_partition(writer: Engine, shared: Engine, shared_settings: Settings) -> None:
    """Breaks if samples cannot be stored while a long query holds the default partition, or stay there afterwards."""
    with shared.connect() as reader:
        reader.execute(text("LOCK TABLE headrace.samples_other IN ACCESS SHARE MODE"))
        assert apply(writer, shared_settings, delivery(heartrate("lock", {0: 60}))) == {"applied": 1}
        create_ahead(writer)
        assert where(writer) == {"samples_other": 1}
    create_ahead(writer)
    assert where(writer) == {name_of(START): 1}


def test_a_month_is_tried_again_after_a_lock(writer: Engine, shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a worker stores samples of a month in the default partition for ten minutes after a short lock."""
    months = SampleMonths(writer)
    rows_ = [Sample(START, None, 60.0, "bpm", None, None)]
    given = [Samples("heartrate", "u1", "garmin", "watch", "", rows_, START)]
    with shared.connect() as reader:
        reader.execute(text("LOCK TABLE headrace.samples_other IN ACCESS SHARE MODE"))
        months.ensure(given)
    assert names(writer) == []
    months.ensure(given)
    assert names(writer) == []  # not at once, because each try waits
    later = time.monotonic() + 11
    monkeypatch.setattr("workers.store.partitions.time.monotonic", lambda: later)
    months.ensure(given)
    assert names(writer) == [name_of(START)]


def test_a_large_month_is_dropped(writer: Engine) -> None:
    """Breaks if the rows of a month that is dropped must be counted within the usual timeout of a statement."""
    moment = NOW - timedelta(days=400)
    with writer.begin() as connection:
        connection.execute(text("SELECT headrace.create_partition('samples', :moment)"), {"moment": moment})
    run(writer, INSERT.format(at=f"{moment:%Y-%m-01}", rows=100_000))
    url = writer.url.render_as_string(hide_password=False)
    quick = make_writer(Settings(database_url=url), session={**SESSION, "statement_timeout": "20ms"})
    edges = {name: NOW - timedelta(days=300) for name, one in catalogue().items() if one.is_series}
    assert retention.drop_partitions(quick, edges) == [name_of(moment)]
    quick.dispose()


def test_concurrent_workers_create_a_month_once(writer: Engine, shared_settings: Settings) -> None:
    """Breaks if two workers that meet a new month at the same time fail or block each other."""
    sent = [delivery(heartrate(f"user-{n}", {0: 60, 90 * MINUTES_OF_A_DAY: 60})) for n in range(6)]
    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(lambda one: apply(writer, shared_settings, one), sent))
    assert outcomes == [{"applied": 1}] * 6
    create_ahead(writer)  # a worker that did not get the lock has used the default partition
    assert where(writer) == {name_of(START): 6, name_of(START + timedelta(days=90)): 6}


def test_old_months_are_dropped_if_every_resource_has_a_limit(writer: Engine, shared_settings: Settings) -> None:
    """Breaks if a month is kept although all of its samples have expired, or one that has not expired is dropped."""
    months = [NOW - timedelta(days=days) for days in (400, 300, 5)]
    for moment in months:
        minute = int((moment - START).total_seconds()) // 60
        apply(writer, shared_settings, delivery(heartrate("old", {minute: 60})))
    every = retention.limits(replace(shared_settings, retention=(("*", 350),)), NOW)
    some = retention.limits(replace(shared_settings, retention=(("heartrate", 100),)), NOW)
    assert retention.drop_partitions(writer, {}) == []
    assert retention.drop_partitions(writer, every) == [name_of(months[0])]
    assert retention.drop_partitions(writer, some) == []
    assert dict(retention.remove(writer, some)) == {"heartrate": 1}
    assert retention.drop_partitions(writer, some) == [name_of(months[1])]  # it has become empty
    assert where(writer) == {name_of(months[2]): 1}


def test_the_functions_drop_nothing_else(writer: Engine) -> None:
    """Breaks if a worker can drop the default partition or any other table, or a partition that still has rows."""
    maintain_partitions(writer, None)
    run(writer, INSERT.format(at=NOW.isoformat(), rows=1))
    query = text("SELECT headrace.drop_partition(:parent, :name, :only_empty)")
    with writer.begin() as connection:
        for parent, name, only_empty in (
            ("samples", "samples_other", False),
            ("samples", "users", False),
            ("users", "users", False),
            ("archive", name_of(NOW), False),
            ("samples", name_of(NOW), True),
        ):
            values = {"parent": parent, "name": name, "only_empty": only_empty}
            assert connection.scalar(query, values) is False
    assert where(writer) == {name_of(NOW): 1}


def test_a_query_of_one_month_reads_one_partition(writer: Engine, shared_settings: Settings) -> None:
    """Breaks if a view of samples hides the column of the partition key from the planner."""
    apply(writer, shared_settings, delivery(heartrate("x", {day * MINUTES_OF_A_DAY: 60 for day in range(0, 200, 20)})))
    assert len(names(writer)) >= 6
    first, last = START.replace(day=1), START.replace(day=27)
    query = f"EXPLAIN SELECT * FROM health.heartrate WHERE user_id = 'x' AND ts >= '{first}' AND ts < '{last}'"
    plan = "\n".join(row["QUERY PLAN"] for row in rows(writer, query))
    assert [name for name in names(writer) if name in plan] == [name_of(START)]
