"""Crash counts: with which deliveries worker processes died."""

from collections.abc import Sequence

from sqlalchemy import Connection, Engine, text

from workers.store.engine import transaction

RECORD_CRASH = text("""
INSERT INTO headrace.crash_counts AS stored (name, crashes) VALUES (:name, 1)
ON CONFLICT (name) DO UPDATE SET crashes = stored.crashes + 1 RETURNING crashes""")
CRASH_COUNTS = text("SELECT name, crashes FROM headrace.crash_counts WHERE name = ANY(:names)")
CLEAR_CRASHES = text("DELETE FROM headrace.crash_counts WHERE name = ANY(:names)")


def record_crash(engine: Engine, name: str) -> int:
    """Notes that a worker is at something that a worker has died with; how often that is now. Committed at once."""
    with transaction(engine) as connection:
        return int(connection.scalar(RECORD_CRASH, {"name": name}) or 0)


def crash_counts(engine: Engine, names: Sequence[str]) -> dict[str, int]:
    """Which of these workers have died with, and how often."""
    with transaction(engine) as connection:
        return {row.name: row.crashes for row in connection.execute(CRASH_COUNTS, {"names": list(names)})}


def clear_crashes(connection: Connection, names: Sequence[str]) -> None:
    """A worker has come through with these alive."""
    connection.execute(CLEAR_CRASHES, {"names": list(names)})
