"""A real RabbitMQ as the broker: it keeps confirmed messages, and senders learn of failed publishes in time.

Skipped where RabbitMQ is not installed. This module also tests workers, because they share its one server.
"""

import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from amqp import Message  # type: ignore[import-untyped]
from sqlalchemy import Engine

from app.broker.celery import make_celery
from app.broker.delays import delay_options, delay_queue
from app.broker.lanes import APPLY, LANES
from app.broker.rabbitmq_publisher import RabbitMQPublisher
from app.config.settings import Settings
from app.delivery import Delivery, pack, unpack
from app.errors import Misconfigured, PublishFailed, TryLater
from tests.support import HTTP, JUNCTION_SECRET, delivery, program, rows, signed, status, until, worker, workout
from tests.support.rabbitmq import ABSENT, RabbitMQ, binaries, publishing, rabbitmq
from tests.support.workers import IS_WAITING, SharedWorker, blocking, is_ready
from workers import broker_admin
from workers.broker_admin import Lane, lanes, need_durable
from workers.local.ports import free_port
from workers.rabbitmq_management import Held

pytestmark = [pytest.mark.processes, pytest.mark.services, pytest.mark.skipif(binaries() is None, reason=ABSENT)]
SECONDS = 5.0  # the longest time until a sender gets a response


@pytest.fixture(scope="module")
def shared() -> Iterator[RabbitMQ]:
    """One server for all tests. A test may kill it; it restarts with its data."""
    with rabbitmq(management=True) as server:
        yield server


@pytest.fixture(scope="module")
def module_worker(
    deployment: Settings, shared: RabbitMQ, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedWorker]:
    """The worker of the module. The first test that uses it starts it."""
    settings = replace(deployment, broker_url=shared.url, redis_url=deployment.broker_url)
    with SharedWorker(settings, tmp_path_factory.mktemp("worker")) as worker_process:
        yield worker_process


@pytest.fixture
def live_worker(module_worker: SharedWorker, shared: RabbitMQ, settings: Settings) -> SharedWorker:
    """The worker, ready, with an empty database. Its lane is not deleted: the worker would detect that late."""
    if not module_worker.is_alive:
        shared.empty()
    return module_worker.ready()


@pytest.fixture
def server(shared: RabbitMQ, module_worker: SharedWorker) -> RabbitMQ:
    """The server without messages and without consumers."""
    module_worker.end()
    shared.empty()
    return shared


@pytest.fixture
def without_lanes(server: RabbitMQ) -> Iterator[RabbitMQ]:
    """The server with a virtual host that has no queues."""
    with server.without_queues():
        yield server


@pytest.fixture
def rabbitmq_settings(settings: Settings, server: RabbitMQ) -> Settings:
    """A complete deployment on RabbitMQ."""
    return replace(settings, broker_url=server.url, redis_url=settings.broker_url)


def one(name: str) -> list[Delivery]:
    """The content of a message: one delivery, whose id and workout id are `name`."""
    return [delivery(workout("u1", name), name=name)]


def publish(url: str, *names: str) -> None:
    """Publishes one message per name to the live lane, each with one delivery."""
    with publishing(url) as publisher:
        for name in names:
            publisher.publish(one(name))


def is_accepted(url: str, name: str) -> bool:
    """Publishes a message. False if the broker rejects it: its sender would try again."""
    try:
        publish(url, name)
    except PublishFailed:
        return False
    return True


def consume_all(server: RabbitMQ, lane: str = "live") -> list[Any]:
    """Consumes all messages of a lane."""
    found = []
    with server.connect() as connection:
        channel = connection.channel()
        while (message := channel.basic_get(lane, no_ack=True)) is not None:
            found.append(message)
    return found


def names(server: RabbitMQ) -> list[str]:
    """Consumes all messages of the live lane and returns their delivery ids."""
    packed = [msgspec.json.decode(message.body)[0][0] for message in consume_all(server)]
    return [each.message_id for text in packed for each in unpack(text)]


