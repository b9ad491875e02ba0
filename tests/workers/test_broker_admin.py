"""Broker checks and queue depths, against a real broker whose settings are changed and restored."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
import redis

from app.broker.celery import make_celery
from app.broker.lanes import FAILING_SINCE, LANES, PROCESSING, RECEIVED_AT, RETRY_REASON, SENT_AT, SWEEP
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Misconfigured, TryLater
from tests.support.broker import BlockingPublisher
from workers.broker_admin import drain_invalid, lanes, need_durable
from workers.local.ports import free_port
from workers.redis_durability import redis_client

PASSWORD = "a-password-that-is-secret"


@pytest.fixture
def here(broker_url: str) -> Settings:
    return Settings(broker_url=broker_url)


@pytest.fixture
def client(broker_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(broker_url) as client:
        yield client


@contextlib.contextmanager
def set_to(client: Any, name: str, value: str) -> Iterator[None]:
    """Changes a setting of the broker for the duration of the block."""
    before = client.config_get(name)[name]
    client.config_set(name, value)
    try:
        yield
    finally:
        client.config_set(name, before)


def nowhere(user: str = "") -> Settings:
    """Settings with a broker address where no server listens."""
    return Settings(broker_url=f"redis://{user}:{PASSWORD}@127.0.0.1:{free_port()}/0")


def old(seconds: float) -> Delivery:
    return Delivery("junction", f"msg_{seconds}", time.time() - seconds, b"\x00{}")


def test_a_durable_broker_passes(here: Settings) -> None:
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
    """A power cut, a restart or full memory must not lose events that were answered 202."""
    with set_to(client, name, value):
        with pytest.raises(Misconfigured, match=f"BROKER_URL: the broker has {name} {value}.*CONFIG SET {name} "):
            need_durable(here)
        need_durable(replace(here, broker_durability_asserted=True))
    need_durable(here)


def test_a_broker_that_hides_its_configuration_is_refused(here: Settings, client: Any) -> None:
    """A managed Redis that forbids CONFIG passes only if the operator asserts its durability."""
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
def test_an_unreachable_rabbitmq_raises_try_later(scheme: str) -> None:
    with pytest.raises(TryLater, match="BROKER_URL: the broker cannot be reached"):
        need_durable(Settings(broker_url=f"{scheme}://127.0.0.1:{free_port()}"))


def test_a_broker_is_needed() -> None:
    with pytest.raises(Misconfigured, match="BROKER_URL"):
        need_durable(Settings())


def test_an_unreachable_broker_raises_try_later_without_its_password() -> None:
    settings = nowhere()
    for ask in (need_durable, lanes):
        with pytest.raises(TryLater, match="BROKER_URL: the broker cannot be reached") as caught:
            ask(settings)
        assert PASSWORD not in str(caught.value)


def test_the_error_for_a_wrong_password_does_not_contain_it(here: Settings) -> None:
    where = urlsplit(here.need_broker())
    url = urlunsplit(where._replace(netloc=f":{PASSWORD}@{where.hostname}:{where.port}"))
    settings = replace(here, broker_url=url)
    for ask in (need_durable, lanes):
        with pytest.raises((TryLater, Misconfigured), match="BROKER_URL") as caught:
            ask(settings)
        assert PASSWORD not in str(caught.value)


def test_empty_lanes_are_seen_as_empty(here: Settings) -> None:
    """Redis has no key for an empty queue."""
    found = lanes(here)
    assert [(lane.name, lane.messages, lane.oldest) for lane in found] == [(name, 0, None) for name in LANES]


def test_lanes_count_messages_and_know_the_oldest(here: Settings) -> None:
    publisher = BlockingPublisher(here)
    for deliveries in ([old(1000), old(1)], [old(2000)], [old(2)]):
        publisher.publish(deliveries)
    publisher.close()
    live, *others = lanes(here)
    assert (live.messages, {lane.messages for lane in others}) == (3, {0})
    assert live.oldest is not None
    assert timedelta(seconds=1000) <= live.oldest < timedelta(seconds=1100)


def test_another_task_in_a_lane_has_no_age(here: Settings) -> None:
    celery = make_celery(here, "publisher")
    celery.send_task(SWEEP, queue="maintenance")
    (lane,) = [one for one in lanes(here) if one.name == "maintenance"]
    assert (lane.messages, lane.oldest) == (1, None)
    celery.close()


def test_messages_of_workers_and_beat_have_an_age(here: Settings) -> None:
    """Their messages contain no delivery, so the age comes from a header."""
    celery = make_celery(here, "publisher")
    celery.send_task(SWEEP, queue="maintenance", headers={SENT_AT: time.time() - 500})
    (lane,) = [one for one in lanes(here) if one.name == "maintenance"]
    assert lane.oldest is not None
    assert timedelta(seconds=500) <= lane.oldest < timedelta(seconds=600)
    celery.close()


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b'{"body": "!"}', b'{"body": "W10="}', b'{"body": "W1siYSJdXQ=="}', b"[1]"]
)
def test_a_message_of_another_program_has_no_age(here: Settings, client: Any, raw: bytes) -> None:
    client.lpush("live", raw)
    live = lanes(here)[0]
    assert (live.messages, live.oldest) == (1, None)


def test_a_client_has_short_timeouts() -> None:
    started = time.monotonic()
    with redis_client(nowhere().need_broker()) as client, pytest.raises(redis.ConnectionError):
        client.ping()
    assert time.monotonic() - started < 20


def test_an_idle_sweep_sends_the_broker_few_commands(here: Settings, client: Any) -> None:
    """Breaks if every sweep opens its connections in several round trips, or reads each list in one of its own."""
    before = client.info("stats")["total_reads_processed"]
    drain_invalid(here, lambda *_: None)
    assert client.info("stats")["total_reads_processed"] - before <= 4  # AUTH, the lists, end of connection, INFO


def test_unacknowledged_messages_of_any_content_are_counted(here: Settings, client: Any) -> None:
    """Breaks if `status` or the sweep fails because of a message that somebody else has put into the broker."""
    odd = {"retries": "x", RETRY_REASON: ["a"], FAILING_SINCE: -1e300, RECEIVED_AT: {}, "eta": 7}
    shell = {"retries": 3, RETRY_REASON: "a\x1b[31mb" * 100, FAILING_SINCE: time.time() - 60}
    found = [json.dumps([{"body": "b", "headers": one, "properties": {}}, "", "live"]) for one in (odd, shell)]
    for tag, raw in enumerate([*found, "", "[]", "rubbish", '[{"headers": {'], 1):
        client.hset("unacked", tag, raw)
        client.zadd("unacked_index", {tag: tag})
    live = lanes(here)[0]
    assert (live.unacked, live.retrying, live.retries) == (2, 1, 3)
    assert live.retry_reason == ("a[31mb" * 100)[:200]


def test_a_message_that_waits_for_its_retry_is_not_being_processed(here: Settings, client: Any) -> None:
    """Breaks if a delayed retry counts as a stuck worker, or a stuck worker is not seen."""
    for tag, eta in (("running", None), ("waiting", "2999-01-01T00:00:00+00:00")):
        headers = {"eta": eta, RECEIVED_AT: time.time() - (600 if eta else 400)}
        client.hset("unacked", tag, json.dumps([{"body": "b", "headers": headers}, "", "download"]))
        client.zadd("unacked_index", {tag: time.time()})
    client.lpush("download" + PROCESSING, "popped")
    download = lanes(here)[1]
    assert download.unacked == 3
    assert download.unacked_for is not None
    assert 399 < download.unacked_for.total_seconds() < 500


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "1" * 400, "true", "[" * 5000])
def test_odd_headers_of_an_unacknowledged_message_do_not_end_status(here: Settings, client: Any, number: str) -> None:
    """Breaks if a client of the broker can end `headrace status` with a number that is no time and no count."""
    headers = ", ".join(f'"{name}": {number}' for name in ("retries", RECEIVED_AT, FAILING_SINCE))
    client.hset("unacked", "odd", f'[{{"body": "b", "headers": {{{headers}}}}}, "", "live"]')
    client.zadd("unacked_index", {"odd": 1})
    live = lanes(here)[0]
    assert (live.unacked, live.retries <= 1) == (1, True)
