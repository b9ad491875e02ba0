"""The change feed: the outbox of transactions, the numbered changes, and consumers.

A transaction that changes rows inserts its changes into the outbox. The sequencer (workers/store/feed.py) moves
committed changes to `changes` and numbers them. See record 0077.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# The outbox has no key: rows are inserted once and deleted once. The index leads the sequencer past deleted rows that
# VACUUM cannot remove yet, because another application holds a snapshot.
TABLES = """
CREATE TABLE headrace.outbox (
    transaction xid8 NOT NULL DEFAULT pg_current_xact_id(),
    n bigint GENERATED ALWAYS AS IDENTITY,
    op text NOT NULL,
    user_id text NOT NULL,
    resource text,
    provider text,
    source_type text,
    record_id text,
    ts_min timestamptz,
    ts_max timestamptz,
    row_count int NOT NULL,
    origin text NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
        autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_scale_factor = 0,
        autovacuum_analyze_threshold = 1000000);
CREATE INDEX outbox_transaction ON headrace.outbox (transaction);

CREATE TABLE headrace.changes (
    position bigint NOT NULL,
    changed_at timestamptz NOT NULL,
    op text NOT NULL,
    user_id text NOT NULL,
    client_user_id text,
    resource text,
    provider text,
    source_type text,
    record_id text,
    ts_min timestamptz,
    ts_max timestamptz,
    row_count int NOT NULL,
    origin text NOT NULL,
    PRIMARY KEY (position, changed_at)
) PARTITION BY RANGE (changed_at);
CREATE TABLE headrace.changes_other PARTITION OF headrace.changes DEFAULT;

-- One row. Its lock, which is held until the commit, serializes sequencers. `dropped` is the greatest position that
-- retention has dropped.
CREATE TABLE headrace.feed (
    newest bigint NOT NULL,
    changed_at timestamptz NOT NULL,
    dropped bigint NOT NULL,
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row)
) WITH (fillfactor = 50);
INSERT INTO headrace.feed (newest, changed_at, dropped) VALUES (0, '-infinity', 0);

CREATE TABLE headrace.consumers (
    name text PRIMARY KEY,
    position bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    moved_at timestamptz NOT NULL DEFAULT now()
);
"""
VIEWS = """
-- The ledger is partitioned after the migrations (workers/store/ledger_partitioning.py).
CREATE OR REPLACE VIEW headrace.partitioned (parent, key, unit, ahead) AS
SELECT given.* FROM (VALUES ('archive', 'received_at', 'day', 7), ('samples', 'ts', 'month', 2),
    ('deliveries', 'month', 'month', 2), ('changes', 'changed_at', 'day', 7)) AS given (parent, key, unit, ahead)
JOIN pg_class ON pg_class.oid = to_regclass('headrace.' || parent) WHERE relkind = 'p';

CREATE VIEW health.changes AS
SELECT position, changed_at, op, user_id, client_user_id, resource, provider, source_type, record_id AS id,
       ts_min, ts_max, row_count AS rows, origin
FROM headrace.changes;

