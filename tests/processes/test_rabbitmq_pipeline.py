"""`headrace etl` on a real RabbitMQ: every event is stored once, in queue order, whichever process dies."""

import gzip
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from amqp import Message  # type: ignore[import-untyped]
from sqlalchemy import Engine

from app.broker.lanes import FETCH
from app.config.settings import Settings
from app.errors import Misconfigured, TryLater, Unprocessable
from tests.support import START, apply, delivery, event, heartrate, of_worker, program, rows, until, workout
from tests.support.broker import arguments, waiting
from tests.support.rabbitmq import ABSENT, RabbitMQ, binaries, rabbitmq
from workers.ingest import rabbitmq_pipeline
from workers.ingest.apply import Applier
from workers.ingest.rabbitmq_pipeline import MessageIdentity, PipelineConsumer, ReceivedMessage, decode_body

pytestmark = pytest.mark.processes
QUEUE = "etl"
needs_rabbitmq = pytest.mark.skipif(binaries() is None, reason=ABSENT)
CANARY = "canary-7d1f"
NOTICE = event("historical.data.sleep.created", "u1", {"user_id": "u1", "provider": "oura", "is_final": True})


@pytest.fixture(scope="module")
def shared() -> Iterator[RabbitMQ]:
    """One server for all tests."""
    with rabbitmq() as server:
        yield server


@pytest.fixture
def server(shared: RabbitMQ) -> RabbitMQ:
    """The server with the exchange that the pipeline publishes to and an empty queue."""
    with shared.connect() as connection:
        channel = connection.channel()
        channel.queue_delete(QUEUE)
        channel.exchange_declare("junction", "topic", durable=True, auto_delete=False)
        channel.queue_declare(QUEUE, durable=True, auto_delete=False)
        channel.queue_bind(QUEUE, "junction", "#")
    return shared


@pytest.fixture
def here(settings: Settings, server: RabbitMQ) -> Settings:
    """A deployment with this pipeline."""
    return replace(settings, etl_url=server.url, etl_queue=QUEUE)


def publish(server: RabbitMQ, *events: Any, zipped: bool = False, **told: Any) -> None:
    """Publishes as the pipeline does: persistent, with the event type as the routing key."""
    with server.connect() as connection:
        channel = connection.channel()
        for one in events:
            body = one if isinstance(one, bytes) else json.dumps(one).encode()
            key = one["event_type"] if isinstance(one, dict) else "daily.data.workouts.created"
            more = {"content_encoding": "gzip"} if zipped else {}
            body = gzip.compress(body) if zipped and isinstance(one, dict) else body
            about = {"content_type": "application/json", "delivery_mode": 2} | more | told
            channel.basic_publish_confirm(Message(body, **about), "junction", key)


def through(engine: Engine, here: Settings, server: RabbitMQ) -> None:
    """Consumes all messages, in this process."""
    door = PipelineConsumer(here, Applier(engine, here))

    original = door._commit

    def commit(connection: Any, batch: Sequence[ReceivedMessage], naming: MessageIdentity) -> None:
        original(connection, batch, naming)
        if not connection.default_channel.queue_declare(QUEUE, passive=True).message_count:
            door.stop()

    door._commit = commit  # type: ignore[method-assign]
    door.run()


@contextmanager
def running(here: Settings, log: Path, **more: str) -> Iterator[Any]:
    """A process `headrace etl`, without a broker of its own unless one is passed."""
    variables = of_worker(here) | {"HEADRACE_ETL_URL": here.need_etl()[0], "HEADRACE_ETL_QUEUE": QUEUE}
    del variables["BROKER_URL"]
    variables |= more
    with program("workers.cli", "etl", log=log, **variables, HEADRACE_LOG_LEVEL="INFO") as process:
        yield process


def taken(body: bytes = b"{}", encoding: str = "", **changes: Any) -> ReceivedMessage:
    """A message."""
    values = {"tag": 1, "routing_key": "k", "redelivered": False, "message_id": None, "seconds": None}
    return ReceivedMessage(**(values | {"body": body, "encoding": encoding} | changes))


# A message


@pytest.mark.parametrize("encoding", ["", "identity", "utf-8"])
def test_a_body_comes_as_it_is_or_zipped(encoding: str) -> None:
    """Breaks if small bodies, which the pipeline does not compress, or large ones cannot be read."""
    assert decode_body(taken(b"{}", encoding), 100) == b"{}"
    assert decode_body(taken(gzip.compress(b"{}"), "gzip"), 100) == b"{}"


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (gzip.compress(bytes(1_000_000)), "gzip"),
        (gzip.compress(b"{}")[:-4], "gzip"),
        (b"{}", "gzip"),
        (gzip.compress(b"{}") + b"more", "gzip"),
        (b"{}", "br"),
    ],
    ids=["bomb", "cut short", "not zipped", "two in one", "another encoding"],
)
def test_what_cannot_be_unwrapped_is_refused(body: bytes, encoding: str) -> None:
    """Breaks if a small message expands to all memory, or half a body counts as whole."""
    with pytest.raises(Unprocessable):
        decode_body(taken(body, encoding), 1000)


