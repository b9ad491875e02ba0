"""A real RabbitMQ as the broker: confirmed messages are kept, and refusals are reported in time.

Skipped where RabbitMQ is not installed. The tests of workers are here too, because they share the one server.
"""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from amqp import Message  # type: ignore[import-untyped]
from sqlalchemy import Engine, text

from app.broker.celery import make_celery
from app.broker.delays import delay_options, delay_queue
from app.broker.lanes import APPLY, LANES
from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.delivery import Delivery, pack, unpack
from app.errors import Misconfigured, PublishFailed, TryLater
from tests.support import HTTP, JUNCTION_SECRET, delivery, program, rows, signed, until, worker, workout
from tests.support.rabbitmq import ABSENT, RabbitMQ, binaries, rabbitmq
from tests.support.workers import SharedWorker, is_ready
from workers.broker_admin import lanes, need_durable
from workers.local.ports import free_port

pytestmark = [pytest.mark.processes, pytest.mark.services, pytest.mark.skipif(binaries() is None, reason=ABSENT)]
SECONDS = 5.0  # within which every sender gets a response


@pytest.fixture(scope="module")
def shared() -> Iterator[RabbitMQ]:
    """One server for all tests. A test may kill it; it restarts with its data."""
    with rabbitmq() as server:
        yield server


@pytest.fixture(scope="module")
def module_worker(
    deployment: Settings, shared: RabbitMQ, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedWorker]:
    """The worker of the module. The first test that uses it starts it."""
    settings = replace(deployment, broker_url=shared.url, redis_url=deployment.broker_url)
    with SharedWorker(settings, tmp_path_factory.mktemp("worker")) as one:
        yield one


@pytest.fixture
def live_worker(module_worker: SharedWorker, shared: RabbitMQ, settings: Settings) -> SharedWorker:
    """The worker, ready, with an empty database. Its lane is not deleted: the worker would notice that late."""
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
def here(settings: Settings, server: RabbitMQ) -> Settings:
    """A complete deployment on RabbitMQ."""
    return replace(settings, broker_url=server.url, redis_url=settings.broker_url)


def one(name: str) -> list[Delivery]:
    """The payload of a message with one delivery."""
    return [delivery(workout("u1", name), name=name)]


@contextmanager
def publishing(url: str, *, confirms: bool = True) -> Iterator[Publisher]:
    """A publisher as in each process of the endpoint; `confirm=False` is Celery's default."""
    celery = make_celery(Settings(broker_url=url), "publisher")
    celery.conf.broker_transport_options = celery.conf.broker_transport_options | {"confirm_publish": confirms}
    publisher = Publisher(celery)
    try:
        yield publisher
    finally:
        publisher.close()
        celery.close()


def publish(url: str, *names: str) -> None:
    """Puts messages of one delivery on the live lane."""
    with publishing(url) as publisher:
        for name in names:
            publisher.publish(one(name))


def taken(server: RabbitMQ, lane: str = "live") -> list[Any]:
    """Consumes everything in a lane."""
    found = []
    with server.connect() as connection:
        channel = connection.channel()
        while (message := channel.basic_get(lane, no_ack=True)) is not None:
            found.append(message)
    return found


def names(server: RabbitMQ) -> list[str]:
    """The ids of the deliveries in the live lane. Empties the lane."""
    packed = [msgspec.json.decode(message.body)[0][0] for message in taken(server)]
    return [one.message_id for text in packed for one in unpack(text)]


def refused(publisher: Publisher, name: str = "refused") -> float:
    """Publishes, expects a refusal and returns the seconds until it."""
    began = time.monotonic()
    with pytest.raises(PublishFailed):
        publisher.publish(one(name))
    return time.monotonic() - began


# Durability


