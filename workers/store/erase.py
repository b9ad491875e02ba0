"""What there is of a person, by table: counted, and removed in batches behind a tombstone that lets nothing new in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import Connection, Engine, text

from workers.store import audit
from workers.store.engine import transaction

BATCH = 10_000  # rows of one transaction: of samples, 30 ms
PERSON = text("""
SELECT client_user_id, erased_at, ARRAY(
    SELECT other.user_id FROM headrace.users other WHERE other.client_user_id = person.client_user_id
       AND other.user_id <> person.user_id AND other.erased_at IS NULL AND other.merged_into IS NULL
       ORDER BY 1) AS others
FROM headrace.users person WHERE user_id = :user""")
CREATE_TOMBSTONE = text("""
INSERT INTO headrace.users AS stored (user_id, erased_at) VALUES (:user, now())
ON CONFLICT (user_id) DO UPDATE SET erased_at = coalesce(stored.erased_at, excluded.erased_at) RETURNING erased_at""")
LOCK = text("SELECT 1 FROM headrace.users WHERE user_id = :user FOR UPDATE")
RECHECK_ROW = text("UPDATE headrace.users SET erased_at = erased_at WHERE user_id = :user")
CLEAR_CLIENT_ID = text("UPDATE headrace.users SET client_user_id = NULL WHERE user_id = :user OR merged_into = :user")
# Whatever has a column `user_id`, also what the catalogue has forgotten, or somebody adds and does not think of this;
# the series come last, because the samples are found by them.
TABLES = text("""
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'user_id'
WHERE n.nspname = 'headrace' AND c.relkind IN ('r', 'p') AND NOT c.relispartition
  AND c.relname <> ALL(ARRAY['users', 'deliveries']) ORDER BY c.relname = 'series', c.relname""")
OWNED_BY_USER = "user_id = :user"
OF_THEIRS = {
    "chunks": "backfill_id IN (SELECT id FROM headrace.backfills WHERE user_id = :user)",
    "samples": "series_id IN (SELECT id FROM headrace.series WHERE user_id = :user)",
    "crash_counts": """EXISTS (SELECT 1 FROM headrace.deliveries d WHERE d.user_id = :user AND d.aggregator
        = split_part(name, ':', 1) AND d.message_id = substr(name, strpos(name, ':') + 1))""",
    "deliveries": OWNED_BY_USER,
    # What came in one message with the reconnection itself was kept under the id that it came with.
    "archive": "user_id IN (SELECT user_id FROM headrace.users WHERE user_id = :user OR merged_into = :user)",
}
SERIES = text("SELECT id FROM headrace.series WHERE user_id = :user ORDER BY id")
# From where the last batch ended: an index keeps what was deleted, and from its start each batch would read all that.
SAMPLES = text("""
WITH batch AS (SELECT ts FROM headrace.samples WHERE series_id = :series AND ts > CAST(:after AS timestamptz)
              ORDER BY ts LIMIT :limit),
gone AS (DELETE FROM headrace.samples WHERE series_id = :series AND ts > CAST(:after AS timestamptz)
         AND ts <= (SELECT max(ts) FROM batch) RETURNING ts)
SELECT CAST(max(ts) AS text) AS last, count(*) AS removed FROM gone""")
# Walked by its key: an index for the few who are ever erased would cost every delivery a tenth of its price. The rows
# are locked in the order in which whoever applies locks them.
LEDGER = text("""
WITH batch AS MATERIALIZED (
    SELECT aggregator, message_id, user_id FROM headrace.deliveries
    WHERE (aggregator, message_id) > (:aggregator, :message_id) ORDER BY aggregator, message_id LIMIT :limit),
theirs AS MATERIALIZED (
    SELECT aggregator, message_id FROM headrace.deliveries d JOIN batch USING (aggregator, message_id)
    WHERE batch.user_id IN (SELECT user_id FROM headrace.users WHERE user_id = :user OR merged_into = :user)
    ORDER BY aggregator, message_id FOR NO KEY UPDATE OF d),
done AS (
    UPDATE headrace.deliveries d SET user_id = NULL FROM theirs
    WHERE (d.aggregator, d.message_id) = (theirs.aggregator, theirs.message_id) RETURNING 1)
