"""`headrace etl` on a real RabbitMQ: every event is stored once, in queue order, whichever process dies."""

import gzip
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from amqp import Message  # type: ignore[import-untyped]
from sqlalchemy import Engine

from app.broker.lanes import FETCH
from app.config.settings import Settings
from app.errors import ConnectionLost, Misconfigured, RetryAlone, TryLater, Unprocessable
from tests.support import START, apply, delivery, event, heartrate, of_worker, program, rows, until, workout
from tests.support.broker import arguments, waiting
from tests.support.poison import BAD, RAISE, fault
from tests.support.rabbitmq import ABSENT, RabbitMQ, binaries, rabbitmq
from workers.ingest import rabbitmq_pipeline
from workers.ingest.apply import Applier
from workers.ingest.outcomes import MAX_LIVE_BYTES, Applied, ParsedDelivery, Unsettled
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
def pipeline_settings(settings: Settings, server: RabbitMQ) -> Settings:
    """The settings of a deployment that consumes this queue."""
    return replace(settings, etl_url=server.url, etl_queue=QUEUE)


def publish(server: RabbitMQ, *events: Any, compressed: bool = False, **properties: Any) -> None:
    """Publishes as the pipeline does: persistent, with the event type as the routing key."""
    with server.connect() as connection:
        channel = connection.channel()
        for one in events:
            body = one if isinstance(one, bytes) else json.dumps(one).encode()
            key = one["event_type"] if isinstance(one, dict) else "daily.data.workouts.created"
            more = {"content_encoding": "gzip"} if compressed else {}
            body = gzip.compress(body) if compressed and isinstance(one, dict) else body
            merged = {"content_type": "application/json", "delivery_mode": 2} | more | properties
            channel.basic_publish_confirm(Message(body, **merged), "junction", key)


def consume_all(engine: Engine, pipeline_settings: Settings, server: RabbitMQ) -> None:
    """Consumes all messages, in this process."""
    consumer = PipelineConsumer(pipeline_settings, Applier(engine, pipeline_settings))

    original = consumer._commit

    def commit(connection: Any, batch: Sequence[ReceivedMessage], identity: MessageIdentity) -> None:
        original(connection, batch, identity)
        if not connection.default_channel.queue_declare(QUEUE, passive=True).message_count:
            consumer.stop()

    consumer._commit = commit  # type: ignore[method-assign]
    consumer.run()


@contextmanager
def running(pipeline_settings: Settings, log: Path, **more: str) -> Iterator[Any]:
    """A process `headrace etl`. It has no Celery broker unless `more` sets BROKER_URL."""
    variables = of_worker(pipeline_settings) | {
        "HEADRACE_ETL_URL": pipeline_settings.need_etl()[0],
        "HEADRACE_ETL_QUEUE": QUEUE,
    }
    del variables["BROKER_URL"]
    variables |= more
    with program("workers.cli", "etl", log=log, **variables, HEADRACE_LOG_LEVEL="INFO") as process:
        yield process


def received(body: bytes = b"{}", encoding: str = "", **changes: Any) -> ReceivedMessage:
    """A message of the pipeline."""
    values = {"tag": 1, "routing_key": "k", "redelivered": False, "message_id": None, "seconds": None}
    return ReceivedMessage(**(values | {"body": body, "encoding": encoding} | changes))


# A message


@pytest.mark.parametrize("encoding", ["", "identity", "utf-8"])
def test_plain_and_compressed_bodies_are_decoded(encoding: str) -> None:
    """Breaks if small bodies, which the pipeline does not compress, or large ones cannot be read."""
    assert decode_body(received(b"{}", encoding), 100) == b"{}"
    assert decode_body(received(gzip.compress(b"{}"), "gzip"), 100) == b"{}"


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (gzip.compress(bytes(1_000_000)), "gzip"),
        (gzip.compress(b"{}")[:-4], "gzip"),
        (b"{}", "gzip"),
        (gzip.compress(b"{}") + b"more", "gzip"),
        (b"{}", "br"),
    ],
    ids=["bomb", "truncated", "not compressed", "trailing bytes", "unknown encoding"],
)
def test_a_body_that_cannot_be_decoded_is_rejected(body: bytes, encoding: str) -> None:
    """Breaks if a small message fills the memory when decompressed, or a truncated body is accepted."""
    with pytest.raises(Unprocessable):
        decode_body(received(body, encoding), 1000)


