"""Replay of archived deliveries into an empty database, then again: rates, table sizes and equality of the views."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import psycopg
from sqlalchemy import Engine, text

from app.config.settings import Settings, load
from app.delivery import pack
from tests.bench.floors import deliveries
from tests.bench.results import SAMPLES_PER_EVENT, Plan, ReplayResult
from tests.bench.stack import running_servers
from tests.support import ENCRYPTION_KEY
from workers.ingest.apply import Applier
from workers.ingest.replay import replay
from workers.store import schema
from workers.store.archive import ArchiveWindow
from workers.store.engine import make_engine, make_writer
from workers.store.migrate import migrate

BATCH_SIZE = 20  # deliveries per message of the first application
EVENTS = {"workouts": 4_000, "heartrate": 50}  # per second of the planned load
SIZE = text("""
SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class
WHERE relnamespace = 'headrace'::regnamespace AND relkind = 'r'""")


def measure(plan: Plan) -> list[ReplayResult]:
    """Measures the code path of `headrace replay` in one process, on otherwise idle servers."""
    with running_servers() as (database_url, _):
        source = _settings(database_url)
        return [
            _measure_both(source, _settings(_new_database(database_url, kind)), kind, int(each * plan.seconds))
            for kind, each in EVENTS.items()
        ]


def _settings(database_url: str) -> Settings:
    return replace(load({"DATABASE_URL": database_url}), encryption_keys=(ENCRYPTION_KEY,))


def _new_database(database_url: str, name: str) -> str:
    """The URL of a new migrated database on the same server."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = urlsplit(database_url)._replace(path=f"/{name}").geturl()
    engine = make_engine(_settings(url), "headrace-bench")  # make_writer requires the schema
    migrate(engine)
    engine.dispose()
    return url


@contextmanager
def _engine(settings: Settings) -> Iterator[Engine]:
    engine = make_writer(settings, "headrace-bench")
    yield engine
    engine.dispose()


def _measure_both(source: Settings, target: Settings, kind: str, count: int) -> ReplayResult:
    with _engine(source) as archive, _engine(target) as engine:
        applier = Applier(archive, source)
        given = deliveries(kind, count)
        for start in range(0, count, BATCH_SIZE):
            applier.apply(pack(given[start : start + BATCH_SIZE]))
        now = datetime.now(UTC)
        window = ArchiveWindow(now - timedelta(hours=1), now + timedelta(minutes=1), f"daily.data.{kind}.*")
        storing = _rate(archive, engine, target, window)
        _vacuum(target)
        digests_before, before = schema.digests(engine), _size(engine)
        again = _rate(archive, engine, target, window)
        after, is_same = _size(engine), schema.digests(engine) == digests_before
    each = SAMPLES_PER_EVENT if kind == "heartrate" else 1
    return ReplayResult(kind, count * each, storing * each, again * each, before, after, is_same)


def _rate(archive: Engine, engine: Engine, target: Settings, window: ArchiveWindow) -> float:
    began = time.perf_counter()
    outcomes = replay(archive, Applier(engine, target), window, "oldest", lambda _: None)
    return outcomes.total() / (time.perf_counter() - began)


def _vacuum(settings: Settings) -> None:
    """Runs VACUUM ANALYZE, so that autovacuum does not run during the measurement."""
    engine = make_engine(settings, "headrace-bench").execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("VACUUM ANALYZE"))
    engine.dispose()


def _size(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(SIZE) or 0)