def test_lanes_are_durable_quorum_queues(server: RabbitMQ) -> None:
    """Breaks if a lane loses its messages with one broken disk or restart, whichever process declares it first."""
    publish(server.url, "msg_1")
    kinds = "name", "type", "durable", "auto_delete"
    assert ["live", "quorum", "true", "false"] in server.table("list_queues", *kinds)
    celery = make_celery(Settings(broker_url=server.url), "publisher")
    assert [lane.messages for lane in lanes(celery, Settings(broker_url=server.url))] == [1, 0, 0, 0]
    celery.close()
    found = server.table("list_queues", *kinds)
    assert [row for row in found if row[0] in LANES] == [
        row for row in found if row[0] in LANES and row[1:] == ["quorum", "true", "false"]
    ]
    assert {row[0] for row in found} >= set(LANES)
    (message,) = taken(server)
    assert message.properties["delivery_mode"] == 2


def test_a_publish_returns_after_the_confirm(server: RabbitMQ) -> None:
    """Breaks if a publish returns before its confirm. Without confirms it does, and the message is lost."""
    with publishing(server.url) as confirmed, publishing(server.url, confirms=False) as hoped:
        for publisher, name in ((confirmed, "confirmed"), (hoped, "hoped")):
            publisher.publish(one(name))
        until(lambda: server.waiting() == 2)
        with server.frozen():
            assert refused(confirmed) < 3 * SECONDS
            hoped.publish(one("lost"))  # the control: the message may or may not arrive
            server.kill()
        server.start()
    assert names(server) == ["confirmed", "hoped"]


@dataclass
class Load:
    """Threads that publish until they are stopped, and the ids of the confirmed messages."""

    url: str
    confirms: bool
    over: threading.Event
    threads: int = 4

    def __enter__(self) -> None:
        """Stops the threads at the end of the block."""

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def run(self) -> list[str]:
        """The ids of all confirmed messages."""
        with ThreadPoolExecutor(self.threads) as pool:
            return [name for names in pool.map(self._publish, range(self.threads)) for name in names]

    def _publish(self, thread: int) -> list[str]:
        done: list[str] = []
        with publishing(self.url, confirms=self.confirms) as publisher:
            while not self.over.is_set():
                name = f"{thread}-{len(done)}"
                try:
                    publisher.publish(one(name))
                except PublishFailed:
                    break
                done.append(name)
        return done


def test_a_killed_broker_has_what_it_confirmed(server: RabbitMQ, record_property: Any, *, full: bool) -> None:
    """Breaks if kill -9 of the broker under load loses confirmed messages.

    The loss without confirms is measured with --full, and not asserted: it may be zero.
    """
    dice, figures = random.Random(7), {}
    for confirms in (True, False) if full else (True,):
        server.empty()
        load = Load(server.url, confirms, threading.Event())
        publish(server.url, "first")  # declares the lane
        with ThreadPoolExecutor(1) as pool, load:
            running = pool.submit(load.run)
            until(lambda: server.waiting() > 200)
            load.over.wait(dice.uniform(0, 0.5))
            server.kill()
            confirmed = running.result(timeout=60)
        server.start()
        kept = set(names(server))
        figures[confirms] = (len(confirmed), len(set(confirmed) - kept))
    record_property("confirmed and lost, with and without confirms", str(figures))
    print(f"\nconfirmed and lost, with and without confirms: {figures}")
    assert figures[True][0] > 200
    assert figures[True][1] == 0


# Refusals


@contextmanager
def away(server: RabbitMQ) -> Iterator[None]:
    """Stops the server for the block."""
    server.kill()
    try:
        yield
    finally:
        server.start()


