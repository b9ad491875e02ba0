"""What the benchmark was made to show, each aim held against what was found."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.results import SAMPLES_AN_EVENT, Results

REFERENCE_FLOOR = 11_400  # requests a second by Flask and verification alone, on the machine that the aims are for
WORKOUTS = 6_600  # 1.5 times a mirror in Node.js without a queue
SAMPLES, BACKFILL = 150_000, 120_000  # a second
ANSWER_MS, TO_ROW_MS = 25, 500
REPLAY_RATIO = 2.0
FLAT_SHARE = 0.2
MEMORY_SHARE = 0.05  # of what the endpoint has, in ten minutes
WHOLE_ROWS, WHOLE_HISTORY, WHOLE_MINUTES = 50_000_000, 1_000_000, 10
ISOLATION_RATIO = 2.0


@dataclass(frozen=True)
class Aim:
    """One aim. `share` is how far it was reached: 1 and more is reached."""

    name: str
    wanted: str
    found: str
    share: float
    scaled_share: float | None = None  # if this machine's floor were the reference's
    remark: str = ""
    is_whole: bool = True  # or the run was shorter than the aim is about


def machine(results: Results) -> float:
    """How fast this machine was, in this run, of the one that the aims are for."""
    assert results.floors
    return results.floors.verified / REFERENCE_FLOOR


def aims(results: Results) -> Iterator[Aim]:
    """All that something was found about."""
    yield from _rates(results)
    yield from _times(results)
    yield from _replays(results)
    yield from _flatness(results)


def _rates(results: Results) -> Iterator[Aim]:
    if live := results.live:
        best = max(one.committed for one in live.closed)
        yield _rate("workouts committed", WORKOUTS, best, results, sum(one.missing for one in live.closed))
    if samples := results.samples:
        rate = samples.committed * SAMPLES_AN_EVENT
        yield _rate("samples by webhook, 1,000 an event", SAMPLES, rate, results, samples.missing)
    if backfill := results.backfill:
        yield _rate("samples by backfill", BACKFILL, backfill.rate, results, backfill.missing)


def _rate(name: str, wanted: float, found: float, results: Results, missing: int) -> Aim:
    share, remark = (0.0, f"{missing:,} MISSING") if missing else (found / wanted, "")
    return Aim(name, f"{wanted:,.0f}/s", f"{found:,.0f}/s", share, share / machine(results), remark)


def _times(results: Results) -> Iterator[Aim]:
    if live := results.live:
        at = f"at {live.rate:,.0f}/s"
        yield _at_most("answer, p99", ANSWER_MS, live.paced.answer.p99, at)
        yield _at_most("from 202 to row, p99", TO_ROW_MS, live.to_row.p99, at)
    if backfill := results.backfill:
        rates = {"as fast as it goes": backfill.unlimited, "at the default rate": backfill.as_shipped}
        for name, beside in rates.items():
            ratio = beside.during.p99 / beside.before.p99
            found = f"{ratio:.1f} times ({beside.before.p99:.0f} to {beside.during.p99:.0f} ms)"
            remark = f"{backfill.samples:,} samples at {beside.rate:,.0f}/s"
            wanted, is_whole = f"at most {ISOLATION_RATIO:.0f} times", backfill.samples >= WHOLE_HISTORY
            about = f"live p99 beside a backfill {name}"
            yield Aim(about, wanted, found, ISOLATION_RATIO / ratio, remark=remark, is_whole=is_whole)


def _at_most(name: str, wanted: float, found: float, remark: str) -> Aim:
    return Aim(name, f"under {wanted:,.0f} ms", f"{found:,.1f} ms", wanted / found, remark=remark)


def _replays(results: Results) -> Iterator[Aim]:
    for one in results.replay or ():
        ratio, growth = one.again / one.storing, one.bytes_after / one.bytes_before - 1
        wanted = f"{REPLAY_RATIO:.0f} times storing"
        yield Aim(f"replay of stored {one.kind}", wanted, f"{ratio:.1f} times", ratio / REPLAY_RATIO)
        content = "views the same" if one.is_same else "VIEWS DIFFER"
        share = 1.0 if growth <= 0 and one.is_same else 0.0
        yield Aim(f"tables after replay of {one.kind}", "no growth", f"{growth:+.1%}", share, remark=content)


def _flatness(results: Results) -> Iterator[Aim]:
    if results.growth:
        first, last = results.growth[0], results.growth[-1]
        for kind, before, after in (
            ("workouts", first.workouts, last.workouts),
            ("samples", first.samples, last.samples),
        ):
            cost = after.cost_us / before.cost_us - 1
            name, wanted = f"CPU for an event of {kind} as rows grow", f"at most {FLAT_SHARE:+.0%}"
            remark = f"up to {last.rows:,} rows; committed/s {after.committed / before.committed - 1:+.0%}"
            share, is_whole = (1 + FLAT_SHARE) / (1 + cost), last.rows >= 0.99 * WHOLE_ROWS
            yield Aim(name, wanted, f"{cost:+.0%}", share, remark=remark, is_whole=is_whole)
    if soak := results.soak:
        allowed = MEMORY_SHARE * soak.mb[-1] / WHOLE_MINUTES
        share, minutes = min(1.0, allowed / max(soak.slope, 1e-9)), soak.seconds[-1] / 60
        remark, is_whole = f"over {minutes:.1f} min at {soak.rate:,.0f}/s", minutes >= WHOLE_MINUTES
        found = f"{soak.slope:+.2f} MB/min of {soak.mb[-1]:.0f}"
        yield Aim("endpoint's memory", "flat", found, share, remark=remark, is_whole=is_whole)
