"""Erasure of a user: counts and deletes the rows in every table, behind a tombstone that blocks new data."""

from collections.abc import Iterator, Mapping
from datetime import datetime

from sqlalchemy import Engine, text

from workers.store import audit, feed
from workers.store.engine import delete_in_batches, execute, scalars, transaction
from workers.store.sql import quoted

MAINTAIN_SINCE = 170000  # PostgreSQL 17
BATCH = 10_000  # rows per transaction; 30 ms for samples
MAX_ROW_COUNT = 2**31 - 1  # of a change
CREATE_TOMBSTONE = text("""
INSERT INTO headrace.users AS stored (user_id, erased_at) VALUES (:user, now())
ON CONFLICT (user_id) DO UPDATE SET erased_at = coalesce(stored.erased_at, excluded.erased_at) RETURNING erased_at""")
# Former ids get tombstones too: the sequencer and the planner then drop changes that name one. The merge of two users
# locks their rows in the order of the ids as well.
LOCK_IDS = text("""
SELECT FROM headrace.users WHERE user_id = :user OR merged_into = :user ORDER BY user_id FOR NO KEY UPDATE""")
CREATE_FORMER_TOMBSTONES = text("""
UPDATE headrace.users SET erased_at = now() WHERE merged_into = :user AND erased_at IS NULL""")
LOCK = text("SELECT 1 FROM headrace.users WHERE user_id = :user FOR UPDATE")
RECHECK_ROW = text("UPDATE headrace.users SET erased_at = erased_at WHERE user_id = :user")
CLEAR_CLIENT_ID = text("UPDATE headrace.users SET client_user_id = NULL WHERE user_id = :user OR merged_into = :user")
# Every table with a column `user_id`, so that tables of removed resources and future tables are included. The series
# come last, because they lead to the samples.
TABLES = text("""
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'user_id'
WHERE n.nspname = 'headrace' AND c.relkind IN ('r', 'p') AND NOT c.relispartition
  AND c.relname <> ALL(ARRAY['users', 'deliveries']) ORDER BY c.relname = 'series', c.relname""")
PRESENT_OR_FORMER_ID = "user_id IN (SELECT user_id FROM headrace.users WHERE user_id = :user OR merged_into = :user)"
# A person is the client_user_id of users, or their user_id. Its days are computed again for users who stay (REQUEUE).
IS_SHARED = """SELECT FROM headrace.users other WHERE coalesce(other.client_user_id, other.user_id) = erased.person
    AND other.user_id <> :user AND other.erased_at IS NULL AND other.merged_into IS NULL"""
# The name, and the former one if the days have not moved to the name yet (workers/daily/people.py).
NAMES = f"""SELECT coalesce(client_user_id, user_id) FROM headrace.users WHERE user_id = :user
    UNION SELECT person FROM headrace.daily_people WHERE {PRESENT_OR_FORMER_ID}"""
OF_PERSON = f"""person IN (SELECT erased.person FROM (SELECT :user UNION {NAMES}) AS erased(person)
    WHERE NOT EXISTS ({IS_SHARED}))"""
