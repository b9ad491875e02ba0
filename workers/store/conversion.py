"""Conversion of the yearly partitions of samples to monthly ones, while workers write and readers read.

Monthly tables are filled in batches from the yearly partition (the source). A trigger on the source repeats every
insert, update and delete in them. When all rows are copied, one short transaction detaches the source, attaches the
months and drops the source. An interrupted conversion continues where it stopped.

Races between a batch and a transaction of a worker:
- An insert or update of the worker wins: the batch inserts with ON CONFLICT DO NOTHING, the trigger with DO UPDATE, and
  the later one waits for the earlier one at the unique index.
- A row that a worker deletes after the snapshot of the batch, and that the batch inserts afterwards, would come back.
  The trigger therefore also records every deleted key, and before the swap, while a lock keeps writers out, recorded
  keys that the source does not contain are deleted from the months.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Connection, Engine, text

from app.errors import Misconfigured
from workers.store.engine import LOCK_PAUSE_SECONDS, insist, transaction
from workers.store.partitions import create_ahead

Result = TypeVar("Result")
Progress = Callable[[int], None]
DEFAULT = "samples_other"
COLUMNS = "ts, ts_end, value, version, stored_at, series_id, timezone_offset, origin, unit, extra"
CONVERT_LOCK = 0x48454145  # the session's advisory lock; only one conversion runs
AHEAD = "date_trunc('month', now()) + interval '3 months'"  # the end of the months that `create_ahead` creates
IS_OWNER = text("SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = 'headrace.samples'::regclass")
SOURCES = text(f"""
SELECT CAST(c.name AS text), CAST(c.first AS text), CAST(c.last AS text), greatest(t.reltuples, 0)::bigint AS rows,
       pg_total_relation_size(t.oid) AS bytes
FROM (SELECT name, first, last FROM headrace.partitions WHERE parent = 'samples' AND last - first > interval '40 days'
      UNION ALL SELECT '{DEFAULT}', '-infinity', 'infinity' WHERE EXISTS (
          SELECT FROM headrace.{DEFAULT} WHERE ts >= '2000-01-01' AND ts < {AHEAD})) AS c
JOIN pg_class t ON t.oid = format('headrace.%I', c.name)::regclass ORDER BY c.name = '{DEFAULT}' DESC, c.first""")
MONTHS_OF_YEAR = (
    "generate_series(CAST(:first AS timestamptz), CAST(:last AS timestamptz) - interval '1 day', '1 month')"
)
MONTHS_OF_DEFAULT = f"""(SELECT DISTINCT date_trunc('month', ts) FROM headrace.{DEFAULT}
WHERE ts >= '2000-01-01' AND ts < {AHEAD} ORDER BY 1)"""
# The deleted keys and the position exist only during a conversion, as do the partitioned table and the function.
PREPARE = f"""
CREATE TABLE headrace.samples_converting (LIKE headrace.samples INCLUDING ALL) PARTITION BY RANGE (ts);
CREATE TABLE headrace.samples_deleted (series_id int NOT NULL, ts timestamptz NOT NULL);
CREATE TABLE headrace.samples_position (source text NOT NULL, series_id int NOT NULL, ts timestamptz NOT NULL);
CREATE FUNCTION headrace.mirror_sample() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' OR TG_OP = 'UPDATE' AND (OLD.series_id, OLD.ts) <> (NEW.series_id, NEW.ts) THEN
        DELETE FROM headrace.samples_converting WHERE series_id = OLD.series_id AND ts = OLD.ts;
        INSERT INTO headrace.samples_deleted VALUES (OLD.series_id, OLD.ts);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO headrace.samples_converting ({COLUMNS})
        VALUES ({", ".join(f"NEW.{name}" for name in COLUMNS.split(", "))})
        ON CONFLICT (series_id, ts) DO UPDATE SET ({COLUMNS}) =
            ROW({", ".join(f"excluded.{name}" for name in COLUMNS.split(", "))});
    END IF;
    RETURN NULL;
END $$;
"""
COPY = """
WITH position AS (SELECT series_id, ts FROM headrace.samples_position),
batch AS MATERIALIZED (
    SELECT {columns} FROM headrace.{source}
    WHERE (series_id, ts) > ((SELECT series_id FROM position), (SELECT ts FROM position))
    ORDER BY series_id, ts LIMIT :limit),
copied AS (
    INSERT INTO headrace.samples_converting ({columns}) SELECT {columns} FROM batch ON CONFLICT DO NOTHING),