def is_redelivered(server: RabbitMQ, name: str) -> bool:
    """Whether the message of this delivery is back in the live lane, and not the only one. Puts all back.

    Probes of readiness checks, which expire only at the head of the queue, do not count.
    """
    found = {}
    with server.connect() as connection:
        channel = connection.channel()
        while (message := channel.basic_get("live")) is not None:
            if message.headers.get("task") == APPLY:
                (one,) = unpack(msgspec.json.decode(message.body)[0][0])
                found[one.message_id] = (
                    message.delivery_info["redelivered"] and message.headers["x-delivery-count"] >= 1
                )
    return len(found) == 2 and found[name]


def seconds_until_failure(publisher: RabbitMQPublisher, name: str = "failed") -> float:
    """Publishes, asserts that this fails, and returns the seconds until the failure."""
    began = time.monotonic()
    with pytest.raises(PublishFailed):
        publisher.publish(one(name))
    return time.monotonic() - began


# Durability


def test_lanes_are_durable_quorum_queues(without_lanes: RabbitMQ) -> None:
    """Breaks if a lane loses its messages after one disk failure or restart, whichever process declares it first."""
    server = without_lanes
    until(lambda: is_accepted(server.url, "msg_1"))  # the new queue may have no leader yet
    columns = "name", "type", "durable", "auto_delete"
    queues = "list_queues", "--vhost", server.vhost
    assert ["live", "quorum", "true", "false"] in server.table(*queues, *columns)
    assert [lane.messages for lane in lanes(Settings(broker_url=server.url))] == [1, *[0] * (len(LANES) - 1)]
    found = server.table(*queues, *columns)
    assert [row for row in found if row[0] in LANES] == [
        row for row in found if row[0] in LANES and row[1:] == ["quorum", "true", "false"]
    ]
    assert {row[0] for row in found} >= set(LANES)
    (message,) = consume_all(server)
    assert message.properties["delivery_mode"] == 2


def test_unacknowledged_messages_are_shown(without_lanes: RabbitMQ) -> None:
    """Breaks if `status`, the metrics and the console show none on RabbitMQ while a worker hangs."""
    settings = Settings(broker_url=without_lanes.url, broker_management_url=f"{without_lanes.management_url}/")

    def live() -> Lane:
        return lanes(settings)[0]

    until(lambda: is_accepted(without_lanes.url, "msg_1"))
    with without_lanes.connect() as connection:
        channel = connection.channel()
        channel.basic_publish(Message("x"), routing_key="notify")  # no worker takes this lane: it has no statistics
        held = until(lambda: channel.basic_get("live"))
        until(lambda: live().unacked == 1, 30)
        assert until(lambda: live().unacked_for) > timedelta()
        channel.basic_ack(held.delivery_tag)
        until(lambda: live().unacked == 0, 30)
        assert live().unacked_for is None


@pytest.mark.parametrize("stats", [[], {}, {"ack": None}])
def test_a_server_that_counts_no_acknowledgements_hides_nothing_and_alerts_nobody(stats: Any) -> None:
    """Breaks if `rates_mode = none`, or a lane without deliveries, hides the number or looks like a hanging worker."""
    held = {"live": Held("live", messages_unacknowledged=3, message_stats=stats)}
    assert [broker_admin._unacked_of("amqp://x", "live", held) for _ in range(2)] == [(3, None)] * 2


def test_an_unknown_number_of_unacknowledged_messages_is_not_zero(server: RabbitMQ) -> None:
    """Breaks if `status` says that workers hold no message although the management API does not answer."""
    settings = Settings(broker_url=server.url, broker_management_url=f"http://127.0.0.1:{free_port()}")
    assert {(one.unacked, one.unacked_for) for one in lanes(settings)} == {(None, None)}


