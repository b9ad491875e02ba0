"""Crash counts: how many worker processes, or processes of PostgreSQL, crashed while they processed a delivery."""

from collections.abc import Sequence

from sqlalchemy import Connection, Engine, text

from workers.store.engine import execute, scalars

RECORD_CRASH = text("""
INSERT INTO headrace.crash_counts AS stored (name, crashes) VALUES (:name, 1)
ON CONFLICT (name) DO UPDATE SET crashes = stored.crashes + 1 RETURNING crashes""")
CRASH_COUNTS = text("SELECT name, crashes FROM headrace.crash_counts WHERE name = ANY(:names)")
CLEAR_CRASHES = text("DELETE FROM headrace.crash_counts WHERE name = ANY(:names)")


def record_crash(engine: Engine, name: str) -> int:
    """Counts a crash in advance, before the worker processes the delivery. Commits, and returns the new count."""
    return sum(scalars(engine, RECORD_CRASH, {"name": name}))


def crash_counts(engine: Engine, names: Sequence[str]) -> dict[str, int]:
    """The crash counts of those deliveries that have one."""
    return {row.name: row.crashes for row in execute(engine, CRASH_COUNTS, {"names": list(names)})}


def clear_crashes(connection: Connection, names: Sequence[str]) -> None:
    """Deletes the counts of deliveries that a worker has processed without a crash."""
    connection.execute(CLEAR_CRASHES, {"names": list(names)})
