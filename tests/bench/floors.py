"""Floors: the throughput of single steps alone, measured in the same run as reference for every other figure."""

import multiprocessing
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import redis
from flask import Flask, Response, request
from werkzeug.datastructures import Headers

from app.catalogue import catalogue
from app.config.settings import Settings, load
from app.delivery import Delivery, pack
from app.signatures.junction import verify
from tests.bench.load import MAKERS, Load, run, workout_event
from tests.bench.pages import PAGES, SAMPLES_PER_PAGE, page
from tests.bench.results import SAMPLES_PER_EVENT, Floors, Plan, Times, times
from tests.bench.stack import running_floor, running_servers
from tests.support import ENCRYPTION_KEY, JUNCTION_SECRET, delivery, signed
from tests.support.broker import BlockingPublisher
from workers.actions import Samples
from workers.aggregators import junction
from workers.ingest.apply import Applier
from workers.store.engine import make_writer, transaction
from workers.store.series import SeriesNumbers
from workers.store.users import claim_user
from workers.store.writer import BatchItem, write

SIZES = (1, 10, 50)  # deliveries to a message
CONNECTIONS, ROUNDS = 32, 3
MAX_REQUESTS_PER_SECOND = 16_000  # requests prepared per second of load


def measure(plan: Plan) -> Floors:
    """Measures all floors, on the web server of the endpoint and on otherwise idle servers."""
    routes = {target: _measure_route(target, plan.seconds / 2) for target in ("bare", "verified")}
    with running_servers() as (database_url, broker_url):
        settings = load({"DATABASE_URL": database_url})
        return Floors(
            *routes["bare"],
            *routes["verified"],
            verifying(),
            {size: publishing(broker_url, size) for size in SIZES},
            {size: applying(settings, size, 60) for size in SIZES},
            applying(settings, 10, 6, samples=True) * SAMPLES_PER_EVENT,
            {count: merging(database_url, 3, count) for count in sorted({1, plan.workers})},
        )


def _measure_route(target: str, seconds: float) -> tuple[float, Times]:
    """The best of ROUNDS: other load can only lower a floor, which would make the ratios look better than they are."""
    numbers, rounds = range(int(seconds * MAX_REQUESTS_PER_SECOND)), list[Load]()
    with running_floor(target, JUNCTION_SECRET) as url:
        for _ in range(ROUNDS):
            given = (url, JUNCTION_SECRET, "workouts", ["floor"])
            rounds.append(run(*given, connections=CONNECTIONS, seconds=seconds, numbers=numbers))
    best = max(rounds, key=lambda one: one.accepted / one.seconds)
    return best.accepted / best.seconds, times(best.seconds_each)


def _route(*, with_verification: bool) -> Flask:
    flask, settings = Flask("floor"), load()

    @flask.post("/webhooks/junction")
    def webhook() -> Response:
        body = request.get_data()
        if with_verification:
            verify(request.headers, body, settings, datetime.now(UTC))
        return Response(status=202)

    @flask.get("/livez")
    def livez() -> Response:
        return Response("up")

    return flask


def bare() -> Flask:
    """A route that only responds."""
    return _route(with_verification=False)


def verified() -> Flask:
    """A route that verifies and responds."""
    return _route(with_verification=True)


def verifying(seconds: float = 1.0) -> float:
    """Requests a second that one process verifies, without a web server."""
    given = msgspec.json.encode(workout_event("floor", 0))
    headers, settings = Headers(signed(given)), load({"JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET})
    count, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        verify(headers, given, settings, datetime.now(UTC))
        count += 1
    return count / (time.perf_counter() - began)


def publishing(broker_url: str, size: int, seconds: float = 2.0) -> float:
    """Deliveries a second that one thread publishes, `size` per message, to a broker without consumers."""
    publisher, message, sent = BlockingPublisher(Settings(broker_url=broker_url)), deliveries("workouts", size), 0
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        publisher.publish(message)
        sent += size
    rate = sent / (time.perf_counter() - began)
    publisher.close()
    with redis.Redis.from_url(broker_url) as client:
        client.delete("live")
    return rate


def applying(settings: Settings, size: int, messages: int, *, samples: bool = False) -> float:
    """Deliveries a second that one process applies, `size` per message."""
    settings = replace(settings, encryption_keys=(ENCRYPTION_KEY,))
    given = deliveries("heartrate" if samples else "workouts", size * (messages + 1))
    packed = [pack(given[start : start + size]) for start in range(0, len(given), size)]
    engine = make_writer(settings)
    applier = Applier(engine, settings)
    applier.apply(packed.pop())
    began = time.perf_counter()
    for message in packed:
        applier.apply(message)
    rate = size * messages / (time.perf_counter() - began)
    engine.dispose()
    return rate


def deliveries(kind: str, count: int) -> list[Delivery]:
    """`count` deliveries of 50 users, sealed as by the endpoint."""
    return [delivery(MAKERS[kind](f"floor-{number % 50}", number), datetime.now(UTC)) for number in range(count)]


def merging(database_url: str, people: int, processes: int) -> float:
    """Samples a second that processes copy, merge and commit page by page, after they have parsed them.

    Each process writes for `people` users of its own.
    """
    context = multiprocessing.get_context("spawn")
    ready, go = context.Barrier(processes + 1), context.Barrier(processes + 1)
    children = [context.Process(target=_merge_all, args=(database_url, people, ready, go)) for _ in range(processes)]
    for child in children:
        child.start()
    ready.wait(120)
    go.wait(120)
    began = time.perf_counter()
    for child in children:
        child.join(300)
    if any(child.exitcode for child in children):
        raise RuntimeError("a process could not write")
    return people * processes * PAGES * SAMPLES_PER_PAGE / (time.perf_counter() - began)


def _merge_all(database_url: str, people: int, ready: Any, go: Any) -> None:
    engine = make_writer(load({"DATABASE_URL": database_url}), "headrace-bench-floor")
    numbers, read = SeriesNumbers(engine), [_samples(page(number, PAGES)) for number in range(PAGES)]
    with transaction(engine) as connection:  # so that the first page does not include the connection setup
        claim_user(connection, "floor", "junction")
    ready.wait(120)
    go.wait(120)
    for _ in range(people):
        user = str(uuid.uuid4())
        for samples in read:
            action = replace(samples, user_id=user)
            known = numbers.prepare("junction", [action])
            with transaction(engine) as connection:
                claim_user(connection, user, "junction")
                write(connection, [BatchItem(0, action)], "backfill", known)
    engine.dispose()


def _samples(body: bytes) -> Samples:
    (action,) = junction.read_page(catalogue()["heartrate"], "floor", body, datetime.now(UTC)).actions
    assert isinstance(action, Samples)
    return action