edge AS (SELECT series_id, ts FROM batch ORDER BY series_id DESC, ts DESC LIMIT 1),
moved AS (UPDATE headrace.samples_position SET series_id = edge.series_id, ts = edge.ts FROM edge)
SELECT count(*) FROM batch"""
# Nested loops over the primary keys: the tables of this query have no statistics, and a hash join would read all of
# them while writers wait.
BY_INDEX = "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL enable_seqscan = off"
FORGET = """
WITH gone AS (
    DELETE FROM headrace.samples_deleted
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM headrace.samples_deleted LIMIT :limit)) RETURNING series_id, ts),
resurrected AS (
    DELETE FROM headrace.samples_converting c USING gone WHERE c.series_id = gone.series_id AND c.ts = gone.ts
    AND NOT EXISTS (SELECT FROM headrace.{source} s WHERE s.series_id = gone.series_id AND s.ts = gone.ts))
SELECT count(*) FROM gone"""
BATCH_SECONDS = 0.1  # writers of the batch's rows wait as long; workers time out after 0.5 s
MIN_ROWS, MAX_ROWS = 500, 50_000
MAX_DELETED = 2_000  # keys that one transaction looks up while writers wait


@dataclass(frozen=True)
class ConversionSource:
    """A partition to convert: a year, or the default one, which is limited to the months of its plausible rows."""

    name: str
    first: str
    last: str
    rows: int  # estimated by PostgreSQL
    bytes: int  # with its index: the free space that a conversion needs


def unconverted(engine: Engine) -> list[ConversionSource]:
    """The partitions to convert: one that was interrupted, then the default one, then the years."""
    current = _current(engine)
    with transaction(engine) as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        found = [ConversionSource(**row) for row in connection.execute(SOURCES).mappings()]
    return sorted(found, key=lambda one: one.name != current)


def convert(engine: Engine, source: ConversionSource, progress: Progress) -> None:
    """Converts one partition. `progress` receives the number of rows of each batch. Raises Misconfigured.

    Continues a conversion of this partition that was interrupted.
    """
    with _alone(engine):
        with transaction(engine) as connection:
            if not connection.scalar(IS_OWNER):
                raise Misconfigured("only the owner of the tables can convert them; log in as the owner")
        if (current := _current(engine)) is None:
            insist(engine, lambda connection: _prepare(connection, source))
        elif current != source.name:
            raise Misconfigured(f"the conversion of {current} was interrupted and must be completed first")
        _copy(engine, source.name, progress)
        # The planner needs statistics from the first query after the swap on.
        _run_long(engine, "ANALYZE headrace.samples_converting")
        if source.name != DEFAULT:
            _exclude_from_default(engine, source)
        while insist(engine, lambda connection: _forget_deleted(connection, source.name)) == MAX_DELETED:
            time.sleep(LOCK_PAUSE_SECONDS)  # writers that have waited proceed
        insist(engine, lambda connection: _swap(connection, source))
    create_ahead(engine)


def _current(engine: Engine) -> str | None:
    """The name of the partition whose conversion was interrupted."""
    with transaction(engine) as connection:
        if connection.scalar(text("SELECT to_regclass('headrace.samples_position')")) is None:
            return None
        return str(connection.scalar(text("SELECT source FROM headrace.samples_position")))


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """Holds the advisory lock of a session of its own. Raises Misconfigured if another conversion runs."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": CONVERT_LOCK}):
            raise Misconfigured("another conversion of this database is running")
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": CONVERT_LOCK})


def _run(connection: Connection, *statements: str) -> None:
    for statement in statements:
        connection.execute(text(statement))


def _prepare(connection: Connection, source: ConversionSource) -> None:
    """Creates the monthly tables and the trigger, which waits for the writers of the source."""
    _run(connection, "SELECT pg_advisory_xact_lock(hashtext('headrace.partitions'))", PREPARE)
    for name, first, last in _months(connection, source):
        # The CHECK proves that all rows belong to the month, so that ATTACH PARTITION need not read them.
        _run(
            connection,
            f"CREATE TABLE headrace.{name} PARTITION OF headrace.samples_converting "
            f"FOR VALUES FROM ('{first}') TO ('{last}')",
            f"ALTER TABLE headrace.{name} ADD CONSTRAINT converting CHECK (ts >= '{first}' AND ts < '{last}')",
        )
    if source.name == DEFAULT:
        _run(connection, f"CREATE TABLE headrace.{DEFAULT}_new PARTITION OF headrace.samples_converting DEFAULT")
    _run(
        connection,
        f"INSERT INTO headrace.samples_position VALUES ('{source.name}', -2147483648, '-infinity')",
        f"CREATE TRIGGER mirror AFTER INSERT OR UPDATE OR DELETE ON headrace.{source.name} "
        "FOR EACH ROW EXECUTE FUNCTION headrace.mirror_sample()",
    )


