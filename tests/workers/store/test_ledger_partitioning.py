"""The conversion of the ledger to months, while workers write to it, and the way back that the runbook describes."""

import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from textwrap import dedent

import pytest
from sqlalchemy import Connection, Engine, text

from app.config.settings import Settings
from app.errors import RetryAlone, TryLater
from tests.support import ROOT, START, message_id, rows
from tests.support.database import run
from workers.store import engine as store_engine
from workers.store import ledger_partitioning
from workers.store.engine import WORKER_SESSION, make_writer, transaction
from workers.store.ledger import OutcomeRow, settle
from workers.store.ledger_partitioning import partition_ledger
from workers.store.migrate import migrate

RUNBOOK = (ROOT / "deploy" / "docs" / "runbook.md").read_text(encoding="utf-8")
IS_PARTITIONED = "SELECT relkind = 'p' AS it FROM pg_class WHERE oid = 'headrace.deliveries'::regclass"
FILL = """
INSERT INTO headrace.deliveries (aggregator, message_id, event_type, received_at, applied_at, outcome, digest)
SELECT CASE n % 2 WHEN 0 THEN 'junction' ELSE 'terra' END, 'old-' || n, 'daily', now(), now(), 'applied',
       CASE n % 2 WHEN 1 THEN decode(md5(n::text), 'hex') END
FROM generate_series(1, {}) AS n"""
# Of version 0.2.
SETTLE = text("""
INSERT INTO headrace.deliveries AS stored (aggregator, message_id, received_at, applied_at, outcome)
VALUES ('junction', :name, now(), now(), 'applied')
ON CONFLICT (aggregator, message_id) DO UPDATE SET attempts = stored.attempts + excluded.attempts""")
ENTRIES = "SELECT aggregator || ':' || message_id AS name, attempts FROM health.deliveries_of_test"
VIEW = """
CREATE VIEW health.deliveries_of_test AS SELECT aggregator, message_id, attempts FROM headrace.deliveries"""


@pytest.fixture
def plain(empty: Engine) -> Engine:
    """A database whose ledger is the table of version 0.2: the runbook's way back, and no column of the month."""
    migrate(empty)
    run(empty, VIEW)
    go_back(empty)
    run(empty, "ALTER TABLE headrace.deliveries DROP COLUMN month")
    return empty


def go_back(engine: Engine) -> None:
    """Runs the SQL of the runbook. The view of a test is not one of Headrace's."""
    section = RUNBOOK.partition("### From 0.2 to 0.3")[2]
    (block,) = re.findall(r"<<'SQL'\n(.*?)    SQL\n", section.partition("\n## ")[0], re.DOTALL)
    run(engine, "DROP VIEW health.deliveries_of_test")
    with engine.connect() as connection:
        connection.exec_driver_sql(dedent(block).replace("%", "%%"))
    run(engine, VIEW)


class Writers:
    """Workers that settle new deliveries and repeat earlier ones until the block ends."""

    def __init__(self, engine: Engine, known: int) -> None:
        self._engine, self._known = engine, known
        self._ended = threading.Event()
        self._numbers = itertools.count()
        self.settled = Counter[str]()
        self.waits: list[float] = []
        self.put_back = 0

    @contextmanager
    def running(self) -> Iterator["Writers"]:
        with ThreadPoolExecutor(3) as pool:
            tasks = [pool.submit(self._write, is_old=False) for _ in range(2)] + [pool.submit(self._write, is_old=True)]
            try:
                yield self
            finally:
                self._ended.set()
        for task in tasks:
            task.result()

    def _write(self, *, is_old: bool) -> None:
        while not self._ended.is_set():
            number = next(self._numbers)
            names = [message_id(START, number), f"old-{2 * (number % (self._known // 2)) + 2}", "at once"]
            for name in names:
                began = time.monotonic()
                if self._try(name, is_old=is_old):
                    self.settled[f"junction:{name}"] += 1
                self.waits.append(time.monotonic() - began)

    def _try(self, name: str, *, is_old: bool) -> bool:
        try:
            with transaction(self._engine) as connection:
                self._settle(connection, name, is_old=is_old)
        except RetryAlone:
            raise  # a lock was held for longer than workers wait
        except TryLater:
            self.put_back += 1
            return False
        return True

    def _settle(self, connection: Connection, name: str, *, is_old: bool) -> None:
        if is_old:
            connection.execute(SETTLE, {"name": name})
        else:
            settle(connection, [OutcomeRow("junction", name, "daily", None, START, "applied")])


