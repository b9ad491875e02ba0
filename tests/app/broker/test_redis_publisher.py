"""Publishing: the message, and brokers that are unavailable, full or frozen."""

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from app.broker.lanes import APPLY, LANES
from app.config.settings import Settings
from app.delivery import Delivery, Receipt, seal, unpack
from app.errors import PublishFailed
from app.sealing import Sealer
from tests.support.broker import BlockingPublisher, arguments, fake_server, stop, waiting
from workers.local import embedded_valkey, wheels
from workers.local.supervisor import running

MakePublisher = Callable[[str], BlockingPublisher]
QUICK = 5.0  # seconds: what a sender is promised


def deliveries(*names: str) -> list[Delivery]:
    sealer = Sealer([bytes(32)])
    return [seal("junction", Receipt(name), b'{"heart":"canary"}', sealer) for name in names]


@pytest.fixture
def make_publisher() -> Iterator[MakePublisher]:
    """Makes publishers, which are closed at the end of the test."""
    made: list[BlockingPublisher] = []

    def make(url: str) -> BlockingPublisher:
        made.append(BlockingPublisher(Settings(broker_url=url)))
        return made[-1]

    yield make
    for publisher in made:
        publisher.close()


def refused_within(seconds: float, publisher: BlockingPublisher) -> str:
    """Publishes, expects PublishFailed in time and returns its text."""
    began = time.monotonic()
    with pytest.raises(PublishFailed) as refused:
        publisher.publish(deliveries("refused"))
    assert time.monotonic() - began < seconds
    return str(refused.value)


def test_a_publish_is_one_message_on_the_live_lane(url: str, make_publisher: MakePublisher) -> None:
    """Breaks if a publish enqueues no message, two, to another lane or in another form."""
    sent = deliveries("msg_1", "msg_2", "msg_3")
    make_publisher(url).publish(sent)
    (message,) = waiting(url)
    assert message["headers"]["task"] == APPLY
    assert message["content-type"] == "application/json"
    (packed,) = arguments(message)
    assert unpack(packed) == sent
    assert not any(waiting(url, lane) for lane in LANES if lane != "live")


def test_flower_shows_a_count_only(url: str, make_publisher: MakePublisher) -> None:
    """Breaks if Flower shows or a worker logs the arguments of a task."""
    make_publisher(url).publish(deliveries("msg_1", "msg_2", "msg_3"))
    (message,) = waiting(url)
    headers, properties = message["headers"], message["properties"]
    assert headers["argsrepr"] == "(3 deliveries)"
    assert headers["kwargsrepr"] == "{}"
    assert "msg_1" not in json.dumps([headers, properties])
    assert arguments(message)[0] not in json.dumps([headers, properties])


def test_a_body_is_not_readable_on_the_queue(url: str, make_publisher: MakePublisher) -> None:
    """Breaks if a body is readable on the broker."""
    make_publisher(url).publish(deliveries("msg_1"))
    (message,) = waiting(url)
    assert b"canary" not in base64.b64decode(arguments(message)[0])


def test_messages_keep_their_order(url: str, make_publisher: MakePublisher) -> None:
    """Breaks if a connection is not reused, or messages are reordered."""
    publisher, names = make_publisher(url), [f"msg_{n}" for n in range(20)]
    for name in names:
        publisher.publish(deliveries(name))
    assert [unpack(arguments(message)[0])[0].message_id for message in waiting(url)] == names


def test_a_publisher_has_one_connection(url: str, make_publisher: MakePublisher) -> None:
    """Breaks if each publish opens a connection, which costs more than the publish."""
    publisher = make_publisher(url)
    publisher.publish(deliveries("msg_1"))
    connection = publisher.publisher._connection
    publisher.publish(deliveries("msg_2"))
    assert publisher.publisher._connection is connection is not None


def test_a_ping_succeeds_and_leaves_nothing(url: str, make_publisher: MakePublisher) -> None:
    """Breaks if a ping fails while the broker is available, or enqueues a message."""
    make_publisher(url).ping()
    assert waiting(url) == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:1/5"])
