"""Partitions the delivery ledger by month, and builds indexes, while workers write: steps of `headrace migrate`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, text

from app.errors import RetryAlone, TryLater
from workers.store.engine import LOCK_PAUSE_SECONDS, insist, transaction
from workers.store.sql import quoted

IS_PARTITIONED = text("SELECT relkind = 'p' FROM pg_class WHERE oid = 'headrace.deliveries'::regclass")
# A constant default does not rewrite the table. Afterwards a worker that does not know the column inserts this month.
ADD_MONTH = """
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'headrace.deliveries'::regclass AND attname = 'month') THEN
        EXECUTE format('ALTER TABLE headrace.deliveries ADD COLUMN month date NOT NULL DEFAULT %L',
                       headrace.ledger_month());
        ALTER TABLE headrace.deliveries ALTER COLUMN month SET DEFAULT headrace.ledger_month();
    END IF;
END $$"""
# The indexes of the present table become the partition's.
INDEXES = {
    "deliveries_before_key": "(aggregator, message_id, month)",
    "deliveries_before_digest": "(aggregator, digest, month) WHERE digest IS NOT NULL",
}
# The present table becomes the partition of everything before the next month, or in the last week of a month before the
# one after that: entries of a month that begins during the conversion would violate the constraint.
BOUND = text("""
SELECT CAST(date_trunc('month', now() AT TIME ZONE 'UTC' + interval '7 days') + interval '1 month' AS date)""")
# ATTACH PARTITION does not scan a table whose validated constraint implies the bounds.
ADD_BOUND = """
ALTER TABLE headrace.deliveries DROP CONSTRAINT IF EXISTS deliveries_bound;
ALTER TABLE headrace.deliveries ADD CONSTRAINT deliveries_bound CHECK (month < '{bound}') NOT VALID"""
VALIDATE = text("ALTER TABLE headrace.deliveries VALIDATE CONSTRAINT deliveries_bound")
# Views are bound to the table, not to its name, so those that this login may replace are created again.
SWAP = """
DO $$ DECLARE views text[]; grants text[]; statement text; BEGIN
    LOCK TABLE headrace.deliveries IN ACCESS EXCLUSIVE MODE;
    views := ARRAY(
        SELECT DISTINCT format('CREATE OR REPLACE VIEW %I.%I AS %s', nspname, relname, pg_get_viewdef(c.oid))
        FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class c ON c.oid = r.ev_class
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = 'headrace.deliveries'::regclass AND c.relkind = 'v'
          AND pg_has_role(c.relowner, 'USAGE'));
    grants := ARRAY(
        SELECT format('GRANT %s ON headrace.deliveries, headrace.deliveries_other TO %s', privilege_type,
                      CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END)
        FROM pg_class, aclexplode(relacl) WHERE oid = 'headrace.deliveries'::regclass AND grantee <> relowner);
    ALTER TABLE headrace.deliveries DROP CONSTRAINT deliveries_pkey;
    DROP INDEX IF EXISTS headrace.deliveries_digest;  -- of development versions
    ALTER TABLE headrace.deliveries RENAME TO deliveries_before;
    CREATE TABLE headrace.deliveries (LIKE headrace.deliveries_before INCLUDING DEFAULTS) PARTITION BY RANGE (month);
    CREATE UNIQUE INDEX deliveries_key ON headrace.deliveries (aggregator, message_id, month);
    CREATE UNIQUE INDEX deliveries_digest ON headrace.deliveries (aggregator, digest, month) WHERE digest IS NOT NULL;
    CREATE INDEX deliveries_received_at ON headrace.deliveries USING brin (received_at);
    CREATE INDEX deliveries_reference ON headrace.deliveries (reference) WHERE reference IS NOT NULL;
    ALTER TABLE headrace.deliveries ATTACH PARTITION headrace.deliveries_before
        FOR VALUES FROM (MINVALUE) TO ('{bound}');
    CREATE TABLE headrace.deliveries_other PARTITION OF headrace.deliveries DEFAULT;
    ALTER TABLE headrace.deliveries_before DROP CONSTRAINT deliveries_bound;
    FOREACH statement IN ARRAY views || grants LOOP
        EXECUTE statement;
    END LOOP;
END $$"""
# Not the lock of the migrations, which belongs to a transaction: an index is built concurrently outside of one.
LOCK = text("SELECT pg_try_advisory_lock(hashtext('headrace.ledger_partitioning'))")
UNLOCK = text("SELECT pg_advisory_unlock(hashtext('headrace.ledger_partitioning'))")
VALIDITY = text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('headrace.' || quote_ident(:name))")


def partition_ledger(engine: Engine) -> None:
    """Converts the present table to the first partition of a partitioned one. Safe to interrupt, repeat and run twice.

    Writers wait for three short transactions (155 ms at most with 2 million entries on a busy machine). Between them,
    two unique indexes are built and a constraint is validated, which reads the whole table and blocks no writer. After
    the swap, workers of older versions put their messages back: their ON CONFLICT clause needs an index without month.

    Raises TryLater if a lock was not available for 10 minutes.
    """
    with one_at_a_time(engine) as connection:
        if connection.scalar(IS_PARTITIONED):
            return
        _run_short(engine, ADD_MONTH)
        for name, definition in INDEXES.items():
            create_index(connection, name, f"headrace.deliveries {definition}", unique=True)
        bound = connection.scalar(BOUND)
        _run_short(engine, ADD_BOUND.format(bound=bound))
        connection.execute(VALIDATE)
        _run_short(engine, SWAP.format(bound=bound))


def _run_short(engine: Engine, statement: str) -> None:
    """Runs a statement that needs an exclusive lock for milliseconds. Tries again while others use the table."""
    try:
        insist(engine, lambda connection: connection.execute(text(statement)))
    except RetryAlone as error:
        if error.cause != "lock_timeout":
            raise
        raise TryLater(
            "another transaction has held a lock on headrace.deliveries for 10 minutes; end it, then run "
            "`headrace migrate` again"
        ) from None


def create_index(connection: Connection, name: str, definition: str, *, unique: bool = False) -> None:
    """Builds an index of schema `headrace`, unless there is a valid one. An interrupted build is repeated."""
    is_valid = connection.scalar(VALIDITY, {"name": name})
    if is_valid:
        return
    if is_valid is False:
        connection.execute(text(f"DROP INDEX CONCURRENTLY headrace.{quoted(name)}"))
    kind = "UNIQUE INDEX" if unique else "INDEX"
    connection.execute(text(f"CREATE {kind} CONCURRENTLY {quoted(name)} ON {definition}"))


@contextmanager
def one_at_a_time(engine: Engine) -> Iterator[Connection]:
    """A connection that holds the lock, without transactions and timeouts.

    It polls: a waiting statement would delay the index.
    """
    with transaction(engine.execution_options(isolation_level="AUTOCOMMIT")) as connection:
        while not connection.scalar(LOCK):
            time.sleep(LOCK_PAUSE_SECONDS)
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("SET lock_timeout = 0"))
        try:
            yield connection
        finally:
            connection.execute(UNLOCK)
            connection.execute(text("RESET ALL"))
