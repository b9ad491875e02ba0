"""Samples in yearly partitions, as version 0.2 created them, and writers that change them and a control alike."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import psycopg
from sqlalchemy import Engine

from tests.support.database import run

YEARS = (2024, 2025)
FIRST, PERIOD = datetime(2024, 1, 1, tzinfo=UTC), timedelta(days=730)
COLUMNS = "ts, ts_end, value, version, stored_at, series_id, timezone_offset, origin, unit, extra"
FILL = f"""
INSERT INTO headrace.samples ({COLUMNS})
SELECT '{FIRST}'::timestamptz + n * interval '{{step}} s', NULL, n, now(), now(), s, 3600, 'backfill', 'bpm',
       CASE WHEN n % 100 = 0 THEN jsonb_build_object('n', n) END
FROM generate_series({{first}}, {{last}}) s, generate_series(0, {{rows}} - 1) n"""
TABLES = ("headrace.samples", "control")  # the control is never converted
CONVERTED = f"SELECT {COLUMNS} FROM headrace.samples WHERE series_id <= (SELECT max(series_id) FROM control)"
DIFFERENCES = f"""
SELECT count(*) AS n FROM (({CONVERTED} EXCEPT SELECT {COLUMNS} FROM control)
    UNION ALL (SELECT {COLUMNS} FROM control EXCEPT {CONVERTED})) AS different"""
UPSERT = """
INSERT INTO {table} (ts, value, version, stored_at, series_id, origin, unit)
SELECT at, value, now(), now(), series, 'webhook', 'bpm' FROM unnest(%s::timestamptz[], %s::float8[], %s::int[])
AS given(at, value, series) ON CONFLICT (series_id, ts) DO UPDATE SET value = excluded.value, version = now()"""
DELETE = "DELETE FROM {table} WHERE series_id = %s AND ts BETWEEN %s AND %s"


def create_years(engine: Engine) -> None:
    """Creates the yearly partitions of a migrated database."""
    run(
        engine,
        *(
            f"CREATE TABLE headrace.samples_{year} PARTITION OF headrace.samples "
            f"FOR VALUES FROM ('{year}-01-01 00:00:00+00') TO ('{year + 1}-01-01 00:00:00+00')"
            for year in YEARS
        ),
    )


def step(count: int) -> int:
    """The seconds between two samples of a series that has `count` of them in the 24 months."""
    return int(PERIOD.total_seconds()) // count


def fill_both(engine: Engine, series: int, count: int) -> None:
    """Fills series with `count` samples each, and a control with copies of them."""
    run(
        engine,
        FILL.format(first=1, last=series, rows=count, step=step(count)),
        "CREATE TABLE control (LIKE headrace.samples INCLUDING ALL)",
        f"INSERT INTO control ({COLUMNS}) SELECT {COLUMNS} FROM headrace.samples",
    )


class Writer(threading.Thread):
    """Inserts, revises and deletes samples of both tables until stopped, in transactions that it counts and times.

    Each writer has series of its own. If two writers shared one, the tables could differ without a conversion: a row
    that one of them commits between the two DELETE statements of the other is deleted from the control only.
    """

    def __init__(self, url: str, seed: int, series: Sequence[int], count: int, pause: float) -> None:
        super().__init__()
        self._url, self._random, self._series, self._count, self._pause = url, random.Random(seed), series, count, pause
        self._ending = threading.Event()
        self.written = self.deleted = 0
        self.seconds: list[float] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self._url, autocommit=True) as connection:
                connection.execute("SET lock_timeout = '5s'")
                while not self._ending.wait(self._pause):
                    began = time.monotonic()
                    with connection.transaction():
                        self._change(connection)
                    self.seconds.append(time.monotonic() - began)
        except psycopg.Error as error:
            self.error = error

    def _change(self, connection: psycopg.Connection) -> None:
        each = timedelta(seconds=step(self._count))
        series, at = self._random.choice(self._series), FIRST + self._random.randint(0, self._count - 40) * each
        if self._random.random() < 0.5:
            places = range(self._random.randint(1, 30))
            keys = sorted({(self._random.choice(self._series), at + n * each / 2) for n in places})
            values = [[one for _, one in keys], [self._random.random() for _ in keys], [one for one, _ in keys]]
            for table in TABLES:
                connection.execute(UPSERT.format(table=table), values)
            self.written += len(keys)
        else:
            for table in TABLES:
                self.deleted += connection.execute(DELETE.format(table=table), (series, at, at + 5 * each)).rowcount

    def stop(self) -> None:
        self._ending.set()
        self.join(30)


@contextmanager
def writers(url: str, series: int, count: int, number: int = 3, pause: float = 0.0) -> Iterator[list[Writer]]:
    """Writers of the filled series, until the end of the block."""
    at_work = [Writer(url, seed, range(seed + 1, series + 1, number), count, pause) for seed in range(number)]
    for one in at_work:
        one.start()
    try:
        yield at_work
    finally:
        for one in at_work:
            one.stop()