def test_a_publish_returns_after_the_confirm(server: RabbitMQ) -> None:
    """Breaks if a publish returns before its confirm. The control without confirms does, and its message is lost."""
    with publishing(server.url) as confirmed, publishing(server.url, confirms=False) as unconfirmed:
        for publisher, name in ((confirmed, "confirmed"), (unconfirmed, "unconfirmed")):
            publisher.publish(one(name))
        until(lambda: server.ready_count() == 2)
        with server.frozen():
            assert seconds_until_failure(confirmed) < 3 * SECONDS
            unconfirmed.publish(one("lost"))  # the control: the message may or may not arrive
            server.kill()
        server.start()
    assert names(server) == ["confirmed", "unconfirmed"]


@dataclass
class Load:
    """Threads that publish until they are stopped, and the ids of the confirmed messages."""

    url: str
    confirms: bool
    stop: threading.Event
    threads: int = 4

    def __enter__(self) -> None:
        """Stops the threads at the end of the block."""

    def __exit__(self, *_: object) -> None:
        self.stop.set()

    def run(self) -> list[str]:
        """The ids of all confirmed messages."""
        with ThreadPoolExecutor(self.threads) as pool:
            return [name for names in pool.map(self._publish, range(self.threads)) for name in names]

    def _publish(self, thread: int) -> list[str]:
        confirmed: list[str] = []
        with publishing(self.url, confirms=self.confirms) as publisher:
            while not self.stop.is_set():
                name = f"{thread}-{len(confirmed)}"
                try:
                    publisher.publish(one(name))
                except PublishFailed:
                    break
                confirmed.append(name)
        return confirmed


def test_a_killed_broker_keeps_confirmed_messages(server: RabbitMQ, record_property: Any, *, full: bool) -> None:
    """Breaks if confirmed messages are lost when the broker is killed (kill -9) under load.

    With --full it also measures the loss without confirms, without an assertion: the loss may be zero.
    """
    rng, counts = random.Random(7), {}
    for confirms in (True, False) if full else (True,):
        server.empty()
        load = Load(server.url, confirms, threading.Event())
        publish(server.url, "first")  # declares the lane
        with ThreadPoolExecutor(1) as pool, load:
            running = pool.submit(load.run)
            until(lambda: server.ready_count() > 200)
            load.stop.wait(rng.uniform(0, 0.5))
            server.kill()
            confirmed = running.result(timeout=60)
        server.start()
        found = set(names(server))
        counts[confirms] = (len(confirmed), len(set(confirmed) - found))
    record_property("confirmed and lost, with and without confirms", str(counts))
    print(f"\nconfirmed and lost, with and without confirms: {counts}")
    assert counts[True][0] > 200
    assert counts[True][1] == 0


# Outages


@contextmanager
def stopped(server: RabbitMQ) -> Iterator[None]:
    """Kills the server, and restarts it after the block."""
    server.kill()
    try:
        yield
    finally:
        server.start()


Outage = Callable[[RabbitMQ], Any]
OUTAGES: dict[str, Outage] = {"frozen": RabbitMQ.frozen, "alarm": RabbitMQ.memory_alarm, "absent": stopped}


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
def test_a_publish_fails_in_time_during_an_outage_and_succeeds_after_it(server: RabbitMQ, outage: Outage) -> None:
    """Breaks if a publisher hangs, reports a false success, or does not reconnect to the broker.

    Also breaks if it waits for its timeout although RabbitMQ has blocked the connection; if the readiness check is
    wrong or slow during the outage, or leaves a queue or message; or if the start of a process hangs, or reports the
    outage as a wrong setting.
    """
    is_alarm = outage is RabbitMQ.memory_alarm
    max_seconds = 1 if is_alarm else 3 * SECONDS  # the batcher, not the publisher, enforces the limit of 5 s
    with publishing(server.url) as warm, publishing(server.url) as cold, publishing(server.url) as pinging:
        pinging.ping()
        warm.publish(one("before"))
        with outage(server):
            assert seconds_until_failure(warm) < max_seconds
            assert seconds_until_failure(warm) < max_seconds
            assert seconds_until_failure(cold) < 3 * SECONDS
            began = time.monotonic()
            with pytest.raises(PublishFailed):
                pinging.ping()
            assert time.monotonic() - began < SECONDS
            if not is_alarm:
                began = time.monotonic()
                with pytest.raises(TryLater, match="BROKER_URL: the broker cannot be reached"):
                    need_durable(Settings(broker_url=server.url))
                assert time.monotonic() - began < 6 * SECONDS
        warm.publish(one("after"))
        cold.publish(one("after too"))
        pinging.ping()
    found = names(server)
    assert [name for name in found if name != "failed"] == ["before", "after", "after too"]
    assert set(message_counts(server)) <= {"live"}  # an unconfirmed message may still arrive there


