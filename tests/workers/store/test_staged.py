"""Statements over staged samples: the form that Citus can plan, and the partitions that they touch."""

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, TextClause, text

from tests.support import START
from workers.store import samples
from workers.store.samples import CHANGED_SAMPLES, COMPARE_SAMPLES, MERGE_SAMPLES, OCCUPIED

STATEMENTS = {
    "merge": MERGE_SAMPLES,
    "compare": COMPARE_SAMPLES,
    "changed": CHANGED_SAMPLES,
    "occupied": OCCUPIED,
}
PERIOD = {"first": START, "last": START + timedelta(hours=1)}
RANGES = samples.RANGES.values([(0, 1, PERIOD["first"], PERIOD["last"])])
LOCKED = text("""
SELECT count(*) FROM pg_locks JOIN pg_inherits ON inhrelid = relation
WHERE inhparent = CAST('headrace.samples' AS regclass) AND pid = pg_backend_pid()""")


def tables(plan: dict[str, Any], cte: str = "") -> Iterator[tuple[str, str, str]]:
    """The tables that a plan reads or writes: the CTE, the kind of the node, and the name of the table."""
    name = plan.get("Subplan Name", "")
    cte = name if name.startswith("CTE ") else cte
    if "Relation Name" in plan:
        yield cte.removeprefix("CTE "), plan["Node Type"], plan["Relation Name"]
    for one in plan.get("Plans", ()):
        yield from tables(one, cte)


def plan_of(engine: Engine, statement: TextClause) -> dict[str, Any]:
    """The plan of a statement."""
    with engine.connect() as connection:
        explained = connection.execute(text(f"EXPLAIN (FORMAT JSON, COSTS OFF) {statement.text}"), PERIOD | RANGES)
        plan = explained.scalar_one()[0]["Plan"]
        connection.rollback()
        return dict(plan)


@pytest.mark.parametrize("name", STATEMENTS)
def test_no_statement_joins_samples_with_a_temporary_table(engine: Engine, name: str) -> None:
    """Breaks if a statement reads staged rows and samples in one query level: Citus fails with 0A000."""
    found = list(tables(plan_of(engine, STATEMENTS[name])))
    assert {cte for cte, _, table in found if table == "staged_samples"} <= {"incoming"}
    readers = {cte for cte, node, table in found if table.startswith("samples") and node != "ModifyTable"}
    assert readers == {"occupied" if name == "occupied" else "existing"}
    assert [node for cte, node, _ in found if cte == "incoming"] == ([] if name == "occupied" else ["Seq Scan"])


@pytest.mark.parametrize("name", STATEMENTS)
def test_the_time_is_read_once_beside_the_source(name: str) -> None:
    """Breaks if a node of Citus, whose clock and transaction differ, evaluates now(); in RETURNING it is refused."""
    words = STATEMENTS[name].text
    assert words.count("now()") == 1
    assert re.match(r"\s*WITH \w+ AS MATERIALIZED \(\s*SELECT \*, now\(\) AS", words)


@pytest.mark.parametrize("name", STATEMENTS)
def test_only_partitions_of_the_period_are_locked(engine: Engine, name: str) -> None:
    """Breaks if a statement plans and locks every partition: with 120, a merge of one row takes five times as long."""
    with engine.connect() as connection:
        connection.execute(STATEMENTS[name], PERIOD | (RANGES if name == "occupied" else {}))
        assert connection.scalar(LOCKED) == 1
        connection.rollback()
