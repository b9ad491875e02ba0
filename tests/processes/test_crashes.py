"""Deliveries that crash the worker: real workers that are restarted after each crash."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import delivery, of_worker, program, rows, until, workout
from tests.support.killing_worker import AFTERWARDS, ALWAYS, ONCE
from tests.support.workers import messages, publish
from workers.ingest.apply import MAX_CRASHES

pytestmark = pytest.mark.processes
SUSPECTS = "SELECT name, crashes FROM headrace.crash_counts"
LEDGER = "SELECT message_id, outcome, attempts, error FROM health.deliveries"
WORKOUTS = "SELECT user_id FROM health.workouts ORDER BY 1"


@dataclass
class Kept:
    """A worker that is restarted after each crash."""

    process: "subprocess.Popen[bytes]"
    log: Path
    spent: Path

    @property
    def deaths(self) -> int:
        """The number of crashes so far."""
        return len(self.spent.read_bytes()) if self.spent.exists() else 0

    def until(self, condition: Callable[[], Any]) -> Any:
        """Waits until the condition holds and returns its value."""

        def look() -> Any:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            return condition()

        return until(look, 150)


@contextmanager
def kept_running(
    settings: Settings, folder: Path, *, kind: str = ALWAYS, most_crashes: int = MAX_CRASHES
) -> Iterator[Kept]:
    """Runs a worker of the live lane that is restarted after each crash, until the block ends."""
    deaths, log = folder / "deaths", folder / "log"
    command = ("tests.support.killing_worker", kind, str(folder / "spent"), str(deaths), str(most_crashes))
    # Longer than five deliveries take on a busy machine: a message that is restored meanwhile counts as an attempt.
    variables = of_worker(settings) | {"HEADRACE_VISIBILITY_TIMEOUT_SECONDS": "3"}
    with program(*command, log=log, **variables) as process:
        yield Kept(process, log, deaths)


def message(marker: str) -> list[Delivery]:
    """Five deliveries; the third contains a marker."""
    return [delivery(workout(f"u{n}", title=marker if n == 2 else "Morning")) for n in range(5)]


def test_a_delivery_that_kills_its_worker_is_set_aside_alone(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path
) -> None:
    """Breaks if one delivery prevents its neighbours from being applied, crashes workers without end, or is lost."""
    sent = message(ALWAYS)
    publish(settings, sent)
    with kept_running(settings, tmp_path) as worker:
        worker.until(lambda: rows(engine, "SELECT 1 FROM headrace.dead_letters"))
        worker.until(lambda: not messages(broker))
        deaths = worker.deaths
    assert deaths == MAX_CRASHES + 1
    assert [row["user_id"] for row in rows(engine, WORKOUTS)] == ["u0", "u1", "u3", "u4"]
    outcomes = {row["message_id"]: (row["outcome"], row["error"]) for row in rows(engine, LEDGER)}
    reason = f"the worker crashed {MAX_CRASHES + 1} times while processing this delivery"
    wanted = {one.message_id: ("dead", reason) if n == 2 else ("applied", None) for n, one in enumerate(sent)}
    assert outcomes == wanted
    letters = rows(engine, "SELECT message_id, reason FROM headrace.dead_letters")
    assert letters == [{"message_id": sent[2].message_id, "reason": reason}]
    assert rows(engine, SUSPECTS) == []
    assert "sesame" not in worker.log.read_text()


def test_without_counting_it_would_go_on(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path
) -> None:
    """Breaks if anything but the crash counter ends the crashes: the test above would then prove nothing."""
    publish(settings, message(ALWAYS))
    with kept_running(settings, tmp_path, most_crashes=1_000_000) as worker:
        worker.until(lambda: worker.deaths >= MAX_CRASHES + 2)
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []
    assert messages(broker)
    assert rows(engine, SUSPECTS)[0]["crashes"] >= MAX_CRASHES + 1


@pytest.mark.parametrize("marker", [ONCE, AFTERWARDS])
def test_an_innocent_message_is_applied_once_after_a_crash(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path, marker: str
) -> None:
    """Breaks if the message of a crash before or after the commit is applied twice, or keeps its crash count."""
    publish(settings, message(marker))
    with kept_running(settings, tmp_path, kind=marker) as worker:
        worker.until(lambda: worker.deaths and not messages(broker))
        deaths = worker.deaths
    assert deaths == 1
    assert len(rows(engine, WORKOUTS)) == 5
    attempts = 1 if marker == ONCE else 2
    ledger = [(row["outcome"], row["attempts"]) for row in rows(engine, LEDGER)]
    assert ledger == [("applied", attempts)] * 5
    assert rows(engine, "SELECT count(*) AS n FROM headrace.archive") == [{"n": 5}]
    assert rows(engine, SUSPECTS) == []
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []
