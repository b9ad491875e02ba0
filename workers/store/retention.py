"""Retention: deletes data and ledger entries that are older than their limits, in partitions and batches."""

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta

from sqlalchemy import Connection, Engine, TextClause, text

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.delivery import MAX_AHEAD_SECONDS
from workers.store import feed
from workers.store.engine import delete_in_batches, execute, scalars, transaction
from workers.store.partitions import DROP, OLDER, drop_older, repeated
from workers.store.schema import record_table
from workers.store.sql import quoted

BATCH = 10_000  # rows per transaction
SERIES_PAGE = 500  # series per DELETE
LEDGER = "deliveries"
DAILY = "daily"  # the values of days, and the sessions that were kept
SERIES = text("SELECT id FROM headrace.series WHERE resource = :resource AND id > :after ORDER BY id LIMIT :limit")
COUNT_SAMPLES = text("""
SELECT count(*) FROM headrace.series n JOIN headrace.samples s ON s.series_id = n.id
WHERE n.resource = :resource AND s.ts < :before""")
REMOVE_SAMPLES = text(f"""
WITH gone AS (
    DELETE FROM headrace.samples WHERE series_id = ANY(:series) AND ts < :before AND (series_id, ts) IN (
        SELECT series_id, ts FROM headrace.samples WHERE series_id = ANY(:series) AND ts < :before LIMIT :limit)
    RETURNING series_id, ts),
changed AS (
    SELECT series_id, min(ts) AS ts_min, max(ts) AS ts_max, count(*) AS row_count FROM gone GROUP BY series_id),
announced AS ({feed.announced("remove", "retention", "changed")})
SELECT count(*) FROM gone""")
REMOVE_RANGES = text("""
DELETE FROM headrace.sample_ranges WHERE series_id = ANY(:series) AND greatest(last, replaced_last) < :before""")
OLD_DAY = "local_date < CAST(CAST(:before AS timestamptz) AS date)"
COUNT_DAYS = text(f"SELECT count(*) FROM headrace.days WHERE {OLD_DAY}")
# The change feed names one user of each person.
REMOVE_DAYS = text(f"""
WITH gone AS (
    DELETE FROM headrace.days WHERE (person, metric, local_date) IN (
        SELECT person, metric, local_date FROM headrace.days WHERE {OLD_DAY} LIMIT :limit)
    RETURNING person, local_date),
owners AS (
    SELECT DISTINCT ON (person) person, user_id FROM gone
    JOIN headrace.users ON coalesce(client_user_id, user_id) = person AND erased_at IS NULL AND merged_into IS NULL
    ORDER BY person, user_id),
announced AS (
    INSERT INTO headrace.outbox ({feed.COLUMNS})
    SELECT 'remove', user_id, 'daily', NULL, NULL, NULL, min(local_date), max(local_date), count(*), 'retention'
    FROM gone JOIN owners USING (person) GROUP BY user_id)
SELECT count(*) FROM gone""")
REMOVE_SESSIONS = text(f"DELETE FROM headrace.kept_sessions WHERE {OLD_DAY}")
# A dead letter needs its ledger entry, which has its number of attempts.
HAS_DEAD_LETTER = """EXISTS (SELECT FROM headrace.dead_letters dead_letter
    WHERE (dead_letter.aggregator, dead_letter.message_id) = (entry.aggregator, entry.message_id))"""
OLD = f"entry.received_at < :before AND NOT {HAS_DEAD_LETTER}"
COUNT_ENTRIES = text(f"SELECT count(*) FROM headrace.deliveries entry WHERE {OLD}")
# In the order in which workers lock entries.
REMOVE_ENTRIES = text(f"""
DELETE FROM headrace.deliveries WHERE (aggregator, message_id, month) IN (
    SELECT aggregator, message_id, month FROM headrace.deliveries entry WHERE {OLD}
    ORDER BY aggregator, message_id LIMIT :limit)""")
