"""How long stored data is kept: what is older than its kind may be goes, in batches, from time to time."""

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta

from sqlalchemy import Connection, Engine, text

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from workers.store.engine import transaction
from workers.store.schema import record_table
from workers.store.sql import quoted

BATCH = 10_000  # rows of one transaction
SERIES_PAGE = 500  # series that are looked at together
LEDGER = "deliveries"
SERIES = text("SELECT id FROM headrace.series WHERE resource = :resource AND id > :after ORDER BY id LIMIT :limit")
COUNT_SAMPLES = text("""
SELECT count(*) FROM headrace.series n JOIN headrace.samples s ON s.series_id = n.id
WHERE n.resource = :resource AND s.ts < :before""")
REMOVE_SAMPLES = text("""
DELETE FROM headrace.samples WHERE series_id = ANY(:series) AND ts < :before AND (series_id, ts) IN (
    SELECT series_id, ts FROM headrace.samples WHERE series_id = ANY(:series) AND ts < :before LIMIT :limit)""")
# A dead letter needs its entry: only that says whose it is.
OLD_ENTRIES = """received_at < :before AND NOT EXISTS (SELECT 1 FROM headrace.dead_letters letter
    WHERE (letter.aggregator, letter.message_id) = (d.aggregator, d.message_id))"""
COUNT_LEDGER = text(f"SELECT count(*) FROM headrace.deliveries d WHERE {OLD_ENTRIES}")
REMOVE_LEDGER = text(f"""
DELETE FROM headrace.deliveries WHERE (aggregator, message_id) IN (
    SELECT aggregator, message_id FROM headrace.deliveries d WHERE {OLD_ENTRIES}
    ORDER BY aggregator, message_id LIMIT :limit)""")


def limits(settings: Settings, now: datetime) -> dict[str, datetime]:
    """Before when nothing is kept, by resource and for the ledger; what is kept for ever is not in it."""
    told = dict(settings.retention)
    days = {name: told.get(name, told.get("*", 0)) for name in catalogue()} | {LEDGER: settings.ledger_days}
    return {name: now - timedelta(days=number) for name, number in days.items() if number}


def count(engine: Engine, edges: Mapping[str, datetime]) -> dict[str, int]:
    """How many rows would go."""
    found = {}
    for name, before in edges.items():
        with transaction(engine) as connection:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            found[name] = _count(connection, name, before)
    return {name: number for name, number in found.items() if number}


def _count(connection: Connection, name: str, before: datetime) -> int:
    values = {"before": before}
    if name == LEDGER:
        return int(connection.scalar(COUNT_LEDGER, values) or 0)
    if catalogue()[name].is_series:
        return int(connection.scalar(COUNT_SAMPLES, values | {"resource": name}) or 0)
    query = text(f"SELECT count(*) FROM {record_table(catalogue()[name])} WHERE {_age(catalogue()[name])} < :before")
    return int(connection.scalar(query, values) or 0)


def remove(engine: Engine, edges: Mapping[str, datetime]) -> Iterator[tuple[str, int]]:
    """Removes what is older, a batch a transaction; of each, the kind and how many. May be broken off anywhere."""
    for name, before in edges.items():
        if name == LEDGER:
            yield from _in_batches(engine, name, REMOVE_LEDGER, {"before": before})
        elif catalogue()[name].is_series:
            yield from _samples(engine, name, before)
        else:
            yield from _in_batches(engine, name, _removal(catalogue()[name]), {"before": before})


def _age(resource: Resource) -> str:
    """The day that a record is about; of what has none, such as a profile, when it was last written."""
    if resource.day_field is None:
        return "stored_at"
    return f"coalesce(CAST({quoted(resource.day_field)} AS timestamptz), stored_at)"


def _removal(resource: Resource) -> object:
    table = record_table(resource)
    return text(f"""
DELETE FROM {table} WHERE (user_id, id) IN (
    SELECT user_id, id FROM {table} WHERE {_age(resource)} < :before ORDER BY user_id, id LIMIT :limit)""")


def _samples(engine: Engine, name: str, before: datetime) -> Iterator[tuple[str, int]]:
    after = 0
    while True:
        with transaction(engine) as connection:
            values = {"resource": name, "after": after, "limit": SERIES_PAGE}
            series = list(connection.scalars(SERIES, values))
        if not series:
            return
        yield from _in_batches(engine, name, REMOVE_SAMPLES, {"before": before, "series": series})
        after = series[-1]


def _in_batches(engine: Engine, name: str, query: object, values: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    gone = BATCH
    while gone == BATCH:
        with transaction(engine) as connection:
            gone = connection.execute(query, {**values, "limit": BATCH}).rowcount  # type: ignore[call-overload]
        if gone:
            yield name, gone
