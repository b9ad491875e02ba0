"""The configuration of Celery: serializers, acknowledgement and timeouts."""

from typing import Any

import pytest
from celery import Celery
from kombu.exceptions import ContentDisallowed

from app.broker.celery import make_celery
from app.config.settings import Settings
from tests.support.broker import arguments, waiting  # noqa: F401 - tests/processes imports them from here

QUICK = 5.0  # seconds: what a sender is promised


def test_a_pickled_message_is_not_read(url: str) -> None:
    """Breaks if a message can run code in a worker."""
    worker = make_celery(Settings(broker_url=url), "worker")
    got: list[str] = []

    def take(message: Any) -> None:
        try:
            message.decode()
        except ContentDisallowed:
            got.append(message.content_type)
        message.ack()

    with worker.connection_for_write() as connection:
        lane = worker.amqp.queues["live"]
        with worker.amqp.Producer(connection) as producer:
            producer.publish(([], {}, {}), routing_key="live", exchange="", serializer="pickle", declare=[lane])
        with worker.amqp.TaskConsumer(connection.default_channel, on_message=take, queues=[lane]):
            connection.drain_events(timeout=QUICK)
    assert got == ["application/x-python-serialize"]


@pytest.mark.parametrize("role", ["publisher", "worker"])
def test_only_json_is_spoken(role: str) -> None:
    """Breaks if a serializer that can run code is allowed."""
    conf = make_celery(Settings(broker_url="redis://h"), role).conf  # type: ignore[arg-type]
    assert (conf.accept_content, conf.task_serializer, conf.task_ignore_result) == (["json"], "json", True)


@pytest.mark.parametrize("role", ["publisher", "worker"])
def test_a_publish_waits_for_the_confirmation(role: Any) -> None:
    """Breaks if a 202 on RabbitMQ means that one node had the event in memory."""
    amqp = make_celery(Settings(broker_url="amqp://h"), role).conf
    assert amqp.broker_transport_options["confirm_publish"] is True


def test_a_publisher_gives_up_before_its_sender_does() -> None:
    """Breaks if a publisher retries: the sender does that."""
    celery: Celery = make_celery(Settings(broker_url="redis://h"), "publisher")
    assert celery.conf.task_publish_retry is False
    assert celery.conf.broker_transport_options["socket_timeout"] * 2 < QUICK
    assert celery.conf.broker_transport_options["socket_connect_timeout"] <= 1