def test_each_message_has_its_own_id_and_time() -> None:
    """Breaks if equal events share an id, a redelivered event gets a new one, or successive events share a time."""
    identity, redelivered = (
        MessageIdentity(),
        [received(b"a", redelivered=True), received(b"b", redelivered=True), received(b"a", redelivered=True)],
    )
    assert len({identity.name(received(b"a")) for _ in range(3)}) == 3
    first, second = (
        [MessageIdentity().name(redelivered[0]), *map(identity.name, redelivered)],
        [identity.name(redelivered[0])],
    )
    assert len(set(first)) == 3
    assert first[0] == first[1]
    assert second[0] not in first
    assert identity.name(received(b"a", message_id="1")) == MessageIdentity().name(
        received(b"a", message_id="1", redelivered=True)
    )
    ids = {identity.name(received(b"a", message_id="1", routing_key=key)) for key in ("sleep", "workouts")}
    assert len(ids) == 2  # the pipeline's id is unique only within one type of event
    assert [identity.clock(received(seconds=s))[1] for s in (5, 5, 5, 6, 5, 2, 9)] == [
        *(5000, 5001, 5002, 6000, 5000, 2000),
        9000,
    ]
    moments = [identity.clock(received())[0] for _ in range(1000)]
    assert sorted(set(moments)) == moments


# The queue


@needs_rabbitmq
@pytest.mark.parametrize("compressed", [False, True])
def test_events_are_stored_as_if_by_webhook(
    engine: Engine, pipeline_settings: Settings, server: RabbitMQ, *, compressed: bool
) -> None:
    """Breaks if an event of the pipeline is stored differently from a webhook, or stays in the queue."""
    publish(server, workout("u1"), heartrate("u1", {0: 60, 1: 61}), compressed=compressed)
    consume_all(engine, pipeline_settings, server)
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 1
    assert [row["value"] for row in rows(engine, "SELECT value FROM health.heartrate ORDER BY ts")] == [60, 61]
    ledger = rows(engine, "SELECT provider, event_type, outcome FROM health.deliveries ORDER BY 2")
    assert [(row["provider"], row["outcome"]) for row in ledger] == [("junction", "applied")] * 2
    assert server.ready_count(QUEUE) == 0
    assert len(rows(engine, "SELECT 1 FROM headrace.archive")) == 2


@needs_rabbitmq
@pytest.mark.parametrize(
    "properties", [{}, {"timestamp": int(START.timestamp())}], ids=["no timestamp", "equal timestamps"]
)
def test_a_repeated_value_replaces_the_value_between(
    engine: Engine, pipeline_settings: Settings, server: RabbitMQ, properties: dict[str, Any]
) -> None:
    """Breaks if, after the values A, B, A, the second A counts as a duplicate of the first and B stays stored."""
    publish(server, *(heartrate("u1", {0: value}) for value in (60, 61, 60)), **properties)
    consume_all(engine, pipeline_settings, server)
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 60.0}]
    assert len(rows(engine, "SELECT 1 FROM health.deliveries")) == 3


@needs_rabbitmq
def test_an_old_event_does_not_overwrite_a_newer_webhook(
    engine: Engine, pipeline_settings: Settings, server: RabbitMQ
) -> None:
    """Breaks if an event that was queued for hours overwrites newer data because it arrives last."""
    apply(engine, pipeline_settings, delivery(heartrate("u1", {0: 70}), START + timedelta(hours=1)))
    publish(server, heartrate("u1", {0: 60}), timestamp=int(START.timestamp()))
    consume_all(engine, pipeline_settings, server)
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 70.0}]
    assert rows(engine, "SELECT count(*) FROM health.deliveries WHERE outcome = 'stale'") == [{"count": 1}]


