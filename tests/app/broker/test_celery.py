"""The queue: what a publish puts on it, and what a broker that is away, full or frozen makes of a publish."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from fakeredis import TcpFakeServer
from kombu.exceptions import ContentDisallowed

from app.broker.celery import make_celery
from app.broker.delays import DELAYS, delay_options, delay_queue
from app.broker.lanes import APPLY, LANES, is_amqp
from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.delivery import Delivery, Receipt, seal, unpack
from app.errors import PublishFailed
from app.sealing import Sealer
from workers.celery.context import MAX_COUNTDOWN_SECONDS
from workers.celery.tasks import MAX_RETRY_SECONDS
from workers.local import embedded_valkey, wheels
from workers.local.supervisor import running

QUICK = 5.0  # seconds: what a sender is promised


def deliveries(*names: str) -> list[Delivery]:
    sealer = Sealer([bytes(32)])
    return [seal("junction", Receipt(name), b'{"heart":"canary"}', sealer) for name in names]


def fake_server(port: int = 0) -> TcpFakeServer:
    """A fakeredis server that answers in its own thread."""
    server = TcpFakeServer(("127.0.0.1", port), server_type="valkey")
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


def stop(server: TcpFakeServer) -> None:
    """Stops listening and hangs up on everybody."""
    server.shutdown()
    server.server_close()


@pytest.fixture
def fake_url() -> Iterator[str]:
    """A fakeredis server's URL."""
    server = fake_server()
    yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    stop(server)


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.services)])
def url(request: pytest.FixtureRequest) -> str:
    """An empty broker: fakeredis, and the real Valkey."""
    return str(request.getfixturevalue("fake_url" if request.param == "fake" else "broker_url"))


@pytest.fixture
def make_publisher() -> Iterator[Callable[[str], Publisher]]:
    """Makes publishers whose connections are let go at the end."""
    made: list[Publisher] = []

    def make(url: str) -> Publisher:
        made.append(Publisher(make_celery(Settings(broker_url=url), "publisher")))
        return made[-1]

    yield make
    for publisher in made:
        if publisher._connection is not None:
            publisher._connection.release()


def waiting(url: str, lane: str = "live") -> list[dict[str, Any]]:
    """The Celery messages on a lane, oldest first."""
    with redis.Redis.from_url(url) as client:
        return [json.loads(message) for message in reversed(client.lrange(lane, 0, -1))]


def arguments(message: dict[str, Any]) -> list[Any]:
    """The positional arguments of a task's message."""
    return list(json.loads(base64.b64decode(message["body"]))[0])


def refused_within(seconds: float, publisher: Publisher) -> str:
    """Publishes, expects that to be refused in time, and says with which words."""
    began = time.monotonic()
    with pytest.raises(PublishFailed) as refused:
        publisher.publish(deliveries("refused"))
    assert time.monotonic() - began < seconds
    return str(refused.value)


def test_a_publish_is_one_message_on_the_live_lane(url: str, make_publisher: Callable[[str], Publisher]) -> None:
    """Breaks if a publish puts nothing, twice, elsewhere or in another form than workers read."""
    sent = deliveries("msg_1", "msg_2", "msg_3")
    make_publisher(url).publish(sent)
    (message,) = waiting(url)
    assert message["headers"]["task"] == APPLY
    assert message["content-type"] == "application/json"
    (packed,) = arguments(message)
    assert unpack(packed) == sent
    assert [waiting(url, lane) for lane in LANES if lane != "live"] == [[], [], []]


def test_what_flower_shows_is_a_count(url: str, make_publisher: Callable[[str], Publisher]) -> None:
    """Breaks if the arguments of a task are shown by Flower, or written to a worker's log."""
    make_publisher(url).publish(deliveries("msg_1", "msg_2", "msg_3"))
    (message,) = waiting(url)
    headers, properties = message["headers"], message["properties"]
    assert headers["argsrepr"] == "(3 deliveries)"
    assert headers["kwargsrepr"] == "{}"
    assert "msg_1" not in json.dumps([headers, properties])
    assert arguments(message)[0] not in json.dumps([headers, properties])


def test_a_body_is_not_readable_on_the_queue(url: str, make_publisher: Callable[[str], Publisher]) -> None:
    """Breaks if whoever reads the broker reads the body."""
    make_publisher(url).publish(deliveries("msg_1"))
    (message,) = waiting(url)
    assert b"canary" not in base64.b64decode(arguments(message)[0])


def test_messages_keep_their_order(url: str, make_publisher: Callable[[str], Publisher]) -> None:
    """Breaks if one connection does not do for many messages, or they change places."""
    publisher, names = make_publisher(url), [f"msg_{n}" for n in range(20)]
    for name in names:
        publisher.publish(deliveries(name))
    assert [unpack(arguments(message)[0])[0].message_id for message in waiting(url)] == names


