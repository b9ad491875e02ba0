"""The first schema: users, connections, the ledger, samples, backfills, and the views over them."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

FIRST_YEAR, LAST_YEAR = 2010, 2030

TABLES = """
CREATE SCHEMA IF NOT EXISTS health;

CREATE TYPE headrace.origin AS ENUM ('webhook', 'backfill', 'replay', 'reconcile');

CREATE TABLE headrace.users (
    user_id text PRIMARY KEY,
    client_user_id text,
    named_at timestamptz NOT NULL DEFAULT '-infinity',  -- when the event that says so was made
    first_seen timestamptz NOT NULL DEFAULT now(),
    erased_at timestamptz,  -- a tombstone: nothing more is taken of them
    succeeded_by text  -- they reconnected, and go by this id
);

CREATE TABLE headrace.connections (
    user_id text NOT NULL,
    provider text NOT NULL,
    status text NOT NULL,
    error text,
    version timestamptz NOT NULL,
    origin headrace.origin NOT NULL,
    stored_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, provider)
);

-- One row per delivery id: what became of it.
CREATE TABLE headrace.deliveries (
    aggregator text NOT NULL,
    message_id text NOT NULL,
    event_type text,
    user_id text,
    received_at timestamptz NOT NULL,
    applied_at timestamptz NOT NULL,
    outcome text NOT NULL,
    attempts int NOT NULL DEFAULT 1,
    error text,
    reference text,  -- the large request that it is a part of
    PRIMARY KEY (aggregator, message_id)
);
CREATE INDEX ON headrace.deliveries USING brin (received_at);
CREATE INDEX ON headrace.deliveries (reference) WHERE reference IS NOT NULL;

-- History that was asked for elsewhere and comes by webhook; its deliveries are in the ledger.
CREATE TABLE headrace.large_requests (
    aggregator text NOT NULL,
    reference text NOT NULL,
    user_id text NOT NULL,
    provider text NOT NULL,
    expected int,  -- null: not said, and some providers never say
    announced_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (aggregator, reference)
);

-- What cannot be applied, sealed as it came.
CREATE TABLE headrace.dead_letters (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    aggregator text NOT NULL,
    message_id text NOT NULL,
    event_type text,
    received_at timestamptz NOT NULL,
    died_at timestamptz NOT NULL DEFAULT now(),
    reason text NOT NULL,
    ordering_ms bigint,
    reference text,
    sealed bytea NOT NULL,
    UNIQUE (aggregator, message_id)
);

-- Deliveries that were applied, sealed as they came, by the day, so that old days are dropped and not deleted.
CREATE TABLE headrace.kept (
    received_at timestamptz NOT NULL,
    aggregator text NOT NULL,
    message_id text NOT NULL,
    event_type text,
    user_id text,
    ordering_ms bigint,
    reference text,
    sealed bytea NOT NULL
) PARTITION BY RANGE (received_at);
CREATE TABLE headrace.kept_other PARTITION OF headrace.kept DEFAULT;
CREATE INDEX ON headrace.kept (received_at);
CREATE INDEX ON headrace.kept (user_id);

-- What a worker was at when it died, and how often.
CREATE TABLE headrace.suspects (
    name text PRIMARY KEY,
    crashes int NOT NULL,
    since timestamptz NOT NULL DEFAULT now()
);

-- A series is named once; its samples carry a number instead of five texts.
CREATE TABLE headrace.series (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id text NOT NULL,
    resource text NOT NULL,
    provider text NOT NULL,
    source_type text NOT NULL,
    subtype text NOT NULL,
    UNIQUE (user_id, resource, provider, source_type, subtype)
);

-- Wide types first: no padding between columns.
CREATE TABLE headrace.samples (
    ts timestamptz NOT NULL,
    ts_end timestamptz,
    value double precision,
    version timestamptz NOT NULL,
    stored_at timestamptz NOT NULL,
    series_id int NOT NULL,
    timezone_offset int,
    origin headrace.origin NOT NULL,
    unit text NOT NULL,
    extra jsonb,
    PRIMARY KEY (series_id, ts)
) PARTITION BY RANGE (ts);
CREATE TABLE headrace.samples_other PARTITION OF headrace.samples DEFAULT;

