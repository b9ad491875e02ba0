"""Converts yearly partitions of samples while rows and events arrive. Run by hand: `python -m tests.bench.conversion`.

It needs the URL of an empty database of a server whose role may create tables, and prints the duration, the longest
waits of writers and the longest locks. Then it compares every row: with a control, or by a sum of hashes.
"""

import subprocess
import threading
import time
from collections import defaultdict
from dataclasses import replace

import click
import psycopg
from sqlalchemy import Engine

from app.commands import own
from app.config.settings import load
from app.delivery import pack
from app.errors import TryLater
from tests.support import ENCRYPTION_KEY, delivery, heartrate, rows
from tests.support.database import run
from tests.support.yearly import DIFFERENCES, FILL, create_years, fill_both, step, writers
from workers.ingest.apply import Applier
from workers.store.engine import WORKER_SESSION, make_engine, make_writer
from workers.store.migrate import migrate

CONTROLLED = 50  # series that the writers change; the control has copies of them
EACH = 25_000  # samples of a series
YEAR = 365 * 24 * 60  # minutes
SUM = f"""SELECT count(*) AS n, sum(hashtextextended(s::text, 0)) AS hash FROM (
    SELECT series_id, ts, ts_end, value, version, stored_at, timezone_offset, origin, unit, extra FROM headrace.samples
    WHERE series_id > {CONTROLLED} AND ts < '2026-01-01') AS s"""
WAITS = """
SELECT coalesce(max(extract(epoch FROM clock_timestamp() - l.waitstart)), 0) AS seconds FROM pg_locks l
JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted AND a.datname = current_database()
  AND a.application_name <> 'headrace-migrate'"""
HELD = """
SELECT l.mode, l.relation::regclass::text AS name, a.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.granted AND a.datname = current_database() AND a.application_name = 'headrace-migrate'
  AND l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'AccessExclusiveLock')
  AND l.relation::regclass::text ~ 'samples(_20[0-9][0-9]|_other)?$'"""


class Sampler(threading.Thread):
    """Samples waits of writers, and locks of the conversion on tables that they use, every 10 ms."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url, self._ending = url, threading.Event()
        self.longest_wait = 0.0
        self.longest_lock: dict[str, float] = defaultdict(float)

    def run(self) -> None:
        since: dict[str, float] = {}
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._ending.wait(0.01):
                (waited,) = connection.execute(WAITS).fetchone() or (0,)
                self.longest_wait = max(self.longest_wait, float(waited))
                now, held = time.monotonic(), {f"{mode} of {name}" for mode, name, _ in connection.execute(HELD)}
                since = {one: since.get(one, now) for one in held}
                for one in held:
                    self.longest_lock[one] = max(self.longest_lock[one], now - since[one])

    def stop(self) -> None:
        self._ending.set()
        self.join()


class Events(threading.Thread):
    """Applies events of five samples, of now and of the converted months in turn, as a worker of the live lane does."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        settings = replace(load({"DATABASE_URL": url}), encryption_keys=(ENCRYPTION_KEY,))
        self._engine = make_writer(settings, "headrace-worker", WORKER_SESSION)
        self._applier, self._ending = Applier(self._engine, settings), threading.Event()
        self.sent = 0
        self.seconds: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        while not self._ending.wait(0.02):
            last = (0 if self.sent % 2 else -YEAR) - self.sent * 5
            event = heartrate(f"live-{self.sent % 100}", {last - n: 60 for n in range(5)})
            began = time.monotonic()
            try:
                self._applier.apply(pack([delivery(event)]))
                self.sent += 1
            except TryLater as error:
                self.errors.append(str(error))
            self.seconds.append(time.monotonic() - began)

    def stop(self) -> None:
        self._ending.set()
        self.join()


def _fill(engine: Engine, series: int) -> None:
    migrate(engine)
    create_years(engine)
    fill_both(engine, CONTROLLED, EACH)
    for first in range(CONTROLLED + 1, series, CONTROLLED):
        run(engine, FILL.format(first=first, last=first + CONTROLLED - 1, rows=EACH, step=step(EACH)))


@click.command()
@click.option("--url", required=True, help="of an empty database; one that was filled before is used as it is")
@click.option("--rows", "count", default=50_000_000, show_default=True)
def main(url: str, count: int) -> None:
    """Fill 24 months, convert them with `headrace migrate --convert` under load, and compare all rows."""
    settings = load({"DATABASE_URL": url})
    engine = make_engine(settings, session={"statement_timeout": "0", "idle_in_transaction_session_timeout": "0"})
    if not rows(engine, "SELECT 1 FROM pg_class WHERE relname = 'control'"):
        _fill(engine, count // EACH)
    run(
        engine,
        "INSERT INTO headrace.series (user_id, resource, provider, source_type, subtype) "
        f"SELECT 'filled-' || n, 'heartrate', 'x', 'x', '' FROM generate_series(1, {count // EACH} - "
        "(SELECT count(*) FROM headrace.series)) AS n",
    )
    (before,) = rows(engine, SUM)
    click.echo(f"{before['n']:,} rows, and the control")
    sampler, events = Sampler(url), Events(url)
    with writers(url, CONTROLLED, EACH, number=2, pause=0.02) as at_work:
        sampler.start()
        events.start()
        time.sleep(5)
        began = time.monotonic()
        quiet = len(events.seconds)
        done = subprocess.run(
            [*own("workers.cli", "migrate"), "--convert"],
            env={"DATABASE_URL": url, "HOME": "/nonexistent"},
            check=False,
        )
        took = time.monotonic() - began
        during = events.seconds[quiet:]
        for one in (events, sampler):
            one.stop()
    click.echo(f"converted in {took:.0f} s (status {done.returncode}): {before['n'] / took:,.0f} rows/s")
    click.echo(
        f"events: {events.sent} applied, {len(events.errors)} retried {set(events.errors)}; "
        f"median {sorted(during)[len(during) // 2] * 1000:.0f} ms, longest {max(during) * 1000:.0f} ms "
        f"(before: {max(events.seconds[:quiet]) * 1000:.0f} ms)"
    )
    for writer in at_work:
        click.echo(
            f"writer: {writer.written} written, {writer.deleted} deleted, longest transaction "
            f"{max(writer.seconds) * 1000:.0f} ms, error {writer.error}"
        )
    click.echo(f"longest wait of a writer for a lock: {sampler.longest_wait * 1000:.0f} ms")
    for name, seconds in sorted(sampler.longest_lock.items(), key=lambda item: -item[1])[:8]:
        click.echo(f"lock: {name} {seconds * 1000:.0f} ms")
    (after,) = rows(engine, SUM.replace("WHERE", f"WHERE series_id <= {count // EACH} AND"))
    (differing,) = rows(engine, DIFFERENCES)
    click.echo(f"rows not in the control: {differing['n']}; all others {'equal' if after == before else 'DIFFER'}")
    live = rows(engine, "SELECT count(*) AS n FROM health.heartrate WHERE user_id LIKE 'live-%'")[0]["n"]
    click.echo(f"samples of events: {live} of {events.sent * 5}")


if __name__ == "__main__":
    main()