def test_a_publisher_has_one_client(url: str, make_publisher: Callable[[str], Publisher]) -> None:
    """Breaks if each publish makes a Redis client of its own: that is a third of what it costs."""
    publisher = make_publisher(url)
    publisher.publish(deliveries("msg_1"))
    channel = publisher._producer.channel
    with channel.conn_or_acquire() as one:
        publisher.publish(deliveries("msg_2"))
    with channel.conn_or_acquire() as other:
        assert one is other


def test_a_ping_succeeds_and_leaves_nothing(url: str, make_publisher: Callable[[str], Publisher]) -> None:
    """Breaks if readiness is denied while the broker is there, or asking for it enqueues something."""
    make_publisher(url).ping()
    assert waiting(url) == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:1/5"])
def test_without_a_broker_a_ping_fails_quickly(address: str, make_publisher: Callable[[str], Publisher]) -> None:
    """Breaks if readiness is claimed, or its answer waits, while there is no broker."""
    began = time.monotonic()
    with pytest.raises(PublishFailed, match="cannot be reached"):
        make_publisher(f"redis://:canary@{address}").ping()
    assert time.monotonic() - began < QUICK


def test_without_a_broker_a_publish_fails_quickly_and_says_no_password(
    make_publisher: Callable[[str], Publisher],
) -> None:
    """Breaks if a publish hangs, raises what no request expects, or shows the broker's URL."""
    assert "canary" not in refused_within(QUICK, make_publisher("redis://:canary@127.0.0.1:1/0"))


def test_a_publisher_goes_on_after_it_was_closed(url: str, make_publisher: Callable[[str], Publisher]) -> None:
    """Breaks if a connection that was given up cannot be replaced, or giving it up raises."""
    publisher = make_publisher(url)
    publisher.close()
    publisher.publish(deliveries("msg_1"))
    publisher.close()
    publisher.close()
    publisher.publish(deliveries("msg_2"))
    assert len(waiting(url)) == 2


def test_a_broker_that_comes_back_is_used_again(make_publisher: Callable[[str], Publisher]) -> None:
    """Breaks if a publish is claimed while the broker is away, or not possible after it came back (fakeredis)."""
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
def test_what_was_taken_survives_a_broker_that_was_away(
    tmp_path: Path, make_publisher: Callable[[str], Publisher]
) -> None:
    """Breaks if a message that was confirmed is gone after a restart, or the next publish after it fails (Valkey)."""
    program, url = embedded_valkey.valkey(tmp_path / "broker", "tests", tmp_path / "broker.log")
    publisher = make_publisher(url)
    with running(program):
        publisher.publish(deliveries("before"))
    refused_within(QUICK, publisher)
    with running(program):
        publisher.publish(deliveries("after"))
        assert [unpack(arguments(message)[0])[0].message_id for message in waiting(url)] == ["before", "after"]


def test_a_full_broker_refuses_and_is_used_again(broker_url: str, make_publisher: Callable[[str], Publisher]) -> None:
    """Breaks if a message that a full broker did not take counts as taken."""
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


def test_a_frozen_broker_is_given_up_and_used_again(
    broker_url: str, make_publisher: Callable[[str], Publisher]
) -> None:
    """Breaks if a broker that accepts connections and answers nothing holds a publish for good."""
    publisher = make_publisher(broker_url)
    publisher.publish(deliveries("before"))
    with redis.Redis.from_url(broker_url) as client:
        client.execute_command("CLIENT PAUSE", 60_000, "WRITE")
        try:
            refused_within(3 * QUICK, publisher)  # the batcher, not the publisher, keeps the promise of 5 s
        finally:
            client.execute_command("CLIENT UNPAUSE")
    publisher.publish(deliveries("after"))
    assert unpack(arguments(waiting(broker_url)[-1])[0])[0].message_id == "after"


def test_a_pickled_message_is_not_read(url: str) -> None:
    """Breaks if whoever can write to the broker can run code in a worker."""
    worker = make_celery(Settings(broker_url=url), "worker")
    got: list[str] = []

    def take(message: Any) -> None:
        try:
            message.decode()
        except ContentDisallowed:
            got.append(message.content_type)
        message.ack()

    with worker.connection_for_write() as connection:
        lane = worker.amqp.queues["live"]
        with worker.amqp.Producer(connection) as producer:
            producer.publish(([], {}, {}), routing_key="live", exchange="", serializer="pickle", declare=[lane])
        with worker.amqp.TaskConsumer(connection.default_channel, on_message=take, queues=[lane]):
            connection.drain_events(timeout=QUICK)
    assert got == ["application/x-python-serialize"]


