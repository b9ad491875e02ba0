"""History: samples stored a second, alone and beside live events, and how long a live event takes meanwhile."""

import time
from collections.abc import Iterator, Sequence

import httpx
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from tests.bench import pages
from tests.bench.pages import PAGES, SAMPLES_A_PAGE, WINDOW, page
from tests.bench.passage import people
from tests.bench.probe import Probe, Sender
from tests.bench.results import Backfill, Beside, Plan
from tests.bench.stack import Stack, running_stack
from tests.support import START, event
from workers.aggregators import junction

FAST = "100000/second"  # the provider's limit is not what is measured
QUIET_SECONDS = 0.6  # for each person, so that live events are watched as long without their history as beside it
PATIENCE_SECONDS = 60
PROGRESS = text("""
SELECT count(*) FILTER (WHERE status = 'complete') AS complete, count(*) FILTER (WHERE status = 'failed') AS failed,
       coalesce(sum(records), 0) AS records,
       extract(epoch FROM max(finished_at) - min(started_at)) AS seconds
FROM health.backfills WHERE user_id = ANY(:users)""")
STORED = text("SELECT count(*) FROM health.heartrate WHERE user_id = ANY(:users)")


def measure(plan: Plan) -> Backfill:
    """On stacks of its own, from a provider that costs nearly nothing."""
    with pages.serving(PAGES) as url:
        environment = {"JUNCTION_BASE_URL": url, "JUNCTION_API_KEY": "sk_us_bench"}
        with running_stack(plan.workers, environment | {"HEADRACE_REQUEST_RATE": FAST}) as stack:
            alone, seconds = _pull(stack, plan.people)
            more, unlimited = _beside(stack, plan)
        with running_stack(plan.workers, environment) as stack:
            _pull(stack, 1)  # so that nothing that is watched is the first of its kind
            again, as_shipped = _beside(stack, plan)
        floors = dict(_floors(url))
    missing = 3 * plan.people * PAGES * SAMPLES_A_PAGE - alone - more - again
    return Backfill(alone, missing, alone / seconds, unlimited, as_shipped, floors)


def _beside(stack: Stack, plan: Plan) -> tuple[int, Beside]:
    """How many samples of another history came, and what it was to live events."""
    with Probe(stack, plan.probes) as before:
        time.sleep(plan.people * QUIET_SECONDS)
    with Probe(stack, plan.probes) as during:
        count, seconds = _pull(stack, plan.people)
    return count, Beside(count / seconds, before.to_row, during.to_row)


def _pull(stack: Stack, count: int) -> tuple[int, float]:
    """Tells that so many people's heart rate can be fetched: how many samples came, in which time."""
    users, sender = people(count), Sender(stack)
    data = {"start_date": START.isoformat(), "end_date": (START + WINDOW).isoformat(), "provider": "garmin"}
    for user in users:
        sender.send(event("historical.data.heartrate.created", user, data | {"is_final": True}))
    sender.close()
    seconds = _fetched(stack.engine, users)
    with stack.engine.connect() as connection:
        return connection.scalar(STORED, {"users": users}) or 0, seconds


def _fetched(engine: Engine, users: Sequence[str]) -> float:
    """Waits until everybody's backfill is complete: how long from the first request to the last page's commit."""
    last, changed = -1, time.monotonic()
    while True:
        with engine.connect() as connection:
            row = connection.execute(PROGRESS, {"users": list(users)}).one()
        if row.complete == len(users):
            return float(row.seconds)
        if row.records != last:
            last, changed = row.records, time.monotonic()
        if row.failed or time.monotonic() > changed + PATIENCE_SECONDS:
            raise RuntimeError(f"the history does not come: {row}")
        time.sleep(0.2)


def _floors(url: str) -> Iterator[tuple[str, float]]:
    """What each part of a page's way does alone, in samples a second."""
    yield "the page server, to two connections", pages.ceiling(url, PAGES)
    yield "asking for pages alone, 1 process", _asking(url)
    yield "reading pages alone, 1 process", _reading()


def _asking(url: str, seconds: float = 2.0) -> float:
    """Samples a second that one client gets, without reading what they say."""
    count, began = 0, time.perf_counter()
    with httpx.Client(base_url=url) as client:
        while time.perf_counter() < began + seconds:
            client.get("/", params={"next_cursor": str(count % PAGES)}).raise_for_status()
            count += 1
    return count * SAMPLES_A_PAGE / (time.perf_counter() - began)


def _reading(seconds: float = 2.0) -> float:
    """Samples a second that one process makes of pages that it has."""
    body, count, began = page(0, PAGES), 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        junction.read_page(catalogue()["heartrate"], "floor", body, START)
        count += 1
    return count * SAMPLES_A_PAGE / (time.perf_counter() - began)
