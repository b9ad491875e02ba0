"""Notifications: subscriptions, and the notifications that are due to them. See record 0078."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

# `position`: the changes of the feed up to it are planned. `start_position`: where the subscription began.
TABLES = """
CREATE TABLE headrace.subscriptions (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    url text NOT NULL,
    events text[] NOT NULL,
    window_seconds int NOT NULL,
    allow_private boolean NOT NULL,
    secret bytea NOT NULL,
    old_secret bytea,
    old_secret_until timestamptz,
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'paused')),
    reason text NOT NULL DEFAULT '',
    start_position bigint NOT NULL,
    position bigint NOT NULL,
    failures int NOT NULL DEFAULT 0,
    failing_since timestamptz,
    last_error text NOT NULL DEFAULT '',
    retry_at timestamptz NOT NULL DEFAULT '-infinity',
    lease_until timestamptz NOT NULL DEFAULT '-infinity',
    created_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

CREATE TABLE headrace.notifications (
    id text PRIMARY KEY,
    subscription_id int NOT NULL REFERENCES headrace.subscriptions ON DELETE CASCADE,
    type text NOT NULL,
    user_id text NOT NULL,
    client_user_id text,
    resource text NOT NULL,
    provider text NOT NULL,
    ids text[] NOT NULL,
    ts_min timestamptz,
    ts_max timestamptz,
    row_count bigint NOT NULL,
    first_position bigint NOT NULL,
    last_position bigint NOT NULL,
    changed_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    due_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    attempts int NOT NULL DEFAULT 0,
    status text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'sent', 'dead')),
    last_error text NOT NULL DEFAULT '',
    sent_at timestamptz
) WITH (fillfactor = 70);
-- The notification that later changes join: at most one, because the body is fixed by the first attempt.
CREATE UNIQUE INDEX notifications_open ON headrace.notifications (subscription_id, user_id, type, resource, provider)
    WHERE status = 'pending' AND attempts = 0;
CREATE INDEX notifications_due ON headrace.notifications (subscription_id, due_at) WHERE status = 'pending';
CREATE INDEX notifications_finished ON headrace.notifications (created_at) WHERE status <> 'pending';
CREATE INDEX notifications_user ON headrace.notifications (user_id);
"""
# Existing roles, as in revision 0009.
GRANTS = """
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT DISTINCT grantee::regrole AS role FROM pg_class, aclexplode(relacl)
        WHERE oid = 'headrace.samples'::regclass AND privilege_type = 'DELETE' AND grantee NOT IN (0, relowner)
    LOOP
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON headrace.subscriptions, headrace.notifications TO %s',
                       one.role);
    END LOOP;
END $$;
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(GRANTS)
