"""The month of a new ledger entry.

`headrace migrate` then partitions the ledger, outside of this transaction (workers/store/ledger_partitioning.py).
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# A function of its own, so that a test can set the month: now() cannot be set.
MONTH = """
CREATE OR REPLACE FUNCTION headrace.ledger_month() RETURNS date LANGUAGE sql STABLE PARALLEL SAFE
RETURN CAST(date_trunc('month', now() AT TIME ZONE 'UTC') AS date);
"""


def upgrade() -> None:
    op.execute(MONTH)
