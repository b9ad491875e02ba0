"""Two RabbitMQ servers in BROKER_URL, of which the first fails. They are no cluster, so each has its own lanes.

Skipped where RabbitMQ is not installed.
"""

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from amqp import Message  # type: ignore[import-untyped]
from kombu import Exchange, Producer
from sqlalchemy import Engine

from app.broker import lanes as brokers
from app.broker.celery import make_celery
from app.broker.delays import delay_queue
from app.broker.rabbitmq_publisher import RabbitMQPublisher
from app.config.settings import Settings
from app.errors import PublishFailed
from tests.support import delivery, rows, until, worker, workout
from tests.support.broken_ports import BROKEN, Broken, amqp_url
from tests.support.rabbitmq import ABSENT, RabbitMQ, binaries, publishing, rabbitmq
from tests.support.workers import is_ready
from workers.broker_admin import lanes, need_durable
from workers.celery.heartbeats import TaskHeartbeats

pytestmark = [pytest.mark.processes, pytest.mark.services, pytest.mark.skipif(binaries() is None, reason=ABSENT)]
UNREACHABLE = "postgresql://u:sesame@127.0.0.1:1/d"


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[RabbitMQ, RabbitMQ]]:
    """Two servers for all tests."""
    with rabbitmq() as first, rabbitmq() as second:
        yield first, second


@pytest.fixture
def rabbits(pair: tuple[RabbitMQ, RabbitMQ]) -> tuple[RabbitMQ, RabbitMQ]:
    """Two servers with empty lanes, of which none has failed."""
    brokers._failures.clear()
    for server in pair:
        server.empty()
        need_durable(Settings(broker_url=server.url))
    return pair


def put(publisher: RabbitMQPublisher, name: str) -> float:
    """Publishes one delivery. Returns the seconds that it took."""
    began = time.monotonic()
    publisher.publish([delivery(workout("u1", name), name=name)])
    return time.monotonic() - began


def stored(engine: Engine) -> set[str]:
    return {row["id"] for row in rows(engine, "SELECT id FROM health.workouts")}


def test_a_publisher_goes_to_the_next_broker(rabbits: tuple[RabbitMQ, RabbitMQ]) -> None:
    """Breaks if a frozen broker delays more than one publish, or its event gets a 503 although another works."""
    first, second = rabbits
    with publishing(f"{first.url};{second.url}") as publisher:
        put(publisher, "before")
        assert (first.ready_count(), second.ready_count()) == (1, 0)
        with first.frozen():
            assert put(publisher, "w1") < 3
            assert put(publisher, "w2") < 1
            assert second.ready_count() == 2


@pytest.mark.parametrize("kind", BROKEN.values(), ids=BROKEN)
def test_every_new_connection_goes_to_the_next_broker(rabbits: tuple[RabbitMQ, RabbitMQ], kind: Broken) -> None:
    """Breaks if the endpoint, its readiness, the start of a process or `headrace status` needs the first broker."""
    with kind() as port:
        both = Settings(broker_url=f"{amqp_url(port)};{rabbits[1].url}")
        with publishing(both.need_broker()) as publisher:
            for act in (lambda: put(publisher, "w1"), publisher.ping, lambda: need_durable(both), lambda: lanes(both)):
                brokers._failures.clear()
                began = time.monotonic()
                act()
                assert time.monotonic() - began < 3


def test_publishing_declares_nothing(rabbits: tuple[RabbitMQ, RabbitMQ]) -> None:
    """Breaks if a new connection declares the lane: RabbitMQ delays that while a node does not answer."""
    first, _ = rabbits
    first.control("set_permissions", "guest", "^$", ".*", ".*")  # no right to declare
    try:
        with publishing(first.url) as publisher:
            put(publisher, "w1")
            publisher.ping()
            first.control("delete_queue", "live")
            with pytest.raises(PublishFailed, match="AccessRefused"):  # the control: a returned message is one reason
                put(publisher, "w2")
    finally:
        first.control("set_permissions", "guest", ".*", ".*", ".*")


def test_a_worker_continues_on_the_next_broker(
    engine: Engine, settings: Settings, rabbits: tuple[RabbitMQ, RabbitMQ], tmp_path: Path
) -> None:
    """Breaks if a worker, or the thread that returns its delayed messages, stays with a frozen broker."""
    first, second = rabbits
    both = replace(settings, broker_url=f"{first.url};{second.url}", redis_url=settings.broker_url)
    with worker(both, tmp_path / "log") as process:
        until(lambda: is_ready(tmp_path / "log"))
        with publishing(second.url) as publisher, second.connect() as connection:
            with first.frozen():
                put(publisher, "w1")
                connection.channel().basic_publish(
                    Message(b"sesame", delivery_mode=2), exchange="", routing_key=delay_queue("live").name
                )
                until(lambda: stored(engine) == {"w1"}, 40)
                until(lambda: len(rows(engine, "SELECT 1 FROM headrace.dead_letters")) == 1, 40)
            assert process.poll() is None