CREATE TABLE headrace.backfills (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    aggregator text NOT NULL,
    user_id text NOT NULL,
    provider text NOT NULL,
    resource text NOT NULL,
    item text NOT NULL DEFAULT '',  -- only what belongs to this record, instead of a window: one workout's stream
    asked_by text NOT NULL,  -- notice, operator or reconcile
    status text NOT NULL DEFAULT 'pending',
    window_start timestamptz,
    window_end timestamptz,
    is_final_seen boolean NOT NULL DEFAULT false,
    records bigint NOT NULL DEFAULT 0,
    pages bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    finished_at timestamptz,
    error text,
    due_at timestamptz NOT NULL DEFAULT now(),  -- not before this
    lease_until timestamptz NOT NULL DEFAULT '-infinity',  -- a worker is at it
    attempts int NOT NULL DEFAULT 0,  -- that failed since the last page
    crashes int NOT NULL DEFAULT 0  -- of workers that held it, since the last page
);
CREATE INDEX ON headrace.backfills (due_at) WHERE status IN ('pending', 'running');
CREATE INDEX ON headrace.backfills (user_id);
CREATE INDEX held_backfills ON headrace.backfills (aggregator) WHERE lease_until > '-infinity';
-- The next notice extends the pull that is open. What an operator asks for has an end of its own.
CREATE UNIQUE INDEX one_open_backfill ON headrace.backfills (user_id, provider, resource, item, asked_by)
    WHERE status IN ('pending', 'running', 'paused');

CREATE TABLE headrace.chunks (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    backfill_id bigint NOT NULL REFERENCES headrace.backfills ON DELETE CASCADE,
    message_id text NOT NULL,  -- of the notice, or made up where nobody sent one
    created_at timestamptz NOT NULL DEFAULT now(),
    window_start timestamptz,
    window_end timestamptz,
    is_final boolean NOT NULL,
    status text NOT NULL DEFAULT 'pending',
    slice_end timestamptz,  -- what is later has been fetched; the window is walked from its newest end
    slice_days int,
    cursor text,  -- of the page that comes next in this slice
    pages int NOT NULL DEFAULT 0,
    restarts int NOT NULL DEFAULT 0,  -- of a slice whose cursor was no good
    UNIQUE (message_id, backfill_id)
);
CREATE INDEX ON headrace.chunks (backfill_id);

-- What the last reconciliation found missing, and whose turn it is.
CREATE TABLE headrace.gaps (
    user_id text NOT NULL,
    provider text NOT NULL,
    resource text NOT NULL,
    part text NOT NULL,  -- of the reconciliation
    whose text NOT NULL,
    reason text NOT NULL,
    is_pulling boolean NOT NULL,  -- from the provider to the aggregator, and not done yet
    window_start timestamptz,
    window_end timestamptz,
    since timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, provider, resource, part)
);

-- What is to be done from time to time, and how far it has come.
CREATE TABLE headrace.chores (
    name text PRIMARY KEY,
    due_at timestamptz NOT NULL,
    position jsonb,  -- null: from the beginning
    done_at timestamptz,
    lease_until timestamptz NOT NULL DEFAULT '-infinity'
);

-- What operators did, and to whom.
CREATE TABLE headrace.audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    operator text NOT NULL,
    action text NOT NULL,
    subject text NOT NULL,
    detail jsonb NOT NULL
);
"""

VIEWS = """
CREATE VIEW health.users AS SELECT user_id, client_user_id, first_seen, erased_at FROM headrace.users
WHERE succeeded_by IS NULL;

CREATE VIEW health.connections AS
SELECT user_id, provider, status, stored_at AS since, error FROM headrace.connections;

CREATE VIEW health.deliveries AS
SELECT aggregator AS provider, message_id, event_type, received_at, applied_at, outcome, attempts, error
FROM headrace.deliveries;

CREATE VIEW health.large_requests AS
SELECT r.user_id, r.provider, r.reference, r.expected, count(d.message_id) AS received,
       count(d.message_id) >= r.expected AS is_complete, r.announced_at
FROM headrace.large_requests r LEFT JOIN headrace.deliveries d
  ON d.reference = r.reference AND d.aggregator = r.aggregator AND d.outcome IN ('applied', 'duplicate', 'stale')
 AND d.event_type NOT LIKE 'large_request%'
GROUP BY r.aggregator, r.reference;

CREATE VIEW health.backfills AS
SELECT b.user_id, b.provider, b.resource, b.status, b.window_start, b.window_end, b.is_final_seen,
       count(c.id) AS chunks_total, count(c.id) FILTER (WHERE c.status = 'done') AS chunks_done,
       b.records, b.started_at, b.finished_at, b.error
FROM headrace.backfills b LEFT JOIN headrace.chunks c ON c.backfill_id = b.id
WHERE b.item = '' GROUP BY b.id;
"""


def upgrade() -> None:
    op.execute(TABLES)
    for year in range(FIRST_YEAR, LAST_YEAR + 1):
        op.execute(
            f"CREATE TABLE headrace.samples_{year} PARTITION OF headrace.samples "
            f"FOR VALUES FROM ('{year}-01-01 00:00:00+00') TO ('{year + 1}-01-01 00:00:00+00')"
        )
    op.execute(VIEWS)
