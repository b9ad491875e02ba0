"""The guarded upsert, on its own small table."""

import itertools
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from tests.support import rows
from tests.support.cases import Failures
from workers.store.merge import Target, comparison_sql, upsert_sql

THINGS = Target(
    table="things",
    key=("owner", "place"),
    content=("value", "unit", "remark"),
    rank=(("value", "'-Infinity'::float8"), ("unit", "''")),
)
COLUMNS = "n int, owner text, place int, value float8, unit text, remark text, version timestamptz, origin text"
SOURCE = f"jsonb_to_recordset(CAST(:rows AS jsonb)) AS incoming({COLUMNS})"
MERGE, COMPARE = upsert_sql(THINGS, SOURCE), comparison_sql(THINGS, SOURCE)
STALE = f"SELECT n FROM ({COMPARE}) AS found WHERE is_stale"
# In order of arrival, and without the filter, whose join could sort the rows.
UNSORTED = re.sub(
    r"\nWHERE NOT EXISTS.*?(?=\nON CONFLICT)", "", MERGE.replace("DISTINCT ON (owner, place) ", ""), flags=re.DOTALL
)
DAY = datetime(2026, 3, 14, tzinfo=UTC)

# From the second row of a transaction on, an insert waits for advisory lock 7.
STEP_BY_STEP = """
CREATE FUNCTION step_by_step() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('things.seen', true) = 'yes' THEN PERFORM pg_advisory_xact_lock_shared(7); END IF;
    PERFORM set_config('things.seen', 'yes', true);
    RETURN NEW;
END $$;
CREATE TRIGGER step_by_step BEFORE INSERT ON things FOR EACH ROW EXECUTE FUNCTION step_by_step();"""


@pytest.fixture(scope="module")
def table(shared: Engine) -> Engine:
    with shared.begin() as connection:
        connection.execute(
            text(
                "CREATE TABLE things (owner text, place int, value float8, unit text, remark text, "
                "version timestamptz, origin text, stored_at timestamptz, PRIMARY KEY (owner, place))"
            )
        )
    return shared


@pytest.fixture
def things(table: Engine) -> Iterator[Engine]:
    yield table
    with table.begin() as connection:
        connection.execute(text("DELETE FROM things; DROP FUNCTION IF EXISTS step_by_step CASCADE"))


def thing(version: int, value: float | None, place: int = 1, **more: Any) -> dict[str, Any]:
    """A row with the version of that day."""
    moment = DAY + timedelta(days=version)
    given = {"n": 0, "owner": "a", "place": place, "value": value, "version": moment, "origin": "webhook"}
    return given | more


def merge(engine: Engine, *given: dict[str, Any], statement: str = MERGE) -> list[bool]:
    """Merges in one transaction; `changed` of every touched row, in key order."""
    with engine.begin() as connection:
        merged = connection.execute(text(statement), {"rows": msgspec.json.encode(given).decode()}).all()
    return [row.changed for row in sorted(merged, key=lambda row: (row.owner, row.place))]


def stale(engine: Engine, *given: dict[str, Any]) -> set[int]:
    """The deliveries that `comparison_sql` calls stale."""
    with engine.begin() as connection:
        return set(connection.scalars(text(STALE), {"rows": msgspec.json.encode(given).decode()}))


def stored(engine: Engine, what: str = "value") -> list[Any]:
    """One column, in key order."""
    return [row["found"] for row in rows(engine, f"SELECT {what} AS found FROM things ORDER BY owner, place")]


def test_the_newest_wins_in_every_order(things: Engine) -> None:
    """Breaks if an older version that arrives late is written, or a newer one is not."""
    failures = Failures()
    for place, order in enumerate(itertools.permutations(range(4))):
        with failures.of(order):
            for version in order:
                merge(things, thing(version, float(-version), place))
            query = f"SELECT value, version FROM things WHERE place = {place}"
            assert rows(things, query) == [{"value": -3.0, "version": DAY + timedelta(days=3)}]
    assert failures == {}


def test_the_newest_wins_within_a_statement(things: Engine) -> None:
    """Breaks if two rows of one key reach ON CONFLICT together (SQLSTATE 21000) or the wrong one is picked."""
    failures = Failures()
    for place, order in enumerate(itertools.permutations(range(3))):
        with failures.of(order):
            assert merge(things, *(thing(version, float(-version), place) for version in order)) == [True]
            assert stored(things)[place:] == [-2.0]
    assert failures == {}


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ({"value": 1.0}, {"value": 2.0}),
        ({"value": None}, {"value": -1e300}),
        ({"value": 1.0, "unit": None}, {"value": 1.0, "unit": "bpm"}),
        ({"value": None, "unit": None}, {"value": None, "unit": "a"}),
        ({"value": None, "unit": "z"}, {"value": 0.0, "unit": None}),
        ({"value": 1.0, "unit": "a"}, {"value": 1.0, "unit": "b"}),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_a_tie_ends_in_the_higher_content_in_both_orders(
    things: Engine, low: dict[str, Any], high: dict[str, Any], *, together: bool
) -> None:
    """Breaks if NULL makes a comparison unknown, or the order of arrival decides between equal versions."""
    for place, pair in enumerate([(low, high), (high, low)]):
        both = [thing(0, None, place) | one for one in pair]
        for message in [both] if together else [[one] for one in both]:
            merge(things, *message)
    expected = [high.get("value"), high.get("unit")]
    assert rows(things, "SELECT value, unit FROM things") == [dict(zip(("value", "unit"), expected, strict=True))] * 2


