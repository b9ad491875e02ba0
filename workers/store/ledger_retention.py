"""Retention of the ledger: drops the partitions of old months, and deletes old entries of other months in batches."""

from collections.abc import Iterator
from datetime import datetime, timedelta

from sqlalchemy import Engine, text

from app.delivery import MAX_AHEAD_SECONDS
from workers.store.engine import delete_in_batches, transaction
from workers.store.partitions import DROP, repeated

# A dead letter needs its ledger entry, which has its number of attempts.
HAS_DEAD_LETTER = """EXISTS (SELECT FROM headrace.dead_letters dead_letter
    WHERE (dead_letter.aggregator, dead_letter.message_id) = (entry.aggregator, entry.message_id))"""
OLD = f"entry.received_at < :before AND NOT {HAS_DEAD_LETTER}"
COUNT = text(f"SELECT count(*) FROM headrace.deliveries entry WHERE {OLD}")
# In the order in which workers lock entries.
DELETE = text(f"""
DELETE FROM headrace.deliveries WHERE (aggregator, message_id, month) IN (
    SELECT aggregator, message_id, month FROM headrace.deliveries entry WHERE {OLD}
    ORDER BY aggregator, message_id LIMIT :limit)""")
MONTHS = text("SELECT name FROM headrace.partitions WHERE parent = 'deliveries' AND last <= :before ORDER BY first")
COUNT_MONTH = 'SELECT count(*), count(*) FILTER (WHERE {has_dead_letter}) FROM headrace."{name}" entry'


def remove(engine: Engine, before: datetime, batch: int) -> Iterator[int]:
    """Deletes entries of deliveries that were received earlier, and yields row counts. Can be interrupted.

    A month with a dead letter is not dropped: its other entries are deleted in batches of this size. After the dead
    letter was deleted, the next run drops the month. A locked month is left to the next run.
    """
    with transaction(engine) as connection:
        # A clock that was ahead may have received a delivery later than its entry was inserted.
        names = list(connection.scalars(MONTHS, {"before": before - timedelta(seconds=MAX_AHEAD_SECONDS)}))
    for name in names:
        dropped = _drop(engine, name)
        if dropped is None:
            return  # deleting a whole month in batches would cost hours
        yield dropped
    yield from delete_in_batches(engine, DELETE, {"before": before}, batch)


def _drop(engine: Engine, name: str) -> int | None:
    """Drops a month without dead letters. Returns the number of dropped entries; None if the month is locked."""
    query = text(COUNT_MONTH.format(name=name, has_dead_letter=HAS_DEAD_LETTER))
    with transaction(engine) as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        entries, of_dead_letters = connection.execute(query).one()
    if of_dead_letters:
        return 0
    is_dropped = repeated(engine, DROP, {"parent": "deliveries", "name": name, "only_empty": False})
    return int(entries) if is_dropped else None