@pytest.mark.parametrize("role", ["publisher", "worker"])
@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "amqp://h", "amqps://h"])
def test_lanes_are_declared_and_durable(url: str, role: str) -> None:
    """Breaks if a lane is missing or lost with the broker's memory, or messages go to queues that nobody reads."""
    celery = make_celery(Settings(broker_url=url), role)  # type: ignore[arg-type]
    queues = celery.conf.task_queues
    assert [queue.name for queue in queues] == list(LANES) == ["live", "download", "backfill", "maintenance"]
    assert all(queue.durable and queue.exchange.durable for queue in queues)
    quorum = {"x-queue-type": "quorum"} if is_amqp(url) else None
    assert [queue.queue_arguments for queue in queues] == [quorum] * len(LANES)
    assert celery.conf.task_create_missing_queues is False
    assert celery.conf.task_default_queue in LANES


@pytest.mark.parametrize(
    ("seconds", "name"), [(0.1, "live.1s"), (1, "live.1s"), (1.1, "live.2s"), (33, "live.64s"), (1000, "live.64s")]
)
def test_a_message_waits_in_the_shortest_queue_that_is_long_enough(seconds: float, name: str) -> None:
    """Breaks if a message comes back before it is due, or waits far longer than it should."""
    assert delay_queue("live", seconds).name == name


def test_what_waits_is_kept_and_comes_back() -> None:
    """Breaks if RabbitMQ may lose what waits, forgets to give it back, or gives it back elsewhere."""
    room = delay_queue("backfill", 4)
    assert room.durable
    assert room.queue_arguments == {
        "x-queue-type": "quorum",
        "x-message-ttl": 4000,
        "x-dead-letter-exchange": "backfill",
        "x-dead-letter-routing-key": "backfill",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def test_there_is_a_queue_for_the_longest_wait() -> None:
    """Breaks if a wait that workers ask for is cut short."""
    assert max(DELAYS) >= max(MAX_RETRY_SECONDS, MAX_COUNTDOWN_SECONDS)


@pytest.mark.parametrize("url", ["redis://h", "amqp://h"])
def test_what_need_not_wait_goes_to_its_lane(url: str) -> None:
    """Breaks if what is to be done now takes a detour, or Celery's own pause of three minutes is put in."""
    celery = make_celery(Settings(broker_url=url), "worker")
    assert delay_options(celery, "live", 0) == delay_options(celery, "live", -1) == {"countdown": 0}


def test_where_a_message_waits_depends_on_the_broker() -> None:
    """Breaks if on RabbitMQ a worker holds what waits, or on Redis, where it may, queues are made for nothing."""
    redis_celery, amqp_celery = (make_celery(Settings(broker_url=url), "worker") for url in ("redis://h", "amqp://h"))
    assert delay_options(redis_celery, "live", 2.5) == {"countdown": 2.5}
    options = delay_options(amqp_celery, "live", 2.5)
    assert options.pop("queue").name == "live.4s"
    assert options == {"countdown": 0, "exchange": "", "routing_key": "live.4s", "mandatory": True}


@pytest.mark.parametrize("role", ["publisher", "worker"])
def test_only_json_is_spoken(role: str) -> None:
    """Breaks if a serializer that can run code is allowed."""
    conf = make_celery(Settings(broker_url="redis://h"), role).conf  # type: ignore[arg-type]
    assert (conf.accept_content, conf.task_serializer, conf.task_ignore_result) == (["json"], "json", True)


def test_a_message_is_given_back_when_its_worker_dies() -> None:
    """Breaks if a message is acknowledged before it was worked off, or its confirmation is not waited for."""
    conf = make_celery(Settings(broker_url="redis://h", visibility_timeout_seconds=7), "worker").conf
    assert (conf.task_acks_late, conf.task_reject_on_worker_lost, conf.worker_prefetch_multiplier) == (True, True, 1)
    assert conf.broker_transport_options["visibility_timeout"] == 7
    amqp = make_celery(Settings(broker_url="amqp://h"), "publisher").conf
    assert amqp.broker_transport_options["confirm_publish"] is True


def test_a_publisher_gives_up_before_its_sender_does() -> None:
    """Breaks if a publisher retries, while it is the sender who will."""
    celery: Celery = make_celery(Settings(broker_url="redis://h"), "publisher")
    assert celery.conf.task_publish_retry is False
    assert celery.conf.broker_transport_options["socket_timeout"] * 2 < QUICK
    assert celery.conf.broker_transport_options["socket_connect_timeout"] <= 1
