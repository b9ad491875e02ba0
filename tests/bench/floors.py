"""The floors: what parts of the way cost alone, measured beside the whole, so that every figure is also a ratio."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from flask import Flask, Response, request

from app.config import Settings, load
from app.delivery import Delivery, pack
from app.providers import junction
from app.queue import Publisher, make_celery
from tests.bench.load import samples_event, workout_event
from tests.support import ENCRYPTION_KEY, delivery
from workers.apply import Applier
from workers.store.engine import make_writer


def _route(*, verify: bool) -> Flask:
    flask, settings = Flask("floor"), load()

    @flask.post("/webhooks/junction")
    def webhook() -> Response:
        body = request.get_data()
        if verify:
            junction.verify(request.headers, body, settings, datetime.now(UTC))
        return Response(status=202)

    @flask.get("/livez")
    def livez() -> Response:
        return Response("up")

    return flask


def bare() -> Flask:
    """A route that only answers."""
    return _route(verify=False)


def verified() -> Flask:
    """A route that verifies and answers."""
    return _route(verify=True)


def _deliveries(count: int, *, samples: bool = False) -> list[Delivery]:
    make = samples_event if samples else workout_event
    return [delivery(make(f"floor-{number % 50}", number), datetime.now(UTC)) for number in range(count)]


def publishing(broker_url: str, *, size: int, seconds: float = 2.0) -> float:
    """Deliveries a second that one thread publishes, `size` to a message. Leaves the lane as it was: empty."""
    celery = make_celery(Settings(broker_url=broker_url), "publisher")
    publisher, message, sent = Publisher(celery), _deliveries(size), 0
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        publisher.publish(message)
        sent += size
    rate = sent / (time.perf_counter() - began)
    with celery.connection_for_write() as connection:
        connection.default_channel.queue_purge("live")
    publisher.close()
    return rate


def applying(settings: Settings, *, size: int, messages: int, samples: bool = False) -> float:
    """Deliveries a second that one process applies, `size` to a message."""
    settings = replace(settings, encryption_keys=(ENCRYPTION_KEY,))
    deliveries = _deliveries(size * (messages + 1), samples=samples)
    packed = [pack(deliveries[start : start + size]) for start in range(0, len(deliveries), size)]
    with _applier(settings) as applier:
        applier.apply(packed.pop())
        began = time.perf_counter()
        for message in packed:
            applier.apply(message)
        return size * messages / (time.perf_counter() - began)


@contextmanager
def _applier(settings: Settings) -> Iterator[Applier]:
    engine = make_writer(settings)
    yield Applier(engine, settings)
    engine.dispose()
