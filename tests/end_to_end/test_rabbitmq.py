"""A complete `headrace up` on a real RabbitMQ: events and history arrive while workers and the broker are killed."""

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, takewhile
from random import Random
from typing import Any

import msgspec
import psycopg
import pytest
from amqp import Message  # type: ignore[import-untyped]
from sqlalchemy import create_engine

from app.catalogue import catalogue
from tests.support import heartrate, until, workout
from tests.support.backfills import make_due
from tests.support.rabbitmq import ABSENT, RabbitMQ, binaries, rabbitmq
from tests.support.servers import server_place
from workers.local import wheels
from workers.local.temporary import Stack, running_stack
from workers.simulator import World, first_events
from workers.simulator.sender import NO_ANSWER
from workers.simulator.server import API_KEY, Simulator
from workers.verify.drill.load import ObservingSender
from workers.verify.expected import history, stored

pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(600),
    pytest.mark.skipif(binaries() is None, reason=ABSENT),
    pytest.mark.skipif(not wheels.available(), reason="no PostgreSQL and Valkey wheels for this platform"),
]
GROUPS = ("live", "broker", "backfill")
KILL_INTERVAL_SECONDS = 2.5
QUEUE = "etl"
LIVE = tuple(f"live-{number}" for number in range(10))  # the user ids of the live events


@dataclass(frozen=True)
class Load:
    """The amount of events, history and kills."""

    kill_seconds: float
    events_per_second: int  # events
    days: int  # of history per user
    request_rate: str  # slow enough that the kills happen during the backfills
    workers: int  # of each lane
    resources: frozenset[str]  # the resources with announced history


FEW = frozenset(("activity", "heartrate", "profile", "sleep", "steps", "workouts"))
SMALL, LARGE = Load(5, 15, 4, "4/second", 1, FEW), Load(20, 40, 10, "30/second", 2, frozenset(catalogue()))


def live_event(number: int) -> Any:
    """An odd number is a workout with its own id, an even number a sample with its own minute."""
    user = LIVE[number % len(LIVE)]
    return workout(user, f"w{number}") if number % 2 else heartrate(user, {number: 60 + number % 100})


def announcements(world: World, resources: Container[str]) -> Iterator[Any]:
    """The notices of the history of all users for these resources."""
    for event in first_events(world):
        kind, _, rest = event["event_type"].partition(".data.")
        if kind == "historical" and rest.partition(".")[0] in resources:
            yield event


@contextlib.contextmanager
def stack_on(server: RabbitMQ, provider: Simulator, load: Load) -> Iterator[Stack]:
    """A stack on this broker that fetches history from this provider and consumes the pipeline queue."""
    environment = {
        "BROKER_URL": server.url,
        "JUNCTION_API_KEY": API_KEY,
        "JUNCTION_BASE_URL": provider.url,
        "HEADRACE_REQUEST_RATE": load.request_rate,
        "HEADRACE_ETL_URL": server.url,
        "HEADRACE_ETL_QUEUE": QUEUE,
        "HEADRACE_WEB_PROCESSES": "1",
    }
    with running_stack("rabbitmq", environment, workers=load.workers) as stack:
        yield stack


