"""The benchmark: `python -m tests.bench`. A complete stack, real and durable, under signed load on loopback."""

import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, text

from app.config import load
from tests.bench import backfill, floors, pages
from tests.bench.load import SAMPLES_AN_EVENT, Load, run
from tests.bench.stack import running_floor, running_stack
from tests.support import JUNCTION_SECRET
from workers.store.engine import make_engine

PARTS = ("live", "backfill")
USERS = 200
FAST = "100000/second"  # the provider's limit is not what is measured
PATIENCE_SECONDS = 60
# From the same kind of machine, 2 shared cores: what was measured before anything was built (deploy/DESIGN.md).
KNOWN = {
    "a Celery message an event, 4 workers": 550,
    "a 60-line sketch of group commit": 2_850,
    "a mirror in Node.js without a queue": 4_400,
}
KNOWN_MERGE = 266_000  # samples a second, likewise
QUIET_SECONDS = 0.6  # for each person, so that live events are watched as long without their history as beside it


def stored(engine: Engine, view: str, users: Sequence[str], wanted: int) -> tuple[int, float]:
    """Waits until so many rows are there, or nothing moves any more: the rows, and when the last came."""
    last, changed = -1, time.time()
    while True:
        with engine.connect() as connection:
            query = text(f"SELECT count(*) FROM health.{view} WHERE user_id = ANY(:users)")
            count = connection.scalar(query, {"users": list(users)}) or 0
        if count != last:
            last, changed = count, time.time()
        if count >= wanted or time.time() > changed + PATIENCE_SECONDS:
            return count, changed
        time.sleep(0.1)


def measure(stack: dict[str, Any], engine: Engine, view: str, *, connections: int, seconds: float) -> list[Any]:
    """One kind of event through the whole way: accepted and committed a second, and the times of answer."""
    users = [str(uuid.uuid4()) for _ in range(USERS)]
    each = SAMPLES_AN_EVENT if view == "heartrate" else 1
    most = int(seconds * (200 if each > 1 else 4000))
    url, secret = f"{stack['web']}/webhooks/junction", stack["junction_webhook_secret"]
    load_ = run(url, secret, view, users, connections=connections, seconds=seconds, most=most)
    count, at = stored(engine, view, users, load_.accepted * each)
    took = at - load_.began
    name = "workouts" if each == 1 else f"samples, {each} an event"
    missing = load_.accepted * each - count
    return [
        f"{name}, {connections} connections",
        f"{load_.accepted * each / load_.seconds:,.0f}/s",
        f"{count / took:,.0f}/s" + (f" ({missing} MISSING)" if missing else ""),
        _times(load_),
    ]


def _times(load_: Load) -> str:
    return f"{load_.percentile(0.5):.1f} / {load_.percentile(0.99):.1f} ms"


def floor_rows(stack: dict[str, Any], connections: int, seconds: float) -> list[list[str]]:
    """What each part does alone, on the same machine in the same minutes."""
    rows = []
    for target, name in (("bare", "bare Flask route"), ("verified", "Flask and verification")):
        with running_floor(target, JUNCTION_SECRET) as url:
            users = ["floor"]
            most = int(seconds * 12_000)
            load_ = run(url, JUNCTION_SECRET, "workouts", users, connections=connections, seconds=seconds, most=most)
        rows.append([f"{name}, {connections} connections", f"{load_.accepted / load_.seconds:,.0f}/s", _times(load_)])
    for size in (1, 10, 50):
        rate = floors.publishing(stack["broker_url"], size=size)
        rows.append([f"publishing alone, {size} to a message", f"{rate:,.0f}/s", ""])
    settings = load({"DATABASE_URL": stack["database_url"]})
    for size in (1, 10, 50):
        rate = floors.applying(settings, size=size, messages=60)
        rows.append([f"applying alone, {size} to a message, 1 process", f"{rate:,.0f}/s", ""])
    rate = floors.applying(settings, size=10, messages=6, samples=True) * SAMPLES_AN_EVENT
    rows.append(["applying samples alone, 1 process", f"{rate:,.0f}/s", ""])
    return rows


