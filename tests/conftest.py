"""Configuration of pytest, and fixtures with real services: one PostgreSQL and one Valkey per pytest process.

Each process starts its servers on free ports. Every test begins with an empty database and broker.
"""

import gc
import os
import secrets
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import hypothesis
import psycopg
import pytest
import redis
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler
from sqlalchemy import Engine

from app.config.settings import Settings
from app.observability import otel, tracing
from tests.support import ENCRYPTION_KEY, JUNCTION_SECRET, ROOT, TERRA_SECRET
from tests.support.database import EMPTY, settings_of
from tests.support.fuzzing import SEED_VARIABLE
from tests.support.servers import Servers, own_postgres, server_folder
from workers.local import embedded_valkey, wheels
from workers.local.supervisor import running
from workers.store.engine import make_engine, make_writer
from workers.store.migrate import migrate

# Connections that are still active after a test. The idle ones of a shared worker stay open.
TERMINATE = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND (application_name <> 'headrace-worker' OR state <> 'idle')"""

# The paths of the slow modules. They start first, so that the processes of a run end at about the same time.
SLOW = (
    "tests/processes/test_rabbitmq.py",
    "tests/end_to_end/",
    "tests/processes/",
    "tests/fuzz/",
    "tests/workers/simulator/",
)
# These tests need all cores, because they measure times. They run only if their path is given, and then alone.
MACHINES = "tests/machines"
PLAIN = Settings(
    broker_url="memory://",
    junction_webhook_secrets=(JUNCTION_SECRET,),
    terra_signing_secrets=(TERRA_SECRET,),
    encryption_keys=(ENCRYPTION_KEY,),
)
MACHINES_SKIPPED = f"runs alone, for four minutes, if its path is given: ./deploy/test {MACHINES}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--full`. The default loads find the same faults with a lower probability."""
    parser.addoption("--full", action="store_true", help="make fuzzing, controls and crowds large")


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether `--full` was given."""
    return bool(pytestconfig.getoption("full"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes more than cores, because many tests wait for I/O; a single file runs in this process."""
    files = {argument.partition("::")[0] for argument in config.args}
    if (len(files) == 1 and Path(*files).is_file()) or names_machines(config):
        return 0
    return min(os.cpu_count() or 1, 4) + 2


def names_machines(config: pytest.Config) -> bool:
    """Whether all paths of the command line are those of the tests on machines."""
    return all(Path(path.partition("::")[0]).resolve().is_relative_to(ROOT / MACHINES) for path in config.args)


def pytest_configure(config: pytest.Config) -> None:
    """Seeds fuzzing, and restores SIGINT: background jobs of a shell ignore it, as do their children.

    The processes of a run inherit the new seed from the first one.
    """
    os.environ[SEED_VARIABLE] = os.environ.get(SEED_VARIABLE) or str(secrets.randbelow(2**32))
    hypothesis.settings.register_profile("small", derandomize=True)
    hypothesis.settings.register_profile("full", max_examples=1500)
    hypothesis.settings.load_profile("full" if config.getoption("full") else "small")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # until all tests are collected: modules stay loaded, and collecting takes 20 % of the time


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prints the new seed, which repeats a run of the fuzzers if it is set in the environment."""
    if session.config.getoption("full") and not hasattr(session.config, "workerinput"):
        session.config.get_terminal_writer().line(f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]}")


def pytest_collection_finish() -> None:
    """Freezes the loaded modules so that the garbage collector skips them."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks tests that use a server as `services`, so that `-m "not services"` skips them; sorts slow modules first."""
    items.sort(key=lambda item: next((n for n, path in enumerate(SLOW) if item.nodeid.startswith(path)), len(SLOW)))
    for item in items:
        if {"servers", "settings", "engine", "broker_url"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("services")
        if item.nodeid.startswith(f"{MACHINES}/") and not names_machines(config):
            item.add_marker(pytest.mark.skip(reason=MACHINES_SKIPPED))


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """A real PostgreSQL, migrated, and a real Valkey, both durable as in production."""
    if not wheels.available():
        pytest.skip("no PostgreSQL and Valkey wheels for this platform")
    with own_postgres() as database_url, server_folder("broker") as folder:
        valkey, broker_url = embedded_valkey.valkey(folder, "tests", folder / "log")
        with running(valkey):
            engine = make_engine(settings_of(Settings(), database_url))
            migrate(engine)
            engine.dispose()
            yield Servers(database_url, broker_url)


@pytest.fixture
def broker_url(servers: Servers) -> str:
    """The URL of an empty broker."""
    with redis.Redis.from_url(servers.broker_url) as client:
        client.flushall()
    return servers.broker_url


@pytest.fixture
def broker(broker_url: str) -> Iterator["redis.Redis"]:
    """A client of the empty broker."""
    with redis.Redis.from_url(broker_url) as client:
        yield client


@pytest.fixture(scope="session")
def database_url(servers: Servers) -> str:
    """The URL of a migrated database that all tests of the process use in turn."""
    where = urlsplit(servers.database_url)
    with psycopg.connect(urlunsplit(where._replace(path="/postgres")), autocommit=True) as connection:
        connection.execute("CREATE DATABASE shared TEMPLATE headrace")
    return urlunsplit(where._replace(path="/shared"))


@pytest.fixture(scope="session")
def deployment(servers: Servers, database_url: str) -> Settings:
    """Settings of a complete deployment, for fixtures of session or module scope."""
    settings = replace(PLAIN, broker_url=servers.broker_url, flower_auth="tests:tests-password")
    return settings_of(settings, database_url)


@pytest.fixture(scope="session")
def emptier(database_url: str) -> Iterator[psycopg.Connection]:
    """A permanent connection: a new one needs 15 ms to load its catalog caches."""
    with psycopg.connect(database_url, autocommit=True, application_name="emptier") as connection:
        yield connection


@pytest.fixture
def settings(deployment: Settings, emptier: psycopg.Connection) -> Iterator[Settings]:
    """Settings of a complete deployment with an empty migrated database, unused rate limits and no paused account.

    The tables are emptied instead of recreated: deleting all rows takes 5 ms, a copy of the template 400 ms.
    """
    with redis.Redis.from_url(deployment.need_broker()) as client:
        if left := client.keys("headrace:*"):
            client.delete(*left)
    yield deployment
    emptier.execute(TERMINATE)
    emptier.execute(EMPTY)


@pytest.fixture(scope="session")
def writer(deployment: Settings) -> Iterator[Engine]:
    """An engine of a writer. All tests share its connections, because each new one plans every statement again."""
    engine = make_writer(deployment)
    yield engine
    engine.dispose()


@pytest.fixture
def engine(settings: Settings, writer: Engine) -> Engine:
    """An engine of a writer on the empty database."""
    return writer


@pytest.fixture
def plain_settings() -> Settings:
    """Settings for tests without a server."""
    return PLAIN


@pytest.fixture
def sampler() -> Sampler | None:
    """The sampler of the environment. Tests override this fixture."""
    return None


@pytest.fixture
def exported(sampler: Sampler | None) -> Iterator[InMemorySpanExporter]:
    """The spans of this process, which is traced for one test."""
    provider, exporter = TracerProvider(sampler=sampler, shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(otel.Spans(provider, "redis"))
    yield exporter
    tracing.use(None)