COUNT_MONTH = 'SELECT count(*), count(*) FILTER (WHERE {has_dead_letter}) FROM headrace."{name}" entry'


def limits(settings: Settings, now: datetime) -> dict[str, datetime]:
    """The moment before which data is deleted, by resource, for days and for the ledger. No entry: no limit."""
    retention = dict(settings.retention)
    days = {name: retention.get(name, retention.get("*", 0)) for name in (*catalogue(), DAILY)}
    days |= {LEDGER: settings.ledger_days}
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
    resource = catalogue().get(name)
    if resource is None:
        query = COUNT_DAYS if name == DAILY else COUNT_ENTRIES
    elif resource.is_series:
        query = COUNT_SAMPLES
    else:
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
            batches = _remove_entries(engine, before)
        elif name == DAILY:
            batches = _remove_days(engine, before)
        elif catalogue()[name].is_series:
            batches = _remove_samples(engine, name, before)
        else:
            batches = delete_in_batches(engine, _remove_records(catalogue()[name]), {"before": before}, BATCH)
        yield from ((name, deleted) for deleted in batches if deleted)


def _remove_days(engine: Engine, before: datetime) -> Iterator[int]:
    yield from delete_in_batches(engine, REMOVE_DAYS, {"before": before}, BATCH)
    execute(engine, REMOVE_SESSIONS, {"before": before})


def _age(resource: Resource) -> str:
    """The day of a record; for a resource without days, such as profile, the time of the last write."""
    if resource.day_field is None:
        return "stored_at"
    return f"coalesce(CAST({quoted(resource.day_field)} AS timestamptz), stored_at)"


def _remove_records(resource: Resource) -> TextClause:
    table = record_table(resource)
    return text(f"""
WITH gone AS (
    DELETE FROM {table} WHERE (user_id, id) IN (
        SELECT user_id, id FROM {table} WHERE {_age(resource)} < :before ORDER BY user_id, id LIMIT :limit)
    RETURNING user_id, provider, source_type, id, deleted),
announced AS ({feed.announced_records("remove", "retention", resource, "gone")})
SELECT count(*) FROM gone""")


def _remove_samples(engine: Engine, name: str, before: datetime) -> Iterator[int]:
    after = 0
    while series := scalars(engine, SERIES, {"resource": name, "after": after, "limit": SERIES_PAGE}):
        yield from delete_in_batches(engine, REMOVE_SAMPLES, {"before": before, "series": series}, BATCH)
        execute(engine, REMOVE_RANGES, {"before": before, "series": series})
        after = series[-1]


def _remove_entries(engine: Engine, before: datetime) -> Iterator[int]:
    """Deletes entries of deliveries that were received earlier, and yields row counts. Can be interrupted.

    A month with a dead letter is not dropped: its other entries are deleted in batches. After the dead letter was
    deleted, the next run drops the month. A locked month is left to the next run.
    """
    # A clock that was ahead may have received a delivery later than its entry was inserted.
    edge = before - timedelta(seconds=MAX_AHEAD_SECONDS)
    for name in scalars(engine, OLDER, {"parent": LEDGER, "before": edge}):
        dropped = _drop_month(engine, name)
        if dropped is None:
            return  # deleting a whole month in batches would cost hours
        yield dropped
    yield from delete_in_batches(engine, REMOVE_ENTRIES, {"before": before}, BATCH)


def _drop_month(engine: Engine, name: str) -> int | None:
    """Drops a month without dead letters. Returns the number of dropped entries; None if the month is locked."""
    query = text(COUNT_MONTH.format(name=name, has_dead_letter=HAS_DEAD_LETTER))
    with transaction(engine) as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        entries, of_dead_letters = connection.execute(query).one()
    if of_dead_letters:
        return 0
    is_dropped = repeated(engine, DROP, {"parent": "deliveries", "name": name, "only_empty": False})
    return int(entries) if is_dropped else None