def test_names_and_clocks_are_told_apart() -> None:
    """Breaks if two events of equal content have one id, or a redelivered event has a new one."""
    naming, redelivered = (
        MessageIdentity(),
        [taken(b"a", redelivered=True), taken(b"b", redelivered=True), taken(b"a", redelivered=True)],
    )
    assert len({naming.name(taken(b"a")) for _ in range(3)}) == 3
    first, second = (
        [MessageIdentity().name(redelivered[0]), *map(naming.name, redelivered)],
        [naming.name(redelivered[0])],
    )
    assert len(set(first)) == 3
    assert first[0] == first[1]
    assert second[0] not in first
    assert naming.name(taken(b"a", message_id="1")) == MessageIdentity().name(
        taken(b"a", message_id="1", redelivered=True)
    )
    ids = {naming.name(taken(b"a", message_id="1", routing_key=key)) for key in ("sleep", "workouts")}
    assert len(ids) == 2  # such an id is the pipeline's for one type of event
    assert [naming.clock(taken(seconds=s))[1] for s in (5, 5, 5, 6, 5, 2, 9)] == [
        *(5000, 5001, 5002, 6000, 5000, 2000),
        9000,
    ]
    moments = [naming.clock(taken())[0] for _ in range(1000)]
    assert sorted(set(moments)) == moments


# The queue


@needs_rabbitmq
@pytest.mark.parametrize("zipped", [False, True])
def test_events_land_as_by_webhook(engine: Engine, here: Settings, server: RabbitMQ, *, zipped: bool) -> None:
    """Breaks if an event of the pipeline is stored differently from a webhook, or stays in the queue."""
    publish(server, workout("u1"), heartrate("u1", {0: 60, 1: 61}), zipped=zipped)
    through(engine, here, server)
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 1
    assert [row["value"] for row in rows(engine, "SELECT value FROM health.heartrate ORDER BY ts")] == [60, 61]
    ledger = rows(engine, "SELECT provider, event_type, outcome FROM health.deliveries ORDER BY 2")
    assert [(row["provider"], row["outcome"]) for row in ledger] == [("junction", "applied")] * 2
    assert server.waiting(QUEUE) == 0
    assert len(rows(engine, "SELECT 1 FROM headrace.archive")) == 2


@needs_rabbitmq
@pytest.mark.parametrize("told", [{}, {"timestamp": int(START.timestamp())}], ids=["no clock", "one second"])
def test_what_is_said_again_later_stands(
    engine: Engine, here: Settings, server: RabbitMQ, told: dict[str, Any]
) -> None:
    """Breaks if of A, B, A the second A counts as a duplicate of the first, and B stays."""
    publish(server, *(heartrate("u1", {0: value}) for value in (60, 61, 60)), **told)
    through(engine, here, server)
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 60.0}]
    assert len(rows(engine, "SELECT 1 FROM health.deliveries")) == 3


@needs_rabbitmq
def test_an_old_event_does_not_beat_a_newer_webhook(engine: Engine, here: Settings, server: RabbitMQ) -> None:
    """Breaks if an event that was queued for hours wins over newer data because it arrives last."""
    apply(engine, here, delivery(heartrate("u1", {0: 70}), START + timedelta(hours=1)))
    publish(server, heartrate("u1", {0: 60}), timestamp=int(START.timestamp()))
    through(engine, here, server)
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 70.0}]
    assert rows(engine, "SELECT count(*) FROM health.deliveries WHERE outcome = 'stale'") == [{"count": 1}]


@needs_rabbitmq
def test_poison_is_set_aside_and_its_neighbours_land(engine: Engine, here: Settings, server: RabbitMQ) -> None:
    """Breaks if one invalid message stops the queue, or is dropped."""
    publish(server, workout("u1", "w1"), CANARY.encode(), workout("u1", "w2", title=f"{CANARY}\u0000"))
    publish(server, CANARY.encode(), zipped=True)
    publish(server, workout("u1", "w3"))
    through(engine, here, server)
    assert [row["id"] for row in rows(engine, "SELECT id FROM health.workouts ORDER BY id")] == ["w1", "w3"]
    letters = rows(engine, "SELECT reason FROM headrace.dead_letters")
    assert len(letters) == 3
    assert CANARY not in str(letters)
    assert server.waiting(QUEUE) == 0


@needs_rabbitmq
def test_a_kill_in_the_middle_loses_nothing(engine: Engine, here: Settings, server: RabbitMQ, tmp_path: Path) -> None:
    """Breaks if a message is acknowledged before it is committed, or a redelivered one changes the result."""
    count = 600
    publish(server, *(workout("u1", f"w{number}") for number in range(count)))
    stored = "SELECT count(*) AS rows FROM health.workouts"
    for enough in (1, 150):
        with running(here, tmp_path / "log") as process:
            until(lambda least=enough: rows(engine, stored)[0]["rows"] >= least)
            os.kill(process.pid, signal.SIGKILL)
    with running(here, tmp_path / "log") as process:
        until(lambda: rows(engine, stored) == [{"rows": count}])
        until(lambda: server.waiting(QUEUE) == 0)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 10
    assert rows(engine, "SELECT outcome FROM health.deliveries WHERE outcome = 'dead'") == []
    assert server.waiting(QUEUE) == 0


