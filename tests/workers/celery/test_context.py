"""The sweep: the messages it sends to the lanes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis
from sqlalchemy import Engine, text

from app.broker.celery import make_celery
from app.broker.lanes import FAILURES, FETCH, RECONCILE
from app.broker.merging import is_first_attempt
from app.config.settings import Settings
from app.delivery import pack, unpack
from app.errors import RetryAlone, TryLater
from tests.support import apply, delivery, event, rows
from tests.support.broker import arguments, waiting
from tests.support.poison import RAISE, eleven, fault
from workers.backfill.fetcher import FollowUp
from workers.celery import jobs as scheduled
from workers.celery.context import WorkerContext
from workers.celery.jobs import Jobs
from workers.simulator.server import Simulator
from workers.store import jobs
from workers.store.backfills import due


@contextmanager
def working(settings: Settings, broker_url: str, **changes: Any) -> Iterator[Jobs]:
    """The jobs of a process in a deployment that may fetch history."""
    given = replace(settings, **({"broker_url": broker_url, "junction_api_key": "sk_us_tests"} | changes))
    celery = make_celery(given, "publisher")
    work = WorkerContext(celery, given)
    try:
        yield Jobs(work)
    finally:
        work.engine.dispose()
        celery.close()


def test_a_delivery_that_cannot_be_enqueued_keeps_its_message(engine: Engine, settings: Settings) -> None:
    """Breaks if a delivery is lost when it must be retried alone and the broker is down."""
    celery = make_celery(replace(settings, broker_url="redis://127.0.0.1:1/0"), "publisher")
    work = WorkerContext(celery, settings)
    with fault(engine, RAISE.format("XX001")), pytest.raises(TryLater, match="BROKER_URL: cannot enqueue") as caught:
        work.apply(pack(eleven()), redelivered=False)
    assert not isinstance(caught.value, RetryAlone)
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 10
    work.engine.dispose()
    celery.close()


def test_a_delivery_alone_is_a_message_of_its_own(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if its tries are not counted, or its message is merged with others again."""
    celery = make_celery(replace(settings, broker_url=broker_url), "publisher")
    work = WorkerContext(celery, settings)
    sent = eleven()
    with fault(engine, RAISE.format("XX001")):
        work.apply(pack(sent), redelivered=False)
    (message,) = waiting(broker_url)
    assert unpack(arguments(message)[0]) == [sent[5]]
    assert (message["headers"][FAILURES], is_first_attempt(message)) == (1, False)
    work.engine.dispose()
    celery.close()


def announced(engine: Engine, settings: Settings, count: int) -> list[int]:
    """Opens `count` backfills that are due."""
    notices = [event("historical.data.sleep.created", f"u{number}", {"provider": "oura"}) for number in range(count)]
    apply(engine, settings, *map(delivery, notices))
    return due(engine)


def sent(broker_url: str) -> list[tuple[str, str]]:
    """The messages on the backfill lane, the oldest first: task and arguments."""
    with redis.Redis.from_url(broker_url) as client:
        headers = [json.loads(raw)["headers"] for raw in client.lrange("backfill", 0, -1)]
    return [(one["task"], one["argsrepr"]) for one in reversed(headers)]


