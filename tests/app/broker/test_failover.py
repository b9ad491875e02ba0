"""Several brokers in BROKER_URL that are all broken: each is tried, and the sender gets its answer in time."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.broker import lanes
from app.broker.celery import make_celery
from app.broker.lanes import in_order, mark_failed
from app.broker.rabbitmq_publisher import RabbitMQPublisher
from app.config.settings import Settings
from app.errors import PublishFailed, TryLater
from tests.support import delivery, workout
from tests.support.broken_ports import BROKEN, Broken, amqp_url, halting, refusing, silent
from workers.rabbitmq_admin import need_quorum_queues, queue_depths

DEADLINE = 5.0  # seconds until a sender must have its answer


@pytest.fixture(autouse=True)
def _no_failures() -> Iterator[None]:
    lanes._failures.clear()
    yield
    lanes._failures.clear()


def test_a_broker_that_failed_goes_to_the_end() -> None:
    """Breaks if each new connection tries a broken broker first."""
    all_three = "amqp://a//;amqp://b//;amqp://c//"
    assert in_order(all_three) == ["amqp://a//", "amqp://b//", "amqp://c//"]
    mark_failed("amqp://a//")
    assert in_order(all_three) == ["amqp://b//", "amqp://c//", "amqp://a//"]
    mark_failed("amqp://b//")
    assert in_order(all_three) == ["amqp://c//", "amqp://a//", "amqp://b//"]


def test_another_url_is_one_broker() -> None:
    """Breaks if the URL of another kind of broker is split."""
    assert in_order("sentinel://a;b/mymaster") == ["sentinel://a;b/mymaster"]


@pytest.mark.parametrize("kind", BROKEN.values(), ids=BROKEN)
def test_every_broker_is_tried_before_the_deadline(kind: Broken) -> None:
    """Breaks if a broken broker takes the time of the others, or a sender waits longer than 5 s."""
    with kind() as first, kind() as second:
        publisher = RabbitMQPublisher(make_celery(Settings(broker_url=amqp_url(first, second)), "publisher"))
        for fails in (lambda: publisher.publish([delivery(workout("u1"))]), publisher.ping):
            lanes._failures.clear()
            began = time.monotonic()
            with pytest.raises(PublishFailed):
                fails()
            assert time.monotonic() - began < DEADLINE
            assert set(lanes._failures) == {amqp_url(first), amqp_url(second)}


@pytest.mark.parametrize("kind", BROKEN.values(), ids=BROKEN)
def test_a_connection_of_a_worker_goes_to_the_next_broker(kind: Broken) -> None:
    """Breaks if a worker stays with a broker that does not answer: kombu limits all attempts to the time of one."""
    with kind() as first, kind() as second:
        celery = make_celery(Settings(broker_url=amqp_url(first, second)), "worker")
        tried: list[str] = []
        with pytest.raises((*celery.connection_for_read().connection_errors, OSError)):
            celery.connection_for_read().ensure_connection(
                errback=lambda _error, _interval: tried.append("failed"), max_retries=1, reraise_as_library_errors=False
            )
        assert tried == ["failed"]
        assert in_order(amqp_url(first, second))[0] == amqp_url(second)


@pytest.mark.parametrize("use", [need_quorum_queues, queue_depths])
def test_an_administrative_command_tries_all(use: Callable[[Settings], Any]) -> None:
    """Breaks if `headrace check` or a new process fails because one broker is down, also one that stops answering."""
    with refusing() as first, halting() as second, silent() as third:
        with pytest.raises(TryLater):
            use(Settings(broker_url=amqp_url(first, second, third)))
        assert list(lanes._failures) == [amqp_url(first), amqp_url(second), amqp_url(third)]
