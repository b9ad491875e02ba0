"""Partitions the delivery ledger by month while workers write to it: the last step of `headrace migrate`."""

import time

from sqlalchemy import Engine, text

from app.errors import RetryAlone, TryLater
from workers.store.engine import transaction
from workers.store.indexes import create_index, one_at_a_time

IS_PARTITIONED = text("SELECT relkind = 'p' FROM pg_class WHERE oid = 'headrace.deliveries'::regclass")
# Statements queue behind one that waits for a lock, and workers wait 500 ms at most.
LOCK_TIMEOUT, PAUSE_SECONDS, MAX_SECONDS = "100ms", 0.2, 600.0
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
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("SET lock_timeout = 0"))
        _run_short(engine, ADD_MONTH)
        for name, definition in INDEXES.items():
            create_index(connection, name, f"headrace.deliveries {definition}", unique=True)
        bound = connection.scalar(BOUND)
        _run_short(engine, ADD_BOUND.format(bound=bound))
        connection.execute(VALIDATE)
        _run_short(engine, SWAP.format(bound=bound))


def _run_short(engine: Engine, statement: str) -> None:
    """Runs a statement that needs an exclusive lock for milliseconds. Tries again while others use the table."""
    until = time.monotonic() + MAX_SECONDS
    while True:
        try:
            with transaction(engine) as connection:
                connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
                connection.execute(text(statement))
        except RetryAlone as error:
            if error.cause != "lock_timeout":
                raise
            if time.monotonic() > until:
                raise TryLater(
                    "another transaction has held a lock on headrace.deliveries for 10 minutes; end it, then run "
                    "`headrace migrate` again"
                ) from None
        else:
            return
        time.sleep(PAUSE_SECONDS)
