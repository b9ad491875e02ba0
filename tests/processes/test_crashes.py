"""What kills its worker: a delivery, in real workers that are started again as often as they die; a page of history."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.delivery import Delivery, pack
from app.errors import TryLater
from tests.processes.test_tasks import held, publish
from tests.support import ROOT, delivery, end, of_worker, rows, until, workout
from tests.workers.backfill.test_fetcher import (
    Killed,
    Provider,
    announce,
    backfill,
    heartrates,
    hourly,
    hurry,
    notice,
    status,
)
from workers.actions import Parsed
from workers.aggregators import AGGREGATORS, junction
from workers.backfill.fetcher import MAX_CRASHES as MAX_FETCH_CRASHES
from workers.ingest import crashes, outcomes
from workers.ingest.apply import Applier
from workers.ingest.crashes import MAX_CRASHES
from workers.store import backfill_admin
from workers.store.backfills import due

ALWAYS, ONCE, AFTERWARDS = "sesame always", "sesame once", "sesame afterwards"
SUSPECTS = "SELECT name, crashes FROM headrace.crash_counts"
LEDGER = "SELECT message_id, outcome, attempts, error FROM health.deliveries"
WORKOUTS = "SELECT user_id FROM health.workouts ORDER BY 1"


# In real processes


def killing_worker(kind: str, spent: Path, most_crashes: int) -> None:
    """A worker as workers.local.processes starts it, but for what some deliveries do to it; `spent` is its one life."""
    crashes.MAX_CRASHES = most_crashes
    applied = Applier.apply

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_once() -> None:
        if not spent.exists():
            spent.touch()
            die()

    def parse(given: Delivery, body: bytes, settings: Settings) -> Parsed:
        if ALWAYS.encode() in body:
            die()
        if ONCE.encode() in body:
            die_once()
        return junction.parse(given, body, settings)

    def dying_afterwards(self: Applier, packed: str, *, redelivered: bool = False) -> outcomes.Applied:
        done = applied(self, packed, redelivered=redelivered)
        die_once()
        return done

    if kind == AFTERWARDS:
        Applier.apply = dying_afterwards  # type: ignore[method-assign]
    AGGREGATORS["junction"] = SimpleNamespace(parse=parse)  # type: ignore[index]
    from celery.__main__ import main  # noqa: PLC0415

    options = ["--queues", "live", "--pool", "solo", "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
    sys.argv = ["celery", "--app", "workers.celery.app", "worker", *options]
    main()


@dataclass
class Kept:
    """A worker that is started again as soon as it has died."""

    command: tuple[str, ...]
    environment: dict[str, str]
    log: Path
    deaths: int = 0
    process: "subprocess.Popen[bytes]" = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=out, stderr=out)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Keeps it running until something is so, and returns that."""

        def look() -> Any:
            if self.process.poll() is not None:
                assert self.process.returncode == -signal.SIGKILL, self.log.read_text()[-2000:]
                self.deaths += 1
                self.start()
            return condition()

        return until(look, 150)


@contextmanager
def kept_running(
    settings: Settings, folder: Path, *, kind: str = ALWAYS, most_crashes: int = MAX_CRASHES
) -> Iterator[Kept]:
    """A worker of the live lane that is started again whenever it dies, and ends with the block."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | of_worker(settings)
    command = (sys.executable, "-m", "tests.processes.test_crashes", kind, str(folder / "spent"), str(most_crashes))
    kept = Kept(command, environment, folder / "log")
    try:
        yield kept
    finally:
        end(kept.process)


def message(marker: str) -> list[Delivery]:
    """Five deliveries, the third of them with a marker."""
    return [delivery(workout(f"u{n}", title=marker if n == 2 else "Morning")) for n in range(5)]


def test_a_delivery_that_kills_its_worker_is_set_aside_alone(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if one delivery keeps its neighbours from landing, kills workers without end, or is not kept."""
    sent = message(ALWAYS)
    publish(settings, *sent)
    with kept_running(settings, tmp_path) as worker:
        worker.until(lambda: rows(engine, "SELECT 1 FROM headrace.dead_letters"))
        worker.until(lambda: not held(settings))
        deaths = worker.deaths
    assert deaths == MAX_CRASHES + 1
    assert [row["user_id"] for row in rows(engine, WORKOUTS)] == ["u0", "u1", "u3", "u4"]
    outcomes = {row["message_id"]: (row["outcome"], row["error"]) for row in rows(engine, LEDGER)}
    reason = f"its worker died with it, {MAX_CRASHES + 1} times"
    wanted = {one.message_id: ("dead", reason) if n == 2 else ("applied", None) for n, one in enumerate(sent)}
    assert outcomes == wanted
    letters = rows(engine, "SELECT message_id, reason FROM headrace.dead_letters")
    assert letters == [{"message_id": sent[2].message_id, "reason": reason}]
    assert rows(engine, SUSPECTS) == []
    assert "sesame" not in worker.log.read_text()


def test_without_counting_it_would_go_on(engine: Engine, settings: Settings, broker_url: str, tmp_path: Path) -> None:
    """Breaks if something else than the counting ends it: then the test above shows nothing."""
    publish(settings, *message(ALWAYS))
    with kept_running(settings, tmp_path, most_crashes=1_000_000) as worker:
        worker.until(lambda: worker.deaths >= MAX_CRASHES + 2)
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []
    assert held(settings)
    assert rows(engine, SUSPECTS)[0]["crashes"] >= MAX_CRASHES + 1


@pytest.mark.parametrize("marker", [ONCE, AFTERWARDS])
def test_an_innocent_message_is_applied_once_after_a_crash(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path, marker: str
) -> None:
    """Breaks if whoever was at hand when a worker died, before or after the commit, is doubled or stays suspected."""
    publish(settings, *message(marker))
    with kept_running(settings, tmp_path, kind=marker) as worker:
        worker.until(lambda: worker.deaths and not held(settings))
        deaths = worker.deaths
    assert deaths == 1
    assert len(rows(engine, WORKOUTS)) == 5
    attempts = 1 if marker == ONCE else 2
    ledger = [(row["outcome"], row["attempts"]) for row in rows(engine, LEDGER)]
    assert ledger == [("applied", attempts)] * 5
    assert rows(engine, "SELECT count(*) AS n FROM headrace.archive") == [{"n": 5}]
    assert rows(engine, SUSPECTS) == []
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []


# In this process


@pytest.fixture
def killers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ids of deliveries that end whoever opens them."""
    found: set[str] = set()

    def parse(given: Delivery, body: bytes, settings: Settings) -> Parsed:
        if given.message_id in found:
            raise Killed
        return junction.parse(given, body, settings)

    monkeypatch.setitem(AGGREGATORS, "junction", SimpleNamespace(parse=parse))
    return found


def test_what_workers_have_died_with_goes_last(engine: Engine, settings: Settings, killers: set[str]) -> None:
    """Breaks if a delivery that kills is tried before its innocent neighbours, each time anew."""
    sent = message(ALWAYS)
    killers.add(sent[0].message_id)
    for again, landed in [(False, 0), (True, 0), (True, 4)]:
        with pytest.raises(Killed):
            Applier(engine, settings).apply(pack(sent), redelivered=again)
        assert len(rows(engine, WORKOUTS)) == landed
    assert rows(engine, SUSPECTS) == [{"name": sent[0].key, "crashes": MAX_CRASHES}]
    outcomes = Applier(engine, settings).apply(pack(sent), redelivered=True).outcomes
    assert outcomes == {"dead": 1, "duplicate": 4}
    assert rows(engine, SUSPECTS) == []


def test_only_what_was_at_hand_is_suspected(engine: Engine, settings: Settings, killers: set[str]) -> None:
    """Breaks if a neighbour that landed, or was not reached, is held against it."""
    sent = message(ALWAYS)
    killers.add(sent[2].message_id)
    with pytest.raises(Killed):
        Applier(engine, settings).apply(pack(sent), redelivered=True)
    assert rows(engine, SUSPECTS) == [{"name": sent[2].key, "crashes": 1}]


def test_crashes_are_cleared_once_the_delivery_is_applied(
    engine: Engine, settings: Settings, killers: set[str]
) -> None:
    """Breaks if a delivery is still suspected when a worker has come through with it alive."""
    sent = message(ALWAYS)
    killers.add(sent[2].message_id)
    for again in (False, True, True):
        with pytest.raises(Killed):
            Applier(engine, settings).apply(pack(sent), redelivered=again)
    killers.clear()
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.crash_counts SET crashes = crashes - 1"))
    Applier(engine, settings).apply(pack(sent), redelivered=True)
    assert rows(engine, SUSPECTS) == []
    assert len(rows(engine, WORKOUTS)) == 5
    assert {row["outcome"] for row in rows(engine, LEDGER)} == {"applied"}


def test_a_delivery_that_is_refused_after_a_crash_is_no_suspect_any_more(engine: Engine, settings: Settings) -> None:
    """Breaks if what becomes a dead letter for its data stays suspected for ever."""
    bad = workout("u1", title="a\u0000b")
    Applier(engine, settings).apply(pack([delivery(bad), delivery(b"rubbish")]), redelivered=True)
    assert len(rows(engine, "SELECT 1 FROM headrace.dead_letters")) == 2
    assert rows(engine, SUSPECTS) == []


def away(engine: Engine, table: str) -> Callable[[], None]:
    """Takes a table away, as a migration that holds it would; returns what brings it back."""
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE headrace.{table} RENAME TO away"))

    def back() -> None:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE headrace.away RENAME TO {table}"))

    return back


def test_waiting_for_the_database_is_no_death(engine: Engine, settings: Settings) -> None:
    """Breaks if a delivery is set aside as a killer because PostgreSQL could not take it, and no worker died."""
    packed = pack([delivery(workout("u1"))])
    back = away(engine, "workouts")
    try:
        for _ in range(MAX_CRASHES + 2):
            with pytest.raises(TryLater):
                Applier(engine, settings).apply(packed, redelivered=True)
    finally:
        back()
    assert Applier(engine, settings).apply(packed, redelivered=True).outcomes == {"applied": 1}


def test_what_had_to_wait_is_no_suspect_in_the_end(engine: Engine, settings: Settings) -> None:
    """Breaks if the table of crashed_deliveries grows with every delivery that met a locked table after a crash."""
    packed = pack([delivery(workout("u1"))])
    back = away(engine, "workouts")
    try:
        with pytest.raises(TryLater):
            Applier(engine, settings).apply(packed, redelivered=True)
    finally:
        back()
    Applier(engine, settings).apply(packed)  # a task that is put back is a new message: nobody has died with it
    assert rows(engine, SUSPECTS) == []


# Pages of history


@pytest.fixture
def reading(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may read history, and as fast as it likes."""
    return replace(settings, broker_url=broker_url, junction_api_key="sk_us_tests", request_rate="1000000/second")


def killed(_: httpx.Request) -> httpx.Response:
    """An answer that nobody lives to read."""
    raise Killed


def die_of(engine: Engine, settings: Settings, provider: Provider, backfill_id: int) -> None:
    """A worker takes up a backfill and dies; its lease runs out."""
    with pytest.raises(Killed):
        provider.fetcher(engine, settings).run(backfill_id)
    hurry(engine, leases=True)


