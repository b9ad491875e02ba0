"""The audit log records the database login, which the writer cannot choose."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

CHANGES = """
-- `operator` is the login of the database session. Rows of earlier versions have none: what they called the operator is
-- the user of the operating system, as the command reported it.
ALTER TABLE headrace.audit RENAME COLUMN operator TO os_user;
ALTER TABLE headrace.audit ADD COLUMN operator text;
ALTER TABLE headrace.audit ALTER COLUMN operator SET DEFAULT session_user;

-- Roles that may insert rows keep this right for the columns that do not say who acted, and when.
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT DISTINCT grantee::regrole AS role FROM pg_class, aclexplode(relacl)
        WHERE oid = 'headrace.audit'::regclass AND privilege_type = 'INSERT' AND grantee NOT IN (0, relowner)
    LOOP
        EXECUTE format('REVOKE INSERT ON headrace.audit FROM %s', one.role);
        EXECUTE format('GRANT INSERT (os_user, action, subject, detail) ON headrace.audit TO %s', one.role);
    END LOOP;
END $$;
"""


def upgrade() -> None:
    op.execute(CHANGES)