@needs_rabbitmq
def test_invalid_messages_become_dead_letters_and_block_no_other(
    engine: Engine, pipeline_settings: Settings, server: RabbitMQ
) -> None:
    """Breaks if one invalid message stops the queue, or is dropped."""
    publish(server, workout("u1", "w1"), CANARY.encode(), workout("u1", "", title=CANARY))
    publish(server, CANARY.encode(), compressed=True)
    publish(server, workout("u1", "w3"))
    consume_all(engine, pipeline_settings, server)
    assert [row["id"] for row in rows(engine, "SELECT id FROM health.workouts ORDER BY id")] == ["w1", "w3"]
    dead_letters = rows(engine, "SELECT reason FROM headrace.dead_letters")
    assert len(dead_letters) == 3
    assert CANARY not in str(dead_letters)
    assert server.ready_count(QUEUE) == 0


@needs_rabbitmq
def test_a_killed_process_loses_no_message(
    engine: Engine, pipeline_settings: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if a message is acknowledged before it is committed, or a redelivered one changes the result."""
    count = 600
    publish(server, *(workout("u1", f"w{number}") for number in range(count)))
    stored = "SELECT count(*) AS rows FROM health.workouts"
    for min_rows in (1, 150):
        with running(pipeline_settings, tmp_path / "log") as process:
            until(lambda min_rows=min_rows: rows(engine, stored)[0]["rows"] >= min_rows)
            os.kill(process.pid, signal.SIGKILL)
    with running(pipeline_settings, tmp_path / "log") as process:
        until(lambda: rows(engine, stored) == [{"rows": count}])
        until(lambda: server.ready_count(QUEUE) == 0)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 10
    assert rows(engine, "SELECT outcome FROM health.deliveries WHERE outcome = 'dead'") == []
    assert server.ready_count(QUEUE) == 0


@needs_rabbitmq
def test_the_worker_reconnects_after_a_broker_restart(
    engine: Engine, pipeline_settings: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if a restart of RabbitMQ ends the worker, or the worker consumes no message after it."""
    with running(pipeline_settings, tmp_path / "log") as process:
        publish(server, workout("u1", "w1"))
        until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))
        server.kill()
        server.start()
        publish(server, workout("u1", "w2"))
        until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 2)
        assert process.poll() is None
    assert "guest" not in (tmp_path / "log").read_text()


