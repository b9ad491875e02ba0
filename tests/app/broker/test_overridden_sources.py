"""Digests of the private functions of kombu and Celery that Headrace overrides or calls: review each change."""

import hashlib
import inspect
import tomllib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
from amqp import Connection as AMQPConnection  # type: ignore[import-untyped]
from celery import Celery
from celery.app.amqp import AMQP
from celery.worker import consumer
from celery.worker.consumer.control import Control
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from celery.worker.pidbox import Pidbox
from flower.views.monitor import Metrics
from kombu.connection import Connection
from kombu.transport import redis, virtual
from packaging.requirements import Requirement
from redis.sentinel import SentinelConnectionPoolProxy, SentinelManagedConnection

from app.broker import failover, redis_transport
from app.broker.redis_celery import QuickConnection
from tests.support import ROOT
from workers.celery.consumer import make_consumer

WHAT_TO_DO = """{name} of {package} has changed.
Read the change, adapt what overrides or calls it (app/broker/redis_transport.py, redis_celery.py, sentinel.py and
failover.py, workers/celery/consumer.py, heartbeats.py and flower.py), then update its digest here to {digest!r}."""
# The first twelve hexadecimal digits of the SHA-256 of each source.
OVERRIDDEN: dict[Callable[..., Any], str] = {
    redis.QoS.append: "35c655f6ecc6",
    redis.QoS.ack: "1bc15a4ddf54",
    redis.QoS.restore_visible: "d4a4a40a3eaf",
    redis.Channel.conn_or_acquire: "25883caca6c4",
    redis.Channel._brpop_start: "06723d707ddf",
    redis.Channel._brpop_read: "c42518699709",
    redis.Channel._do_restore_message: "8b430df94e45",
    redis.Channel._put: "1c0cf9749576",
    redis.Channel.maybe_refresh_binding_expiry: "6a24d076d222",
    redis.SentinelChannel._sentinel_managed_pool: "bde54a2d6e93",
    Connection._ensure_connection: "9928a72370fd",
    Connection.as_uri: "84a4b582d143",
    Connection._connection_factory: "b96326e2cccc",
    Connection.maybe_switch_next: "4224624771e9",
    AMQP._create_task_sender: "f648c9fd2959",
    Celery._connection: "8c73001d4137",
    virtual.base.Base64.decode: "e3f834a13358",
    redis.Channel._receive_one: "d59b8751d897",
    consumer.Consumer.create_task_handler: "292c5a681f10",
    consumer.Consumer.on_decode_error: "e3538c586a7f",
    consumer.Consumer.call_soon_ack: "39f8579d0762",
    Metrics.get: "e596713f31f1",
}
# What the overriding code calls, or is called by, in the way that it was written for.
RELIED_ON: dict[Callable[..., Any], str] = {
    virtual.QoS.append: "b388f0cd6485",
    virtual.Transport._deliver: "799e242f3ec5",
    virtual.QoS.ack: "0714292b916f",
    redis.QoS.restore_by_tag: "58e161d81b6f",
    redis.Channel._create_client: "dae92bc4075d",
    redis.Channel._flush_brpop_reauth: "bb4930b4fd3c",
    redis.Channel._restore: "92e63e38835b",
    redis.MultiChannelPoller._register_BRPOP: "85724582464a",
    redis.MultiChannelPoller.maybe_refresh_binding_expiry: "8564166a6431",
    redis.MultiChannelPoller.get: "e0f960e0c328",
    redis.Channel._connparams: "e9a4295085a8",
    SentinelConnectionPoolProxy.reset: "65e4e110b4ff",
    SentinelManagedConnection._connect_retry: "3c68be804dbb",
    redis.MultiChannelPoller.on_readable: "c0d99f241607",
    DelayedDelivery.start: "28f53fd4146f",
    Control.__init__: "35676395acaf",
    Pidbox.__init__: "a7c5b7b005e4",
    Pidbox.start: "94ac3a69cb47",
    AMQPConnection.heartbeat_tick: "6e0e042ed248",
    Pidbox.on_message: "a7fc59f96634",
}


def digest(function: Callable[..., Any]) -> str:
    """A short digest of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    ("function", "known"),
    [pytest.param(*pair, id=pair[0].__qualname__) for pair in chain(OVERRIDDEN.items(), RELIED_ON.items())],
)
def test_the_source_is_the_one_that_was_read(function: Callable[..., Any], known: str) -> None:
    """Breaks if a library changes a function that Headrace overrides or calls."""
    found, package = digest(function), function.__module__.partition(".")[0]
    assert found == known, WHAT_TO_DO.format(name=function.__qualname__, package=package, digest=found)


def overridden(ours: type, theirs: type) -> Iterator[Callable[..., Any]]:
    """The functions of `theirs` that `ours` overrides."""
    return (getattr(theirs, name) for name in vars(ours) if inspect.isfunction(getattr(theirs, name, None)))


def test_every_override_is_in_the_table() -> None:
    """Breaks if an overridden method is missing in the table."""
    kept = make_consumer(lambda _body, _reason: None)
    pairs = [
        (redis_transport.QoS, redis.QoS),
        (redis_transport.Channel, redis.Channel),
        (redis_transport.Transport, redis.Transport),
        (redis_transport.SentinelChannel, redis.SentinelChannel),
        (redis_transport.SentinelTransport, redis.SentinelTransport),
        (QuickConnection, Connection),
        (failover.FailoverConnection, Connection),
        (failover.ReturnAwareAMQP, AMQP),
        (failover.FailoverCelery, Celery),
        (redis_transport.Base64, virtual.base.Base64),
        (kept, consumer.Consumer),
        (kept.Blueprint, consumer.Consumer.Blueprint),
    ]
    assert {one for pair in pairs for one in overridden(*pair)} | {Metrics.get} == OVERRIDDEN.keys()


@pytest.mark.parametrize("package", ["kombu", "celery"])
def test_only_versions_that_were_read_are_installed(package: str) -> None:
    """Breaks if `pip install headrace` allows a minor version whose private methods were not reviewed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = [one for one in map(Requirement, project["dependencies"]) if one.name == package]
    assert {str(one) for one in needed.specifier} == {">=5.7", "<5.8"}
