"""Failures of days that cannot be computed, so that they are postponed and reported."""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
    ALTER TABLE headrace.daily_queue
        ADD failures int NOT NULL DEFAULT 0,  -- in a row
        ADD error text NOT NULL DEFAULT ''  -- of the last one
    """)
