"""Terra on a complete stack: killed processes lose and duplicate nothing."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, islice

import pytest
from sqlalchemy import Engine

from app.config import settings as config
from app.errors import TryLater
from tests.support import until
from tests.support.backfills import make_due
from tests.support.servers import server_place
from workers.local.temporary import Stack, running_stack
from workers.simulator import Simulator, terra
from workers.simulator.terra.sender import TerraSender
from workers.store.backfill_admin import OPEN, Filter, listed
from workers.store.engine import make_engine, transaction
from workers.verify.expected import terra_history
from workers.verify.totals import prove

pytestmark = pytest.mark.stack
KILLED_GROUPS = ("live", "broker", "postgres", "web", "backfill")
WAITS = (0.1, 0.5, *[1.0] * 60)  # seconds between retries: about a minute of attempts
PAST = timedelta(minutes=30)  # how far the simulated present is ahead, so that it stays fixed during the comparison


@dataclass(frozen=True)
class Load:
    """The amount of events, history and kills."""

    people: int
    days: int  # of history per user
    events: int
    events_per_second: int
    rounds: int


SMALL, LARGE = Load(2, 8, 150, 12, 1), Load(4, 20, 400, 25, 2)


@pytest.fixture(scope="module")
def load(*, full: bool) -> Load:
    """LARGE with `--full`, otherwise SMALL."""
    return LARGE if full else SMALL


@pytest.fixture(scope="module")
def simulator(load: Load) -> Iterator[Simulator]:
    """Simulated users with accounts at Terra."""
    with Simulator(load.people, load.days, 7, until=datetime.now(UTC) + PAST) as one:
        yield one


def kill_each(stack: Stack, rounds: int) -> int:
    """Kills one process after the other and waits for each restart. Returns the number of kills."""
    killed = 0
    for group in KILLED_GROUPS * rounds:
        time.sleep(2)
        (pid,) = until(lambda group=group: stack.info()["processes"][group][:1])
        os.kill(pid, signal.SIGKILL)
        until(lambda group=group, pid=pid: stack.info()["processes"][group][:1] not in ([], [pid]))
        killed += 1
    return killed


def is_up(engine: Engine) -> bool:
    with suppress(TryLater), transaction(engine):
        return True
    return False


def test_kills_lose_or_duplicate_nothing(simulator: Simulator, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a killed process loses or duplicates an accepted event of Terra or a page of its history."""
    monkeypatch.setattr(tempfile, "tempdir", str(server_place()))  # of running_stack
    twin = simulator.terra
    settings = simulator.environment | {"HEADRACE_VISIBILITY_TIMEOUT_SECONDS": "5", "HEADRACE_HISTORY_DAYS": "60"}
    settings |= {"HEADRACE_WEB_PROCESSES": "1"}
    with running_stack("terra", settings, workers=1) as stack:
        info = stack.info()
        engine = make_engine(config.load({"DATABASE_URL": info["database_url"]}))
        disorder = {"duplicates": 0.2, "reordering": 0.2, "late": 0.05, "seed": 7, "waits": WAITS, "remember": True}
        events = chain(terra.first_events(twin), islice(terra.live_events(twin, 7), load.events))
        with (
            TerraSender(f"{info['web']}/webhooks/terra", info["terra_signing_secret"], **disorder) as sender,
            ThreadPoolExecutor(1) as pool,
        ):
            killing = pool.submit(kill_each, stack, load.rounds)
            sender.send_all(events, load.events_per_second)
            assert killing.result(120) == len(KILLED_GROUPS) * load.rounds
        until(lambda: is_up(engine))  # PostgreSQL may still recover from the last kill
        make_due(engine, leases=True)
        until(lambda: not listed(engine, Filter(states=OPEN)), 240)
        proof = prove(engine, sender.taken, terra_history(twin))
        with transaction(engine) as connection:
            names = connection.exec_driver_sql("SELECT count(*), count(DISTINCT message_id) FROM health.deliveries")
            assert len(set(names.one())) == 1
        engine.dispose()
    assert proof.holds, proof
    assert proof.accepted >= load.events
