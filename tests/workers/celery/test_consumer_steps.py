"""The steps of a worker's consumer."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from amqp.exceptions import ChannelError, ResourceLocked  # type: ignore[import-untyped]
from celery.worker.consumer import Consumer
from celery.worker.consumer.control import Control
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from kombu.asynchronous import Hub
from kombu.utils.imports import symbol_by_name

from workers.celery.consumer import CONTROL_SECONDS, ReadOnlyControl, make_consumer


def test_delayed_delivery_and_nothing_else_is_left_out() -> None:
    """Breaks if a worker declares 28 unused queues, or lacks a step."""
    ours = [symbol_by_name(one) for one in make_consumer(lambda _body, _reason: None).Blueprint.default_steps]
    theirs = [symbol_by_name(one) for one in Consumer.Blueprint.default_steps]
    assert DelayedDelivery in theirs
    assert ours == [ReadOnlyControl if one is Control else one for one in theirs if one is not DelayedDelivery]


def test_a_step_is_known_by_its_class(monkeypatch) -> None:
    """Breaks if the step returns when Celery names it differently, or a step with a similar name is removed."""

    class NotDelayedDelivery:
        pass

    monkeypatch.setattr(Consumer.Blueprint, "default_steps", [DelayedDelivery, NotDelayedDelivery])
    assert make_consumer(lambda _body, _reason: None).Blueprint.default_steps == (NotDelayedDelivery,)


def make_control(start: Callable[[Any], None]) -> tuple[ReadOnlyControl, SimpleNamespace, list[tuple[Any, ...]]]:
    """The step with this start, a worker, and the list of what its timer gets."""
    later: list[tuple[Any, ...]] = []
    control = ReadOnlyControl.__new__(ReadOnlyControl)
    control.box = SimpleNamespace(start=start)
    connection = SimpleNamespace(channel_errors=(ChannelError,))
    timer = SimpleNamespace(call_after=lambda *arguments: later.append(arguments))
    return control, SimpleNamespace(connection=connection, timer=timer), later


@pytest.mark.parametrize("error", [ResourceLocked("celery.pidbox"), TimeoutError()])
def test_a_worker_starts_without_remote_control(error: Exception) -> None:
    """Breaks if a worker ends, or consumes nothing, while RabbitMQ keeps the queue of its lost connection locked."""
    results: list[Exception | None] = [error, None]

    def start(_worker: Any) -> None:
        result = results.pop(0)
        if result is not None:
            raise result

    control, worker, later = make_control(start)
    control._start(worker)
    ((seconds, again, arguments),) = later
    assert seconds == CONTROL_SECONDS
    again(*arguments)
    assert results == []
    assert len(later) == 1


def test_remote_control_is_not_started_twice() -> None:
    """Breaks if a worker that has reconnected meanwhile answers each command twice."""
    control, worker, _ = make_control(lambda _worker: pytest.fail("started"))
    control._start(worker, "an older connection")


@pytest.mark.parametrize(("url", "is_at_once"), [("amqp://a;amqp://b", True), ("redis://a", False)])
def test_rabbitmq_gets_an_acknowledgement_before_the_loop_waits(url: str, is_at_once: bool) -> None:
    """Breaks if a message that the loop has read after its poll is acknowledged up to a second later."""
    kind = make_consumer(lambda _body, _reason: None)
    worker, acknowledged = kind.__new__(kind), list[str]()
    worker.app, worker.hub = SimpleNamespace(conf=SimpleNamespace(broker_url=url)), Hub()
    worker.call_soon_ack(acknowledged.append, "tag")
    assert acknowledged == (["tag"] if is_at_once else [])
    worker.hub.close()
