"""New columns of health.deliveries and health.backfills, and the index by which queries find a client_user_id."""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

# health.connections has new columns too. It reads the tables of records, so workers/store/schema.py creates it.
CHANGES = """
CREATE OR REPLACE VIEW health.deliveries AS
SELECT aggregator AS provider, message_id, event_type, received_at, applied_at, outcome, attempts, error,
       aggregator, user_id
FROM headrace.deliveries;

CREATE OR REPLACE VIEW health.backfills AS
SELECT b.user_id, b.provider, b.resource, b.status, b.window_start, b.window_end, b.is_final_seen,
       count(c.id) AS chunks_total, count(c.id) FILTER (WHERE c.status = 'done') AS chunks_done,
       b.records, b.started_at, b.finished_at, b.error, b.id
FROM headrace.backfills b LEFT JOIN headrace.chunks c ON c.backfill_id = b.id
WHERE b.item = '' GROUP BY b.id;

CREATE INDEX users_client_user_id ON headrace.users (client_user_id);
"""


def upgrade() -> None:
    op.execute(CHANGES)