def _months(connection: Connection, source: ConversionSource) -> list[tuple[str, datetime, datetime]]:
    """The name and the bounds of each monthly table."""
    starts = MONTHS_OF_DEFAULT if source.name == DEFAULT else MONTHS_OF_YEAR
    query = text(f"""SELECT 'samples_' || to_char(month, 'YYYYMM'), month, month + interval '1 month'
FROM {starts} AS months(month)""")
    return [(name, first, last) for name, first, last in connection.execute(query, vars(source))]


def _copy(engine: Engine, source: str, progress: Progress) -> None:
    """Copies the rows in the order of the key, in batches of about 0.1 s."""
    query, limit, copied = text(COPY.format(source=source, columns=COLUMNS)), MIN_ROWS, MIN_ROWS

    def batch(connection: Connection) -> int:
        return int(connection.scalar(query, {"limit": limit}) or 0)

    while copied:
        began = time.monotonic()
        copied = insist(engine, batch)
        progress(copied)
        speed = BATCH_SECONDS / (time.monotonic() - began)
        limit = max(MIN_ROWS, min(MAX_ROWS, int(limit * min(2.0, speed))))


def _run_long(engine: Engine, statement: str) -> None:
    with transaction(engine) as connection:
        _run(connection, "SET LOCAL statement_timeout = 0", statement)


def _exclude_from_default(engine: Engine, source: ConversionSource) -> None:
    """A constraint that proves that the default partition has no row of this year: the swap need not read it.

    It refuses no row, because rows of the year go to the yearly partition while that is attached.
    """
    table = f"ALTER TABLE headrace.{DEFAULT}"
    check = f"CHECK (ts < '{source.first}' OR ts >= '{source.last}') NOT VALID"
    add = f"{table} DROP CONSTRAINT IF EXISTS converting, ADD CONSTRAINT converting {check}"
    insist(engine, lambda connection: _run(connection, add))
    _run_long(engine, f"{table} VALIDATE CONSTRAINT converting")


def _forget_deleted(connection: Connection, source: str, limit: int | None = MAX_DELETED) -> int:
    """Deletes copied rows that were deleted in the source. Returns the number of recorded keys that were looked up."""
    _run(connection, f"LOCK TABLE headrace.{source} IN SHARE MODE", BY_INDEX)
    return int(connection.scalar(text(FORGET.format(source=source)), {"limit": limit}) or 0)


def _swap(connection: Connection, source: ConversionSource) -> None:
    """Replaces the source by the months that have rows. One call runs most statements, which shortens the lock."""
    _run(
        connection,
        "LOCK TABLE ONLY headrace.samples IN ACCESS EXCLUSIVE MODE",
        f"LOCK TABLE headrace.{source.name} IN ACCESS EXCLUSIVE MODE",
    )
    _forget_deleted(connection, source.name, limit=None)
    statements = [
        f"ALTER TABLE headrace.samples DETACH PARTITION headrace.{source.name}",
        f"DROP TABLE headrace.{source.name}",
        "DROP FUNCTION headrace.mirror_sample",
    ]
    for name, bounds in _attached(connection).items():
        statements += [f"ALTER TABLE headrace.samples_converting DETACH PARTITION headrace.{name}"]
        if bounds == "DEFAULT":
            statements += [
                f"ALTER TABLE headrace.{DEFAULT}_new RENAME TO {DEFAULT}",
                f"ALTER INDEX headrace.{DEFAULT}_new_pkey RENAME TO {DEFAULT}_pkey",
                f"ALTER TABLE headrace.samples ATTACH PARTITION headrace.{DEFAULT} DEFAULT",
            ]
        elif connection.scalar(text(f"SELECT EXISTS (SELECT FROM headrace.{name})")):
            statements += [
                f"ALTER TABLE headrace.samples ATTACH PARTITION headrace.{name} {bounds}",
                f"ALTER TABLE headrace.{name} DROP CONSTRAINT converting",
            ]
        else:
            statements += [f"DROP TABLE headrace.{name}"]
    statements += [
        f"ALTER TABLE headrace.{DEFAULT} DROP CONSTRAINT IF EXISTS converting",
        "DROP TABLE headrace.samples_converting, headrace.samples_deleted, headrace.samples_position",
    ]
    _run(connection, "; ".join(statements))


def _attached(connection: Connection) -> dict[str, str]:
    """The filled tables with their bounds, the default one last: attaching a month would read it."""
    query = text("""
SELECT relname, pg_get_expr(relpartbound, c.oid) AS bounds FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
WHERE inhparent = 'headrace.samples_converting'::regclass ORDER BY pg_get_expr(relpartbound, c.oid) = 'DEFAULT', 1""")
    return {row.relname: row.bounds for row in connection.execute(query)}