Trouble = Callable[[RabbitMQ], Any]
TROUBLES: dict[str, Trouble] = {"frozen": RabbitMQ.frozen, "alarm": RabbitMQ.short_of_memory, "absent": away}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_what_cannot_be_taken_is_refused_and_taken_later(server: RabbitMQ, trouble: Trouble) -> None:
    """Breaks if a publisher hangs, reports a false success, or does not reconnect to the broker.

    Or if it waits for its timeout although RabbitMQ has refused; if readiness is wrong or slow during the outage, or
    leaves something behind; or if a start hangs, or reports the outage as a wrong setting.
    """
    is_alarm = trouble is RabbitMQ.short_of_memory
    longest = 1 if is_alarm else 3 * SECONDS  # the courier, not the publisher, keeps the promise of 5 s
    with publishing(server.url) as warm, publishing(server.url) as cold, publishing(server.url) as pinging:
        pinging.ping()
        warm.publish(one("before"))
        with trouble(server):
            assert refused(warm) < longest
            assert refused(warm) < longest
            assert refused(cold) < 3 * SECONDS
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
    kept = names(server)
    assert [name for name in kept if name != "refused"] == ["before", "after", "after too"]
    assert set(held(server)) <= {"live"}  # a refused message may still arrive there


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


def status(url: str) -> int:
    """The status of a GET; 0 without a response."""
    try:
        return HTTP.get(url).status_code
    except httpx.TransportError:
        return 0


def post(url: str, name: str) -> httpx.Response:
    """Sends an event as Junction does."""
    body = msgspec.json.encode(workout("u1", name))
    return HTTP.post(f"{url}/webhooks/junction", content=body, headers=signed(body, name=name))


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_a_sender_is_answered_in_time(server: RabbitMQ, endpoint: str, trouble: Trouble) -> None:
    """Breaks if a sender waits longer than 5 s, gets another status than 503, or the endpoint must be restarted."""
    until(lambda: post(endpoint, "before").status_code == 202, 20)
    with trouble(server), ThreadPoolExecutor(10) as pool:
        for _ in range(2):
            answers = list(pool.map(lambda number: post(endpoint, f"refused-{number}"), range(10)))
            assert {answer.status_code for answer in answers} == {503}
            assert all("Retry-After" in answer.headers for answer in answers)
            assert max(answer.elapsed.total_seconds() for answer in answers) < SECONDS
        assert status(f"{endpoint}/livez") == 200
        assert status(f"{endpoint}/readyz") == 503
    until(lambda: post(endpoint, "after").status_code == 202, 20)
    assert status(f"{endpoint}/readyz") == 200
    assert {"before", "after"} <= set(names(server))


@pytest.mark.parametrize("gone", ["queue", "exchange", "both"])
def test_a_lane_that_was_removed_swallows_nothing(server: RabbitMQ, gone: str) -> None:
    """Breaks if an unroutable message, which RabbitMQ confirms all the same, counts as published."""
    with publishing(server.url) as publisher:
        publisher.publish(one("before"))
        with server.connect() as connection:
            channel = connection.channel()
            if gone != "exchange":
                channel.queue_delete("live")
            if gone != "queue":
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


@pytest.mark.parametrize("seconds", [1, 64])
def test_where_messages_wait_may_be_removed(server: RabbitMQ, seconds: int) -> None:
    """Breaks if a delayed message is lost because its delay queue was deleted."""
    celery = make_celery(Settings(broker_url=server.url), "worker")
    room = delay_queue("live", seconds).name
    with celery.connection_for_write() as connection, celery.amqp.Producer(connection) as producer:
        for name in ("first", "second"):
            options = delay_options(celery, "live", seconds)
            celery.send_task(APPLY, args=(pack(one(name)),), producer=producer, **options)
            assert server.waiting(room) == 1
            with server.connect() as other:
                other.channel().queue_delete(room)
    celery.close()


# Checks at the start


