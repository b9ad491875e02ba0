"""Dead letters of single items, ranges of replaced samples, retractions, grants, lost deliveries, teams of senders."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

CHANGES = """
-- A dead letter is a whole delivery (item = ''), or one refused item of it, with the digest of its content as `item`.
-- `items` is the number of refused items that it stands for.
ALTER TABLE headrace.dead_letters ADD COLUMN user_id text, ADD COLUMN item text NOT NULL DEFAULT '',
    ADD COLUMN items integer NOT NULL DEFAULT 1;
ALTER TABLE headrace.dead_letters DROP CONSTRAINT dead_letters_aggregator_message_id_key,
    ADD UNIQUE (aggregator, message_id, item);
UPDATE headrace.dead_letters SET user_id = entry.user_id FROM headrace.deliveries entry
WHERE (entry.aggregator, entry.message_id) = (dead_letters.aggregator, dead_letters.message_id);

ALTER TABLE headrace.deliveries ADD COLUMN team_id text;

-- The samples that a record has in a series: their range in its newest version that has any, and in all older ones.
CREATE TABLE headrace.sample_ranges (
    series_id int NOT NULL,
    id text NOT NULL,  -- of the record
    version timestamptz NOT NULL,
    first timestamptz,  -- null: the newest version is a deletion
    last timestamptz,
    replaced_first timestamptz,
    replaced_last timestamptz,
    PRIMARY KEY (series_id, id)
);
CREATE INDEX ON headrace.sample_ranges (series_id, replaced_last) WHERE replaced_last IS NOT NULL;

-- Records that an operator has hidden. Not a column of the record: the record may be removed and arrive again.
CREATE TABLE headrace.retractions (
    user_id text NOT NULL,
    resource text NOT NULL,
    id text NOT NULL,
    retracted_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, resource, id)
);

-- Versions that a wrong clock had put into the future would win over all later ones.
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT table_name FROM information_schema.columns
        WHERE table_schema = 'headrace' AND column_name = 'payload'
    LOOP EXECUTE format('UPDATE headrace.%I SET version = stored_at + interval ''5 minutes''
        WHERE version > stored_at + interval ''5 minutes''', one.table_name);
    END LOOP;
END $$;

-- The resources that a person allowed a provider to share.
CREATE TABLE headrace.grants (
    user_id text NOT NULL,
    provider text NOT NULL,
    resource text NOT NULL,
    granted boolean NOT NULL,
    since timestamptz NOT NULL,
    version timestamptz NOT NULL,
    origin headrace.origin NOT NULL,
    stored_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, provider, resource)
);
CREATE VIEW health.grants AS SELECT user_id, provider, resource, granted, since FROM headrace.grants;

-- Deliveries that the sender gave up. `started_at`: a reconciliation was scheduled because of this one.
CREATE TABLE headrace.lost_deliveries (
    aggregator text NOT NULL,
    message_id text NOT NULL,
    user_id text,
    reported_at timestamptz NOT NULL,
    started_at timestamptz,
    reconciled_at timestamptz,
    PRIMARY KEY (aggregator, message_id)
);
CREATE INDEX ON headrace.lost_deliveries (aggregator, user_id) WHERE reconciled_at IS NULL;
"""


def upgrade() -> None:
    op.execute(CHANGES)