def select(stack: Stack, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """The rows of a query."""
    with psycopg.connect(stack.info()["database_url"], connect_timeout=5) as connection:
        return connection.execute(query, parameters).fetchall()


def kill_at_random(server: RabbitMQ, stack: Stack, dice: Random, seconds: float) -> Counter[str]:
    """Kills a worker or the broker every KILL_INTERVAL_SECONDS, and restarts the broker."""
    killed: Counter[str] = Counter()
    began = time.monotonic()
    while time.monotonic() < began + seconds or len(killed) < len(GROUPS):
        time.sleep(KILL_INTERVAL_SECONDS)
        group = min(dice.sample(GROUPS, len(GROUPS)), key=lambda one: killed[one])
        if group == "broker":
            server.kill()
            server.start()
        else:
            os.kill(dice.choice(stack.info()["processes"][group]), signal.SIGKILL)
        killed[group] += 1
    return killed


def check_events(stack: Stack, accepted: dict[str, Any]) -> None:
    """Checks that every accepted event is stored exactly once."""
    settled = "SELECT outcome, count(*) FROM health.deliveries WHERE message_id = ANY(%s) GROUP BY 1"
    until(lambda: sum(count for _, count in select(stack, settled, [*accepted])) == len(accepted), 120)
    assert {outcome for outcome, _ in select(stack, settled, [*accepted])} <= {"applied", "duplicate", "stale"}
    wanted = Counter(event["event_type"].split(".")[2] for event in accepted.values() if event["user_id"] in LIVE)
    for view, key in (("workouts", "id"), ("heartrate", "ts")):
        query = f"SELECT count(*), count(DISTINCT (user_id, {key})) FROM health.{view} WHERE user_id = ANY(%s)"
        assert select(stack, query, [*LIVE]) == [(wanted[view], wanted[view])]
    assert select(stack, "SELECT message_id FROM health.deliveries GROUP BY 1 HAVING count(*) > 1") == []


def check_history(stack: Stack, world: World, resources: Container[str]) -> None:
    """Checks that the history of the provider is stored exactly once."""
    status = "SELECT DISTINCT status FROM health.backfills"
    engine = create_engine(stack.info()["database_url"].replace("postgresql", "postgresql+psycopg", 1))
    make_due(engine, leases=True)
    until(lambda: select(stack, status) == [("complete",)], 240)
    with engine.connect() as connection:
        found = [(key, content) for key, content in stored(connection) if key[1] not in (*LIVE, "u1")]
    engine.dispose()
    assert [key for key, count in Counter(key for key, _ in found).items() if count > 1] == []
    expected = {key: content for key, content in history(world).items() if key[0] in resources}
    assert dict(found).keys() == expected.keys()
    assert [key for key, content in found if expected[key] != content] == []


def check_pipeline(server: RabbitMQ, stack: Stack) -> None:
    """Checks that HEADRACE_ETL_QUEUE is consumed too."""
    assert len(stack.info()["processes"]["etl"]) == 1
    with server.connect() as connection:
        body = Message(msgspec.json.encode(workout("u1")), content_type="application/json", delivery_mode=2)
        connection.channel().basic_publish_confirm(body, "", QUEUE)
    until(lambda: select(stack, "SELECT 1 FROM health.workouts WHERE user_id = 'u1'"))


def test_kills_lose_or_duplicate_nothing(record_property: Any, monkeypatch: pytest.MonkeyPatch, *, full: bool) -> None:
    """Breaks if kill -9 of workers and of RabbitMQ loses or duplicates an event, or a backfill does not resume.

    Also breaks if `headrace up` does not consume HEADRACE_ETL_QUEUE.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(server_place()))  # of running_stack
    load = LARGE if full else SMALL
    with ExitStack() as everything:
        server = everything.enter_context(rabbitmq())
        with server.connect() as connection:
            connection.channel().queue_declare(QUEUE, durable=True, auto_delete=False)
        provider = everything.enter_context(Simulator(1, load.days, page_size=50))
        stack = everything.enter_context(stack_on(server, provider, load))
        info = stack.info()
        assert info["broker_url"] == server.url
        assert info["redis_url"].startswith("redis:")  # for the rate limits
        assert ("broker" in info["processes"], len(info["processes"]["redis"])) == (False, 1)
        check_pipeline(server, stack)
        over, url = threading.Event(), f"{info['web']}/webhooks/junction"
        sender = ObservingSender(url, info["junction_webhook_secret"], 7, threading.Event())
        everything.enter_context(sender)
        for notice in announcements(provider.world, load.resources):
            assert sender.send(notice) == 202
        live = takewhile(lambda _: not over.is_set(), map(live_event, count()))
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(sender.send_all, live, load.events_per_second)
            try:
                killed = kill_at_random(server, stack, Random(7), load.kill_seconds)
            finally:
                over.set()
            assert set(sending.result(timeout=150)) == {202}
        done = select(stack, "SELECT count(*) FILTER (WHERE status = 'complete'), count(*) FROM health.backfills")
        began = time.monotonic()
        check_events(stack, sender.taken)
        drained = time.monotonic() - began
        check_history(stack, provider.world, load.resources)
        statuses = Counter(answer.status for answer in sender.answers)
        figures = (
            f"{len(sender.taken)} accepted, 0 lost, 0 duplicated; {dict(statuses)}; killed {dict(killed)}; "
            f"drained {drained:.1f} s after the last; {done[0][0]} of {done[0][1]} backfills complete by then"
        )
        record_property("figures", figures)
        print(f"\n{figures}")
        assert set(statuses) <= {202, 503, NO_ANSWER}
        logs = "".join(file.read_text() for file in (stack.data / "log").glob("*.log"))
        # PostgreSQL logs "unexpected EOF" for each killed client.
        assert not [line for line in logs.splitlines() if "unexpected" in line and "unexpected EOF" not in line]
        assert not [user for user in LIVE if user in logs]
        stack_file = stack.data / "stack.json"
        began = time.monotonic()
        os.kill(stack.pid, signal.SIGTERM)
        until(lambda: not stack_file.exists(), 60)
        assert time.monotonic() - began < 30
        until(lambda: not connections(server), 30, every=1)
        left = dict(server.table("list_queues", "name", "messages"))
        # The other queues may contain notices of due work, which is also stored in a table.
        assert (left["live"], left["download"]) == ("0", "0")


def connections(server: RabbitMQ) -> list[list[str]]:
    """The open connections."""
    return server.table("list_connections", "pid")