@pytest.mark.parametrize(
    ("durable", "arguments"),
    [(True, {}), (False, {}), (True, {"x-queue-type": "classic"}), (True, {"x-queue-type": "stream"})],
    ids=["durable", "transient", "classic", "stream"],
)
def test_a_queue_of_another_kind_is_refused(server: RabbitMQ, *, durable: bool, arguments: dict[str, str]) -> None:
    """Breaks if a lane that another program declared loses events, and no process reports that at its start."""
    with server.connect() as connection:
        connection.channel().queue_declare("live", durable=durable, auto_delete=False, arguments=arguments)
    settings = Settings(broker_url=server.url)
    with pytest.raises(Misconfigured, match=r"BROKER_URL: queue live is not a durable quorum queue.*delete_queue live"):
        need_durable(settings)
    need_durable(replace(settings, broker_durability_asserted=True))
    with publishing(server.url) as publisher:
        assert refused(publisher) < SECONDS


def test_a_queue_to_wait_in_of_another_kind_is_refused(server: RabbitMQ) -> None:
    """Breaks if a delay queue without a TTL is found only when a message has to be delayed."""
    room = delay_queue("backfill", 4).name
    with server.connect() as connection:
        channel = connection.channel()
        channel.queue_delete(room)
        channel.queue_declare(room, durable=True, auto_delete=False)
        with pytest.raises(Misconfigured, match=f"BROKER_URL: queue {room} is not"):
            need_durable(Settings(broker_url=server.url))
        channel.queue_delete(room)


def test_what_waits_for_its_time_counts_with_its_lane(server: RabbitMQ) -> None:
    """Breaks if `headrace status` omits delayed messages, or a sweep does not count them when it fills the lane."""
    settings = Settings(broker_url=server.url)
    publish(server.url, "w1")
    send(settings, APPLY, ["w2"], 30)
    send(settings, APPLY, ["w3"], 60)
    celery = make_celery(settings, "publisher")
    assert [lane.messages for lane in lanes(celery, settings)] == [3, 0, 0, 0]
    celery.close()


def test_a_broker_as_it_should_be_is_taken(server: RabbitMQ) -> None:
    """Breaks if an empty or used broker is refused, or the check consumes a message."""
    need_durable(Settings(broker_url=server.url))
    publish(server.url, "kept")
    need_durable(Settings(broker_url=server.url))
    assert names(server) == ["kept"]


@pytest.mark.parametrize("wrong", ["password", "vhost"])
def test_a_wrong_login_is_told_as_such(server: RabbitMQ, wrong: str) -> None:
    """Breaks if a wrong password or vhost is reported as a wrong queue, or the report shows the password."""
    url = server.url.replace("guest:guest", "guest:sesame") if wrong == "password" else server.url + "nowhere"
    with pytest.raises((Misconfigured, TryLater), match="BROKER_URL") as caught:
        need_durable(Settings(broker_url=url))
    assert "queue" not in str(caught.value)
    assert "sesame" not in str(caught.value)


# Workers


def stored(engine: Engine) -> list[str]:
    """The stored workouts."""
    return [row["id"] for row in rows(engine, "SELECT id FROM health.workouts ORDER BY stored_at, id")]


def held(server: RabbitMQ) -> dict[str, str]:
    """The number of ready, delayed and unacknowledged messages of the broker.

    RabbitMQ updates its counts twice a second; only the count of ready messages in one queue is current.
    """
    return {name: count for name, count in server.table("list_queues", "name", "messages") if count != "0"}


def until_empty(server: RabbitMQ) -> None:
    """Waits until the broker has no message, neither ready nor unacknowledged."""
    until(lambda: server.waiting() == 0)
    time.sleep(0.5)  # until RabbitMQ has counted: each query starts Erlang, 0.7 s of CPU
    until(lambda: not held(server), every=1)


def complaints(log: Path) -> list[str]:
    """The warnings in a worker's log."""
    marks = (" WARNING ", " ERROR ", " CRITICAL ", "Traceback")
    return [line for line in log.read_text().splitlines() if any(mark in line for mark in marks)]


