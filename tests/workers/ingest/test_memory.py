"""The memory of a worker that applies the largest events. Its container has 1 GiB (deploy/kubernetes, compose.yaml)."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Receipt, pack, seal
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, ROOT, START, of_worker, rows

JUNCTION = (
    b'{"event_type":"daily.data.heartrate.created","user_id":"u1","data":{"source":{"provider":"x"},"data":[%b]}}'
)
RECORD = b'{"event_type":"daily.data.workouts.created","user_id":"u1","data":{"id":"w1","x":[%b]}}'
TERRA = (
    b'{"type":"daily","user":{"user_id":"u1","provider":"X"},"data":[{"metadata":{"start_time":"2026-01-01T00:00:00Z",'
    b'"end_time":"2026-01-02T00:00:00Z"},"heart_rate_data":{"detailed":{"hr_samples":[%b]}}}]}'
)
SAMPLE, POINT = b'{"timestamp":"%bZ","value":%d}', b'{"timestamp":"%bZ","bpm":%d}'


def event(aggregator: str, megabytes: int) -> bytes:
    """An event of the shortest samples of the aggregator."""
    outer, item = {"junction": (JUNCTION, SAMPLE), "terra": (TERRA, POINT)}[aggregator]
    first = START - timedelta(days=60)
    times = ((first + timedelta(seconds=n)).isoformat()[:19].encode() for n in range(megabytes * 1_000_000 // 45))
    return outer % b",".join(item % (time, 60 + n % 60) for n, time in enumerate(times))


def applied(settings: Settings, aggregator: str, body: bytes) -> tuple[str, int]:
    """The outcome of an event and the peak memory of its worker in MiB."""
    message = pack([seal(aggregator, Receipt("m1", 1_773_512_405_000), body, Sealer([ENCRYPTION_KEY]))])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | of_worker(settings)
    command = (sys.executable, "-m", "tests.support.peak_memory")
    done = subprocess.run(command, input=message, env=environment, capture_output=True, text=True, check=True)
    outcome, peak = done.stdout.split()
    return outcome, int(peak)


@pytest.mark.parametrize("aggregator", ["junction", "terra"])
def test_a_large_event_fits_into_the_memory_of_a_worker(
    engine: Engine, settings: Settings, full: bool, aggregator: str
) -> None:
    """Breaks if an event of the maximum size ends a worker, whose message then ends the next one."""
    megabytes, limit = (64, 1000) if full else (8, 230)
    outcome, peak = applied(settings, aggregator, event(aggregator, megabytes))
    assert (outcome, peak < limit) == ("applied", True), peak
    (row,) = rows(engine, "SELECT count(*) AS n FROM health.heartrate")
    assert row["n"] == megabytes * 1_000_000 // 45


@pytest.mark.parametrize("outer", [JUNCTION, RECORD], ids=["samples", "record"])
def test_millions_of_empty_arrays_are_refused_cheaply(engine: Engine, settings: Settings, outer: bytes) -> None:
    """Breaks if they are decoded, in 25 times their size, or stored as jsonb, which PostgreSQL refuses (XX000)."""
    outcome, peak = applied(settings, "junction", outer % (b"[]," * 6_000_000 + b"[]"))
    assert (outcome, peak < 300) == ("dead", True), peak
    (row,) = rows(engine, "SELECT reason FROM headrace.dead_letters")
    assert row == {"reason": "not a Junction event: more than 5,000,000 values"}