CREATE VIEW health.feed AS SELECT dropped + 1 AS oldest_position, newest AS newest_position FROM headrace.feed;
"""
COMMENTS = """
COMMENT ON VIEW health.changes IS 'The change feed: keep the greatest position that you have read, ask for the next.';
COMMENT ON COLUMN health.changes.position IS 'strictly increasing; no change appears at or below one that is visible';
COMMENT ON COLUMN health.changes.changed_at IS 'when the change became readable';
COMMENT ON COLUMN health.changes.op IS 'put (inserted or updated), remove (retracted or expired), erase (the person)';
COMMENT ON COLUMN health.changes.user_id IS 'whose data changed: the id at the aggregator';
COMMENT ON COLUMN health.changes.client_user_id IS 'whose data changed: your own id';
COMMENT ON COLUMN health.changes.resource IS 'a resource, connections, history (completed) or daily; null for erase';
COMMENT ON COLUMN health.changes.id IS 'of a record; of history its resource; null for samples';
COMMENT ON COLUMN health.changes.ts_min IS 'the time of the first of the samples that changed; null for records';
COMMENT ON COLUMN health.changes.ts_max IS 'the time of the last of the samples that changed; null for records';
COMMENT ON COLUMN health.changes.rows IS 'the number of rows that changed';
COMMENT ON COLUMN health.changes.origin IS 'webhook, backfill, replay, reconcile, erase or retention';
COMMENT ON VIEW health.feed IS 'One row: the range of the positions that can be read.';
"""
# As in 0007; in addition, the feed announces the samples of a partition that is dropped. They are counted before the
# partition is locked, so that nobody waits for it: samples that arrive meanwhile in this month, whose retention has
# ended, are dropped without being counted. The lock is tried again here, because a repeated call would count again.
DROP_PARTITION = """
CREATE OR REPLACE FUNCTION headrace.drop_partition(parent_name text, partition_name text, only_empty boolean)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO' SET lock_timeout = '100ms' AS $$
DECLARE
    part regclass;
    has_rows boolean;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('headrace.partitions'));
    IF NOT EXISTS (SELECT FROM headrace.partitioned p JOIN headrace.partitions c USING (parent)
                   WHERE p.parent = parent_name AND c.name = partition_name) THEN
        RETURN false;
    END IF;
    part := format('headrace.%I', partition_name)::regclass;
    -- A partition that `headrace migrate --convert` copies stays until it is converted. VACUUM truncates the file of an
    -- empty partition; reading a large file of deleted rows would hold the lock for too long.
    IF EXISTS (SELECT FROM pg_trigger WHERE tgrelid = part AND tgname = 'mirror')
       OR only_empty AND pg_relation_size(part) > 1048576 THEN
        RETURN false;
    END IF;
    IF parent_name = 'samples' AND NOT only_empty THEN
        EXECUTE format($announce$
            INSERT INTO headrace.outbox
                (op, user_id, resource, provider, source_type, ts_min, ts_max, row_count, origin)
            SELECT 'remove', user_id, resource, provider, source_type, min(first), max(last), sum(rows), 'retention'
            FROM (SELECT series_id, min(ts) AS first, max(ts) AS last, count(*) AS rows
                  FROM %s GROUP BY series_id) AS of_series
            JOIN headrace.series ON series.id = series_id GROUP BY user_id, resource, provider, source_type
        $announce$, part);
    END IF;
    FOR attempt IN 1..20 LOOP
        BEGIN
            EXECUTE format('LOCK TABLE headrace.%I IN ACCESS EXCLUSIVE MODE', parent_name);
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            IF attempt = 20 THEN
                RAISE;
            END IF;
            PERFORM pg_sleep(0.2);
        END;
    END LOOP;
    IF only_empty THEN
        EXECUTE format('SELECT EXISTS (SELECT FROM %s)', part) INTO has_rows;
        IF has_rows THEN
            RETURN false;
        END IF;
    END IF;
    EXECUTE format('DROP TABLE %s', part);
    RETURN true;
END $$;
"""
# Existing roles: what `headrace roles` grants to a new one. Default privileges cover tables that the owner creates, if
# the roles were created by that script.
GRANTS = """
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT DISTINCT grantee::regrole AS role FROM pg_class, aclexplode(relacl)
        WHERE oid = 'headrace.samples'::regclass AND privilege_type = 'DELETE' AND grantee NOT IN (0, relowner)
    LOOP
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON headrace.outbox, headrace.changes, headrace.feed,
                        headrace.consumers TO %s', one.role);
        EXECUTE format('GRANT SELECT ON health.changes, health.feed TO %s', one.role);
    END LOOP;
END $$;
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(VIEWS)
    op.execute(DROP_PARTITION)
    op.execute(COMMENTS)
    op.execute(GRANTS)
