"""What a backfill did not store as received, and an index of the ranges of samples by their end."""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE headrace.backfills ADD COLUMN notes jsonb")
    op.execute("CREATE INDEX sample_ranges_last ON headrace.sample_ranges (series_id, last)")
    op.execute("DROP INDEX headrace.sample_ranges_series_id_replaced_last_idx")  # of a query that is gone
