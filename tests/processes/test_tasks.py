"""Tasks in real workers on a real broker: outages, killed workers and invalid messages."""

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from sqlalchemy import Engine

from app.broker.celery import make_celery
from app.broker.lanes import APPLY
from app.config.settings import Settings
from app.delivery import MESSAGE_VERSION
from tests.support import delivery, rows, until, worker, workout
from tests.support.collector import Collector, ReceivedSpan, collector
from tests.support.workers import IS_WAITING, SharedWorker, blocking, messages, publish

pytestmark = pytest.mark.processes
UNREACHABLE = "postgresql://u:sesame@127.0.0.1:1/d"


def retry_count(log: Path) -> int:
    """The number of task retries in a worker's log."""
    return log.read_text().count("headrace.apply is retried")


def stored(engine: Engine) -> list[dict[str, Any]]:
    """The stored workouts."""
    return rows(engine, "SELECT user_id FROM health.workouts")


def attempts_before(found: Collector, one: ReceivedSpan) -> int:
    """The number of attempts before this one."""
    before = {seen.id: seen.links for seen in found.named("headrace.apply live")}
    count, span_id = 0, one.id
    while before.get(span_id):
        count, (span_id,) = count + 1, before[span_id]
    return count


def test_a_message_is_retried_while_the_database_is_down(
    engine: Engine, settings: Settings, broker: "redis.Redis", stopped_worker: SharedWorker, tmp_path: Path
) -> None:
    """Breaks if a message is lost or acknowledged while PostgreSQL is down, or while its worker stops.

    Also breaks if its attempts are not traced separately, or their traces omit the error.
    """
    publish(settings, [delivery(workout("u1"))])
    with collector() as found:
        for stop, attempts in (("terminate", 3), ("kill", 1)):
            log = tmp_path / f"{stop}.log"
            with worker(settings, log, DATABASE_URL=UNREACHABLE, OTEL_EXPORTER_OTLP_ENDPOINT=found.url) as first:
                until(lambda: retry_count(log) >= attempts)  # noqa: B023
                assert messages(broker)
                getattr(first, stop)()
                first.wait(30)
            assert "sesame" not in log.read_text()
            (message,) = {one["headers"]["id"]: one for one in messages(broker)}.values()
            assert message["headers"]["task"] == APPLY
            assert message["headers"]["retries"] >= 2
            assert message["headers"]["argsrepr"] == "(1 deliveries)"
            assert message["headers"]["kwargsrepr"] == "{}"
            assert stored(engine) == []
    check_traces(found)
    stopped_worker.ready()
    until(lambda: stored(engine))
    until(lambda: not messages(broker))
    assert stored(engine) == [{"user_id": "u1"}]


def check_traces(found: Collector) -> None:
    """Asserts that each attempt has its own span, which links to the previous attempt."""
    first, second, third = sorted(found.named("headrace.apply live"), key=lambda one: attempts_before(found, one))[:3]
    assert [first.links, second.links, third.links] == [(), (first.id,), (second.id,)]
    assert {one.attributes["headrace.state"] for one in (first, second, third)} == {"RETRY"}
    assert {one.attributes["error.type"] for one in (first, second, third)} == {"TryLater"}
    assert "sesame" not in str(found.raw)


def test_a_worker_killed_during_a_backlog_loses_no_message(
    engine: Engine, settings: Settings, broker: "redis.Redis", stopped_worker: SharedWorker
) -> None:
    """Breaks if a message is acknowledged before its rows are committed, or is not redelivered."""
    publish(
        settings,
        *(
            [
                delivery(workout(f"u{number}", f"w{workout_number}"), name=f"{number}-{workout_number}")
                for workout_number in range(10)
            ]
            for number in range(40)
        ),
    )
    with blocking(engine, "30-5"):
        killed = stopped_worker.ready().process
        until(lambda: rows(engine, IS_WAITING))
        killed.kill()
        killed.wait(30)
    assert messages(broker)
    stopped_worker.ready()
    count = "SELECT count(*) AS n, count(DISTINCT user_id) AS users FROM health.workouts"
    until(lambda: rows(engine, count) == [{"n": 400, "users": 40}])
    until(lambda: not messages(broker))
    assert "Traceback" not in stopped_worker.log.read_text()
    assert rows(engine, "SELECT outcome, count(*) AS n FROM health.deliveries GROUP BY 1") == [
        {"outcome": "applied", "n": 400}
    ]


def send(settings: Settings, packed: str) -> None:
    """Puts a message with this content on the live lane."""
    celery = make_celery(settings, "publisher")
    celery.send_task(APPLY, args=(packed,), queue="live", argsrepr="(?)")
    celery.close()


def test_a_message_of_a_newer_version_is_not_lost(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if an older worker loses deliveries of a newer version during an update."""
    newer = msgspec.msgpack.encode((MESSAGE_VERSION + 1, [delivery(workout("u1"))]))
    send(settings, base64.b64encode(newer).decode())
    publish(settings, [delivery(workout("u2"))])
    until(lambda: stored(engine))
    assert messages(broker) or rows(engine, "SELECT 1 FROM headrace.dead_letters")
