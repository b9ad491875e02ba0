"""Publishing with replicas, with and without Sentinel: what was confirmed survives a failover."""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis

from app.broker.celery import make_celery
from app.broker.sentinel import PrimaryFinder, make_client
from app.config import sentinel_url
from app.config.settings import Settings
from app.delivery import unpack
from app.errors import PublishFailed
from tests.support import delivery, workout
from tests.support.broker import BlockingPublisher, arguments
from tests.support.sentinels import (
    MASTER,
    PASSWORD,
    SENTINEL_PASSWORD,
    Group,
    Node,
    data_node,
    monitor,
    running_group,
    sentinel,
    until,
)
from tests.support.workers import consuming, messages
from workers.local.ports import free_port

pytestmark = pytest.mark.services
ANSWER_SECONDS = 5.0  # what a sender is promised
FOLLOW_SECONDS = 2.0  # from the promotion to the next publish


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    with running_group(tmp_path) as group:
        yield group


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Group]:
    """With two replicas: after a failover the new primary has one."""
    with running_group(tmp_path, replicas=2) as group:
        yield group


def settings_of(url: str, replicas: int = 1) -> Settings:
    return Settings(broker_url=url, broker_replicas=replicas)


@dataclass
class Sender:
    """Publishes deliveries with names of their own, and remembers those that were confirmed."""

    publisher: BlockingPublisher
    sent: int = 0
    confirmed: set[str] = field(default_factory=set)

    def attempt(self) -> bool:
        """Publishes one delivery. Returns whether it was confirmed, in time in any case."""
        began, name = time.monotonic(), f"msg_{self.sent}"
        self.sent += 1
        try:
            self.publisher.publish([delivery(workout("u1"), name=name)])
        except PublishFailed:
            return False
        finally:
            assert time.monotonic() - began < ANSWER_SECONDS
        self.confirmed.add(name)
        return True


@pytest.fixture
def make_sender() -> Iterator[Callable[[str], Sender]]:
    made: list[Sender] = []

    def make(url: str, replicas: int = 1) -> Sender:
        made.append(Sender(BlockingPublisher(settings_of(url, replicas))))
        return made[-1]

    yield make
    for sender in made:
        sender.publisher.close()


def names_in(message: dict[str, Any]) -> set[str]:
    return {one.message_id for one in unpack(arguments(message)[0])}


def stored(node: Node) -> set[str]:
    """The names of the deliveries on a node: queued, being received, and unacknowledged ones."""
    with node.client as client:
        return {name for message in messages(client) for name in names_in(message)}


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_publishers_and_consumers_follow_a_failover(
    trio: Group, make_sender: Callable[[str], Sender], fault: signal.Signals
) -> None:
    """Breaks if a confirmed message is lost with the primary, or a process stays with a killed or frozen primary."""
    sender, received = make_sender(trio.url), list[set[str]]()

    def note(message: Any) -> None:
        received.append({one.message_id for one in unpack(message.decode()[0][0])})
        message.ack()

    assert all(sender.attempt() for _ in range(5))
    assert stored(trio.nodes[1]) == sender.confirmed
    with consuming(settings_of(trio.url), note) as consume_next:
        consume_next()
        assert all(sender.attempt() for _ in range(5))
        trio.nodes[0].signal(fault)
        assert not sender.attempt()
        promoted = trio.promoted()
        began = time.monotonic()
        until(sender.attempt)
        published_after = time.monotonic() - began
        before = len(received)
        while len(received) == before:
            with contextlib.suppress(redis.ConnectionError, OSError):  # a worker connects again then
                consume_next()
        received_after = time.monotonic() - began
    assert sender.confirmed <= stored(promoted).union(*received)
    assert max(published_after, received_after) < FOLLOW_SECONDS, (published_after, received_after)


def test_a_message_that_no_replica_has_is_not_confirmed(group: Group, make_sender: Callable[[str], Sender]) -> None:
    """Breaks if an event is answered 202 that a failover would lose, or `/readyz` says that the broker accepts it."""
    sender = make_sender(group.direct_url)
    assert sender.attempt()
    group.nodes[1].signal(signal.SIGSTOP)
    assert [sender.attempt() for _ in range(2)] == [False, False]
    with pytest.raises(PublishFailed):
        sender.publisher.ping()
    group.nodes[1].signal(signal.SIGCONT)
    assert until(sender.attempt) < FOLLOW_SECONDS
    sender.publisher.ping()
    until(lambda: sender.confirmed <= stored(group.nodes[1]))


def test_an_old_primary_confirms_nothing_after_the_promotion(
    group: Group, make_sender: Callable[[str], Sender]
) -> None:
    """Breaks if an isolated old primary, which its clients still reach, confirms a message that only it has."""
    sender = make_sender(group.direct_url)
    assert all(sender.attempt() for _ in range(3))
    with group.nodes[1].client as replica:
        replica.replicaof("NO", "ONE")
    assert [sender.attempt() for _ in range(2)] == [False, False]
    assert stored(group.nodes[1]) == sender.confirmed


