"""Retention: deletes data that is older than its resource's limit, in batches."""

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta

from sqlalchemy import Connection, Engine, TextClause, text

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from workers.store import ledger_retention
from workers.store.engine import delete_in_batches, transaction
from workers.store.partitions import drop_older
from workers.store.schema import record_table
from workers.store.sql import quoted

BATCH = 10_000  # rows per transaction
SERIES_PAGE = 500  # series per DELETE
LEDGER = "deliveries"
SERIES = text("SELECT id FROM headrace.series WHERE resource = :resource AND id > :after ORDER BY id LIMIT :limit")
COUNT_SAMPLES = text("""
SELECT count(*) FROM headrace.series n JOIN headrace.samples s ON s.series_id = n.id
WHERE n.resource = :resource AND s.ts < :before""")
REMOVE_SAMPLES = text("""
DELETE FROM headrace.samples WHERE series_id = ANY(:series) AND ts < :before AND (series_id, ts) IN (
    SELECT series_id, ts FROM headrace.samples WHERE series_id = ANY(:series) AND ts < :before LIMIT :limit)""")
REMOVE_RANGES = text("""
DELETE FROM headrace.sample_ranges WHERE series_id = ANY(:series) AND greatest(last, replaced_last) < :before""")


def limits(settings: Settings, now: datetime) -> dict[str, datetime]:
    """The moment before which data is deleted, by resource and for the ledger. Without a limit there is no entry."""
    retention = dict(settings.retention)
    days = {name: retention.get(name, retention.get("*", 0)) for name in catalogue()} | {LEDGER: settings.ledger_days}
    return {name: now - timedelta(days=number) for name, number in days.items() if number}


def count(engine: Engine, edges: Mapping[str, datetime]) -> dict[str, int]:
    """The number of rows that `remove` would delete, by resource."""
    found = {}
    for name, before in edges.items():
        with transaction(engine) as connection:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            found[name] = _count(connection, name, before)
    return {name: number for name, number in found.items() if number}


def _count(connection: Connection, name: str, before: datetime) -> int:
    if name == LEDGER:
        query = ledger_retention.COUNT
    elif catalogue()[name].is_series:
        query = COUNT_SAMPLES
    else:
        resource = catalogue()[name]
        query = text(f"SELECT count(*) FROM {record_table(resource)} WHERE {_age(resource)} < :before")
    return int(connection.scalar(query, {"before": before, "resource": name}) or 0)


def drop_partitions(engine: Engine, edges: Mapping[str, datetime]) -> list[str]:
    """Drops partitions of samples that are wholly older than the limit of every resource. Returns their names.

    A partition has the samples of all resources, so that one resource without a limit keeps it. Also drops partitions
    that `remove` has emptied.
    """
    series = [name for name, resource in catalogue().items() if resource.is_series]
    befores = [edges[name] for name in series if name in edges]
    if not befores:
        return []
    dropped = drop_older(engine, "samples", min(befores)) if len(befores) == len(series) else []
    return dropped + drop_older(engine, "samples", max(befores), only_empty=True)


def remove(engine: Engine, edges: Mapping[str, datetime]) -> Iterator[tuple[str, int]]:
    """Deletes older rows, one transaction per batch, and yields each batch's resource and count. Can be interrupted."""
    for name, before in edges.items():
        if name == LEDGER:
            batches = ledger_retention.remove(engine, before, BATCH)
        elif catalogue()[name].is_series:
            batches = _remove_samples(engine, name, before)
        else:
            batches = delete_in_batches(engine, _remove_records(catalogue()[name]), {"before": before}, BATCH)
        yield from ((name, deleted) for deleted in batches if deleted)


def _age(resource: Resource) -> str:
    """The day of a record; for a resource without days, such as profile, the time of the last write."""
    if resource.day_field is None:
        return "stored_at"
    return f"coalesce(CAST({quoted(resource.day_field)} AS timestamptz), stored_at)"


def _remove_records(resource: Resource) -> TextClause:
    table = record_table(resource)
    return text(f"""
DELETE FROM {table} WHERE (user_id, id) IN (
    SELECT user_id, id FROM {table} WHERE {_age(resource)} < :before ORDER BY user_id, id LIMIT :limit)""")


def _remove_samples(engine: Engine, name: str, before: datetime) -> Iterator[int]:
    after = 0
    while True:
        with transaction(engine) as connection:
            page = {"resource": name, "after": after, "limit": SERIES_PAGE}
            series = list(connection.scalars(SERIES, page))
        if not series:
            return
        yield from delete_in_batches(engine, REMOVE_SAMPLES, {"before": before, "series": series}, BATCH)
        with transaction(engine) as connection:
            connection.execute(REMOVE_RANGES, {"before": before, "series": series})
        after = series[-1]
