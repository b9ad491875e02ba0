"""Messages in a lane that are not tasks of this version become dead letters: a real worker and a real broker."""

from collections.abc import Callable
from typing import Any

import pytest
import redis
from kombu import Producer
from sqlalchemy import Engine

from app.broker.celery import make_celery
from app.broker.lanes import APPLY
from app.config.settings import Settings
from app.delivery import pack
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, delivery, rows, until, workout
from tests.support.workers import SharedWorker, publish
from workers.broker_admin import drain_invalid
from workers.ingest.apply import Applier
from workers.ingest.parse import UNKNOWN
from workers.ingest.replay import replay_dead_letters
from workers.store import dead_letters

pytestmark = pytest.mark.processes
Put = Callable[[Settings], None]


def put_task(name: str, *args: Any, **kwargs: Any) -> Put:
    """Puts a Celery task of any name and arguments on the live lane."""

    def put(settings: Settings) -> None:
        celery = make_celery(settings, "publisher")
        celery.send_task(name, args=args, kwargs=kwargs, queue="live", argsrepr="(?)", kwargsrepr="{}")
        celery.close()

    return put


def put_bytes(body: Any, **properties: Any) -> Put:
    """Puts a message that is not a Celery task on the live lane."""

    def put(settings: Settings) -> None:
        celery = make_celery(settings, "publisher")
        lane = next(queue for queue in celery.conf.task_queues if queue.name == "live")
        with celery.connection_for_write() as connection:
            Producer(connection).publish(body, exchange=lane.exchange, routing_key="live", declare=[lane], **properties)
        celery.close()

    return put


INVALID_MESSAGES = {
    "another task": put_task("headrace.unknown", "sesame"),
    "no argument": put_task(APPLY),
    "two arguments": put_task(APPLY, "sesame", "sesame"),
    "keyword arguments": put_task(APPLY, packed="sesame"),
    "another type": put_task(APPLY, {"sesame": 1}),
    "no deliveries": put_task(APPLY, "sesame!"),
    "a task of another lane": put_task("headrace.fetch", "sesame"),
    "a task of Celery": put_task("celery.chord_unlock", "sesame"),
    "no task": put_bytes({"sesame": 1}),
    "text": put_bytes("sesame", serializer="raw", content_type="text/plain"),
    "pickle": put_bytes(
        b"\x80\x04\x8c\x06sesame\x94.", content_type="application/x-python-serialize", content_encoding="binary"
    ),
    "broken JSON": put_bytes(
        b'{"sesame',
        content_type="application/json",
        content_encoding="utf-8",
        headers={"task": APPLY, "id": "1", "lang": "py"},
    ),
}


@pytest.mark.parametrize("put", INVALID_MESSAGES.values(), ids=INVALID_MESSAGES)
def test_a_message_that_is_not_a_known_task_becomes_a_dead_letter(
    engine: Engine, settings: Settings, live_worker: SharedWorker, put: Put
) -> None:
    """Breaks if a worker drops a message of a newer version, or an invalid message ends it or appears in its log."""
    put(settings)
    publish(settings, [delivery(workout("u1"))])
    until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))
    (dead_letter,) = until(lambda: dead_letters.listed(engine))
    assert live_worker.is_alive
    assert dead_letter.aggregator == UNKNOWN
    assert "sesame" not in dead_letter.reason + live_worker.output
    stored = dead_letters.delivery(engine, dead_letter)
    assert b"sesame" in stored.open(Sealer([ENCRYPTION_KEY])) or put is INVALID_MESSAGES["no argument"]


def test_bytes_that_are_not_a_message_become_a_dead_letter(
    engine: Engine, settings: Settings, broker: "redis.Redis", live_worker: SharedWorker
) -> None:
    """Breaks if an entry that the transport moved to the list of invalid messages is not stored, or is stored twice."""
    broker.lpush("live", b"\x80sesame")
    publish(settings, [delivery(workout("u1"))])
    until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))
    applier = Applier(engine, settings)
    drain_invalid(settings, applier.dead_letter_raw)
    drain_invalid(settings, applier.dead_letter_raw)
    (dead_letter,) = dead_letters.listed(engine)
    assert dead_letter.reason == "bytes that are not a message"
    assert broker.keys("*:invalid") == []


def test_a_task_of_a_newer_version_can_be_replayed_after_the_update(
    engine: Engine, settings: Settings, live_worker: SharedWorker
) -> None:
    """Breaks if a message that an older worker stored as a dead letter cannot be replayed."""
    put_task("headrace.unknown", pack([delivery(workout("u1")), delivery(workout("u2"), name="msg_2")]))(settings)
    until(lambda: dead_letters.listed(engine))
    outcomes = replay_dead_letters(engine, Applier(engine, settings), dead_letters.listed(engine))
    assert dict(outcomes) == {"applied": 2}
    assert dead_letters.listed(engine) == []
    assert rows(engine, "SELECT user_id FROM health.workouts ORDER BY 1") == [{"user_id": "u1"}, {"user_id": "u2"}]
