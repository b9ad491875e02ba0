"""The steps of a worker's consumer."""

from celery.worker.consumer import Consumer
from celery.worker.consumer.control import Control
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from kombu.utils.imports import symbol_by_name

from workers.celery.consumer import ReadOnlyControl, make_consumer


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
