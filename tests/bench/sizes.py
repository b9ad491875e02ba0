"""Bytes and CPU time of a delivery, a record and a sample, and the table of deploy/docs/sizing.md that they give.

PYTHONPATH=. .venv/bin/python -P -m tests.bench.sizes            # prints the table, from the constants below
PYTHONPATH=. .venv/bin/python -P -m tests.bench.sizes measure    # measures the constants, some minutes
"""

import gc
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
from sqlalchemy import Engine, text

from app.config.settings import load
from app.delivery import Delivery, pack
from app.observability.gc import freeze
from tests.bench.load import workout_event
from tests.bench.processes import cpu_seconds
from tests.bench.stack import running_servers
from tests.support import ENCRYPTION_KEY, START, delivery, heartrate
from workers.daily.derive import Deriver
from workers.ingest.apply import Applier
from workers.store.engine import make_writer
from workers.store.feed import Sequencer

DAY, YEAR_DAYS, MONTH_DAYS = 86_400, 365, 31
USERS, MESSAGE = 1_000, 10  # deliveries per message
DAY_MINUTES, DAY_SAMPLES = 1_440, 30  # of a delivery, one a minute
TABLES = ("samples", "workouts", "deliveries", "archive")
SIZE = text("""
SELECT sum(pg_total_relation_size(oid)) FROM pg_class
WHERE oid = CAST(:table AS regclass) OR oid IN (SELECT relid FROM pg_partition_tree(CAST(:table AS regclass)))""")
WAL = text("SELECT CAST(pg_current_wal_lsn() - '0/0' AS bigint)")


@dataclass(frozen=True)
class Costs:
    """Bytes of tables with their indexes, and microseconds of CPU time.

    The CPU times were measured on two otherwise idle cores.
    """

    sample_bytes: int = 121  # in events of 60 of one series; 118 in pages of 1,000, 132 in events of 29
    record_bytes: int = 1_165  # a workout
    ledger_bytes: int = 265  # as the next one: 269 and 247 bytes
    archive_bytes: int = 593  # 5 of 6 deliveries have 29 samples (539 bytes), the others are workouts (865)
    web_us: int = 325  # per delivery, in the endpoint and the broker; 8 connections, 3.8 deliveries to a message
    delivery_us: int = 730  # per delivery, in a worker (70 %) and PostgreSQL
    sample_us: float = 11.0  # per sample, in a worker (65 %) and PostgreSQL
    days_us: int = 4_800  # per delivery of samples: its day, of 720 samples on average, is computed again


@dataclass(frozen=True)
class Person:
    """What a person sends in a day."""

    samples: int = 1_440
    deliveries: int = 60
    records: int = 10
    peak: int = 5  # the busiest minutes, as a multiple of the mean


COSTS = Costs()
PEOPLE = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
KEEP_DAYS, LEDGER_DAYS = 30, 400
# A worker is planned to be busy half of the time at the peak, so that queues stay short.
UTILIZATION = 0.5
WORKERS_SHARE = 0.7  # of the CPU time of workers and PostgreSQL
MAX_TABLE_BYTES = 32 * 2**40  # PostgreSQL's limit for a table or partition, with blocks of 8 kB


def daily_bytes(costs: Costs, person: Person) -> int:
    """Permanent bytes of a day of a person: samples and records."""
    return person.samples * costs.sample_bytes + person.records * costs.record_bytes


def core_us(costs: Costs, person: Person) -> float:
    """CPU time of a day of a person, in workers and PostgreSQL."""
    return person.deliveries * costs.delivery_us + person.samples * costs.sample_us


def days_us(costs: Costs, person: Person) -> float:
    """CPU time of the days of a person, in workers of the lane `derive` (two thirds) and PostgreSQL, in a day."""
    return (person.deliveries - person.records) * costs.days_us


