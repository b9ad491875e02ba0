"""The targets of the benchmark, compared with the results."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.results import SAMPLES_PER_EVENT, Results

REFERENCE_FLOOR = 11_400  # requests a second by Flask and verification alone, on the reference machine
WORKOUTS = 6_600  # 1.5 times the rate of an equivalent in Node.js without a queue
SAMPLES, BACKFILL = 150_000, 120_000  # a second
ANSWER_MS, TO_ROW_MS, TO_DAY_MS = 25, 500, 5000
REPLAY_RATIO = 2.0
FLAT_SHARE = 0.2
MEMORY_SHARE = 0.05  # of the memory of the endpoint, in ten minutes
WHOLE_ROWS, WHOLE_HISTORY, WHOLE_MINUTES = 50_000_000, 1_000_000, 10
ISOLATION_RATIO = 2.0


@dataclass(frozen=True)
class Target:
    """One target. `share` is the degree of attainment: it is reached at 1 or more."""

    name: str
    wanted: str
    found: str
    share: float
    scaled_share: float | None = None  # scaled to the floor of the reference machine
    remark: str = ""
    is_whole: bool = True  # False if the run was shorter than the target requires


def machine(results: Results) -> float:
    """The speed of this machine in this run, relative to the reference machine."""
    assert results.floors
    return results.floors.verified / REFERENCE_FLOOR


def targets(results: Results) -> Iterator[Target]:
    """The targets of all parts with results."""
    yield from _rates(results)
    yield from _times(results)
    yield from _replays(results)
    yield from _flatness(results)


def _rates(results: Results) -> Iterator[Target]:
    if live := results.live:
        best = max(one.committed for one in live.closed)
        yield _rate("workouts committed", WORKOUTS, best, results, sum(one.missing for one in live.closed))
    if samples := results.samples:
        rate = samples.committed * SAMPLES_PER_EVENT
        yield _rate("samples by webhook, 1,000 per event", SAMPLES, rate, results, samples.missing)
    if backfill := results.backfill:
        yield _rate("samples by backfill", BACKFILL, backfill.rate, results, backfill.missing)


def _rate(name: str, wanted: float, found: float, results: Results, missing: int) -> Target:
    share, remark = (0.0, f"{missing:,} MISSING") if missing else (found / wanted, "")
    return Target(name, f"{wanted:,.0f}/s", f"{found:,.0f}/s", share, share / machine(results), remark)


def _times(results: Results) -> Iterator[Target]:
    if live := results.live:
        at = f"at {live.rate:,.0f}/s"
        yield _at_most("response, p99", ANSWER_MS, live.paced.answer.p99, at)
        yield _at_most("from 202 to row, p99", TO_ROW_MS, live.to_row.p99, at)
        yield _at_most("from 202 to day, p99", TO_DAY_MS, live.to_day.p99, at)
    if backfill := results.backfill:
        rates = {"without a rate limit": backfill.unlimited, "at the default rate": backfill.as_shipped}
        for name, concurrent in rates.items():
            ratio = concurrent.during.p99 / concurrent.before.p99
            found = f"{ratio:.1f} times ({concurrent.before.p99:.0f} to {concurrent.during.p99:.0f} ms)"
            remark = f"{backfill.samples:,} samples at {concurrent.rate:,.0f}/s"
            wanted, is_whole = f"at most {ISOLATION_RATIO:.0f} times", backfill.samples >= WHOLE_HISTORY
            label = f"live p99 during a backfill {name}"
            yield Target(label, wanted, found, ISOLATION_RATIO / ratio, remark=remark, is_whole=is_whole)


def _at_most(name: str, wanted: float, found: float, remark: str) -> Target:
    return Target(name, f"under {wanted:,.0f} ms", f"{found:,.1f} ms", wanted / found, remark=remark)


def _replays(results: Results) -> Iterator[Target]:
    for one in results.replay or ():
        ratio, growth = one.again / one.storing, one.bytes_after / one.bytes_before - 1
        wanted = f"{REPLAY_RATIO:.0f} times storing"
        yield Target(f"replay of stored {one.kind}", wanted, f"{ratio:.1f} times", ratio / REPLAY_RATIO)
        content = "views the same" if one.is_same else "VIEWS DIFFER"
        share = 1.0 if growth <= 0 and one.is_same else 0.0
        yield Target(f"tables after replay of {one.kind}", "no growth", f"{growth:+.1%}", share, remark=content)


def _flatness(results: Results) -> Iterator[Target]:
    if results.growth:
        first, last = results.growth[0], results.growth[-1]
        for kind, before, after in (
            ("workouts", first.workouts, last.workouts),
            ("samples", first.samples, last.samples),
        ):
            cost = after.cost_us / before.cost_us - 1
            name, wanted = f"CPU per event of {kind} as rows grow", f"at most {FLAT_SHARE:+.0%}"
            remark = f"up to {last.rows:,} rows; committed/s {after.committed / before.committed - 1:+.0%}"
            share, is_whole = (1 + FLAT_SHARE) / (1 + cost), last.rows >= 0.99 * WHOLE_ROWS
            yield Target(name, wanted, f"{cost:+.0%}", share, remark=remark, is_whole=is_whole)
    if soak := results.soak:
        allowed = MEMORY_SHARE * soak.mb[-1] / WHOLE_MINUTES
        share, minutes = min(1.0, allowed / max(soak.slope, 1e-9)), soak.seconds[-1] / 60
        remark, is_whole = f"over {minutes:.1f} min at {soak.rate:,.0f}/s", minutes >= WHOLE_MINUTES
        found = f"{soak.slope:+.2f} MB/min of {soak.mb[-1]:.0f}"
        yield Target("memory of the endpoint", "flat", found, share, remark=remark, is_whole=is_whole)