OF_SERIES = "series_id IN (SELECT id FROM headrace.series WHERE user_id = :user)"
# The condition for the user's rows, where it is not `user_id = :user` alone. Deliveries keep the former id if they
# arrived under it with, or after, the message of the reconnection. The change and the notification that announce the
# erasure stay.
CONDITIONS = {
    "chunks": "backfill_id IN (SELECT id FROM headrace.backfills WHERE user_id = :user)",
    "samples": OF_SERIES,
    "sample_ranges": OF_SERIES,
    "crash_counts": """EXISTS (SELECT 1 FROM headrace.deliveries d WHERE d.user_id = :user AND d.aggregator
        = split_part(name, ':', 1) AND d.message_id = substr(name, strpos(name, ':') + 1))""",
    "deliveries": "user_id = :user",  # excluded from TABLES
    **dict.fromkeys(
        ("archive", "dead_letters", "kept_sessions", "daily_records", "daily_people"), PRESENT_OR_FORMER_ID
    ),
    "days": f"({PRESENT_OR_FORMER_ID} OR user_id IS NULL AND person IN ({NAMES}))",
    **dict.fromkeys(("daily_priorities", "daily_zones", "daily_queue"), OF_PERSON),
    **dict.fromkeys(("changes", "outbox"), f"{PRESENT_OR_FORMER_ID} AND op <> 'erase'"),
    "notifications": f"{PRESENT_OR_FORMER_ID} AND type <> 'user.erased'",
}
# Waits for a sequencer that has not seen the tombstone. Later ones drop the user's changes.
WAIT_FOR_SEQUENCER = text("SELECT 1 FROM headrace.feed FOR UPDATE")
# Waits for a planner of notifications, which holds these locks until its commit.
WAIT_FOR_PLANNER = text("SELECT 1 FROM headrace.subscriptions ORDER BY id FOR NO KEY UPDATE")
# Also for former ids: a reader that has not read the reconnection still holds rows under them.
ANNOUNCE = text(f"""
INSERT INTO headrace.outbox ({feed.COLUMNS})
SELECT 'erase', user_id, NULL, NULL, NULL, NULL, NULL, NULL, CASE user_id WHEN :user THEN :rows ELSE 0 END, 'erase'
FROM headrace.users one WHERE (user_id = :user OR merged_into = :user)
  AND NOT EXISTS (SELECT FROM headrace.changes WHERE user_id = one.user_id AND op = 'erase')
  AND NOT EXISTS (SELECT FROM headrace.outbox WHERE user_id = one.user_id AND op = 'erase')
ORDER BY user_id""")
# Resource *: every resource.
REQUEUE = text(f"""
INSERT INTO headrace.daily_queue (person, resource, dates, origin)
SELECT person, '*', datemultirange(daterange(NULL, NULL)), 'erase' FROM ({NAMES}) AS erased(person)
WHERE EXISTS ({IS_SHARED}) ON CONFLICT DO NOTHING""")
# Tables that this login may vacuum: the owner's, or with MAINTAIN since PostgreSQL 17. Others get a warning.
MAY_VACUUM = """
SELECT coalesce(bool_and(pg_has_role(c.relowner, 'USAGE') OR {maintain}), false)
FROM pg_class c WHERE c.oid = CAST(:table AS regclass) OR c.oid IN (SELECT relid FROM pg_partition_tree(:table))"""
SERIES = text("SELECT id FROM headrace.series WHERE user_id = :user ORDER BY id")
# Each batch starts where the last one ended: from the start of the index it would read all entries deleted before.
SAMPLES = text("""
WITH batch AS (SELECT ts FROM headrace.samples WHERE series_id = :series AND ts > CAST(:after AS timestamptz)
              ORDER BY ts LIMIT :limit),
gone AS (DELETE FROM headrace.samples WHERE series_id = :series AND ts > CAST(:after AS timestamptz)
         AND ts <= (SELECT max(ts) FROM batch) RETURNING ts)
SELECT CAST(max(ts) AS text) AS last, count(*) AS removed FROM gone""")
# Walks the unique index: an index by user would make every delivery 10 % more expensive, and erasures are rare. Workers
# that apply deliveries lock rows in the same order.
LEDGER = text("""
WITH batch AS MATERIALIZED (
    SELECT aggregator, message_id, month, user_id FROM headrace.deliveries
    WHERE (aggregator, message_id) > (:aggregator, :message_id) ORDER BY aggregator, message_id LIMIT :limit),
theirs AS MATERIALIZED (
    SELECT aggregator, message_id, month FROM headrace.deliveries d JOIN batch USING (aggregator, message_id, month)
    WHERE batch.user_id IN (SELECT user_id FROM headrace.users WHERE user_id = :user OR merged_into = :user)
    ORDER BY aggregator, message_id FOR NO KEY UPDATE OF d),
done AS (
    UPDATE headrace.deliveries d SET user_id = NULL FROM theirs
    WHERE (d.aggregator, d.message_id, d.month) = (theirs.aggregator, theirs.message_id, theirs.month) RETURNING 1)
SELECT aggregator, message_id, (SELECT count(*) FROM done) AS removed
FROM batch ORDER BY aggregator DESC, message_id DESC LIMIT 1""")


def create_tombstone(engine: Engine, user_id: str) -> datetime:
    """Creates the tombstone and waits for open transactions that write data of the user. Returns the erasure time.

    Transactions that read the tombstone write nothing. Earlier ones hold the row's lock (`upsert_users`) until they
    commit; this waits 5 min for them, as long as a hung worker's transaction may last. The tombstone is committed
    before that wait: otherwise overlapping transactions of workers could delay it forever.
    """
    with transaction(engine, confirm=True) as connection:
        connection.execute(LOCK_IDS, {"user": user_id})
        erased_at: datetime = connection.execute(CREATE_TOMBSTONE, {"user": user_id}).scalar_one()
        connection.execute(CREATE_FORMER_TOMBSTONES, {"user": user_id})
        audit.note(connection, "erase", user_id, {})
    with transaction(engine) as connection:
        connection.execute(text("SET LOCAL lock_timeout = '5min'"))
        connection.execute(text("SET LOCAL statement_timeout = '5min'"))
        connection.execute(LOCK, {"user": user_id})
        # A transaction that read the row before the tombstone was committed would otherwise lock the old version; an
        # update of the row makes PostgreSQL re-check it.
        connection.execute(RECHECK_ROW, {"user": user_id})
        connection.execute(WAIT_FOR_SEQUENCER)
        connection.execute(WAIT_FOR_PLANNER)
    return erased_at


