"""Variants of valid messages on each lane: the worker lives, and each is applied, a dead letter or set aside.

500 on the live lane and 100 on the others and on RabbitMQ; with `--full` 100,000 and 5,000, for each seed.
"""

import base64
import copy
import json
import random
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import amqp  # type: ignore[import-untyped]
import msgspec
import pytest
import redis
from sqlalchemy import Engine

from app.broker.celery import make_celery
from app.broker.lanes import APPLY, DERIVE, DOWNLOAD, FETCH, INVALID, LANES, NOTIFY, PROCESSING, RECONCILE, SWEEP
from app.config.settings import Settings
from app.delivery import MESSAGE_VERSION, Delivery, pack
from tests.support import delivery, rows, until, worker, workout
from tests.support.rabbitmq import ABSENT, RabbitMQ, binaries, rabbitmq
from tests.support.workers import is_ready, publish

pytestmark = pytest.mark.processes
Message = dict[str, Any]
TASK_OF = dict(zip(LANES, (APPLY, DOWNLOAD, FETCH, SWEEP, NOTIFY, DERIVE), strict=True))
HAS_DELIVERIES = ("live", "download")  # other tasks have no outcome
NOW = datetime.now(UTC)
TASKS = (
    APPLY,
    DOWNLOAD,
    FETCH,
    SWEEP,
    RECONCILE,
    NOTIFY,
    DERIVE,
    "celery.backend_cleanup",
    "celery.chord_unlock",
    "celery.chain",
    "celery.map",
)
TASKS += ("celery.starmap", "celery.accumulate", "", "headrace", "headrace.apply ", "__main__.x", "\x00")
SIGNATURE = {"task": SWEEP, "args": [], "kwargs": {}, "options": {"queue": "maintenance"}, "subtask_type": None}
TIMES = [one.isoformat() for one in (NOW - timedelta(days=1), NOW + timedelta(seconds=1), NOW + timedelta(days=9))]
TIMES += ["yesterday", "0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00", "2026-11-26T00:00:00"]
ODD = (None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 1e300, -1e300, float("nan"), float("inf"), 0.5)
ODD += ("", "x", "\x00", "\ud800", "é" * 200, "x" * 100_000, "NaN", *TIMES, *TASKS)
ODD += ([], [[]], [None] * 1000, {}, {"a": {}}, {"": None}, [SIGNATURE], SIGNATURE, {"tasks": [SIGNATURE]})
NAMES = ("task", "id", "lang", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id")
NAMES += ("parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "stamped_headers", "stamps", "compression")
NAMES += ("callbacks", "errbacks", "chain", "chord", "args", "kwargs", "delivery_info", "headers", "hostname", "x")
NAMES += ("redelivered", "traceparent", "tracestate", "headrace-sent-at", "headrace-others", "headrace-failures")
NAMES += ("headrace-failing-since", "headrace-retry-reason", "called_directly", "replaced_task_nesting", "is_eager")
PROPERTIES = (
    "correlation_id",
    "reply_to",
    "delivery_mode",
    "delivery_info",
    "priority",
    "body_encoding",
    "delivery_tag",
)
EMBEDDED = ("callbacks", "errbacks", "chain", "chord", "group", "retries", "task", "x")
LINES = (b"", b"{}", b"[]", b"null", b"0", b'"x"', b"NaN", b"\xff\xfe", b"\x00", b"[" * 50_000, b'{"a":' * 50_000)
BROADCASTS = (b"", b"{}", b"[]", b"null", b"{", b'{"body": 1, "properties": {}}', b"\xff", b"[" * 50_000)


class Variants:
    """Changes one message in one or two places. Everything depends on the seed."""

    def __init__(self, seed: int, template: Message, lane: str) -> None:
        message = copy.deepcopy(template)
        message["headers"]["task"] = TASK_OF[lane]
        message["properties"]["delivery_info"]["routing_key"] = lane
        self._dice, self._template, self._number, self._lane = random.Random(seed), json.dumps(message), 0, lane

    def valid(self) -> bytes:
        """The bytes of a valid message of the user `good`."""
        body = [[pack([delivery(workout("good"))])], {}, dict.fromkeys(EMBEDDED[:4])]
        message = json.loads(self._template) | {"body": base64.b64encode(json.dumps(body).encode()).decode()}
        return json.dumps(message).encode()

    def next(self) -> bytes:
        """The bytes of the next variant."""
        self._number += 1
        message, dice = json.loads(self._template), self._dice
        if dice.random() < 0.05:
            return dice.choice(LINES)
        one = delivery(workout(f"u{self._number}", f"w{self._number}"), name=f"msg_{self._number}")
        packed = self._changed_delivery(one) if dice.random() < 0.2 else pack([one])
        arguments = [packed] if self._lane in HAS_DELIVERIES else [self._number] if self._lane == "backfill" else []
        body: Any = [arguments, {}, dict.fromkeys(EMBEDDED[:4])]
        if dice.random() < 0.25:
            body = self._changed_body(body)
        message["body"] = base64.b64encode(json.dumps(body).encode()).decode()
        for _ in range(dice.choice((1, 1, 2))):
            self._change(message)
        raw = json.dumps(message).encode()
        return raw if dice.random() > 0.03 else raw[: dice.randrange(len(raw))]

    def _odd(self) -> Any:
        return copy.deepcopy(self._dice.choice(ODD))  # a later change may insert into it

    def _changed_delivery(self, one: Delivery) -> str:
        fields, version = list(msgspec.structs.astuple(one)), MESSAGE_VERSION
        where = self._dice.randrange(len(fields) + 1)
        if where == len(fields):
            version = self._dice.choice((0, 1, 3, -1, 2**40))
        else:
            odd = self._dice.choice([v for v in ODD if not _is_text_of_surrogates(v) and v != 2**70])
            fields[where] = odd if self._dice.random() < 0.7 else bytes(self._dice.randrange(30))
        return base64.b64encode(msgspec.msgpack.encode([version, [fields]])).decode()

    def _changed_body(self, body: list[Any]) -> Any:
        where = self._dice.randrange(5)
        if where == 0:
            return self._odd()
        if where == 1:
            body[0] = [self._odd() for _ in range(self._dice.randrange(3))] or self._odd()
        elif where == 2:
            body[1] = {self._dice.choice(NAMES): self._odd()}
        elif where == 3:
            body[2] = {self._dice.choice(EMBEDDED): self._odd()}
        else:
            body = body[: self._dice.randrange(3)]
        return body

    def _change(self, message: Message) -> None:
        kind = self._dice.randrange(10)
        if kind < 5:
            self._put(message["headers"], NAMES)
        elif kind < 7:
            self._put(message["properties"], PROPERTIES)
        elif kind == 7:
            came = message["properties"].get("delivery_info")
            self._put(came if isinstance(came, dict) else message, ("exchange", "routing_key", "redelivered"))
        else:
            self._put(message, ("content-type", "content-encoding", "properties", "headers", "body"))
        for part in ("headers", "properties"):
            if not isinstance(message.get(part), dict):
                message[part] = json.loads(self._template)[part] if self._dice.random() < 0.5 else message.get(part)
        if not all(isinstance(message.get(part), dict) for part in ("headers", "properties")):
            message.setdefault("headers", {})
            message["headers"], message["properties"] = (
                message[part] if isinstance(message.get(part), dict) else {} for part in ("headers", "properties")
            )

    def _put(self, into: dict[str, Any], names: tuple[str, ...]) -> None:
        name = self._dice.choice(names)
        if self._dice.random() < 0.2:
            into.pop(name, None)
        else:
            into[name] = self._odd()


def _is_text_of_surrogates(value: Any) -> bool:
    return isinstance(value, str) and not value.isascii() and "\ud800" in value


@pytest.fixture
def message(settings: Settings, broker: "redis.Redis") -> Message:
    """A valid message as the endpoint publishes it, taken out of the lane."""
    publish(settings, [delivery(workout("u0"))])
    published = json.loads(broker.rpop("live"))
    assert isinstance(published, dict)
    return published


@pytest.fixture
def lane() -> str:
    """The lane of the worker; a parametrized test replaces it."""
    return "live"


@pytest.fixture
def running(settings: Settings, message: Message, lane: str, tmp_path: Path) -> Iterator[Any]:
    """A worker process of the lane, started after `message` was taken out of the live lane."""
    assert message
    log = tmp_path / "worker.log"
    with worker(settings, log, lane) as process:
        until(lambda: is_ready(log))
        yield process


def is_drained(broker: "redis.Redis", lane: str) -> bool:
    """Whether no message is queued, moved or unacknowledged."""
    with broker.pipeline() as pipe:
        return not sum(pipe.llen(lane).llen(lane + PROCESSING).hlen("unacked").execute())


@dataclass(frozen=True)
class Attack:
    """A broker with a worker, and the variants to send."""

    broker: "redis.Redis"
    worker: "subprocess.Popen[bytes]"
    variants: Variants
    number: int


@pytest.fixture
def attack(broker: "redis.Redis", message: Message, running: Any, lane: str, fuzz_seed: int, *, full: bool) -> Attack:
    """Many variants for the live lane, fewer for the others."""
    return Attack(broker, running, Variants(fuzz_seed, message, lane), so_many(lane, full=full))


def so_many(lane: str, *, full: bool) -> int:
    """The number of variants."""
    return (100_000 if full else 500) if lane == "live" else (5_000 if full else 100)


def outcomes_of(engine: Engine) -> dict[str, int]:
    """The number of attempts by outcome."""
    found = rows(engine, "SELECT outcome, sum(attempts)::int AS n FROM headrace.deliveries GROUP BY 1")
    return {row["outcome"]: row["n"] for row in found}


@pytest.mark.timeout(14_400)  # each dead letter is a commit: 25 messages a second on a busy machine with two cores
@pytest.mark.parametrize("lane", LANES)
def test_no_message_ends_a_worker_or_is_lost(engine: Engine, attack: Attack, lane: str) -> None:
    """Breaks if a message in a lane ends the worker, is dropped, or runs another task."""
    broker, number = attack.broker, attack.number
    for _ in range(0, number, 500):  # all at once would fill the memory of the broker
        broker.lpush(lane, *(attack.variants.next() for _ in range(min(number, 500))))
        until(lambda: attack.worker.poll() is not None or is_drained(broker, lane), 240)
        assert attack.worker.poll() is None
    outcomes, set_aside = outcomes_of(engine), broker.llen(lane + INVALID)
    print(f"{lane}: {number} variants: {outcomes}, {set_aside} set aside")
    ours = set(LANES) - {"notify", "derive"}  # to these, a worker of the lane `notify` sends tasks itself
    assert [other for other in ours if broker.llen(other)] == []
    if lane in HAS_DELIVERIES:
        assert sum(outcomes.values()) + set_aside == number
        assert set(outcomes) == {"applied", "dead"}
        broker.lpush(lane, attack.variants.valid())
        until(lambda: rows(engine, "SELECT 1 FROM health.workouts WHERE user_id = 'good'"))
    else:
        assert set(outcomes) == {"dead"}
        assert sum(outcomes.values()) + set_aside < number, "no task was executed"


@pytest.fixture(scope="module")
def server() -> Iterator[RabbitMQ]:
    """A RabbitMQ of this module."""
    with rabbitmq() as started:
        yield started


def publish_variant(server: RabbitMQ, lane: str, raw: bytes) -> bool:
    """Publishes a variant. False if AMQP cannot express it, or RabbitMQ refuses it and closes the connection."""
    try:
        message = json.loads(raw)
        body, found = base64.b64decode(message["body"]), message["properties"]
        named = {"content_type": message["content-type"], "content_encoding": message["content-encoding"]}
        named |= {name: found[name] for name in ("correlation_id", "reply_to") if name in found}
        sent = amqp.Message(body, application_headers=message["headers"], delivery_mode=2, **named)
        with server.connect() as connection:
            connection.channel().basic_publish_confirm(sent, routing_key=lane, timeout=5)
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError, OverflowError):
        return False  # not in the form of a message
    except (amqp.AMQPError, OSError, struct.error):
        return False
    return True


@pytest.fixture
def on_rabbitmq(settings: Settings, server: RabbitMQ, lane: str, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker of the lane."""
    log = tmp_path / "worker.log"
    own = replace(settings, broker_url=server.url, redis_url=settings.broker_url)
    with worker(own, log, lane) as process:
        until(lambda: is_ready(log))
        yield process


@pytest.fixture
def variants(message: Message, lane: str, fuzz_seed: int) -> Variants:
    """The variants of a message in the lane."""
    return Variants(fuzz_seed, message, lane)


@pytest.mark.skipif(binaries() is None, reason=ABSENT)
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("lane", HAS_DELIVERIES)
def test_no_message_on_rabbitmq_ends_a_worker_or_is_lost(
    engine: Engine, variants: Variants, server: RabbitMQ, on_rabbitmq: Any, lane: str, *, full: bool
) -> None:
    """Breaks if a message in a lane of RabbitMQ ends the worker, or is dropped."""
    sent, wanted = 0, so_many("on RabbitMQ", full=full)
    for _ in range(3 * wanted):
        sent += publish_variant(server, lane, variants.next())
        if sent == wanted:
            break
    assert sent == wanted
    until(lambda: on_rabbitmq.poll() is not None or sum(outcomes_of(engine).values()) >= sent, 600 if full else 120)
    assert (on_rabbitmq.poll(), sum(outcomes_of(engine).values())) == (None, sent)
    assert set(outcomes_of(engine)) == {"applied", "dead"}
    assert publish_variant(server, lane, variants.valid())
    until(lambda: rows(engine, "SELECT 1 FROM health.workouts WHERE user_id = 'good'"))


def test_broadcasts_do_not_end_a_worker(
    engine: Engine, settings: Settings, broker: "redis.Redis", message: Message, running: Any
) -> None:
    """Breaks if whoever can write to the broker can end workers, or let them drop a task, by remote control."""
    celery = make_celery(settings, "publisher")
    control = celery.control
    for command in ("shutdown", "pool_restart", "pool_shrink", "disable_events", "hello", "memdump"):
        control.broadcast(command)
    control.broadcast("cancel_consumer", arguments={"queue": "live"})
    control.broadcast("rate_limit", arguments={"task_name": APPLY, "rate_limit": "1/h"})
    control.revoke(message["headers"]["id"])
    for raw in BROADCASTS:
        broker.publish("/0.celery.pidbox", raw)
    (reply,) = until(lambda: control.ping(timeout=1))
    assert list(reply.values()) == [{"ok": "pong"}]
    broker.lpush("live", json.dumps(message))
    until(lambda: rows(engine, "SELECT 1 FROM health.workouts WHERE user_id = 'u0'"))
    assert control.inspect(timeout=2).stats()
    assert running.poll() is None
    celery.close()