def send(here: Settings, task: str, names: list[str], seconds: float) -> None:
    """Sends tasks with a countdown in seconds to the live lane."""
    celery = make_celery(here, "publisher")
    options = {"queue": "live"} | delay_options(celery, "live", seconds)
    with celery.connection_for_write() as connection, celery.amqp.Producer(connection) as producer:
        for name in names:
            celery.send_task(task, args=(pack(one(name)),), producer=producer, **options, argsrepr="(?)")
    celery.close()


def test_a_worker_has_nothing_to_complain_about(engine: Engine, live_worker: SharedWorker) -> None:
    """Breaks if a worker logs a warning at each start: operators would stop reading warnings."""
    publish(live_worker.settings.need_broker(), "w1")
    until(lambda: stored(engine) == ["w1"])
    assert complaints(live_worker.log) == []


def test_a_worker_makes_no_queue_that_it_has_no_use_for(shared: RabbitMQ, live_worker: SharedWorker) -> None:
    """Breaks if a worker declares 28 unused quorum queues, each with its own log and election."""
    found = {row[0] for row in shared.table("list_queues", "name")}
    assert not [name for name in found if name.startswith("celery_delayed")]


def test_a_worker_takes_one_message_at_a_time(shared: RabbitMQ, live_worker: SharedWorker) -> None:
    """Breaks if a busy worker holds messages that another worker could apply."""
    consumers = dict(shared.table("list_consumers", "queue_name", "prefetch_count"))
    assert consumers["live"] == "1"


def put(body: bytes, **properties: Any) -> Callable[[RabbitMQ, Settings], None]:
    """Puts a message on the live lane without Celery."""

    def put_it(server: RabbitMQ, here: Settings) -> None:
        with server.connect() as connection:
            channel = connection.channel()
            channel.confirm_select()
            channel.basic_publish(Message(body, delivery_mode=2, **properties), "live", "live")

    return put_it


def put_unknown(server: RabbitMQ, here: Settings) -> None:
    """Puts a task on the lane that this version does not have."""
    send(here, "headrace.of.tomorrow", ["w9"], 0)


TASK = {"task": APPLY, "id": "1", "lang": "py"}
JSON = {"content_type": "application/json", "content_encoding": "utf-8"}
FOREIGN: dict[str, Callable[[RabbitMQ, Settings], None]] = {
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
    "odd due time": put(b'[["sesame"], {}, {}]', application_headers=TASK | {"eta": "sesame"}, **JSON),
}