def live(console: Console, *, seconds: float, connections: int, workers: int) -> None:
    """Live events: the whole way, and what the parts do alone."""
    with running_stack("--workers", str(workers)) as stack:
        engine = make_engine(load({"DATABASE_URL": stack["database_url"]}), "headrace-bench")
        table = Table("through the whole way", "accepted", "committed", "answer p50 / p99")
        for view, count in (("workouts", connections), ("workouts", 1), ("heartrate", connections)):
            table.add_row(*measure(stack, engine, view, connections=count, seconds=seconds))
        console.print(table)
        alone = Table("floors, this run", "per second", "answer p50 / p99")
        for row in floor_rows(stack, connections, seconds / 2):
            alone.add_row(*row)
        console.print(alone)
        engine.dispose()
    known = Table("measured before, events committed", "per second")
    for name, rate in KNOWN.items():
        known.add_row(name, f"{rate:,}/s")
    console.print(known)


def history(console: Console, *, people: int, rate: float, workers: int) -> None:
    """History through pages of a thousand samples beside live events, and what the parts do alone."""
    with pages.serving(backfill.PAGES) as url:
        environment = {"JUNCTION_BASE_URL": url, "JUNCTION_API_KEY": "sk_us_bench", "HEADRACE_REQUEST_RATE": FAST}
        with running_stack("--workers", str(workers), environment=environment) as stack:
            with backfill.Live(stack, rate) as quiet:
                time.sleep(people * QUIET_SECONDS)
            with backfill.Live(stack, rate) as beside:
                found = backfill.pull(stack, people)
            console.print(history_table(found, quiet, beside))
            alone = dict(history_floors(stack["database_url"], url, people))
    table = Table("floors, this run, samples", "per second", "the history above is at")
    for name, floor in alone.items():
        table.add_row(name, f"{floor:,.0f}/s", f"{found.rate / floor:.2f} of it")
    console.print(table)


def history_table(found: backfill.History, quiet: backfill.Live, beside: backfill.Live) -> Table:
    """What came of a history, and of the live events before it and beside it."""
    table = Table("history", "", "")
    rate = f"{found.rate:,.0f}/s" + (f" ({found.missing} MISSING)" if found.missing else "")
    table.add_row(f"{found.samples:,} samples in pages of {pages.SAMPLES_A_PAGE:,}", f"{found.seconds:.1f} s", rate)
    table.add_row("a live event from its 202 to its row", "", "p50 / p99")
    for name, live_ in (("before that history", quiet), ("beside it", beside)):
        times = f"{live_.percentile(0.5):.0f} / {live_.percentile(0.99):.0f} ms"
        table.add_row(f"  {name}", f"{len(live_.seconds_each)} events", times)
    return table


def history_floors(database_url: str, url: str, people: int) -> Iterator[tuple[str, float]]:
    """What each part of a page's way does alone, in samples a second."""
    yield "the page server, to two connections", pages.ceiling(url, backfill.PAGES)
    yield "asking for pages alone, 1 process", backfill.asking(url)
    yield "reading pages alone, 1 process", backfill.reading()
    for processes in (1, 2):
        rate = backfill.writing(database_url, max(people // 2, processes), processes)
        yield f"COPY, merge and commit of pages alone, {processes} process{'es' * (processes > 1)}", rate
    yield "COPY and merge, measured before", KNOWN_MERGE


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--seconds", type=click.FloatRange(1), default=8.0, show_default=True, help="length of each load")
@click.option("--connections", type=click.IntRange(1), default=32, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="worker processes per lane")
@click.option("--people", type=click.IntRange(1), default=20, show_default=True, help="each has 50,000 samples")
@click.option("--rate", type=click.FloatRange(1), default=20.0, show_default=True, help="live events beside history")
def main(*, parts: Sequence[str], seconds: float, connections: int, workers: int, people: int, rate: float) -> None:
    """Print what this machine accepts and commits per second, and what the parts do alone. Without PARTS all of it."""
    console = Console(width=110)
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; load generator, web, workers and PostgreSQL share the cores"
    )
    if "live" in (parts or PARTS):
        live(console, seconds=seconds, connections=connections, workers=workers)
    if "backfill" in (parts or PARTS):
        history(console, people=people, rate=rate, workers=workers)


if __name__ == "__main__":
    main()
