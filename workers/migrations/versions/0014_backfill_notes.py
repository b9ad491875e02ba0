"""What a backfill did not store as received."""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE headrace.backfills ADD COLUMN notes jsonb")