def test_a_sweep_sends_what_is_due(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if a backfill whose message was lost is never continued."""
    numbers = announced(engine, settings, 3)
    with working(settings, broker_url) as work:
        work.sweep()
    assert sent(broker_url) == [(FETCH, f"({number},)") for number in numbers]


def test_a_sweep_fills_the_lane_and_no_more(
    engine: Engine, settings: Settings, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if every sweep enqueues the same messages while no worker runs, until the broker is full."""
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
    """Breaks if a deployment without a key, or without history, enqueues messages."""
    announced(engine, settings, 2)
    with working(settings, broker_url, **changes) as work:
        work.sweep()
    assert sent(broker_url) == []
    assert rows(engine, "SELECT 1 FROM headrace.jobs WHERE name = 'reconcile'") == []


def update_job(engine: Engine, what: str) -> None:
    """Updates the reconciliation job in the database."""
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE headrace.jobs SET {what} WHERE name = 'reconcile'"))


def test_a_reconciliation_is_sent_when_it_is_due(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if every sweep starts a reconciliation, none does, or two workers run it at once."""
    with working(settings, broker_url, reconcile_hours=6) as work:
        work.sweep()
        assert sent(broker_url) == []  # the first one runs a period after the installation
        (row,) = rows(engine, "SELECT due_at - now() AS left FROM headrace.jobs WHERE name = 'reconcile'")
        assert row["left"].total_seconds() == pytest.approx(6 * 3600, abs=60)
        work.sweep()
        assert sent(broker_url) == []
        update_job(engine, "due_at = now() - interval '1 second'")
        work.sweep()
        assert sent(broker_url) == [(RECONCILE, "()")]
        assert jobs.claim(engine, "reconcile") is not None
        work.sweep()
        assert len(sent(broker_url)) == 1
        update_job(engine, "lease_until = now() - interval '1 second'")  # of a worker that was killed
        work.sweep()
        assert len(sent(broker_url)) == 2
        jobs.save(engine, "reconcile", None, 6 * 3600)
        work.sweep()
        assert len(sent(broker_url)) == 2


def test_zero_hours_disable_the_reconciliation(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if HEADRACE_RECONCILE_HOURS=0 starts a reconciliation."""
    with working(settings, broker_url, reconcile_hours=6) as work:
        work.sweep()
    update_job(engine, "due_at = now() - interval '1 day'")
    with working(settings, broker_url, reconcile_hours=0) as work:
        work.sweep()
    assert sent(broker_url) == []


TERRA = {"junction_api_key": None, "terra_dev_id": "dev", "terra_api_key": "key", "terra_admin_token": "terra_at_1"}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (TERRA, {"reconcile-terra"}),
        (TERRA | {"junction_api_key": "sk_us_tests"}, {"reconcile", "reconcile-lost", "reconcile-terra"}),
        (TERRA | {"terra_admin_token": None}, set()),
        (TERRA | {"terra_api_key": None}, set()),
    ],
)
def test_each_aggregator_has_a_reconciliation(
    engine: Engine, settings: Settings, broker_url: str, changes: dict[str, Any], names: set[str]
) -> None:
    """Breaks if Terra is not compared on schedule, or is compared without a token or without a key to fetch."""
    with working(settings, broker_url, **changes) as work:
        work.sweep()
        found = {row["name"] for row in rows(engine, "SELECT name FROM headrace.jobs WHERE name LIKE 'reconcile%'")}
        assert found == names
        with engine.begin() as connection:
            connection.execute(text("UPDATE headrace.jobs SET due_at = now() WHERE name LIKE 'reconcile%'"))
        work.sweep()
    assert sent(broker_url) == [(RECONCILE, "()")] * bool(names)


def test_terra_is_compared_on_schedule(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if the scheduled reconciliation compares Junction only."""
    with Simulator(2, 3) as simulator:
        account = {name: simulator.environment[name.upper()] for name in (*TERRA, "terra_base_url")}
        account["terra_admin_base_url"] = simulator.environment["TERRA_ADMIN_BASE_URL"]
        changes = account | {"junction_base_url": simulator.url, "resources": ("sleep",)}
        with working(settings, broker_url, **changes) as work:
            work.sweep()
            with engine.begin() as connection:
                connection.execute(text("UPDATE headrace.jobs SET due_at = now()"))
            work.reconcile()
        opened = {row["aggregator"] for row in rows(engine, "SELECT DISTINCT aggregator FROM headrace.backfills")}
        assert opened == {"junction", "terra"}
        assert any(one["path"].startswith("/v3/admin") for one in simulator.requests)


def test_a_reconciliation_waits_for_room(
    engine: Engine, settings: Settings, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if every sweep enqueues another message while no worker runs."""
    monkeypatch.setattr(scheduled, "MAX_QUEUED_FETCHES", 2)
    with working(settings, broker_url, reconcile_hours=6) as work:
        work.sweep()
        update_job(engine, "due_at = now() - interval '1 second'")
        work._context.enqueue([FollowUp(404, 0), FollowUp(405, 0)])
        for _ in range(3):
            work.sweep()
    assert [task for task, _ in sent(broker_url)] == [FETCH, FETCH]