SELECT aggregator, message_id, (SELECT count(*) FROM done) AS removed
FROM batch ORDER BY aggregator DESC, message_id DESC LIMIT 1""")


@dataclass(frozen=True)
class ErasureSubject:
    """Somebody, as far as they are known: what else they are called, and who else alive is called so."""

    state: Literal["unknown", "known", "erased"]
    client_user_id: str | None = None
    others: tuple[str, ...] = ()


def person(connection: Connection, user_id: str) -> ErasureSubject:
    """Who that is."""
    row = connection.execute(PERSON, {"user": user_id}).first()
    if row is None:
        return ErasureSubject("unknown")
    return ErasureSubject("erased" if row.erased_at else "known", row.client_user_id, tuple(row.others))


def create_tombstone(engine: Engine, user_id: str) -> datetime:
    """Puts up the tombstone, and waits until nobody writes of them any more. Returns since when they are erased.

    Whoever reads it writes nothing. Who was at work before holds the row (`upsert_users`) until they have committed,
    and this waits for them, for as long as a hung worker's transaction may last. It is put up and committed without
    that wait, because workers that each began before the last one ended could keep it from ever standing.
    """
    with transaction(engine) as connection:
        erased_at: datetime = connection.execute(CREATE_TOMBSTONE, {"user": user_id}).scalar_one()
        audit.note(connection, "erase", user_id, {})
    with transaction(engine) as connection:
        connection.execute(text("SET LOCAL lock_timeout = '5min'"))
        connection.execute(text("SET LOCAL statement_timeout = '5min'"))
        connection.execute(LOCK, {"user": user_id})
        # Who looked before it stood and locks only now would be given the row as it looked then, unless a row that was
        # locked like this is also written: then PostgreSQL has them look again.
        connection.execute(RECHECK_ROW, {"user": user_id})
    return erased_at


def count(engine: Engine, user_id: str) -> dict[str, int]:
    """How many rows there are of somebody, by table."""
    with transaction(engine) as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        whose = dict.fromkeys(connection.scalars(TABLES), OWNED_BY_USER) | OF_THEIRS
        queries = {
            table: text(f'SELECT count(*) FROM headrace."{table}" WHERE {where}') for table, where in whose.items()
        }
        found = {table: int(connection.scalar(query, {"user": user_id}) or 0) for table, query in queries.items()}
    return {table: number for table, number in found.items() if number}


def remove(engine: Engine, user_id: str) -> Iterator[tuple[str, int]]:
    """Removes what there is of somebody, a batch a transaction; of each, the table and how many rows.

    It can be broken off anywhere and begun again: what leads to other rows goes after them.
    """
    yield from _remove_samples(engine, user_id)
    with transaction(engine) as connection:
        tables = list(connection.scalars(TABLES))
    for table in ("crash_counts", "chunks", *tables):
        yield from ((table, number) for number in _remove(engine, table, user_id))
    yield from _forget(engine, user_id)


def _remove(engine: Engine, table: str, user_id: str) -> Iterator[int]:
    """In batches while there are many; the rest by whose it is alone, because a row that is changed moves elsewhere."""
    everything = f'DELETE FROM headrace."{table}" WHERE {OF_THEIRS.get(table, OWNED_BY_USER)}'
    some = everything.replace("DELETE", "SELECT tableoid, ctid") + " LIMIT :limit"
    number = BATCH
    while number == BATCH:
        number = _execute(engine, f"{everything} AND (tableoid, ctid) IN ({some})", user=user_id, limit=BATCH)
        yield number
    yield _execute(engine, everything, user=user_id)


def _execute(engine: Engine, query: str, **values: str | int) -> int:
    with transaction(engine) as connection:
        return connection.execute(text(query), values).rowcount


def _remove_samples(engine: Engine, user_id: str) -> Iterator[tuple[str, int]]:
    with transaction(engine) as connection:
        series = list(connection.scalars(SERIES, {"user": user_id}))
    for one in series:
        after = "-infinity"
        while after:
            with transaction(engine) as connection:
                row = connection.execute(SAMPLES, {"series": one, "after": after, "limit": BATCH}).one()
            after = row.last
            yield "samples", row.removed


def _forget(engine: Engine, user_id: str) -> Iterator[tuple[str, int]]:
    """Takes the person out of the ledger; that something came, and what became of it, stays."""
    at = {"aggregator": "", "message_id": ""}
    while True:
        with transaction(engine) as connection:
            row = connection.execute(LEDGER, at | {"user": user_id, "limit": BATCH}).first()
        if row is None:
            return
        at = {"aggregator": row.aggregator, "message_id": row.message_id}
        yield "deliveries", row.removed


def finish(engine: Engine, user_id: str, detail: Mapping[str, int]) -> None:
    """Takes the last name off the tombstone, and writes down what was removed."""
    with transaction(engine) as connection:
        connection.execute(CLEAR_CLIENT_ID, {"user": user_id})
        audit.note(connection, "erased", user_id, detail)
