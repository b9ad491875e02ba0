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
CRASH_COUNTS = "SELECT name, crashes FROM headrace.crash_counts"
LEDGER = "SELECT message_id, outcome, attempts, error FROM health.deliveries"
WORKOUTS = "SELECT user_id FROM health.workouts ORDER BY 1"


@dataclass
class RestartedWorker:
    """A worker that is restarted after each crash."""

    process: "subprocess.Popen[bytes]"
    log: Path
    crash_log: Path  # one byte per crash

    @property
    def crashes(self) -> int:
        """The number of crashes so far."""
        return len(self.crash_log.read_bytes()) if self.crash_log.exists() else 0

    def until(self, condition: Callable[[], Any]) -> Any:
        """Waits until the condition holds and returns its value."""

        def check() -> Any:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            return condition()

        return until(check, 150)


@contextmanager
def restarted_worker(
    settings: Settings, folder: Path, *, kind: str = ALWAYS, max_crashes: int = MAX_CRASHES
) -> Iterator[RestartedWorker]:
    """Runs a worker of the live lane that is restarted after each crash, until the block ends."""
    crash_log, log = folder / "crashes", folder / "log"
    command = ("tests.support.killing_worker", kind, str(folder / "crashed-once"), str(crash_log), str(max_crashes))
    # Longer than a busy machine needs for five deliveries: restoring a message that is still being processed counts as
    # an attempt.
    variables = of_worker(settings) | {"HEADRACE_VISIBILITY_TIMEOUT_SECONDS": "3"}
    with program(*command, log=log, **variables) as process:
        yield RestartedWorker(process, log, crash_log)


def message(marker: str) -> list[Delivery]:
    """Five deliveries; the third contains a marker."""
    return [delivery(workout(f"u{n}", title=marker if n == 2 else "Morning")) for n in range(5)]


def test_only_the_delivery_that_crashes_the_worker_becomes_a_dead_letter(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path
) -> None:
    """Breaks if a crashing delivery blocks the rest of its batch, crashes workers without limit, or is lost."""
    sent = message(ALWAYS)
    publish(settings, sent)
    with restarted_worker(settings, tmp_path) as worker:
        worker.until(lambda: rows(engine, "SELECT 1 FROM headrace.dead_letters"))
        worker.until(lambda: not messages(broker))
        crashes = worker.crashes
    assert crashes == MAX_CRASHES + 1
    assert [row["user_id"] for row in rows(engine, WORKOUTS)] == ["u0", "u1", "u3", "u4"]
    outcomes = {row["message_id"]: (row["outcome"], row["error"]) for row in rows(engine, LEDGER)}
    reason = f"the worker, or PostgreSQL's process, crashed {MAX_CRASHES + 1} times while processing this delivery"
    expected = {one.message_id: ("dead", reason) if n == 2 else ("applied", None) for n, one in enumerate(sent)}
    assert outcomes == expected
    dead_letters = rows(engine, "SELECT message_id, reason FROM headrace.dead_letters")
    assert dead_letters == [{"message_id": sent[2].message_id, "reason": reason}]
    assert rows(engine, CRASH_COUNTS) == []
    assert "sesame" not in worker.log.read_text()


def test_without_the_crash_limit_the_crashes_continue(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path
) -> None:
    """Breaks if the crashes end without the crash limit: the test above would then prove nothing."""
    publish(settings, message(ALWAYS))
    with restarted_worker(settings, tmp_path, max_crashes=1_000_000) as worker:
        worker.until(lambda: worker.crashes >= MAX_CRASHES + 2)
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []
    assert messages(broker)
    assert rows(engine, CRASH_COUNTS)[0]["crashes"] >= MAX_CRASHES + 1


@pytest.mark.parametrize("marker", [ONCE, AFTERWARDS])
def test_a_message_is_applied_once_if_its_worker_crashed_only_once(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path, marker: str
) -> None:
    """Breaks if a message is applied twice, or keeps its crash count, after a crash before or after the commit."""
    publish(settings, message(marker))
    with restarted_worker(settings, tmp_path, kind=marker) as worker:
        worker.until(lambda: worker.crashes and not messages(broker))
        crashes = worker.crashes
    assert crashes == 1
    assert len(rows(engine, WORKOUTS)) == 5
    attempts = 1 if marker == ONCE else 2
    ledger = [(row["outcome"], row["attempts"]) for row in rows(engine, LEDGER)]
    assert ledger == [("applied", attempts)] * 5
    assert rows(engine, "SELECT count(*) AS n FROM headrace.archive") == [{"n": 5}]
    assert rows(engine, CRASH_COUNTS) == []
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []
