"""Tasks, in real workers on the real broker: what becomes of a message when something is away."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from sqlalchemy import Engine, text

from app.broker.celery import make_celery
from app.broker.lanes import APPLY, FETCH, RECONCILE
from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import apply, delivery, event, rows, until, worker, workout
from tests.support.collector import Collector, Seen, collector
from workers.backfill.fetcher import FollowUp
from workers.celery import jobs as scheduled
from workers.celery.context import WorkerContext
from workers.celery.jobs import Jobs
from workers.celery.tasks import MAX_RETRY_SECONDS, retry_delay
from workers.store import jobs
from workers.store.backfills import due


@pytest.mark.parametrize(
    ("attempt", "longest"),
    [(0, 0.5), (1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 16.0), (6, 30.0), (7, 30.0), (10**9, 30.0)],
)
def test_a_pause_doubles_up_to_half_a_minute(attempt: int, longest: float) -> None:
    """Breaks if workers try again all at once, hammer what is away, or sleep past the visibility timeout."""
    pauses = [retry_delay(attempt) for _ in range(200)]
    assert longest / 2 <= min(pauses) < max(pauses) <= longest
    assert max(pauses) - min(pauses) > longest / 4


def test_a_waiting_message_is_not_given_to_another_worker() -> None:
    """Breaks if a message that waits in a worker becomes visible again meanwhile, and is applied by two."""
    assert Settings().visibility_timeout_seconds > MAX_RETRY_SECONDS


def waits(log: Path) -> int:
    """How often a worker has put a task back."""
    return log.read_text().count("headrace.apply waits")


def publish(settings: Settings, *deliveries: Delivery) -> None:
    """Puts one message on the live lane, as the endpoint does."""
    publisher = Publisher(make_celery(settings, "publisher"))
    publisher.publish(deliveries)
    publisher.close()


def held(settings: Settings) -> list[dict[str, Any]]:
    """The messages that the broker still has: those that wait, and those that a worker has not acknowledged."""
    with redis.Redis.from_url(settings.need_broker()) as client:
        lists = ("live", "live:processing")
        waiting = [json.loads(raw) for name in lists for raw in client.lrange(name, 0, -1)]
        return waiting + [json.loads(raw)[0] for raw in client.hvals("unacked")]


def stored(engine: Engine) -> list[dict[str, Any]]:
    """The workouts that a reader sees."""
    return rows(engine, "SELECT user_id FROM health.workouts")


NOWHERE = "postgresql://u:sesame@127.0.0.1:1/d"


@pytest.mark.parametrize("ending", ["terminate", "kill"])
def test_a_message_waits_for_a_database_that_is_away(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path, ending: str
) -> None:
    """Breaks if a message is lost or acknowledged while PostgreSQL is down, or while the worker that held it ends."""
    publish(settings, delivery(workout("u1")))
    log = tmp_path / "first.log"
    with worker(settings, log, DATABASE_URL=NOWHERE) as first:
        until(lambda: waits(log) >= 3)
        assert held(settings)
        getattr(first, ending)()
        first.wait(30)
    assert "sesame" not in log.read_text()
    (message,) = {one["headers"]["id"]: one for one in held(settings)}.values()
    assert message["headers"]["task"] == APPLY
    assert message["headers"]["retries"] >= 2
    assert message["headers"]["argsrepr"] == "(1 deliveries)"
    assert message["headers"]["kwargsrepr"] == "{}"
    assert stored(engine) == []
    with worker(settings, tmp_path / "second.log"):
        until(lambda: stored(engine))
        until(lambda: not held(settings))
    assert stored(engine) == [{"user_id": "u1"}]


def test_a_worker_that_is_killed_amid_messages_loses_none(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if a message is acknowledged before its rows are committed, or does not come back."""
    for number in range(120):
        publish(settings, *(delivery(workout(f"u{number}", f"w{each}")) for each in range(10)))
    with worker(settings, tmp_path / "first.log") as first:
        until(lambda: stored(engine))
        first.kill()
        first.wait(30)
    assert held(settings)
    count = "SELECT count(*) AS n, count(DISTINCT user_id) AS users FROM health.workouts"
    log = tmp_path / "second.log"
    with worker(settings, log):
        until(lambda: rows(engine, count) == [{"n": 1200, "users": 120}])
        until(lambda: not held(settings))
    assert "Traceback" not in log.read_text()
    assert rows(engine, "SELECT outcome, count(*) AS n FROM health.deliveries GROUP BY 1") == [
        {"outcome": "applied", "n": 1200}
    ]


def send(settings: Settings, packed: str) -> None:
    """Puts a message of any content on the live lane."""
    celery = make_celery(settings, "publisher")
    celery.send_task(APPLY, args=(packed,), queue="live", argsrepr="(?)")
    celery.close()


def test_a_message_that_is_none_of_ours_does_not_stop_the_lane(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if rubbish in the queue ends the worker, or what it held gets into the log."""
    send(settings, "sesame!")
    publish(settings, delivery(workout("u1")))
    log = tmp_path / "log"
    with worker(settings, log) as process:
        until(lambda: stored(engine))
        assert process.poll() is None
    assert "sesame" not in log.read_text()


def test_a_message_of_a_newer_version_is_not_lost(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if deliveries that were answered 202 are gone because an older worker met them during an update."""
    newer = msgspec.msgpack.encode((2, [delivery(workout("u1"))]))
    send(settings, base64.b64encode(newer).decode())
    publish(settings, delivery(workout("u2")))
    with worker(settings, tmp_path / "log"):
        until(lambda: stored(engine))
    assert held(settings) or rows(engine, "SELECT 1 FROM headrace.dead_letters")


@contextmanager
def working(settings: Settings, broker_url: str, **changes: Any) -> Iterator[Jobs]:
    """What the tasks of a process share, in a deployment that may read history."""
    given = replace(settings, broker_url=broker_url, junction_api_key="sk_us_tests", **changes)
    celery = make_celery(given, "publisher")
    work = WorkerContext(celery, given)
    try:
        yield Jobs(work)
    finally:
        work.engine.dispose()
        celery.close()


def announced(engine: Engine, settings: Settings, count: int) -> list[int]:
    """So many backfills that are due."""
    notices = [event("historical.data.sleep.created", f"u{number}", {"provider": "oura"}) for number in range(count)]
    apply(engine, settings, *map(delivery, notices))
    return due(engine)


def sent(broker_url: str) -> list[tuple[str, str]]:
    """The messages on the lane of history, the oldest first: task and arguments."""
    with redis.Redis.from_url(broker_url) as client:
        headers = [json.loads(raw)["headers"] for raw in client.lrange("backfill", 0, -1)]
    return [(one["task"], one["argsrepr"]) for one in reversed(headers)]


def test_a_sweep_sends_what_is_due(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if a backfill whose message was lost is never gone on with."""
    numbers = announced(engine, settings, 3)
    with working(settings, broker_url) as work:
        work.sweep()
    assert sent(broker_url) == [(FETCH, f"({number},)") for number in numbers]


def test_a_sweep_fills_the_lane_and_no_more(
    engine: Engine, settings: Settings, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if every sweep puts the same messages on a lane that nobody works on, until the broker is full."""
    monkeypatch.setattr(scheduled, "MAX_QUEUED_FETCHES", 5)
    numbers = announced(engine, settings, 8)
    with working(settings, broker_url) as work:
        work._context.enqueue([FollowUp(404, 0), FollowUp(405, 0)])
        work.sweep()
        assert sent(broker_url)[2:] == [(FETCH, f"({number},)") for number in numbers[:3]]
        for _ in range(3):
            work.sweep()
        assert len(sent(broker_url)) == 5
        with redis.Redis.from_url(broker_url) as client:
            client.rpop("backfill")
        work.sweep()
    assert len(sent(broker_url)) == 5


@pytest.mark.parametrize("changes", [{"fetch_history": False}, {"junction_api_key": None}])
def test_a_sweep_sends_nothing_where_nothing_is_fetched(
    engine: Engine, settings: Settings, broker_url: str, changes: dict[str, Any]
) -> None:
    """Breaks if a deployment without a key, or without history, fills its broker with messages."""
    announced(engine, settings, 2)
    given = replace(settings, broker_url=broker_url, **({"junction_api_key": "sk_us_tests"} | changes))
    celery = make_celery(given, "publisher")
    work = WorkerContext(celery, given)
    Jobs(work).sweep()
    assert sent(broker_url) == []
    assert rows(engine, "SELECT 1 FROM headrace.jobs WHERE name = 'reconcile'") == []
    work.engine.dispose()
    celery.close()


def set_chore(engine: Engine, what: str) -> None:
    """Changes the reconciliation by hand."""
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE headrace.jobs SET {what} WHERE name = 'reconcile'"))


def test_a_reconciliation_is_sent_when_it_is_due(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if everything is compared at every sweep, never, or by two workers at once."""
    with working(settings, broker_url, reconcile_hours=6) as work:
        work.sweep()
        assert sent(broker_url) == []  # the first time is a whole period after the installation
        (row,) = rows(engine, "SELECT due_at - now() AS left FROM headrace.jobs WHERE name = 'reconcile'")
        assert row["left"].total_seconds() == pytest.approx(6 * 3600, abs=60)
        work.sweep()
        assert sent(broker_url) == []
        set_chore(engine, "due_at = now() - interval '1 second'")
        work.sweep()
        assert sent(broker_url) == [(RECONCILE, "()")]
        assert jobs.claim(engine, "reconcile") is not None
        work.sweep()
        assert len(sent(broker_url)) == 1
        set_chore(engine, "lease_until = now() - interval '1 second'")  # of a worker that was killed
        work.sweep()
        assert len(sent(broker_url)) == 2
        jobs.save(engine, "reconcile", None, 6 * 3600)
        work.sweep()
        assert len(sent(broker_url)) == 2


def test_no_hours_mean_never(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if an operator who wants it on demand only gets it at every sweep."""
    with working(settings, broker_url, reconcile_hours=6) as work:
        work.sweep()
    set_chore(engine, "due_at = now() - interval '1 day'")
    with working(settings, broker_url, reconcile_hours=0) as work:
        work.sweep()
    assert sent(broker_url) == []


def test_a_reconciliation_waits_for_room(
    engine: Engine, settings: Settings, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a lane that nobody works on gets a message more at every sweep."""
    monkeypatch.setattr(scheduled, "MAX_QUEUED_FETCHES", 2)
    with working(settings, broker_url, reconcile_hours=6) as work:
        work.sweep()
        set_chore(engine, "due_at = now() - interval '1 second'")
        work._context.enqueue([FollowUp(404, 0), FollowUp(405, 0)])
        for _ in range(3):
            work.sweep()
    assert [task for task, _ in sent(broker_url)] == [FETCH, FETCH]


def attempts_before(found: Collector, one: Seen) -> int:
    """How many attempts came before."""
    before = {seen.id: seen.links for seen in found.named("headrace.apply live")}
    count, at = 0, one.id
    while before.get(at):
        count, (at,) = count + 1, before[at]
    return count


def test_each_attempt_is_traced_and_leads_to_the_one_before(
    settings: Settings, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if a message that waits for its database is seen once, or what it waited for cannot be found."""
    log = tmp_path / "log"
    with collector() as found:
        with worker(settings, log, DATABASE_URL=NOWHERE, OTEL_EXPORTER_OTLP_ENDPOINT=found.url):
            publish(settings, delivery(workout("u1")))
            until(lambda: waits(log) >= 3)
        first, second, third = sorted(found.named("headrace.apply live"), key=lambda one: attempts_before(found, one))[
            :3
        ]
    assert [first.links, second.links, third.links] == [(), (first.id,), (second.id,)]
    assert {one.attributes["headrace.state"] for one in (first, second, third)} == {"RETRY"}
    assert {one.attributes["error.type"] for one in (first, second, third)} == {"TryLater"}
    assert "sesame" not in str(found.raw)
