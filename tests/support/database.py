"""Empties the database between the cases of a test, and runs queries."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from sqlalchemy import Engine, text

from app.config.settings import Settings
from workers.store.engine import transaction

EMPTY = """
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'headrace' AND c.relkind IN ('r', 'p') AND NOT c.relispartition
          AND c.relname NOT IN ('schema_version', 'feed')
    LOOP EXECUTE format('DELETE FROM headrace.%I', one.relname); END LOOP;
    UPDATE headrace.feed SET newest = 0, changed_at = '-infinity', dropped = 0;
END $$"""


@contextmanager
def emptied(engine: Engine) -> Iterator[None]:
    """Deletes all rows after the block, so that every case starts with an empty database."""
    try:
        yield
    finally:
        with engine.begin() as connection:
            connection.execute(text(EMPTY))


def run(engine: Engine, *queries: str) -> None:
    """Runs queries in one transaction."""
    with transaction(engine) as connection:
        for query in queries:
            connection.execute(text(query))


def settings_of(settings: Settings, url: str) -> Settings:
    """The tests' settings, on another database."""
    return replace(settings, database_url=url.replace("postgresql", "postgresql+psycopg", 1))
