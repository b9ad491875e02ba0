"""What is asked of the broker, on a real one whose settings are changed and put back."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
import redis

from app.broker.celery import make_celery
from app.broker.lanes import LANES, SENT_AT, SWEEP
from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Misconfigured, TryLater
from workers.broker_admin import lanes, need_durable, redis_client
from workers.local.ports import free_port

PASSWORD = "a-password-that-is-secret"


@pytest.fixture
def here(broker_url: str) -> Settings:
    """Settings with an empty, durable broker."""
    return Settings(broker_url=broker_url)


@pytest.fixture
def client(broker_url: str) -> Iterator[Any]:
    """A connection of the test's own."""
    with redis.Redis.from_url(broker_url) as client:
        yield client


@contextlib.contextmanager
def set_to(client: Any, name: str, value: str) -> Iterator[None]:
    """A setting of the broker's, for as long as the block lasts."""
    before = client.config_get(name)[name]
    client.config_set(name, value)
    try:
        yield
    finally:
        client.config_set(name, before)


def nowhere(user: str = "") -> Settings:
    """Settings with a broker that does not listen."""
    return Settings(broker_url=f"redis://{user}:{PASSWORD}@127.0.0.1:{free_port()}/0")


def old(seconds: float) -> Delivery:
    """A delivery that came some time ago."""
    return Delivery("junction", f"msg_{seconds}", time.time() - seconds, b"\x00{}")


def test_a_durable_broker_is_taken(here: Settings) -> None:
    """Breaks if the broker that `headrace up` itself starts is refused."""
    need_durable(here)
    need_durable(Settings(redis_url=here.broker_url))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("appendfsync", "everysec"),
        ("appendfsync", "no"),
        ("appendonly", "no"),
        ("maxmemory-policy", "allkeys-lru"),
        ("maxmemory-policy", "volatile-ttl"),
    ],
)
def test_a_broker_that_loses_events_is_refused(here: Settings, client: Any, name: str, value: str) -> None:
    """Breaks if a 202 is given for what a power cut, a restart or full memory takes away."""
    with set_to(client, name, value):
        with pytest.raises(Misconfigured, match=f"BROKER_URL: the broker has {name} {value}.*CONFIG SET {name} "):
            need_durable(here)
        need_durable(replace(here, broker_durability_asserted=True))
    need_durable(here)


def test_a_broker_that_hides_its_configuration_is_refused(here: Settings, client: Any) -> None:
    """Breaks if a managed Redis, which forbids CONFIG, is believed to be durable, or cannot be vouched for."""
    client.acl_setuser("guest", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], commands=["+@all", "-config"])
    try:
        where = urlsplit(here.need_broker())
        url = urlunsplit(where._replace(netloc=f"guest:{PASSWORD}@{where.hostname}:{where.port}"))
        with pytest.raises(Misconfigured, match="HEADRACE_BROKER_DURABILITY_ASSERTED=true") as caught:
            need_durable(replace(here, broker_url=url))
        assert PASSWORD not in str(caught.value)
        need_durable(replace(here, broker_url=url, broker_durability_asserted=True))
    finally:
        client.acl_deluser("guest")


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
def test_a_rabbitmq_that_is_away_is_another_day(scheme: str) -> None:
    """Breaks if a broker that nobody could look at passes for durable, or its absence for a wrong setting."""
    with pytest.raises(TryLater, match="BROKER_URL: the broker cannot be reached"):
        need_durable(Settings(broker_url=f"{scheme}://127.0.0.1:{free_port()}"))


def test_a_broker_is_needed() -> None:
    """Breaks if a missing BROKER_URL shows as something else."""
    with pytest.raises(Misconfigured, match="BROKER_URL"):
        need_durable(Settings())


def test_no_broker_is_tried_later_without_the_password() -> None:
    """Breaks if a broker that restarts counts as a wrong setting, or its URL is told."""
    settings = nowhere()
    for ask in (need_durable, lambda one: lanes(make_celery(one, "publisher"), one)):
        with pytest.raises(TryLater, match="BROKER_URL: the broker cannot be reached") as caught:
            ask(settings)
        assert PASSWORD not in str(caught.value)


def test_a_wrong_password_is_told_without_it(here: Settings) -> None:
    """Breaks if the password that was tried gets into the text, or the error comes through as it is."""
    where = urlsplit(here.need_broker())
    url = urlunsplit(where._replace(netloc=f":{PASSWORD}@{where.hostname}:{where.port}"))
    settings = replace(here, broker_url=url)
    for ask in (need_durable, lambda one: lanes(make_celery(one, "publisher"), one)):
        with pytest.raises((TryLater, Misconfigured), match="BROKER_URL") as caught:
            ask(settings)
        assert PASSWORD not in str(caught.value)


def test_empty_lanes_are_seen_as_empty(here: Settings) -> None:
    """Breaks if a queue that Redis does not know, because nothing is in it, is an error or is left out."""
    found = lanes(make_celery(here, "publisher"), here)
    assert [(lane.name, lane.messages, lane.oldest) for lane in found] == [(name, 0, None) for name in LANES]


def test_lanes_count_messages_and_know_the_oldest(here: Settings) -> None:
    """Breaks if `headrace status` shows the wrong depth, or the age of the newest message."""
    celery = make_celery(here, "publisher")
    publisher = Publisher(celery)
    for deliveries in ([old(1000), old(1)], [old(2000)], [old(2)]):
        publisher.publish(deliveries)
    publisher.close()
    live, *others = lanes(celery, here)
    assert (live.messages, [lane.messages for lane in others]) == (3, [0, 0, 0])
    assert live.oldest is not None
    assert timedelta(seconds=1000) <= live.oldest < timedelta(seconds=1100)


def test_another_task_in_a_lane_has_no_age(here: Settings) -> None:
    """Breaks if a message that is no batch of deliveries makes `headrace status` fail."""
    celery = make_celery(here, "publisher")
    celery.send_task(SWEEP, queue="maintenance")
    (lane,) = [one for one in lanes(celery, here) if one.name == "maintenance"]
    assert (lane.messages, lane.oldest) == (1, None)
    celery.close()


def test_what_workers_and_beat_send_says_since_when_it_waits(here: Settings) -> None:
    """Breaks if nobody can see, or scale by, how long history has waited: its messages hold no delivery."""
    celery = make_celery(here, "publisher")
    celery.send_task(SWEEP, queue="maintenance", headers={SENT_AT: time.time() - 500})
    (lane,) = [one for one in lanes(celery, here) if one.name == "maintenance"]
    assert lane.oldest is not None
    assert timedelta(seconds=500) <= lane.oldest < timedelta(seconds=600)
    celery.close()


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b'{"body": "!"}', b'{"body": "W10="}', b'{"body": "W1siYSJdXQ=="}', b"[1]"]
)
def test_a_message_of_somebody_else_has_no_age(here: Settings, client: Any, raw: bytes) -> None:
    """Breaks if what another program put into the list makes `headrace status` fail."""
    client.lpush("live", raw)
    live = lanes(make_celery(here, "publisher"), here)[0]
    assert (live.messages, live.oldest) == (1, None)


def test_a_client_gives_up_quickly() -> None:
    """Breaks if a command hangs on a broker that does not answer."""
    started = time.monotonic()
    with redis_client(nowhere().need_broker()) as client, pytest.raises(redis.ConnectionError):
        client.ping()
    assert time.monotonic() - started < 20