def test_equal_content_of_a_newer_version_updates_only_the_version(things: Engine) -> None:
    """Breaks if a repetition counts as a write, or its version is lost and an older one wins later."""
    merge(things, thing(0, 1.0))
    before = rows(things, "SELECT stored_at, origin FROM things")
    assert merge(things, thing(2, 1.0, origin="backfill")) == [False]
    assert rows(things, "SELECT stored_at, origin FROM things") == before
    assert stored(things, "version") == [DAY + timedelta(days=2)]
    assert merge(things, thing(1, 5.0)) == []
    assert stored(things) == [1.0]


@pytest.mark.parametrize("value", [1.0, None])
def test_an_equal_row_is_not_touched(things: Engine, value: float | None) -> None:
    """Breaks if a redelivered message rewrites rows, or NULLs count as a difference."""
    merge(things, thing(0, value))
    before = stored(things, "xmin::text || ctid::text")
    assert merge(things, thing(0, value)) == []
    assert stored(things, "xmin::text || ctid::text") == before


@pytest.mark.parametrize(("before", "after"), [(None, 1.0), (1.0, None), (1.0, 2.0)])
def test_a_change_from_or_to_null_is_a_change(things: Engine, before: float | None, after: float | None) -> None:
    """Breaks if a value that appears or disappears is ignored, or keeps the old origin."""
    merge(things, thing(0, before))
    assert merge(things, thing(1, after, origin="backfill")) == [True]
    assert rows(things, "SELECT value, origin FROM things") == [{"value": after, "origin": "backfill"}]


def test_unranked_columns_are_updated_too(things: Engine) -> None:
    """Breaks if a content column that is not compared keeps the old value."""
    merge(things, thing(0, 1.0, remark="old"))
    merge(things, thing(1, 2.0, remark="new"))
    assert stored(things, "remark") == ["new"]


def test_keys_are_independent(things: Engine) -> None:
    """Breaks if only a part of the key is compared."""
    assert merge(things, thing(0, 1.0, 1), thing(0, 2.0, 2), thing(0, 3.0, 1, owner="b")) == [True] * 3
    assert merge(things, thing(1, 9.0, 2)) == [True]
    assert stored(things) == [1.0, 9.0, 3.0]


def test_an_empty_source_changes_nothing(things: Engine) -> None:
    """Breaks if an empty source fails."""
    assert merge(things) == []


@pytest.mark.parametrize(
    ("given", "is_stale"),
    [
        (thing(0, 1.0, n=7), True),
        (thing(0, None, n=7), True),
        (thing(1, 2.0, n=7), False),
        (thing(0, 2.0, n=7), False),
        (thing(0, 2.0, 2, n=7), False),
    ],
)
def test_deliveries_that_differ_are_stale(things: Engine, given: dict[str, Any], *, is_stale: bool) -> None:
    """Breaks if a repetition is called stale, or a late version a duplicate."""
    merge(things, thing(1, 2.0))
    assert stale(things, given, given) == ({7} if is_stale else set())


@pytest.mark.parametrize(
    ("given", "is_newer"),
    [
        (thing(2, 2.0), True),
        (thing(2, 3.0), True),
        (thing(0, 2.0, 2), True),
        (thing(1, 3.0), True),
        (thing(1, 1.0), False),
        (thing(1, 2.0), False),
        (thing(0, 3.0), False),
    ],
    ids=["newer", "newer and other", "not stored", "ranks higher", "ranks lower", "the same", "older"],
)
def test_is_newer_agrees_with_the_merge(things: Engine, given: dict[str, Any], *, is_newer: bool) -> None:
    """Breaks if the comparison misses a row that the merge would write, or finds one that it would not."""
    merge(things, thing(1, 2.0))
    with things.begin() as connection:
        found = connection.execute(text(COMPARE), {"rows": msgspec.json.encode([given]).decode()}).one()
    assert found.is_newer == is_newer
    assert len(merge(things, given)) == is_newer


def test_equal_nulls_are_not_stale(things: Engine) -> None:
    """Breaks if two rows without a value count as different."""
    merge(things, thing(1, None))
    assert stale(things, thing(0, None, n=1), thing(0, 1.0, n=2)) == {2}


@pytest.mark.parametrize(("statement", "deadlocks"), [(MERGE, 0), (UNSORTED, 1)], ids=["sorted", "unsorted"])
def test_two_transactions_do_not_deadlock(things: Engine, statement: str, deadlocks: int) -> None:
    """Breaks if rows are not written in key order. Without that order the same two do deadlock."""
    merge(things, thing(0, 0.0, 1), thing(0, 0.0, 2))
    failed: list[str] = []
    written = threading.Lock()

    def run(version: int, places: tuple[int, int]) -> None:
        try:
            merge(things, *(thing(version, float(version), place) for place in places), statement=statement)
        except OperationalError as error:
            with written:
                failed.append(type(error.orig).__name__)

    with things.connect() as gate, ThreadPoolExecutor(2) as pool:
        gate.execute(text(STEP_BY_STEP))
        gate.commit()
        gate.execute(text("SELECT pg_advisory_lock(7)"))
        gate.commit()
        running = [pool.submit(run, 1, (1, 2)), pool.submit(run, 2, (2, 1))]
        waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        deadline = time.monotonic() + 20
        while gate.scalar(waiting) < 2 and time.monotonic() < deadline:
            gate.commit()
        gate.execute(text("SELECT pg_advisory_unlock(7)"))
        gate.commit()
        for one in running:
            one.result()
    assert failed == ["DeadlockDetected"] * deadlocks