@pytest.fixture
def worker(plain: Engine, empty_settings: Settings) -> Iterator[Engine]:
    engine = make_writer(empty_settings, session=WORKER_SESSION)
    yield engine
    engine.dispose()


def test_nothing_is_lost_or_doubled_while_workers_write(plain: Engine, worker: Engine, full: bool) -> None:
    """Breaks if the conversion loses or doubles an entry, blocks workers, or workers of 0.2 lose a delivery."""
    known = 2_000_000 if full else 50_000
    run(plain, FILL.format(known))
    with Writers(worker, known).running() as writers:
        time.sleep(0.5)
        migrate(plain)
        time.sleep(0.5)
    assert rows(plain, IS_PARTITIONED) == [{"it": True}]
    expected = Counter({f"{'junction' if n % 2 == 0 else 'terra'}:old-{n}": 1 for n in range(1, known + 1)})
    expected += writers.settled
    found = rows(plain, ENTRIES)
    assert len(found) == len(expected)
    assert {row["name"]: row["attempts"] for row in found} == expected
    assert writers.put_back > 0  # by the worker of 0.2
    print(f"{len(writers.waits)} transactions, the longest of {max(writers.waits) * 1000:.0f} ms")
    assert max(writers.waits) < 2


def test_an_interrupted_conversion_is_continued(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if `headrace migrate` fails after it was killed, or accepts an index that was not completed."""
    run(plain, FILL.format(100))
    with monkeypatch.context() as patch:
        patch.setattr(ledger_partitioning, "SWAP", "SELECT 1 / 0")
        with pytest.raises(Exception, match="DivisionByZero"):
            migrate(plain)
    with transaction(plain) as connection:
        settle(connection, [OutcomeRow("junction", "old-2", None, None, START, "applied")])
    invalid = "'headrace.deliveries_before_key'::regclass"
    run(plain, f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = {invalid}")
    migrate(plain)
    assert rows(plain, "SELECT count(*) AS n, sum(attempts) AS attempts FROM headrace.deliveries") == [
        {"n": 100, "attempts": 101}
    ]
    assert rows(plain, "SELECT 1 FROM pg_index WHERE NOT indisvalid") == []


def test_a_long_query_delays_the_conversion_only(
    plain: Engine, worker: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a report that reads the ledger for hours stops all workers, or the operator is not told of it."""
    monkeypatch.setattr(store_engine, "LOCK_SECONDS", 1.0)
    with plain.begin() as report:
        report.execute(text("SELECT count(*) FROM headrace.deliveries"))
        with Writers(worker, 100).running() as writers, pytest.raises(TryLater, match="end it, then run"):
            partition_ledger(plain)
    assert writers.waits
    assert rows(plain, IS_PARTITIONED) == [{"it": False}]
    partition_ledger(plain)
    assert rows(plain, IS_PARTITIONED) == [{"it": True}]


def test_rights_and_views_are_kept(plain: Engine) -> None:
    """Breaks if the writer's or an analyst's rights end with the conversion, or a view shows only the old table."""
    run(plain, "DROP ROLE IF EXISTS ledger_reader", "CREATE ROLE ledger_reader",
        "GRANT SELECT, INSERT ON headrace.deliveries TO ledger_reader")  # fmt: skip
    try:
        before = rows(plain, "SELECT viewname, definition FROM pg_views WHERE schemaname = 'health' ORDER BY 1")
        migrate(plain)
        assert rows(plain, "SELECT viewname, definition FROM pg_views WHERE schemaname = 'health' ORDER BY 1") == before
        granted = "SELECT has_table_privilege('ledger_reader', 'headrace.deliveries', '{}') AS it"
        found = [rows(plain, granted.format(right))[0]["it"] for right in ("SELECT", "INSERT", "DELETE")]
        assert found == [True, True, False]
    finally:
        run(plain, "DROP OWNED BY ledger_reader", "DROP ROLE ledger_reader")
