"""Indexes that `headrace migrate` builds while workers write, outside of the transaction of the migrations."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, text

from app.catalogue import Catalogue
from workers.store.engine import transaction
from workers.store.sql import quoted

# Not the lock of the migrations, which belongs to a transaction: an index is built concurrently outside of one.
LOCK = text("SELECT pg_try_advisory_lock(hashtext('headrace.ledger_partitioning'))")
UNLOCK = text("SELECT pg_advisory_unlock(hashtext('headrace.ledger_partitioning'))")
PAUSE_SECONDS = 0.2
VALIDITY = text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('headrace.' || quote_ident(:name))")
MISSING = text("""
SELECT name FROM unnest(CAST(:names AS text[])) AS name WHERE NOT EXISTS (
    SELECT FROM pg_index WHERE indexrelid = to_regclass('headrace.' || quote_ident(name)) AND indisvalid)""")


def index_records(engine: Engine, catalogue: Catalogue) -> None:
    """Builds an index of each table of records that have a day: by user, provider and day.

    Queries for one person's time range use it, as does health.connections for the newest record. `stored_at` is not
    indexed: every update of a record would then write the indexes. Safe to interrupt, repeat and run twice.
    """
    days = {f"{one.name}_days": one for one in catalogue.values() if one.day_field and not one.is_series}
    with transaction(engine) as connection:
        missing = list(connection.scalars(MISSING, {"names": list(days)}))
    if not missing:
        return
    with one_at_a_time(engine) as connection:
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("SET lock_timeout = 0"))
        for name in missing:
            columns = f"(user_id, provider, {quoted(days[name].day_field or '')})"
            create_index(connection, name, f"headrace.{quoted(days[name].name)} {columns}")


def create_index(connection: Connection, name: str, definition: str, *, unique: bool = False) -> None:
    """Builds an index of schema `headrace`, unless there is a valid one. An interrupted build is repeated."""
    is_valid = connection.scalar(VALIDITY, {"name": name})
    if is_valid:
        return
    if is_valid is False:
        connection.execute(text(f"DROP INDEX CONCURRENTLY headrace.{quoted(name)}"))
    kind = "UNIQUE INDEX" if unique else "INDEX"
    connection.execute(text(f"CREATE {kind} CONCURRENTLY {quoted(name)} ON {definition}"))


@contextmanager
def one_at_a_time(engine: Engine) -> Iterator[Connection]:
    """A connection without transactions that holds the lock. It polls: a waiting statement would delay the index."""
    with transaction(engine.execution_options(isolation_level="AUTOCOMMIT")) as connection:
        while not connection.scalar(LOCK):
            time.sleep(PAUSE_SECONDS)
        try:
            yield connection
        finally:
            connection.execute(UNLOCK)
            connection.execute(text("RESET ALL"))