@pytest.mark.parametrize("put_foreign", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_task_of_ours_is_kept(
    engine: Engine, shared: RabbitMQ, live_worker: SharedWorker, put_foreign: Callable[[RabbitMQ, Settings], None]
) -> None:
    """Breaks if a message that a worker cannot read is dropped, ends the worker, or appears in its log."""
    need_durable(live_worker.settings)
    put_foreign(shared, live_worker.settings)
    publish(live_worker.settings.need_broker(), "w1")
    until(lambda: "w1" in stored(engine))
    until_empty(shared)
    assert live_worker.is_alive
    assert "sesame" not in live_worker.output
    assert len(rows(engine, "SELECT 1 FROM headrace.dead_letters")) == 1


@contextmanager
def locked(engine: Engine) -> Iterator[None]:
    """Locks the users table, so that workers block in the middle of a task."""
    with engine.connect() as connection, connection.begin():
        connection.execute(text("LOCK TABLE headrace.users IN ACCESS EXCLUSIVE MODE"))
        yield


def test_a_killed_workers_message_is_done_once(
    engine: Engine, here: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if the message of a killed worker is lost, late, or applied twice."""
    publish(here.need_broker(), "w1", "w2")
    with worker(here, tmp_path / "first") as first, locked(engine):
        until(lambda: rows(engine, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        first.kill()
        first.wait(30)
        until(lambda: server.waiting() == 2)
    assert stored(engine) == []
    with server.connect() as connection:
        channel = connection.channel()
        message = channel.basic_get("live")
        assert message.delivery_info["redelivered"] is True
        assert message.headers["x-delivery-count"] >= 1
        channel.basic_reject(message.delivery_tag, requeue=True)
    with worker(here, tmp_path / "second"):
        until(lambda: sorted(stored(engine)) == ["w1", "w2"])
        until_empty(server)
    ledger = rows(engine, "SELECT outcome, count(*) AS n FROM health.deliveries GROUP BY 1")
    assert ledger == [{"outcome": "applied", "n": 2}]


def test_a_task_that_waits_is_done_when_it_is_due(
    engine: Engine, here: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if a delayed task runs at once, twice or never, or is lost after kill -9 of the broker."""
    need_durable(here)
    began = time.time()
    send(here, APPLY, ["w1"], 8)
    server.kill()
    server.start()
    with worker(here, tmp_path / "log"):
        until(lambda: stored(engine))
        assert time.time() - began > 7.5
        until_empty(server)
    assert rows(engine, "SELECT outcome, attempts FROM health.deliveries") == [{"outcome": "applied", "attempts": 1}]


NOWHERE = "postgresql://u:sesame@127.0.0.1:1/d"


def test_a_retried_message_comes_back_to_its_lane_and_holds_up_no_other(
    engine: Engine, here: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if a retried task ends in another lane, is dropped, or is retried only once.

    Or if a few failing messages with a delay of half a minute stop the lane in the meantime.
    """
    publish(here.need_broker(), "w1")
    log = tmp_path / "first"
    with worker(here, log, DATABASE_URL=NOWHERE):
        until(lambda: log.read_text().count("headrace.apply is retried") == 6)  # for 8 s at least, this time
        publish(here.need_broker(), "w2")
        began = time.monotonic()
        until(lambda: log.read_text().count("headrace.apply is retried") > 6)
        assert time.monotonic() - began < 6
    with worker(here, tmp_path / "second"):
        until(lambda: sorted(stored(engine)) == ["w1", "w2"])
        until_empty(server)


def test_a_worker_finds_its_lane_again(engine: Engine, here: Settings, server: RabbitMQ, tmp_path: Path) -> None:
    """Breaks if a worker stays idle after its queue was deleted or the broker was killed."""
    with worker(here, tmp_path / "log") as process:
        until(lambda: is_ready(tmp_path / "log"))
        publish(here.need_broker(), "w1")
        until(lambda: stored(engine) == ["w1"])
        with server.connect() as connection:
            connection.channel().queue_delete("live")
        until(
            lambda: server.has("live")
        )  # the worker declares it again; an immediate declaration would hide the deletion
        publish(here.need_broker(), "w2")
        until(lambda: "w2" in stored(engine))
        server.kill()
        server.start()
        publish(here.need_broker(), "w3")
        until(lambda: "w3" in stored(engine))
        with server.frozen():
            time.sleep(1)
        publish(here.need_broker(), "w4")
        until(lambda: "w4" in stored(engine))
        assert process.poll() is None


def test_workers_end_amid_work_without_loss(engine: Engine, here: Settings, server: RabbitMQ, tmp_path: Path) -> None:
    """Breaks if SIGTERM makes a worker drop or double its message, or takes long."""
    every = [f"w{number}" for number in range(60)]
    publish(here.need_broker(), *every)
    for number in range(2):
        with worker(here, tmp_path / str(number)) as process:
            before = len(stored(engine))
            until(lambda: len(stored(engine)) > before or len(stored(engine)) == len(every))  # noqa: B023
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
    with ExitStack() as both:
        for number in (2, 3):
            both.enter_context(worker(here, tmp_path / str(number)))
        until(lambda: sorted(stored(engine)) == sorted(every))
        until_empty(server)
    ledger = rows(engine, "SELECT outcome, count(*) AS n FROM health.deliveries GROUP BY 1")
    assert ledger == [{"outcome": "applied", "n": len(every)}]