@needs_rabbitmq
def test_a_broker_that_goes_away_is_waited_for(
    engine: Engine, here: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if a restart of RabbitMQ ends the worker, or it does not consume the messages that were kept."""
    with running(here, tmp_path / "log") as process:
        publish(server, workout("u1", "w1"))
        until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))
        server.kill()
        server.start()
        publish(server, workout("u1", "w2"))
        until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 2)
        assert process.poll() is None
    assert "guest" not in (tmp_path / "log").read_text()


@needs_rabbitmq
def test_a_second_worker_stands_by_and_takes_over(
    engine: Engine, here: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if two workers consume one queue out of order, or no worker takes over from the first."""
    log = tmp_path / "second"
    with running(here, tmp_path / "first") as first:
        until(lambda: "consuming from queue" in (tmp_path / "first").read_text())
        with running(here, log):
            until(lambda: "stands by" in log.read_text())
            assert "consuming from queue" not in log.read_text()
            first.send_signal(signal.SIGTERM)
            publish(server, workout("u1"))
            until(lambda: "consuming from queue" in log.read_text())
            until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))


@needs_rabbitmq
def test_while_the_database_is_away_nothing_is_acknowledged(here: Settings, server: RabbitMQ, engine: Engine) -> None:
    """Breaks if a message is acknowledged before it is stored."""
    waiting: list[int] = []

    class Away(Applier):
        def apply_deliveries(self, deliveries: Any, *, redelivered: bool = False) -> Any:
            if len(waiting) < 2:
                with server.connect() as connection:
                    waiting.append(connection.channel().queue_declare(QUEUE, passive=True).message_count)
                raise TryLater("PostgreSQL: away")
            door.stop()
            return super().apply_deliveries(deliveries, redelivered=redelivered)

    publish(server, workout("u1"))
    door = PipelineConsumer(here, Away(engine, here))
    door.run()
    assert len(waiting) == 2
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 1
    assert server.waiting(QUEUE) == 0


@needs_rabbitmq
def test_announced_history_is_fetched_at_once(
    here: Settings, server: RabbitMQ, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if history that the pipeline announces is fetched only after the next sweep, other than with webhooks."""
    ready = tmp_path / "ready"
    more = {"BROKER_URL": broker_url, "JUNCTION_API_KEY": "sk_us_key", "HEADRACE_READY_FILE": str(ready)}
    with running(here, tmp_path / "log", **more):
        until(ready.exists)
        publish(server, NOTICE, workout("u1"))
        (message,) = until(lambda: waiting(broker_url, "backfill"))
    assert (message["headers"]["task"], len(arguments(message))) == (FETCH, 1)


@needs_rabbitmq
def test_a_broker_of_ours_that_is_away_delays_nothing(
    engine: Engine, here: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if events wait for the Celery broker, which only history needs, or are not acknowledged."""
    more = {"BROKER_URL": "redis://127.0.0.1:1/0", "JUNCTION_API_KEY": "sk_us_key"}
    with running(here, tmp_path / "log", **more):
        publish(server, NOTICE, NOTICE, workout("u1"))
        until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))
        until(lambda: "the next sweep enqueues it" in (tmp_path / "log").read_text())
        until(lambda: server.waiting(QUEUE) == 0)
    assert len(rows(engine, "SELECT 1 FROM health.backfills")) == 1


def test_a_runner_of_the_procfile_is_not_ended_by_it(tmp_path: Path) -> None:
    """Breaks if a deployment without a pipeline cannot run all lines of the Procfile, or the process does not end."""
    log = tmp_path / "log"
    with program("workers.cli", "etl", "--optional", log=log) as process:
        until(lambda: "HEADRACE_ETL_URL: not set" in log.read_text())
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 0
    with program("workers.cli", "etl", log=log) as process:
        assert process.wait(30) == 1


@needs_rabbitmq
def test_the_check_looks_at_the_queue(here: Settings, server: RabbitMQ) -> None:
    """Breaks if `headrace check` does not find a typing error in the name of the queue."""
    publish(server, workout("u1"))
    assert rabbitmq_pipeline.queue_depth(here) == 1
    with pytest.raises(Misconfigured, match=r"^HEADRACE_ETL_URL: there is no queue of the name in HEADRACE_ETL_QUEUE"):
        rabbitmq_pipeline.queue_depth(replace(here, etl_queue="other"))
    with pytest.raises(Misconfigured, match=r"cannot be reached"):
        rabbitmq_pipeline.queue_depth(replace(here, etl_url="amqp://guest:guest@127.0.0.1:1//"))
    with pytest.raises(Misconfigured, match=r"^HEADRACE_ETL_QUEUE: not set"):
        rabbitmq_pipeline.queue_depth(replace(here, etl_queue=None))
