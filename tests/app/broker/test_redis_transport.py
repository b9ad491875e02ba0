"""The transport of the workers on a real Valkey, with a consumer in this process."""

import os
import threading
import time
from typing import Any

import pytest
import redis
from kombu.transport import virtual

from app.broker import redis_transport
from app.broker.celery import make_celery
from app.broker.lanes import PROCESSING
from app.broker.redis_transport import MAX_MERGED_BYTES, MAX_MERGED_MESSAGES
from app.config.settings import Settings
from tests.support import delivery, workout
from tests.support.broker import BlockingPublisher
from tests.support.workers import LIVE, consume_one, consuming, held, publish


@pytest.mark.parametrize("text", ["", "aGVhZHJhY2U=", "aGVhZHJhY2U==", "aGVh\nZHJhY2U="])
def test_base64_is_decoded_as_kombu_does(text: str) -> None:
    """Breaks if a message is refused that kombu reads."""
    assert redis_transport.Base64().decode(text) == virtual.base.Base64().decode(text)


def test_a_new_transport_receives_a_message_by_moving_it(settings: Settings, broker: "redis.Redis") -> None:
    """Breaks if a message is in no list before it is in "unacked"."""
    publish(settings, [delivery(workout("u1"))])
    celery = make_celery(settings, "publisher")
    celery.conf.broker_transport = "app.broker.redis_transport:Transport"
    seen: list[tuple[int, int, int]] = []
    lane = next(queue for queue in celery.conf.task_queues if queue.name == LIVE)

    def note(message: Any) -> None:
        seen.append((broker.llen(LIVE), broker.llen(LIVE + PROCESSING), broker.hlen("unacked")))
        message.ack()

    with celery.connection_for_read() as connection, connection.channel() as channel:
        consumer = celery.amqp.Consumer(channel, [lane], on_message=note, accept=["json"])
        with consumer:
            connection.drain_events(timeout=10)
    assert seen == [(0, 0, 1)]
    assert held(broker) == 0
    celery.close()


def test_a_message_is_given_back_to_the_lane_it_came_from(settings: Settings, broker: "redis.Redis") -> None:
    """Breaks if a message is dropped because its exchange has no bindings, as kombu does."""
    publish(settings, [delivery(workout("u1"))])

    def give_back(message: Any) -> None:
        broker.delete("_kombu.binding.live")
        message.reject(requeue=True)

    consume_one(settings, give_back)
    assert (broker.llen(LIVE), held(broker)) == (1, 1)


def test_a_shared_batch_lingers_for_the_next(
    settings: Settings, broker: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if workers of a busy lane do not linger, or the worker of a quiet lane does."""
    monkeypatch.setattr(redis_transport, "LINGER_SECONDS", 2.0)
    publisher, taken = BlockingPublisher(settings), list[tuple[str, bool]]()
    began = time.monotonic()

    def note(message: Any) -> None:
        taken.append((message.headers["argsrepr"], time.monotonic() - began > 2.0))
        message.ack()

    with consuming(settings, note) as consume_next:
        for user in ("u1", "u2"):
            publisher.publish([delivery(workout(user))])
        consume_next()  # both were there
        publisher.publish([delivery(workout("u3"))])
        timer = threading.Timer(0.3, publisher.publish, [[delivery(workout("u4"))]])
        timer.start()
        consume_next()
        timer.join()
        publisher.publish([delivery(workout("u5"))])
        consume_next()
    publisher.close()
    assert [many for many, _ in taken] == ["(2 deliveries)", "(2 deliveries)", "(1 deliveries)"]
    assert not taken[0][1]


def test_a_worker_does_not_linger_while_messages_are_queued(
    settings: Settings, broker: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a worker waits although the lane holds the next batch, which would slow down emptying a long lane."""
    monkeypatch.setattr(redis_transport, "LINGER_SECONDS", 5.0)
    monkeypatch.setattr(redis_transport, "MAX_MERGED_MESSAGES", 2)
    publish(settings, *([delivery(workout(f"u{number}"))] for number in range(6)))
    began = time.monotonic()
    with consuming(settings, lambda message: message.ack()) as consume_next:
        for _ in range(3):
            consume_next()
    assert (held(broker), time.monotonic() - began < 5.0) == (0, True)


def test_a_worker_does_not_linger_after_a_large_batch(
    settings: Settings, broker: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if rows come later although a larger batch would save next to nothing."""
    monkeypatch.setattr(redis_transport, "LINGER_SECONDS", 5.0)
    monkeypatch.setattr(redis_transport, "SMALL_BATCH_BYTES", 100)
    began = time.monotonic()
    with consuming(settings, lambda message: message.ack()) as consume_next:
        for _ in range(2):
            publish(settings, [delivery(workout("u1"))], [delivery(workout("u2"))])
            consume_next()
    assert (held(broker), time.monotonic() - began < 5.0) == (0, True)


def test_a_merged_message_stays_within_its_limits(settings: Settings, broker: "redis.Redis") -> None:
    """Breaks if a merged message exceeds its limits on size or number."""
    noise = os.urandom(MAX_MERGED_BYTES // 6).hex()  # does not shrink; base64 twice makes it 1.8 times as large
    publish(settings, *([delivery(workout("u1", note=noise))] for _ in range(4)))
    publish(settings, *([delivery(workout(f"u{number}"))] for number in range(2 * MAX_MERGED_MESSAGES)))
    taken: list[int] = []

    def note(message: Any) -> None:
        taken.append(int(message.headers["argsrepr"][1:].partition(" ")[0]))
        message.ack()

    while broker.llen(LIVE):
        consume_one(settings, note)
    assert (sum(taken), max(taken), taken[0]) == (4 + 2 * MAX_MERGED_MESSAGES, MAX_MERGED_MESSAGES, 2), taken


def test_an_idle_search_for_messages_of_killed_workers_writes_nothing(
    settings: Settings, broker: "redis.Redis"
) -> None:
    """Breaks if each worker of an idle stack has the broker sync to disk every few seconds."""

    def commands() -> dict[str, int]:
        return {name: one["calls"] for name, one in broker.info("commandstats").items()}

    celery = make_celery(settings, "worker")
    lane = next(queue for queue in celery.conf.task_queues if queue.name == LIVE)
    with (
        celery.connection_for_read() as connection,
        connection.channel() as channel,
        celery.amqp.Consumer(channel, [lane], accept=["json"]),
    ):
        channel.qos.restore_visible(interval=1)
        before = commands()
        channel.qos.restore_visible(interval=1)
        sent = {name for name, calls in commands().items() if calls > before.get(name, 0)}
    celery.close()
    assert sent <= {"cmdstat_zcount", "cmdstat_lrange", "cmdstat_info", "cmdstat_ping"}