def table(costs: Costs = COSTS, person: Person = Person()) -> list[str]:
    """The rows of the table: one per number of people."""
    found = []
    for people in PEOPLE:
        per_second = people * person.deliveries / DAY
        cores = people * core_us(costs, person) / 1e6 / DAY * person.peak
        web = people * person.deliveries * costs.web_us / 1e6 / DAY * person.peak
        days = people * days_us(costs, person) / 1e6 / DAY * person.peak
        month = people * person.samples * MONTH_DAYS * costs.sample_bytes
        kept = people * person.deliveries * (costs.archive_bytes * KEEP_DAYS + costs.ledger_bytes * LEDGER_DAYS)
        cells = (
            f"{people:,}",
            f"{_short(per_second)} ({_short(per_second * person.peak)})",
            _short(people * person.samples / DAY),
            f"{_short(web)} + {_short(cores)} + {_short(days)}",
            str(max(2, math.ceil(cores * WORKERS_SHARE / UTILIZATION))),
            _bytes(people * daily_bytes(costs, person) * YEAR_DAYS),
            f"{_bytes(month)}{' (!)' if month > MAX_TABLE_BYTES else ''}",
            _bytes(kept),
        )
        found.append(f"| {' | '.join(cells)} |")
    return found


def _short(value: float) -> str:
    """Two significant digits."""
    digits = max(1 - math.floor(math.log10(value)), 0)
    return f"{round(value, 1 - math.floor(math.log10(value))):,.{digits}f}"


def _bytes(value: float) -> str:
    unit, size = next(((unit, size) for unit, size in (("TB", 1e12), ("GB", 1e9)) if value >= size), ("MB", 1e6))
    return f"{_short(value / size)} {unit}"


def costs_of(costs: Costs = COSTS, person: Person = Person()) -> list[str]:
    """The rows of the table of costs: the cost of one, and of a day of a person."""
    found = (
        ("a sample", person.samples, costs.sample_bytes, costs.sample_us),
        ("a new record", person.records, costs.record_bytes, None),
        ("a delivery, without its samples", person.deliveries, costs.ledger_bytes, costs.delivery_us),
        ("a delivery in the archive", person.deliveries, costs.archive_bytes, None),
        ("a delivery in web and broker", person.deliveries, None, costs.web_us),
        ("the day of a delivery of samples", person.deliveries - person.records, None, costs.days_us),
    )
    return [
        f"| {name} | {_or_none(size, 'B')} | {_or_none(cpu, 'us')} | {_or_none(size and size * count / 1000, 'kB')} "
        f"| {_or_none(cpu and cpu * count / 1000, 'ms')} |"
        for name, count, size, cpu in found
    ]


def _or_none(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.{0 if value >= 20 else 1}f} {unit}"


@dataclass(frozen=True)
class Usage:
    """What a load has cost in total: bytes by table, bytes of the write-ahead log, and CPU seconds."""

    bytes: dict[str, int]
    wal: int
    worker_seconds: float
    postgres_seconds: float


def measure() -> None:
    """Prints what each load costs, per delivery, record and sample."""
    freeze()  # as a worker does: the collector would take a third of the time of days
    with running_servers() as (database_url, _):
        settings = replace(load({"DATABASE_URL": database_url}), encryption_keys=(ENCRYPTION_KEY,))
        engine = make_writer(settings)
        applier = Applier(engine, settings)
        applier.apply(pack([delivery(workout_event("warm", 0)), delivery(heartrate("warm", {0: 60}))]))
        worker, postgres = _days(engine, applier)
        print(f"days of deliveries of {DAY_SAMPLES} samples")
        print(f"  CPU per delivery: worker {worker:.0f} us, PostgreSQL {postgres:.0f} us")
        for name, samples, given in (
            ("records", 0, [delivery(workout_event(f"u{n % USERS}", n)) for n in range(5_000)]),
            ("hourly samples", 60, list(_hourly(60, 12))),
            ("half-hourly samples", 29, list(_hourly(29, 6, first=1_000))),
            ("pages of samples", 1_000, list(_pages(200))),
        ):
            _print(name, len(given), samples, _applied(engine, applier, given))
        engine.dispose()