def test_a_message_needs_the_configured_number_of_replicas(tmp_path: Path, make_sender: Callable[..., Sender]) -> None:
    """Breaks if one replica is enough where two are asked for."""
    with running_group(tmp_path, replicas=2, with_sentinels=False) as group:
        one, two = make_sender(group.direct_url), make_sender(group.direct_url, replicas=2)
        assert (one.attempt(), two.attempt()) == (True, True)
        group.nodes[1].signal(signal.SIGSTOP)
        assert (one.attempt(), two.attempt()) == (True, False)


def test_a_refused_message_is_not_queued_again_and_again(group: Group, make_sender: Callable[[str], Sender]) -> None:
    """Breaks if each repeated webhook adds another message while no replica confirms."""
    sender = make_sender(group.direct_url)
    group.nodes[1].signal(signal.SIGSTOP)
    assert not any(sender.attempt() for _ in range(3))
    assert stored(group.nodes[0]) == set()


def test_the_newest_configuration_counts(tmp_path: Path) -> None:
    """Breaks if a sentinel that has missed a failover, on the machine of the old primary, is believed."""
    with ExitStack() as stack:
        old, new = data_node(stack, tmp_path), data_node(stack, tmp_path)
        stale = sentinel(stack, tmp_path, free_port(), *monitor(old.port))
        epoch = (*monitor(new.port), f"sentinel config-epoch {MASTER} 7")
        others = [sentinel(stack, tmp_path, free_port(), *epoch) for _ in range(2)]
        url = sentinel_url.read(Group([old, new], [stale, *others]).url)
        assert PrimaryFinder(url).discover_master(MASTER) == ("127.0.0.1", new.port)
        others[1].signal(signal.SIGKILL)
        assert PrimaryFinder(url).discover_master(MASTER) == ("127.0.0.1", new.port)


def test_a_silent_sentinel_costs_half_a_second_once(group: Group) -> None:
    """Breaks if each new connection waits for a sentinel whose machine is lost."""
    finder = PrimaryFinder(sentinel_url.read(group.url))
    group.sentinels[0].signal(signal.SIGSTOP)
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        assert finder.discover_master(MASTER) == ("127.0.0.1", group.nodes[0].port)
        seconds.append(time.monotonic() - began)
    assert 0.4 < seconds[0] < 1.0
    assert max(seconds[1:]) < 0.3
    group.sentinels[0].signal(signal.SIGCONT)


def test_kombus_form_of_a_sentinel_url_works(group: Group) -> None:
    """Breaks if a URL in kombu's form, in which every host repeats the scheme, is read in another way."""
    hosts = ";".join(f"sentinel://127.0.0.1:{one.port}" for one in group.sentinels)
    url = f"{hosts.replace('//', f'//:{PASSWORD}@', 1)}/0?master={MASTER}&sentinel_password={SENTINEL_PASSWORD}"
    assert sentinel_url.read(url) == sentinel_url.read(group.url)
    with make_client(url, timeout=3, connect_timeout=2) as client:
        assert client.ping()


def test_celery_shows_no_password(group: Group) -> None:
    """Breaks if a password is in the options that Celery's remote control and Flower show."""
    for role in ("publisher", "worker"):
        celery = make_celery(settings_of(group.url), role)  # type: ignore[arg-type]
        shown = str({**celery.connection_for_read().info(), "password": ""}) + celery.connection_for_read().as_uri()
        assert PASSWORD not in shown
        assert SENTINEL_PASSWORD not in shown


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server, in a version before 7.2")
def test_an_older_redis_waits_for_its_replicas_too(tmp_path: Path, make_sender: Callable[[str], Sender]) -> None:
    """Breaks if publishing needs WAITAOF, or does not wait without it."""
    with ExitStack() as stack:
        binary = str(shutil.which("redis-server"))
        primary = data_node(stack, tmp_path, binary=binary)
        replica = data_node(stack, tmp_path, primary=primary.port, binary=binary)
        sender = make_sender(Group([primary]).direct_url)
        until(sender.attempt)
        replica.signal(signal.SIGSTOP)
        assert not sender.attempt()
        replica.signal(signal.SIGCONT)
        until(lambda: sender.confirmed <= stored(replica))


def test_a_node_that_became_a_replica_is_a_lost_connection(group: Group) -> None:
    """Breaks if a worker behind a proxy ends when its node becomes a replica: kombu expects no READONLY error."""
    celery = make_celery(settings_of(group.direct_url), "worker")
    with celery.connection_for_read() as connection, connection.channel() as channel:
        with group.nodes[0].client as client:
            client.replicaof("127.0.0.1", group.nodes[1].port)
        with pytest.raises(channel.connection_errors), channel.conn_or_acquire() as client:
            client.set("a", "b")
