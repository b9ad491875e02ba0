"""Users belong to the aggregator that named them first."""

import logging

from alembic import op
from sqlalchemy import text

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

MAX_LISTED = 50
log = logging.getLogger("workers.migrations")
# Before the column is added, because ALTER TABLE makes workers wait until the migration ends. The ids of a reconnected
# user are one user: with two owners, each delivery under the former id would be refused.
EVIDENCE = """
SET LOCAL statement_timeout = 0;
CREATE TEMPORARY TABLE user_evidence ON COMMIT DROP AS
SELECT coalesce(users.merged_into, user_id) AS user_id, aggregator, min(at) AS at
FROM (
    SELECT user_id, aggregator, min(received_at) AS at FROM headrace.deliveries GROUP BY 1, 2
    UNION ALL SELECT user_id, aggregator, min(received_at) FROM headrace.archive GROUP BY 1, 2
    UNION ALL SELECT user_id, aggregator, min(created_at) FROM headrace.backfills GROUP BY 1, 2
    UNION ALL SELECT user_id, aggregator, min(announced_at) FROM headrace.large_requests GROUP BY 1, 2
) AS named JOIN headrace.users USING (user_id)
WHERE users.erased_at IS NULL GROUP BY 1, 2;
"""
# NULL: the user was erased, was named by an operator only, or HEADRACE_LEDGER_DAYS has removed the evidence. The next
# aggregator that names the user becomes the owner.
OWNERS = """
ALTER TABLE headrace.users ADD COLUMN aggregator text;
UPDATE headrace.users SET aggregator = first.aggregator
FROM (SELECT DISTINCT ON (user_id) user_id, aggregator FROM user_evidence ORDER BY user_id, at, aggregator) AS first
WHERE first.user_id = coalesce(users.merged_into, users.user_id) AND users.erased_at IS NULL;
-- Terra's laboratory reports, the only source of such ids.
UPDATE headrace.users SET aggregator = 'terra'
WHERE user_id LIKE 'reference:%' AND aggregator IS NULL AND erased_at IS NULL;
-- Their pages would be refused.
UPDATE headrace.backfills b SET status = 'cancelled', finished_at = now(), lease_until = '-infinity',
       error = 'the user belongs to ' || u.aggregator
FROM headrace.users u
WHERE u.user_id = b.user_id AND u.aggregator <> b.aggregator AND b.status IN ('pending', 'running', 'paused');
"""
DISPUTED = """
SELECT user_id, users.aggregator AS owner, string_agg(evidence.aggregator, ', ' ORDER BY evidence.aggregator) AS others
FROM user_evidence evidence JOIN headrace.users USING (user_id)
WHERE evidence.aggregator <> users.aggregator GROUP BY 1, 2 ORDER BY 1
"""


def upgrade() -> None:
    op.execute(EVIDENCE)
    op.execute(OWNERS)
    disputed = [f"{user} ({owner}, also {others})" for user, owner, others in op.get_bind().execute(text(DISPUTED))]
    if disputed:
        more = f" and {len(disputed) - MAX_LISTED} more" if len(disputed) > MAX_LISTED else ""
        log.warning(
            "%d users were named by more than one aggregator, and belong to the first one: %s%s. Data that the other "
            "one wrote is kept; its next deliveries become dead letters",
            len(disputed),
            ", ".join(disputed[:MAX_LISTED]),
            more,
        )
