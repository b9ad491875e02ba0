"""Renames tables, columns and jobs to the field's terms, and gives what a backfill was refused columns of its own."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NAMES = """
ALTER TABLE headrace.kept RENAME TO archive;
ALTER TABLE headrace.suspects RENAME TO crash_counts;
ALTER TABLE headrace.chores RENAME TO jobs;
ALTER TABLE headrace.users RENAME COLUMN succeeded_by TO merged_into;
ALTER TABLE headrace.backfills RENAME COLUMN asked_by TO requested_by;
UPDATE headrace.jobs SET name = 'partitions' WHERE name = 'tend';
UPDATE headrace.jobs SET name = 'retention' WHERE name = 'retain';

-- The archive's partitions, one a day, and whatever is named after a table.
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT inhrelid::regclass AS part, relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = 'headrace.archive'::regclass
    LOOP EXECUTE format('ALTER TABLE %s RENAME TO %I', one.part, replace(one.relname, 'kept_', 'archive_')); END LOOP;
    FOR one IN SELECT c.oid::regclass AS index, relname FROM pg_class c
        WHERE relnamespace = 'headrace'::regnamespace AND relkind IN ('i', 'I') AND relname ~ '^(kept|suspects|chores)_'
    LOOP EXECUTE format('ALTER INDEX %s RENAME TO %I', one.index, replace(replace(replace(
        one.relname, 'kept_', 'archive_'), 'suspects_', 'crash_counts_'), 'chores_', 'jobs_'));
    END LOOP;
END $$;
"""
REFUSED = """
ALTER TABLE headrace.backfills ADD COLUMN refused integer NOT NULL DEFAULT 0, ADD COLUMN first_refusal text;
UPDATE headrace.backfills
SET refused = substring(error FROM '^([0-9]{1,9}) refused, first: ')::integer,
    first_refusal = substring(error FROM '^[0-9]{1,9} refused, first: (.*)$')
WHERE error ~ '^[0-9]{1,9} refused, first: .';
"""


def upgrade() -> None:
    op.execute(NAMES)
    op.execute(REFUSED)
