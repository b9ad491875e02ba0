"""Backfill: samples stored a second, alone and during live events, and the latency of live events during it."""

import time
from collections.abc import Iterator, Sequence

import httpx
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from tests.bench import pages
from tests.bench.pages import PAGES, SAMPLES_PER_PAGE, WINDOW, page
from tests.bench.passage import people
from tests.bench.probe import Probe, Sender
from tests.bench.results import Backfill, ConcurrentBackfill, Plan
from tests.bench.stack import Stack, running_stack
from tests.support import START, event
from workers.aggregators import junction

FAST = "100000/second"  # no effective rate limit
QUIET_SECONDS = 0.6  # per user, so that live events are probed as long before a backfill as during one
STALL_TIMEOUT_SECONDS = 60
PROGRESS = text("""
SELECT count(*) FILTER (WHERE status = 'complete') AS complete, count(*) FILTER (WHERE status = 'failed') AS failed,
       coalesce(sum(records), 0) AS records,
       extract(epoch FROM max(finished_at) - min(started_at)) AS seconds
FROM health.backfills WHERE user_id = ANY(:users)""")
STORED = text("SELECT count(*) FROM health.heartrate WHERE user_id = ANY(:users)")


def measure(plan: Plan) -> Backfill:
    """Measures on separate stacks, with a page server that uses almost no CPU."""
    with pages.serving(PAGES) as url:
        environment = {"JUNCTION_BASE_URL": url, "JUNCTION_API_KEY": "sk_us_bench"}
        with running_stack(plan.workers, environment | {"HEADRACE_REQUEST_RATE": FAST}) as stack:
            alone, seconds = _run_backfills(stack, plan.people)
            more, unlimited = _during_live_events(stack, plan)
        with running_stack(plan.workers, environment) as stack:
            _run_backfills(stack, 1)  # warms up the stack before the probes
            again, as_shipped = _during_live_events(stack, plan)
        floors = dict(_floors(url))
    missing = 3 * plan.people * PAGES * SAMPLES_PER_PAGE - alone - more - again
    return Backfill(alone, missing, alone / seconds, unlimited, as_shipped, floors)


def _during_live_events(stack: Stack, plan: Plan) -> tuple[int, ConcurrentBackfill]:
    """The samples of another backfill, and the latency of live events before and during it."""
    with Probe(stack, plan.probes) as before:
        time.sleep(plan.people * QUIET_SECONDS)
    with Probe(stack, plan.probes) as during:
        count, seconds = _run_backfills(stack, plan.people)
    return count, ConcurrentBackfill(count / seconds, before.to_row, during.to_row)


def _run_backfills(stack: Stack, count: int) -> tuple[int, float]:
    """Announces the heart rate of `count` users; returns the number of stored samples and the seconds it took."""
    users, sender = people(count), Sender(stack)
    data = {"start_date": START.isoformat(), "end_date": (START + WINDOW).isoformat(), "provider": "garmin"}
    for user in users:
        sender.send(event("historical.data.heartrate.created", user, data | {"is_final": True}))
    sender.close()
    seconds = _wait_for_backfills(stack.engine, users)
    with stack.engine.connect() as connection:
        return connection.scalar(STORED, {"users": users}) or 0, seconds


def _wait_for_backfills(engine: Engine, users: Sequence[str]) -> float:
    """Waits until all backfills are complete; returns the seconds from the first request to the last commit."""
    last, changed = -1, time.monotonic()
    while True:
        with engine.connect() as connection:
            row = connection.execute(PROGRESS, {"users": list(users)}).one()
        if row.complete == len(users):
            return float(row.seconds)
        if row.records != last:
            last, changed = row.records, time.monotonic()
        if row.failed or time.monotonic() > changed + STALL_TIMEOUT_SECONDS:
            raise RuntimeError(f"the backfills make no progress or failed: {row}")
        time.sleep(0.2)


def _floors(url: str) -> Iterator[tuple[str, float]]:
    """The throughput of each step of a page alone, in samples a second."""
    yield "the page server, to two connections", pages.ceiling(url, PAGES)
    yield "fetching pages alone, 1 process", _fetching(url)
    yield "parsing pages alone, 1 process", _parsing()


def _fetching(url: str, seconds: float = 2.0) -> float:
    """Samples a second that one client fetches without parsing them."""
    count, began = 0, time.perf_counter()
    with httpx.Client(base_url=url) as client:
        while time.perf_counter() < began + seconds:
            client.get("/", params={"next_cursor": str(count % PAGES)}).raise_for_status()
            count += 1
    return count * SAMPLES_PER_PAGE / (time.perf_counter() - began)


def _parsing(seconds: float = 2.0) -> float:
    """Samples a second that one process parses."""
    body, count, began = page(0, PAGES), 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        junction.read_page(catalogue()["heartrate"], "floor", body, START)
        count += 1
    return count * SAMPLES_PER_PAGE / (time.perf_counter() - began)