def _days(engine: Engine, applier: Applier, people: int = 100) -> tuple[float, float]:
    """Microseconds of CPU to compute the day that a delivery touches again, while a day fills every half an hour."""
    deriver, sequencer = Deriver(engine, load({})), Sequencer(engine)
    deriver.follow()  # the first one queues everything
    with engine.connect() as connection:
        server = psutil.Process(connection.scalar(text("SELECT pg_backend_pid()"))).parent()
    assert server is not None
    worker = postgres = 0.0
    for first in range(0, DAY_MINUTES, DAY_SAMPLES):
        given = [delivery(_half_hour(f"day{n}", first)) for n in range(people)]
        _applied(engine, applier, given)
        sequencer.run(everything=True)
        began = time.process_time(), cpu_seconds(server)
        while deriver.follow() or deriver.step() is not None:
            pass
        worker += time.process_time() - began[0]
        postgres += cpu_seconds(server) - began[1]
    count = people * DAY_MINUTES // DAY_SAMPLES
    return worker / count * 1e6, postgres / count * 1e6


def _half_hour(person: str, first: int) -> dict[str, Any]:
    """An event of a sample per minute, from the minute `first` of the day after START, at the offset of UTC."""
    midnight = DAY_MINUTES - START.hour * 60 - START.minute
    one = heartrate(person, {midnight + first + minute: 60 + minute for minute in range(DAY_SAMPLES)})
    for sample in one["data"]["data"]:
        sample["timezone_offset"] = 0
    return one | {"client_user_id": person}


def _hourly(samples: int, rounds: int, *, first: int = 0) -> Iterator[Delivery]:
    """Deliveries of all users in turn, so that each user's series grows by `samples` at a time."""
    for number in range(rounds):
        start = first + number * samples
        for user in range(USERS):
            yield delivery(heartrate(f"u{user}", {start + n: 60 + n % 90 for n in range(samples)}))


def _pages(count: int) -> Iterator[Delivery]:
    """Deliveries of 1,000 samples of one user after the other, as history arrives."""
    for number in range(count):
        first = (number % 10) * 1_000
        yield delivery(heartrate(f"p{number // 10}", {first + n: 60 + n % 90 for n in range(1_000)}))


def _applied(engine: Engine, applier: Applier, given: list[Delivery]) -> Usage:
    messages = [pack(given[start : start + MESSAGE]) for start in range(0, len(given), MESSAGE)]
    with engine.connect() as connection:
        server = psutil.Process(connection.scalar(text("SELECT pg_backend_pid()"))).parent()
    assert server is not None
    gc.collect()
    before = _sizes(engine)
    worker, postgres = time.process_time(), cpu_seconds(server)
    for message in messages:
        applier.apply(message)
    worker, postgres = time.process_time() - worker, cpu_seconds(server) - postgres
    after = _sizes(engine)
    return Usage({name: after[name] - before[name] for name in TABLES}, after["wal"] - before["wal"], worker, postgres)


def _sizes(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        sizes = {name: int(connection.scalar(SIZE, {"table": f"headrace.{name}"}) or 0) for name in TABLES}
        return sizes | {"wal": int(connection.scalar(WAL) or 0)}


def _print(name: str, deliveries: int, samples: int, usage: Usage) -> None:
    rows = max(deliveries * samples, 1)
    per_delivery = {key: round(value / deliveries) for key, value in usage.bytes.items()}
    print(f"{name}: {deliveries:,} deliveries of {samples} samples, {MESSAGE} to a message")
    print(f"  bytes per delivery: {per_delivery}, write-ahead log {round(usage.wal / deliveries):,}")
    print(f"  bytes per sample: {usage.bytes['samples'] / rows:.1f}")
    worker, postgres = (round(one / deliveries * 1e6) for one in (usage.worker_seconds, usage.postgres_seconds))
    print(f"  CPU per delivery: worker {worker} us, PostgreSQL {postgres} us")


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        print("\n".join((*costs_of(), "", *table())))