@pytest.fixture(scope="module")
def endpoint(shared: RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A ready `headrace web`."""
    port, log = free_port(), tmp_path_factory.mktemp("endpoint") / "log"
    environment = {
        "BROKER_URL": shared.url,
        "JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET,
        "HEADRACE_PORT": str(port),
        "PROMETHEUS_MULTIPROC_DIR": str(log.parent),
        "HEADRACE_WEB_PROCESSES": "1",
    }
    url = f"http://127.0.0.1:{port}"
    with program("workers.cli", "web", log=log, **environment) as process:
        until(lambda: process.poll() is not None or status(f"{url}/livez") == 200)
        assert process.poll() is None, log.read_text()
        yield url


def post(url: str, name: str) -> httpx.Response:
    """Sends an event as Junction does."""
    body = msgspec.json.encode(workout("u1", name))
    return HTTP.post(f"{url}/webhooks/junction", content=body, headers=signed(body, name=name))


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
def test_a_sender_gets_a_response_in_time_during_an_outage(server: RabbitMQ, endpoint: str, outage: Outage) -> None:
    """Breaks if a sender waits longer than 5 s or gets another status than 503, or if the endpoint needs a restart."""
    until(lambda: post(endpoint, "before").status_code == 202, 20)
    with outage(server), ThreadPoolExecutor(10) as pool:
        for _ in range(2):
            answers = list(pool.map(lambda number: post(endpoint, f"failed-{number}"), range(10)))
            assert {answer.status_code for answer in answers} == {503}
            assert all("Retry-After" in answer.headers for answer in answers)
            assert max(answer.elapsed.total_seconds() for answer in answers) < SECONDS
        assert status(f"{endpoint}/livez") == 200
        assert status(f"{endpoint}/readyz") == 503
    until(lambda: post(endpoint, "after").status_code == 202, 20)
    assert status(f"{endpoint}/readyz") == 200
    assert {"before", "after"} <= set(names(server))


@pytest.mark.parametrize("deleted", ["queue", "exchange", "both"])
def test_a_publish_to_a_deleted_lane_is_not_confirmed(server: RabbitMQ, deleted: str) -> None:
    """Breaks if an unroutable message counts as published: RabbitMQ confirms it too."""
    with publishing(server.url) as publisher:
        publisher.publish(one("before"))
        with server.connect() as connection:
            channel = connection.channel()
            if deleted != "exchange":
                channel.queue_delete("live")
            if deleted != "queue":
                channel.exchange_delete("live")
        confirmed = []
        for name in ("first", "second", "third"):
            try:
                publisher.publish(one(name))
            except PublishFailed:
                continue
            confirmed.append(name)
    assert "third" in confirmed
    assert [name for name in names(server) if name != "before"] == confirmed


def rejected(publish: Callable[[], None]) -> str:
    """Publishes until RabbitMQ rejects a message, and returns the text of the error. A new policy takes effect late."""
    for _ in range(1000):
        try:
            publish()
        except PublishFailed as error:
            return str(error)
    return "RabbitMQ accepted all messages"


def test_a_message_that_rabbitmq_rejects_is_not_confirmed(server: RabbitMQ) -> None:
    """Breaks if a rejected message counts as published, raises another error, or makes the publisher unusable.

    The second way to publish is that of returned delayed messages, which stopped at such an error.
    """
    with publishing(server.url) as publisher:
        publisher.publish(one("before"))
        server.control("set_policy", "full", "^live$", '{"max-length": 1, "overflow": "reject-publish"}')
        try:
            assert "OperationalError" in rejected(lambda: publisher.publish(one("more")))
            assert "MessageNacked" in rejected(lambda: publisher.publish_raw("live", Message("more")))
        finally:
            server.control("clear_policy", "full")
        consume_all(server)
        publisher.publish(one("after"))
    assert names(server) == ["after"]


def test_a_deleted_delay_queue_is_declared_again(server: RabbitMQ) -> None:
    """Breaks if a delayed message is lost because its delay queue was deleted."""
    celery = make_celery(Settings(broker_url=server.url), "worker")
    queue = delay_queue("live").name
    with celery.connection_for_write() as connection, celery.amqp.Producer(connection) as producer:
        for name in ("first", "second"):
            options = delay_options(celery, "live", 30)
            celery.send_task(APPLY, args=(pack(one(name)),), producer=producer, **options)
            assert server.ready_count(queue) == 1
            with server.connect() as other:
                other.channel().queue_delete(queue)
    celery.close()


# Checks at the start


@pytest.mark.parametrize(
    ("durable", "arguments"),
    [(True, {}), (False, {}), (True, {"x-queue-type": "classic"}), (True, {"x-queue-type": "stream"})],
    ids=["durable", "transient", "classic", "stream"],
)
def test_a_lane_that_is_not_a_durable_quorum_queue_is_rejected(
    without_lanes: RabbitMQ, *, durable: bool, arguments: dict[str, str]
) -> None:
    """Breaks if a process starts on a lane that another program declared as a queue that can lose events."""
    server = without_lanes
    with server.connect() as connection:
        connection.channel().queue_declare("live", durable=durable, auto_delete=False, arguments=arguments)
    settings = Settings(broker_url=server.url)
    with pytest.raises(Misconfigured, match=r"BROKER_URL: queue live is not a durable quorum queue.*delete_queue live"):
        need_durable(settings)
    need_durable(replace(settings, broker_durability_asserted=True))


def test_a_delay_queue_that_is_not_a_quorum_queue_is_rejected(without_lanes: RabbitMQ) -> None:
    """Breaks if a delay queue that can lose messages is detected only when a message must be delayed."""
    server, queue = without_lanes, delay_queue("backfill").name
    with server.connect() as connection:
        channel = connection.channel()
        channel.queue_delete(queue)
        channel.queue_declare(queue, durable=True, auto_delete=False)
        with pytest.raises(Misconfigured, match=f"BROKER_URL: queue {queue} is not"):
            need_durable(Settings(broker_url=server.url))
        channel.queue_delete(queue)


def test_delayed_messages_count_with_their_lane(server: RabbitMQ) -> None:
    """Breaks if `headrace status` omits delayed messages, or a sweep ignores them when it fills the lane."""
    settings = Settings(broker_url=server.url)
    publish(server.url, "w1")
    send(settings, APPLY, ["w2"], 30)
    send(settings, APPLY, ["w3"], 60)
    assert [lane.messages for lane in lanes(settings)] == [3, *[0] * (len(LANES) - 1)]


def test_a_correct_broker_passes_the_check(server: RabbitMQ) -> None:
    """Breaks if the check rejects a broker with or without queues, or consumes a message."""
    need_durable(Settings(broker_url=server.url))
    publish(server.url, "msg_1")
    need_durable(Settings(broker_url=server.url))
    assert names(server) == ["msg_1"]


@pytest.mark.parametrize("wrong", ["password", "vhost"])
def test_a_wrong_login_is_reported_as_a_login_error(server: RabbitMQ, wrong: str) -> None:
    """Breaks if a wrong password or vhost is reported as a wrong queue, or the report shows the password."""
    url = server.url.replace("guest:guest", "guest:sesame") if wrong == "password" else server.url + "unknown"
    with pytest.raises((Misconfigured, TryLater), match="BROKER_URL") as caught:
        need_durable(Settings(broker_url=url))
    assert "queue" not in str(caught.value)
    assert "sesame" not in str(caught.value)


# Workers


def stored(engine: Engine) -> list[str]:
    """The ids of the stored workouts, oldest first."""
    return [row["id"] for row in rows(engine, "SELECT id FROM health.workouts ORDER BY stored_at, id")]


def message_counts(server: RabbitMQ) -> dict[str, str]:
    """The number of messages per queue that has any: ready, delayed and unacknowledged ones.

    RabbitMQ updates its counts twice a second; only the count of ready messages in one queue is current.
    """
    return {name: count for name, count in server.table("list_queues", "name", "messages") if count != "0"}


def until_empty(server: RabbitMQ) -> None:
    """Waits until the broker has no message, neither ready nor unacknowledged."""
    until(lambda: server.ready_count() == 0)
    time.sleep(0.5)  # until RabbitMQ has updated its counts: each query starts Erlang, which costs 0.7 s of CPU
    until(lambda: not message_counts(server), every=1)


def logged_warnings(log: Path) -> list[str]:
    """The warnings and errors in a worker's log."""
    markers = (" WARNING ", " ERROR ", " CRITICAL ", "Traceback")
    return [line for line in log.read_text().splitlines() if any(marker in line for marker in markers)]


def send(rabbitmq_settings: Settings, task: str, names: list[str], seconds: float) -> None:
    """Sends tasks with a countdown in seconds to the live lane."""
    celery = make_celery(rabbitmq_settings, "publisher")
    options = {"queue": "live"} | delay_options(celery, "live", seconds)
    with celery.connection_for_write() as connection, celery.amqp.Producer(connection) as producer:
        for name in names:
            celery.send_task(task, args=(pack(one(name)),), producer=producer, **options, argsrepr="(?)")
    celery.close()


def test_a_worker_logs_no_warning(engine: Engine, live_worker: SharedWorker) -> None:
    """Breaks if a worker logs a warning at each start: operators would stop reading warnings."""
    publish(live_worker.settings.need_broker(), "w1")
    until(lambda: stored(engine) == ["w1"])
    assert logged_warnings(live_worker.log) == []


def test_a_worker_declares_no_unused_queue(shared: RabbitMQ, live_worker: SharedWorker) -> None:
    """Breaks if a worker declares 28 unused quorum queues, each with its own log and election."""
    found = {row[0] for row in shared.table("list_queues", "name")}
    assert not [name for name in found if name.startswith("celery_delayed")]


def test_a_worker_sends_heartbeats_during_a_task(engine: Engine, shared: RabbitMQ, live_worker: SharedWorker) -> None:
    """Breaks if a busy worker is silent, or its heartbeats break the connection of its other events."""
    kinds: list[str] = []
    celery = make_celery(Settings(broker_url=shared.url), "worker")

    def record(found: dict[str, Any]) -> None:
        if found["hostname"].startswith(f"live.{live_worker.process.pid}@"):
            kinds.append(found["type"])

    with celery.connection_for_read() as connection:
        received = celery.events.Receiver(connection, handlers={"*": record}).itercapture(timeout=15, wakeup=False)
        with live_worker.busy(engine):
            while kinds.count("worker-heartbeat") < 4:
                next(received)
        while "task-succeeded" not in kinds:
            next(received)
    celery.close()


def test_a_worker_prefetches_one_message(shared: RabbitMQ, live_worker: SharedWorker) -> None:
    """Breaks if a busy worker holds messages that another worker could apply."""
    consumers = dict(shared.table("list_consumers", "queue_name", "prefetch_count"))
    assert consumers["live"] == "1"


def put(body: bytes, **properties: Any) -> Callable[[RabbitMQ, Settings], None]:
    """Puts a message on the live lane without Celery."""

    def put_message(server: RabbitMQ, rabbitmq_settings: Settings) -> None:
        with server.connect() as connection:
            channel = connection.channel()
            channel.confirm_select()
            channel.basic_publish(Message(body, delivery_mode=2, **properties), "", "live")

    return put_message


def put_unknown(server: RabbitMQ, rabbitmq_settings: Settings) -> None:
    """Puts a task of a newer version on the lane."""
    send(rabbitmq_settings, "headrace.unknown", ["w9"], 0)


TASK = {"task": APPLY, "id": "1", "lang": "py"}
JSON = {"content_type": "application/json", "content_encoding": "utf-8"}
INVALID_MESSAGES: dict[str, Callable[[RabbitMQ, Settings], None]] = {
    "unknown task": put_unknown,
    "no header": put(b'{"sesame": 1}', **JSON),
    "no properties": put(b"sesame"),
    "broken body": put(b'[["sesame', application_headers=TASK, **JSON),
    "unknown encoding": put(b"sesame", application_headers=TASK, content_type="application/json", content_encoding="?"),
    "pickle": put(
        b"\x80\x04\x8c\x06sesame\x94.",
        application_headers=TASK,
        content_type="application/x-python-serialize",
        content_encoding="binary",
    ),
    "invalid due time": put(b'[["sesame"], {}, {}]', application_headers=TASK | {"eta": "sesame"}, **JSON),
    "expired": put(b'[["sesame"], {}, {}]', application_headers=TASK | {"expires": "2026-03-14T06:30:00Z"}, **JSON),
    "odd headers": put(b'[["sesame"], {}, {}]', application_headers=TASK | {"retries": "x", "timelimit": "a"}, **JSON),
    "callbacks": put(b'[["sesame"], {}, {"chain": [{"task": "headrace.sweep"}]}]', application_headers=TASK, **JSON),
    "a task of Celery": put(b'[["sesame"], {}, {}]', application_headers=TASK | {"task": "celery.map"}, **JSON),
    "compressed": put(b"sesame", application_headers=TASK | {"compression": "application/x-gzip"}, **JSON),
}


@pytest.mark.parametrize("put_invalid", INVALID_MESSAGES.values(), ids=INVALID_MESSAGES)
def test_a_message_that_a_worker_cannot_read_becomes_a_dead_letter(
    engine: Engine, shared: RabbitMQ, live_worker: SharedWorker, put_invalid: Callable[[RabbitMQ, Settings], None]
) -> None:
    """Breaks if a message that a worker cannot read is dropped, ends the worker, or appears in its log."""
    need_durable(live_worker.settings)
    put_invalid(shared, live_worker.settings)
    publish(live_worker.settings.need_broker(), "w1")
    until(lambda: "w1" in stored(engine))
    until_empty(shared)
    assert live_worker.is_alive
    assert "sesame" not in live_worker.output
    assert len(rows(engine, "SELECT 1 FROM headrace.dead_letters")) == 1


def test_the_message_of_a_killed_worker_is_applied_once(
    engine: Engine, rabbitmq_settings: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if the message of a killed worker is lost, redelivered late, or applied twice."""
    publish(rabbitmq_settings.need_broker(), "w1", "w2")
    with blocking(engine, "w1"), worker(rabbitmq_settings, tmp_path / "first") as first:
        until(lambda: rows(engine, IS_WAITING))
        first.kill()
        first.wait(30)
        until(lambda: is_redelivered(server, "w1"))
    assert stored(engine) == []
    with worker(rabbitmq_settings, tmp_path / "second"):
        until(lambda: sorted(stored(engine)) == ["w1", "w2"])
        until_empty(server)
    ledger = rows(engine, "SELECT outcome, count(*) AS n FROM health.deliveries GROUP BY 1")
    assert ledger == [{"outcome": "applied", "n": 2}]


def test_a_delayed_task_runs_when_it_is_due(
    engine: Engine, rabbitmq_settings: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if a delayed task runs at once, twice or never, or is lost after kill -9 of the broker."""
    need_durable(rabbitmq_settings)
    began = time.time()
    send(rabbitmq_settings, APPLY, ["w1"], 8)
    server.kill()
    server.start()
    with worker(rabbitmq_settings, tmp_path / "log"):
        until(lambda: stored(engine))
        assert time.time() - began > 7.5
        until_empty(server)
    assert rows(engine, "SELECT outcome, attempts FROM health.deliveries") == [{"outcome": "applied", "attempts": 1}]


UNREACHABLE = "postgresql://u:sesame@127.0.0.1:1/d"


def test_a_retried_message_returns_to_its_lane_and_blocks_no_other(
    engine: Engine, rabbitmq_settings: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if a retried task ends in another lane, is dropped, or is retried only once.

    Also breaks if a few failing messages, each delayed by half a minute, block the lane in the meantime.
    """
    publish(rabbitmq_settings.need_broker(), "w1")
    log = tmp_path / "first"

    def delays() -> list[float]:
        return [float(seconds) for seconds in re.findall(r"headrace\.apply is retried in ([\d.]+) s", log.read_text())]

    with worker(rabbitmq_settings, log, DATABASE_URL=UNREACHABLE):
        until(lambda: len(delays()) == 5)  # the fifth delay is at least 4 s
        publish(rabbitmq_settings.need_broker(), "w2")
        until(lambda: len(delays()) > 5)
        assert delays()[5] < 1  # the first one of w2
    with worker(rabbitmq_settings, tmp_path / "second"):
        until(lambda: sorted(stored(engine)) == ["w1", "w2"])
        until_empty(server)


def test_a_worker_reconnects_to_its_lane(
    engine: Engine, rabbitmq_settings: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if a worker stays idle after its queue was deleted, or the broker was down or frozen.

    Also breaks if it returns no delayed messages afterwards.
    """
    log = tmp_path / "log"
    with worker(rabbitmq_settings, log) as process:
        until(lambda: is_ready(log))
        publish(rabbitmq_settings.need_broker(), "w1")
        until(lambda: stored(engine) == ["w1"])
        with server.connect() as connection:
            connection.channel().queue_delete("live")
        # The worker must declare the queue: a publish before that would declare it and hide the deletion.
        until(lambda: server.has("live"))
        until(lambda: is_accepted(server.url, "w2"))  # the new queue may have no leader yet
        until(lambda: "w2" in stored(engine))
        with stopped(server):
            until(lambda: log.read_text().count("delayed messages wait") > 2)
        publish(rabbitmq_settings.need_broker(), "w3")
        until(lambda: "w3" in stored(engine))
        with server.frozen():
            time.sleep(1)
        publish(rabbitmq_settings.need_broker(), "w4")
        until(lambda: "w4" in stored(engine))
        send(rabbitmq_settings, APPLY, ["w5"], 1)
        until(lambda: "w5" in stored(engine))
        assert process.poll() is None


def test_sigterm_loses_no_message(
    engine: Engine, rabbitmq_settings: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if a worker that gets SIGTERM drops its message, applies it twice, or takes longer than 10 s to stop."""
    all_names = [f"w{number}" for number in range(60)]
    publish(rabbitmq_settings.need_broker(), *all_names)
    for number in range(2):
        with worker(rabbitmq_settings, tmp_path / str(number)) as process:
            before = len(stored(engine))
            until(lambda: len(stored(engine)) > before or len(stored(engine)) == len(all_names))  # noqa: B023
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
    with worker(rabbitmq_settings, tmp_path / "last"):
        until(lambda: sorted(stored(engine)) == sorted(all_names))
        until_empty(server)
    ledger = rows(engine, "SELECT outcome, count(*) AS n FROM health.deliveries GROUP BY 1")
    assert ledger == [{"outcome": "applied", "n": len(all_names)}]