def test_no_message_is_dropped_at_a_delivery_limit(
    engine: Engine, settings: Settings, rabbits: tuple[RabbitMQ, RabbitMQ], tmp_path: Path
) -> None:
    """Breaks if a worker requeues what it cannot store yet: RabbitMQ 4 drops a message after 20 deliveries."""
    first, _ = rabbits
    settings = replace(settings, broker_url=first.url, redis_url=settings.broker_url)
    first.control("set_policy", "limit", ".*", '{"delivery-limit": 2}', "--apply-to", "queues")
    try:
        with publishing(first.url) as publisher:
            put(publisher, "w1")
        with worker(settings, tmp_path / "first", DATABASE_URL=UNREACHABLE):
            until(lambda: (tmp_path / "first").read_text().count("headrace.apply is retried") == 3, 60)
            with first.connect() as connection:
                connection.channel().basic_publish(Message(b"sesame", delivery_mode=2), exchange="", routing_key="live")
            until(lambda: (tmp_path / "first").read_text().count("cannot store a dead letter") == 3, 60)
        with worker(settings, tmp_path / "second"):
            until(lambda: stored(engine) == {"w1"}, 60)
            until(lambda: len(rows(engine, "SELECT 1 FROM headrace.dead_letters")) == 1)
    finally:
        first.control("clear_policy", "limit")


def test_a_worker_ignores_probes(
    engine: Engine, settings: Settings, rabbits: tuple[RabbitMQ, RabbitMQ], tmp_path: Path
) -> None:
    """Breaks if a readiness check leaves a message, a dead letter or a warning.

    Also breaks if events are applied only while REDIS_URL can be reached.
    """
    first, _ = rabbits
    settings = replace(settings, broker_url=first.url, redis_url="redis://127.0.0.1:1/0")
    with publishing(first.url) as publisher:
        publisher.ping()
        until(lambda: first.ready_count() == 0)
        with worker(settings, tmp_path / "log"):
            until(lambda: is_ready(tmp_path / "log"))
            for number in range(20):
                publisher.ping()
                put(publisher, f"w{number}")
            until(lambda: len(stored(engine)) == 20)
    assert first.ready_count() == 0
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []
    assert " WARNING " not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_long_task_keeps_its_connection(rabbits: tuple[RabbitMQ, RabbitMQ], *, is_kept: bool) -> None:
    """Breaks if RabbitMQ or the worker closes the connection during a task that reads nothing; with the control."""
    celery = make_celery(Settings(broker_url=rabbits[0].url), "worker")
    with celery.connection_for_read(heartbeat=1) as connection:
        channel = connection.default_channel
        connection.heartbeat_check()
        consumer = SimpleNamespace(
            task_consumer=SimpleNamespace(channel=channel), connection_errors=connection.connection_errors
        )
        heartbeats = TaskHeartbeats(consumer)
        end = time.monotonic() + 4
        while time.monotonic() < end:
            time.sleep(0.4)
            if is_kept:
                heartbeats._extend()
        if is_kept:
            connection.heartbeat_check()
            assert channel.queue_declare("live", passive=True).queue == "live"
        else:
            with pytest.raises(connection.connection_errors):
                connection.heartbeat_check()
    celery.close()


def test_a_publish_with_retries_leaves_a_connection_that_was_replaced(rabbits: tuple[RabbitMQ, RabbitMQ]) -> None:
    """Breaks if a heartbeat after a freeze is retried on a dead channel for ever, which stops its worker."""
    celery = make_celery(Settings(broker_url=";".join(server.url for server in rabbits)), "worker")
    exchange = Exchange("celeryev", type="topic")
    with celery, celery.connection_for_write() as connection:
        producer = Producer(connection, exchange=exchange, auto_declare=False)
        producer.publish("before", declare=[exchange], retry=True)
        transport = connection._connection._transport
        transport.sock.shutdown(socket.SHUT_RDWR)
        transport.connected = False
        connection.ensure_connection()
        publish = partial(producer.publish, "after", declare=[exchange], retry=True)
        thread = Thread(target=publish, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
