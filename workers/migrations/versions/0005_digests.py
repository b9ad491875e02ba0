"""Digests of what was signed: deliveries with the same signed time and body are one, whatever id they carry."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

CHANGES = """
-- Null: the signature covers the id. The bodies of the archive and of dead letters are bound to it.
-- workers/store/ledger_partitioning.py creates the unique index of the ledger, without a lock.
ALTER TABLE headrace.deliveries ADD COLUMN digest bytea;
ALTER TABLE headrace.archive ADD COLUMN digest bytea;
ALTER TABLE headrace.dead_letters ADD COLUMN digest bytea;
"""


def upgrade() -> None:
    op.execute(CHANGES)
