"""The check of Redis and its replicas, against real ones."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from app.broker.lanes import LANES
from app.config.settings import Settings
from app.errors import Misconfigured, TryLater
from tests.support.sentinels import Group, data_node, running_group, until
from workers.broker_admin import drain_invalid, lanes, need_durable, need_redis
from workers.fetch.rate_limits import Throttle

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with running_group(tmp_path_factory.mktemp("group")) as group:
        yield group


def settings_of(url: str, replicas: int = 1) -> Settings:
    return Settings(broker_url=url, broker_replicas=replicas)


@pytest.mark.parametrize("attribute", ["url", "direct_url"])
def test_a_broker_with_replicas_is_refused_without_the_setting(group: Group, attribute: str) -> None:
    """Breaks if events are answered 202 that a failover to a replica would lose."""
    settings = settings_of(getattr(group, attribute), 0)
    with pytest.raises(Misconfigured, match="HEADRACE_BROKER_REPLICAS: not set, and the broker has 1 replicas"):
        need_durable(settings)
    need_durable(replace(settings, broker_durability_asserted=True))
    assert need_durable(replace(settings, broker_replicas=1)) == []


def test_more_replicas_than_there_are_is_a_clear_line(group: Group) -> None:
    """Breaks if the endpoint starts although it would refuse every event."""
    with pytest.raises(TryLater, match="HEADRACE_BROKER_REPLICAS: set to 2, but only 1 replicas are connected"):
        need_durable(settings_of(group.direct_url, 2))


@pytest.mark.parametrize(("name", "value"), [("appendfsync", "everysec"), ("maxmemory-policy", "allkeys-lru")])
def test_a_replica_with_unsafe_settings_is_refused(group: Group, name: str, value: str) -> None:
    """Breaks if a failover makes a node the primary that loses confirmed events."""
    with group.nodes[1].client as replica:
        before = replica.config_get(name)[name]
        replica.config_set(name, value)
        with pytest.raises(Misconfigured, match=f"the replica 127.0.0.1:{group.nodes[1].port} has {name} {value}"):
            need_durable(settings_of(group.url))
        replica.config_set(name, before)
    need_durable(settings_of(group.url))


def test_a_replica_that_hides_its_settings_is_a_remark(group: Group) -> None:
    """Breaks if a replica behind another password is refused: WAITAOF waits for its disk in any case."""
    with group.nodes[1].client as replica:
        replica.config_set("requirepass", "another-password")
        try:
            (remark,) = need_durable(settings_of(group.url))
        finally:
            group.nodes[1].password = "another-password"
            with group.nodes[1].client as again:
                again.config_set("requirepass", group.nodes[0].password)
            group.nodes[1].password = group.nodes[0].password
    assert remark == f"the settings of the replicas 127.0.0.1:{group.nodes[1].port} cannot be read"


def test_a_replica_is_no_broker(group: Group) -> None:
    """Breaks if a URL of a replica, which accepts no messages, passes."""
    url = group.direct_url.replace(str(group.nodes[0].port), str(group.nodes[1].port))
    with pytest.raises(TryLater, match="BROKER_URL: the node at this address is a replica"):
        need_durable(settings_of(url))


@pytest.mark.parametrize("asserted", [False, True])
def test_the_setting_is_refused_with_rabbitmq(asserted: bool) -> None:
    """Breaks if an operator believes that the setting applies to quorum queues."""
    settings = Settings(broker_url="amqp://127.0.0.1:1", broker_replicas=1, broker_durability_asserted=asserted)
    with pytest.raises(Misconfigured, match="HEADRACE_BROKER_REPLICAS: for Redis and Valkey only"):
        need_durable(settings)


def test_an_unknown_primary_is_an_error_without_passwords(group: Group) -> None:
    """Breaks if a wrong name of the primary is not reported, or the error shows a password."""
    with pytest.raises(TryLater, match="BROKER_URL: the broker cannot be reached") as caught:
        need_durable(settings_of(group.url.replace("master=headrace", "master=other")))
    assert "password" not in str(caught.value)


def test_every_command_reaches_the_broker_through_sentinel(group: Group) -> None:
    """Breaks if `status`, the sweep or the rate limits cannot use a sentinel:// URL."""
    settings = settings_of(group.url)
    assert [one.messages for one in lanes(settings)] == [0] * len(LANES)
    drain_invalid(settings, lambda *_: None)
    need_redis(Settings(redis_url=group.url).need_redis(), "REDIS_URL")
    throttle = Throttle(Settings(broker_url="amqp://h", redis_url=group.url))
    assert [throttle.take("1/hour", "a key") > 0 for _ in range(2)] == [False, True]


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server, in a version before 7.2")
def test_before_waitaof_the_replicas_must_sync_always(tmp_path: Path) -> None:
    """Breaks if an old Redis, whose WAIT confirms what is only in memory, passes with unknown or unsafe replicas."""
    with ExitStack() as stack:
        binary = str(shutil.which("redis-server"))
        primary = data_node(stack, tmp_path, binary=binary)
        second = data_node(stack, tmp_path, primary=primary.port, binary=binary)
        with primary.client as client:
            if not client.info("server")["redis_version"].startswith(("6.", "7.0")):
                pytest.skip("this redis-server has WAITAOF")
            until(lambda: client.info("replication").get("slave0", {}).get("state") == "online")
        settings = settings_of(Group([primary]).direct_url)
        assert need_durable(settings) == []
        with second.client as replica:
            replica.config_set("appendfsync", "everysec")
        with pytest.raises(Misconfigured, match="has appendfsync everysec"):
            need_durable(settings)
        with second.client as replica:
            replica.config_set("requirepass", "another-password")
        with pytest.raises(Misconfigured, match="and before Redis"):
            need_durable(settings)
