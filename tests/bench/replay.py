"""Kept deliveries into an empty database, and into the same one again: what repetition costs, and what it leaves."""

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
from tests.bench.results import SAMPLES_AN_EVENT, Plan, Replayed
from tests.bench.stack import running_servers
from tests.support import ENCRYPTION_KEY
from workers.ingest.apply import Applier
from workers.ingest.replay import replay
from workers.store import digests
from workers.store.archive import ArchiveWindow
from workers.store.engine import make_engine, make_writer
from workers.store.migrate import migrate

TOGETHER = 20  # deliveries to a message, when they come first
EVENTS = {"workouts": 4_000, "heartrate": 50}  # for each second that loads last
SIZE = text("""
SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class
WHERE relnamespace = 'headrace'::regnamespace AND relkind = 'r'""")


def measure(plan: Plan) -> list[Replayed]:
    """By `headrace replay`'s own way, in one process, on servers that nobody else is at."""
    with running_servers() as (database_url, _):
        source = _settings(database_url)
        return [
            _twice(source, _settings(_emptied(database_url, kind)), kind, int(each * plan.seconds))
            for kind, each in EVENTS.items()
        ]


def _settings(database_url: str) -> Settings:
    return replace(load({"DATABASE_URL": database_url}), encryption_keys=(ENCRYPTION_KEY,))


def _emptied(database_url: str, name: str) -> str:
    """The URL of a new database beside another one, migrated."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = urlsplit(database_url)._replace(path=f"/{name}").geturl()
    engine = make_engine(_settings(url), "headrace-bench")  # a writer's connections want the schema to be there
    migrate(engine)
    engine.dispose()
    return url


@contextmanager
def _engine(settings: Settings) -> Iterator[Engine]:
    engine = make_writer(settings, "headrace-bench")
    yield engine
    engine.dispose()


def _twice(source: Settings, target: Settings, kind: str, count: int) -> Replayed:
    with _engine(source) as kept, _engine(target) as engine:
        applier = Applier(kept, source)
        given = deliveries(kind, count)
        for start in range(0, count, TOGETHER):
            applier.apply(pack(given[start : start + TOGETHER]))
        now = datetime.now(UTC)
        window = ArchiveWindow(now - timedelta(hours=1), now + timedelta(minutes=1), f"daily.data.{kind}.*")
        storing = _rate(kept, engine, target, window)
        _vacuum(target)
        was, before = digests.digests(engine), _size(engine)
        again = _rate(kept, engine, target, window)
        after, is_same = _size(engine), digests.digests(engine) == was
    each = SAMPLES_AN_EVENT if kind == "heartrate" else 1
    return Replayed(kind, count * each, storing * each, again * each, before, after, is_same)


def _rate(kept: Engine, engine: Engine, target: Settings, window: ArchiveWindow) -> float:
    began = time.perf_counter()
    outcomes = replay(kept, Applier(engine, target), window, "oldest", lambda _: None)
    return outcomes.total() / (time.perf_counter() - began)


def _vacuum(settings: Settings) -> None:
    """What autovacuum would do sooner or later, so that it does not come in between."""
    engine = make_engine(settings, "headrace-bench").execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("VACUUM ANALYZE"))
    engine.dispose()


def _size(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(SIZE) or 0)