def test_without_a_broker_a_ping_fails_quickly(address: str, make_publisher: MakePublisher) -> None:
    """Breaks if a ping succeeds or blocks without a broker."""
    began = time.monotonic()
    with pytest.raises(PublishFailed, match="cannot be reached"):
        make_publisher(f"redis://:canary@{address}").ping()
    assert time.monotonic() - began < QUICK


def test_without_a_broker_a_publish_fails_quickly_and_shows_no_password(
    make_publisher: MakePublisher,
) -> None:
    """Breaks if a publish blocks, raises an unexpected error or shows the broker's URL."""
    assert "canary" not in refused_within(QUICK, make_publisher("redis://:canary@127.0.0.1:1/0"))


def test_a_closed_publisher_can_publish_again(url: str, make_publisher: MakePublisher) -> None:
    """Breaks if a publisher cannot be closed twice or used again."""
    publisher = make_publisher(url)
    publisher.close()
    publisher.publish(deliveries("msg_1"))
    publisher.close()
    publisher.close()
    publisher.publish(deliveries("msg_2"))
    assert len(waiting(url)) == 2


def test_a_broker_that_comes_back_is_used_again(make_publisher: MakePublisher) -> None:
    """Breaks if a publish succeeds without the broker, or fails after its return (fakeredis)."""
    server = fake_server()
    port = server.server_address[1]
    publisher = make_publisher(f"redis://127.0.0.1:{port}/0")
    publisher.publish(deliveries("before"))
    stop(server)
    refused_within(QUICK, publisher)
    server = fake_server(port)
    publisher.publish(deliveries("after"))
    (message,) = waiting(f"redis://127.0.0.1:{port}/0")
    assert unpack(arguments(message)[0])[0].message_id == "after"
    stop(server)


@pytest.mark.services
@pytest.mark.skipif(not wheels.available(), reason="no Valkey wheel for this platform")
def test_confirmed_messages_survive_a_restart_of_the_broker(tmp_path: Path, make_publisher: MakePublisher) -> None:
    """Breaks if a restart loses a confirmed message, or the next publish fails (Valkey)."""
    program, url = embedded_valkey.valkey(tmp_path / "broker", "tests", tmp_path / "broker.log")
    publisher = make_publisher(url)
    with running(program):
        publisher.publish(deliveries("before"))
    refused_within(QUICK, publisher)
    with running(program):
        publisher.publish(deliveries("after"))
        assert [unpack(arguments(message)[0])[0].message_id for message in waiting(url)] == ["before", "after"]


def test_a_full_broker_refuses_and_is_used_again(broker_url: str, make_publisher: MakePublisher) -> None:
    """Breaks if a message that a full broker rejected counts as published."""
    publisher = make_publisher(broker_url)
    publisher.publish(deliveries("before"))
    with redis.Redis.from_url(broker_url) as client:
        client.set("filler", b"x" * 2_000_000)
        client.config_set("maxmemory", "1mb")
        try:
            for _ in range(3):
                assert "canary" not in refused_within(QUICK, publisher)
        finally:
            client.config_set("maxmemory", "0")
    publisher.publish(deliveries("after"))
    assert [unpack(arguments(message)[0])[0].message_id for message in waiting(broker_url)] == ["before", "after"]


def test_a_publish_to_a_frozen_broker_times_out_and_recovers(broker_url: str, make_publisher: MakePublisher) -> None:
    """Breaks if a broker that accepts connections and does not answer blocks a publish."""
    publisher = make_publisher(broker_url)
    publisher.publish(deliveries("before"))
    with redis.Redis.from_url(broker_url) as client:
        client.execute_command("CLIENT PAUSE", 60_000, "WRITE")
        try:
            refused_within(3 * QUICK, publisher)  # the courier, not the publisher, keeps the promise of 5 s
        finally:
            client.execute_command("CLIENT UNPAUSE")
    publisher.publish(deliveries("after"))
    assert unpack(arguments(waiting(broker_url)[-1])[0])[0].message_id == "after"