def test_a_page_that_kills_its_workers_ends_its_backfill(engine: Engine, reading: Settings) -> None:
    """Breaks if one page kills a worker a minute, for ever, or ends its history at the first death."""
    provider = Provider(killed)
    (one,) = announce(engine, reading, notice(days=(0, 3)))
    for deaths in range(MAX_FETCH_CRASHES):
        assert rows(engine, "SELECT crashes, status FROM headrace.backfills") == [
            {"crashes": max(deaths - 1, 0), "status": "running" if deaths else "pending"}
        ]
        die_of(engine, reading, provider, one)
    assert provider.fetcher(engine, reading).run(one) == []
    assert len(provider.asked) == MAX_FETCH_CRASHES
    assert status(engine) == [("failed", 0, 1)]
    assert backfill(engine)["error"] == f"its worker died {MAX_FETCH_CRASHES} times without a page between"
    hurry(engine, leases=True)
    assert due(engine) == []


def test_a_page_between_makes_up_for_the_deaths(engine: Engine, reading: Settings) -> None:
    """Breaks if a long history fails because a worker died now and then over the weeks."""
    inner, met = heartrates(hourly(6), 24), dict[str, int]()

    def answer(request: httpx.Request) -> httpx.Response:
        met[str(request.url)] = met.get(str(request.url), 0) + 1
        return killed(request) if met[str(request.url)] < MAX_FETCH_CRASHES else inner(request)

    provider = Provider(answer)
    (one,) = announce(engine, reading, notice(days=(0, 6)))
    for _ in range(200):
        if not due(engine):
            break
        try:
            provider.fetcher(engine, reading).run(one)
        except Killed:
            hurry(engine, leases=True)
    assert set(met.values()) == {MAX_FETCH_CRASHES}
    assert len(met) > 3
    assert status(engine) == [("complete", 1, 1)]
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 24 * 6}]
    assert rows(engine, "SELECT crashes FROM headrace.backfills") == [{"crashes": 0}]


def test_a_worker_that_gave_its_backfill_back_has_not_died(engine: Engine, reading: Settings) -> None:
    """Breaks if waiting for the provider counts as a death."""
    provider = Provider(lambda _: httpx.Response(500))
    (one,) = announce(engine, reading, notice(days=(0, 3)))
    for _ in range(MAX_FETCH_CRASHES + 2):
        provider.fetcher(engine, reading).run(one)
        hurry(engine)
    assert rows(engine, "SELECT crashes, status FROM headrace.backfills") == [{"crashes": 0, "status": "running"}]


def test_an_operator_may_have_it_tried_again(engine: Engine, reading: Settings) -> None:
    """Breaks if a history whose killer was mended fails at once, for the deaths of before."""
    provider = Provider(killed)
    (one,) = announce(engine, reading, notice(days=(0, 3)))
    for _ in range(MAX_FETCH_CRASHES):
        die_of(engine, reading, provider, one)
    provider.fetcher(engine, reading).run(one)
    provider.answer = heartrates(hourly(3))
    assert backfill_admin.resume(engine, [one]) == [one]
    provider.fetcher(engine, reading).run(one)
    assert status(engine) == [("complete", 1, 1)]


def test_other_backfills_go_on_beside_one_that_kills(engine: Engine, reading: Settings) -> None:
    """Breaks if the place of a killed worker is never given to others."""
    provider, healthy = Provider(killed), Provider(heartrates(hourly(3)))
    limited = replace(reading, backfills_per_user=1)
    (one,) = announce(engine, limited, notice(days=(0, 3)))
    (other,) = announce(engine, limited, notice(resource="steps", days=(0, 3)))
    with pytest.raises(Killed):
        provider.fetcher(engine, limited).run(one)
    healthy.fetcher(engine, limited).run(other)
    assert healthy.asked == []
    hurry(engine, leases=True)
    healthy.fetcher(engine, limited).run(other)
    assert [row["status"] for row in rows(engine, "SELECT status FROM headrace.backfills ORDER BY id")] == [
        "running",
        "complete",
    ]


if __name__ == "__main__":
    killing_worker(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