@needs_rabbitmq
def test_a_standby_worker_replaces_a_stopped_worker(
    engine: Engine, pipeline_settings: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if two workers consume one queue at the same time, or the standby does not replace a stopped worker."""
    log = tmp_path / "second"
    with running(pipeline_settings, tmp_path / "first") as first:
        until(lambda: "consuming from queue" in (tmp_path / "first").read_text())
        with running(pipeline_settings, log):
            until(lambda: "stands by" in log.read_text())
            assert "consuming from queue" not in log.read_text()
            first.send_signal(signal.SIGTERM)
            publish(server, workout("u1"))
            until(lambda: "consuming from queue" in log.read_text())
            until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))


@needs_rabbitmq
def test_no_message_is_acknowledged_while_the_database_is_down(
    pipeline_settings: Settings, server: RabbitMQ, engine: Engine
) -> None:
    """Breaks if a message is acknowledged before it is stored."""
    ready_counts: list[int] = []

    class FailingApplier(Applier):
        def apply_batch(self, batch: Any, **options: Any) -> Any:
            if len(ready_counts) < 2:
                with server.connect() as connection:
                    ready_counts.append(connection.channel().queue_declare(QUEUE, passive=True).message_count)
                raise TryLater("PostgreSQL: unavailable")
            consumer.stop()
            return super().apply_batch(batch, **options)

    publish(server, workout("u1"))
    consumer = PipelineConsumer(pipeline_settings, FailingApplier(engine, pipeline_settings))
    consumer.run()
    assert len(ready_counts) == 2
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 1
    assert server.ready_count(QUEUE) == 0


def commit(settings: Settings, apply_batch: Callable[..., Applied]) -> tuple[list[float], list[int]]:
    """Applies a batch of five events without a broker. Returns the pauses and the acknowledged tags."""
    pauses, acknowledged = list[float](), list[int]()
    channel = SimpleNamespace(basic_ack=lambda tag, **_: acknowledged.append(tag))
    applier = cast("Applier", SimpleNamespace(apply_batch=apply_batch))
    consumer = PipelineConsumer(settings, applier)
    consumer._pause_for = pauses.append  # type: ignore[method-assign]
    connection = SimpleNamespace(heartbeat_check=lambda: None, default_channel=channel)
    consumer._commit(connection, [received(tag=n) for n in range(5)], MessageIdentity())
    return pauses, acknowledged


def test_events_that_were_not_tried_yet_wait_for_nothing(settings: Settings) -> None:
    """Breaks if a batch of large events, of which each pass applies some, is slowed down by pauses."""

    def one_each(batch: Sequence[ParsedDelivery], **_: Any) -> Applied:
        return Applied([], [], unsettled=tuple(Unsettled(one.delivery) for one in batch[1:]))

    assert commit(settings, one_each) == ([], [4])


def test_events_are_suspected_after_two_lost_connections(settings: Settings) -> None:
    """Breaks if an event that crashes PostgreSQL is never found, or lost connections use up the tries of an event."""
    seen = []

    def lost(_: Sequence[ParsedDelivery], *, redelivered: bool, failures: int) -> Applied:
        seen.append((redelivered, failures))
        if len(seen) < 5:
            raise RetryAlone("slow") if len(seen) == 1 else ConnectionLost("lost")
        return Applied([], [])

    pauses, acknowledged = commit(settings, lost)
    assert seen == [(False, 0), (False, 1), (False, 1), (True, 1), (True, 1)]
    assert (len(pauses), acknowledged) == (4, [4])


LETTERS = "SELECT 1 FROM headrace.dead_letters"


@needs_rabbitmq
@pytest.mark.parametrize("has_broker", [True, False])
def test_a_poisonous_event_does_not_hold_the_queue(
    pipeline_settings: Settings,
    server: RabbitMQ,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    *,
    has_broker: bool,
) -> None:
    """Breaks if an event that PostgreSQL does not execute is retried for ever, with all events behind it."""
    monkeypatch.setattr(rabbitmq_pipeline, "MAX_RETRY_SECONDS", 0.05)
    handed_over: list[Applied] = []

    def hand_over(applied: Applied) -> None:
        handed_over.append(applied)
        consumer.stop()

    applier = Applier(engine, pipeline_settings)
    consumer = PipelineConsumer(pipeline_settings, applier, hand_over if has_broker else None)
    publish(server, workout("u1"), workout(BAD), workout("u2"))
    with fault(engine, RAISE.format("XX001")), ThreadPoolExecutor(1) as pool:
        done = pool.submit(consumer.run)
        until(lambda: server.ready_count(QUEUE) == 0 and (handed_over or rows(engine, LETTERS)))
        consumer.stop()
        done.result(30)
    assert server.ready_count(QUEUE) == 0  # all are acknowledged
    assert rows(engine, "SELECT user_id FROM health.workouts ORDER BY 1") == [{"user_id": "u1"}, {"user_id": "u2"}]
    assert len(rows(engine, LETTERS)) == (not has_broker)
    assert sum(len(one.unsettled) for one in handed_over) == has_broker


@needs_rabbitmq
@pytest.mark.parametrize("has_broker", [True, False])
def test_a_large_event_does_not_hold_the_queue(
    engine: Engine, pipeline_settings: Settings, server: RabbitMQ, *, has_broker: bool
) -> None:
    """Breaks if events wait while one is applied that is 60 MB large and 0.3 MB compressed, or if that one is lost."""
    handed_over: list[Applied] = []
    applier = Applier(engine, pipeline_settings)
    consumer = PipelineConsumer(pipeline_settings, applier, handed_over.append if has_broker else None)
    publish(server, workout("u1"), workout("large", notes="x" * MAX_LIVE_BYTES), workout("u2"), compressed=True)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(consumer.run)
        until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 3 - has_broker)
        consumer.stop()
        done.result(30)
    assert server.ready_count(QUEUE) == 0
    assert sum(len(one.for_download) for one in handed_over) == has_broker


@needs_rabbitmq
def test_announced_history_is_fetched_at_once(
    pipeline_settings: Settings, server: RabbitMQ, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if history that the pipeline announces waits for the next sweep; history announced by webhook does not."""
    ready = tmp_path / "ready"
    more = {"BROKER_URL": broker_url, "JUNCTION_API_KEY": "sk_us_key", "HEADRACE_READY_FILE": str(ready)}
    with running(pipeline_settings, tmp_path / "log", **more):
        until(ready.exists)
        publish(server, NOTICE, workout("u1"))
        (message,) = until(lambda: waiting(broker_url, "backfill"))
    assert (message["headers"]["task"], len(arguments(message))) == (FETCH, 1)


@needs_rabbitmq
def test_an_outage_of_the_celery_broker_delays_no_event(
    engine: Engine, pipeline_settings: Settings, server: RabbitMQ, tmp_path: Path
) -> None:
    """Breaks if events wait for the Celery broker, which only backfills need, or are not acknowledged."""
    more = {"BROKER_URL": "redis://127.0.0.1:1/0", "JUNCTION_API_KEY": "sk_us_key"}
    with running(pipeline_settings, tmp_path / "log", **more):
        publish(server, NOTICE, NOTICE, workout("u1"))
        until(lambda: rows(engine, "SELECT 1 FROM health.workouts"))
        until(lambda: "the next sweep enqueues it" in (tmp_path / "log").read_text())
        until(lambda: server.ready_count(QUEUE) == 0)
    assert len(rows(engine, "SELECT 1 FROM health.backfills")) == 1


def test_the_optional_process_idles_without_a_pipeline(tmp_path: Path) -> None:
    """Breaks if a deployment without a pipeline cannot run every Procfile line, or SIGTERM does not end the process."""
    log = tmp_path / "log"
    with program("workers.cli", "etl", "--optional", log=log) as process:
        until(lambda: "HEADRACE_ETL_URL: not set" in log.read_text())
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 0
    with program("workers.cli", "etl", log=log) as process:
        assert process.wait(30) == 1


@needs_rabbitmq
def test_the_check_finds_a_wrong_queue(pipeline_settings: Settings, server: RabbitMQ) -> None:
    """Breaks if `headrace check` does not detect a wrong queue name, a missing queue name or an unreachable server."""
    publish(server, workout("u1"))
    assert rabbitmq_pipeline.queue_depth(pipeline_settings) == 1
    with pytest.raises(Misconfigured, match=r"^HEADRACE_ETL_URL: there is no queue of the name in HEADRACE_ETL_QUEUE"):
        rabbitmq_pipeline.queue_depth(replace(pipeline_settings, etl_queue="other"))
    with pytest.raises(Misconfigured, match=r"cannot be reached"):
        rabbitmq_pipeline.queue_depth(replace(pipeline_settings, etl_url="amqp://guest:guest@127.0.0.1:1//"))
    with pytest.raises(Misconfigured, match=r"^HEADRACE_ETL_QUEUE: not set"):
        rabbitmq_pipeline.queue_depth(replace(pipeline_settings, etl_queue=None))