def count(engine: Engine, user_id: str) -> dict[str, int]:
    """The number of the user's rows, by table."""
    with transaction(engine) as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        found = {
            table: int(connection.scalar(text(f"SELECT count(*) FROM {_rows_of(table)}"), {"user": user_id}) or 0)
            for table in dict.fromkeys([*connection.scalars(TABLES), *CONDITIONS])
        }
    return {table: number for table, number in found.items() if number}


def remove(engine: Engine, user_id: str) -> Iterator[tuple[str, int]]:
    """Deletes the user's rows, one transaction per batch, and yields each batch's table and count.

    Can be interrupted and repeated: rows that lead to other rows are deleted after them.
    """
    yield from _remove_samples(engine, user_id)
    tables = scalars(engine, TABLES)
    of_person = ("daily_priorities", "daily_zones", "daily_queue", "days")  # before daily_people, which has its name
    for table in ("crash_counts", "chunks", "sample_ranges", *of_person):
        yield from ((table, number) for number in _remove(engine, table, user_id))
    execute(engine, REQUEUE, {"user": user_id})
    for table in tables:
        if table not in of_person:  # computed again by now
            yield from ((table, number) for number in _remove(engine, table, user_id))
    yield from _remove_from_ledger(engine, user_id)


def vacuum(engine: Engine) -> tuple[list[str], list[str]]:
    """Vacuums every table that an erasure changes. Returns the tables, and those that this login may not vacuum.

    Not only tables with rows that were just deleted, because an earlier erasure may have been interrupted. PostgreSQL
    skips the pages without deleted rows.
    """
    done, skipped = list[str](), list[str]()
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")  # VACUUM cannot run in a transaction
    with transaction(autocommit) as connection:
        version = int(connection.scalar(text("SHOW server_version_num")) or 0)
        maintain = "has_table_privilege(c.oid, 'MAINTAIN')" if version >= MAINTAIN_SINCE else "false"
        connection.execute(text("SET statement_timeout = 0"))
        try:
            for table in dict.fromkeys(["users", *connection.scalars(TABLES), *CONDITIONS]):
                name = f"headrace.{quoted(table)}"
                may_vacuum = connection.scalar(text(MAY_VACUUM.format(maintain=maintain)), {"table": name})
                if may_vacuum:
                    connection.execute(text(f"VACUUM {name}"))
                (done if may_vacuum else skipped).append(table)
        finally:
            connection.execute(text("RESET statement_timeout"))
    return done, skipped


def _rows_of(table: str) -> str:
    return f'headrace."{table}" WHERE {CONDITIONS.get(table, "user_id = :user")}'


def _remove(engine: Engine, table: str, user_id: str) -> Iterator[int]:
    """Deletes in batches, then once without a limit: a row that is updated meanwhile has another ctid."""
    batch = f"(tableoid, ctid) IN (SELECT tableoid, ctid FROM {_rows_of(table)} LIMIT :limit)"
    query = text(f"DELETE FROM {_rows_of(table)} AND {batch}")
    yield from delete_in_batches(engine, query, {"user": user_id}, BATCH)
    with transaction(engine) as connection:
        yield connection.execute(text(f"DELETE FROM {_rows_of(table)}"), {"user": user_id}).rowcount


def _remove_samples(engine: Engine, user_id: str) -> Iterator[tuple[str, int]]:
    for number in scalars(engine, SERIES, {"user": user_id}):
        after = "-infinity"
        while after:
            (row,) = execute(engine, SAMPLES, {"series": number, "after": after, "limit": BATCH})
            after = row.last
            yield "samples", row.removed


def _remove_from_ledger(engine: Engine, user_id: str) -> Iterator[tuple[str, int]]:
    """Clears the user_id in the ledger. The entries and their outcomes stay."""
    values = {"aggregator": "", "message_id": "", "user": user_id, "limit": BATCH}
    while found := execute(engine, LEDGER, values):
        values |= {"aggregator": found[0].aggregator, "message_id": found[0].message_id}
        yield "deliveries", found[0].removed


def finish(engine: Engine, user_id: str, detail: Mapping[str, int]) -> None:
    """Clears the client_user_id of the tombstone. Records the deleted rows in the audit log, and announces the erasure.

    An erasure that is repeated is announced once.
    """
    rows = min(sum(detail.values()), MAX_ROW_COUNT)
    with transaction(engine, confirm=True) as connection:
        connection.execute(CLEAR_CLIENT_ID, {"user": user_id})
        connection.execute(ANNOUNCE, {"user": user_id, "rows": rows})
        audit.note(connection, "erased", user_id, detail)
