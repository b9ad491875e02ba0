"""The results of a run as tables; every rate next to its ratio to a floor."""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table

from app.config.settings import Settings
from tests.bench import verdict
from tests.bench.processes import STAGES
from tests.bench.results import SAMPLES_PER_EVENT, Backfill, ConcurrentBackfill, Floors, PipelineRun, Results, Times


def show(console: Console, results: Results, part: str) -> None:
    """The tables of one part."""
    if getattr(results, part) is not None:
        for table in TABLES[part](results):
            console.print(table)


def targets(results: Results) -> Table:
    """Which targets were reached, in absolute terms and scaled to the speed of this machine."""
    scale = verdict.machine(results)
    caption = f"This machine: Flask and verification at {scale:.2f} of the reference, {verdict.REFERENCE_FLOOR:,}/s"
    table = new_table("Targets", "", "target", "result", "share", "reached", "scaled", "", caption=caption)
    for target in verdict.targets(results):
        scaled = "" if target.scaled_share is None else f"{_reached(target.scaled_share)} ({target.scaled_share:.0%})"
        table.add_row(
            target.name,
            target.wanted,
            target.found,
            f"{target.share:.0%}",
            _reached(target.share, is_whole=target.is_whole),
            scaled,
            target.remark,
        )
    return table


def _reached(share: float, *, is_whole: bool = True) -> str:
    if share < 1:
        return "[red]no[/]"
    return "[green]yes[/]" if is_whole else "[yellow]in a short run[/]"


def new_table(title: str, *columns: str, caption: str = "") -> Table:
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left", min_width=60)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _times(of: Times) -> str:
    return f"{of.p50:,.1f} / {of.p99:,.1f}"


def _ratio(value: float, floor: float) -> str:
    return f"{value / floor:.2f}" if floor else "-"


def _floors(results: Results) -> Iterable[Table]:
    floors = results.floors
    assert floors
    table = new_table("Floors: each step alone", "", "a second", "response p50 / p99, ms")
    table.add_row("bare Flask route, 32 connections", f"{floors.bare:,.0f}", _times(floors.bare_answer))
    table.add_row("Flask and verification, 32 connections", f"{floors.verified:,.0f}", _times(floors.verified_answer))
    table.add_row("verification alone, 1 process", f"{floors.verifying:,.0f}", "")
    for size, rate in floors.publishing.items():
        table.add_row(f"publishing alone, {size} per message, 1 thread", f"{rate:,.0f}", "")
    for size, rate in floors.applying.items():
        table.add_row(f"applying alone, {size} per message, 1 process", f"{rate:,.0f}", "")
    table.add_row("applying samples alone, 1 process", f"{floors.applying_samples:,.0f}", "")
    for name, rate in _merging(floors).items():
        table.add_row(name, f"{rate:,.0f}", "")
    yield table


def _merging(floors: Floors) -> dict[str, float]:
    return {f"bulk merge of samples alone, processes: {count}": rate for count, rate in floors.merging.items()}


def _idle(results: Results) -> Iterable[Table]:
    idle = results.idle
    assert idle
    title = (
        f"`headrace up` in a new folder: ready after {idle.ready_seconds:.1f} s, then {idle.seconds:.0f} s without load"
    )
    table = new_table(title, "", "processes", "PSS, MB", "CPU, % of a core")
    for group, has in sorted(idle.pss.items(), key=lambda item: -item[1].mb):
        percent = idle.cpu_percent.get(group, 0)
        table.add_row(STAGES.get(group, group), str(has.processes), f"{has.mb:,.0f}", f"{percent:.2f}")
    table.add_section()
    count, mb = (sum(values) for values in zip(*((has.processes, has.mb) for has in idle.pss.values()), strict=True))
    table.add_row("all", f"{count:.0f}", f"{mb:,.0f}", f"{sum(idle.cpu_percent.values()):.2f}")
    yield table


def _live(results: Results) -> Iterable[Table]:
    live, floors = results.live, results.floors
    assert live
    assert floors
    table = new_table(
        f"Workouts through the whole pipeline, {results.plan.workers} live workers",
        *("connections", "accepted/s", "committed/s", "response p50 / p99, ms"),
        *("202 to row p50 / p99, ms", "202 to day p50 / p99, ms"),
        *("deliveries per message / batch", "ratio to Flask + verification", "ratio to applying 50, all workers"),
        "missing",
        caption="Load generator: tests/bench/load.py, requests signed in advance",
    )
    for one in live.closed:
        table.add_row(*_pipeline_row(one, floors, results.plan.workers, "", ""))
    paced = _pipeline_row(live.paced, floors, results.plan.workers, _times(live.to_row), _times(live.to_day))
    table.add_row(f"{live.paced.connections}, open loop at 80 %", *paced[1:])
    yield table
    runs = {f"{one.connections} conn.": one for one in live.closed} | {"80 %": live.paced}
    yield _cpu("CPU per workout, core-ms", runs)


def _pipeline_row(one: PipelineRun, floors: Floors, workers: int, *visible: str) -> list[str]:
    ratios = [
        _ratio(one.committed, floors.verified),
        _ratio(one.committed, floors.applying[50] * workers),
    ]
    sizes = f"{one.per_message:.1f} / {one.per_batch:.1f}"
    rates = [f"{one.accepted:,.0f}", f"{one.committed:,.0f}", _times(one.answer), *visible, sizes]
    return [str(one.connections), *rates, *ratios, _lost(one)]


def _lost(one: PipelineRun) -> str:
    refused = f", {one.refused} refused" if one.refused else ""
    return f"{one.missing or 'none'}{refused}"


def _cpu(title: str, runs: dict[str, PipelineRun]) -> Table:
    table = new_table(title, "", *runs)
    for stage in next(iter(runs.values())).cpu_us:
        table.add_row(stage, *(f"{one.cpu_us.get(stage, 0) / 1000:,.3f}" for one in runs.values()))
    table.add_section()
    table.add_row("the stack as a whole", *(f"{one.cost_us / 1000:,.3f}" for one in runs.values()))
    return table


def _samples(results: Results) -> Iterable[Table]:
    one, floors = results.samples, results.floors
    assert one
    assert floors
    columns = [
        "accepted/s",
        "committed/s",
        "response p50 / p99, ms",
        "ratio to bulk merge alone",
        "ratio to applying alone",
        "missing",
    ]
    table = new_table("Samples, 1,000 per event, 32 connections", *columns)
    rates = [rate * SAMPLES_PER_EVENT for rate in (one.accepted, one.committed)]
    ratios = [
        _ratio(rates[1], floors.merging[results.plan.workers]),
        _ratio(rates[1], floors.applying_samples * results.plan.workers),
    ]
    table.add_row(*(f"{rate:,.0f}" for rate in rates), _times(one.answer), *ratios, _lost(one))
    yield table
    yield _cpu("CPU per event of 1,000 samples, core-ms", {"32 conn.": one})


def _backfill(results: Results) -> Iterable[Table]:
    found = results.backfill
    assert found
    table = new_table("Backfill, in pages of 1,000 samples", "", "samples/s", "ratio", caption=_isolation(results))
    lost = f", {found.missing:,} MISSING" if found.missing else ""
    table.add_row(f"{found.samples:,} samples{lost}", f"{found.rate:,.0f}", "")
    for name, concurrent in _concurrent_backfills(found).items():
        table.add_row(
            f"during live events, {name}",
            f"{concurrent.rate:,.0f}",
            f"{_ratio(concurrent.rate, found.rate)} of the backfill alone",
        )
    assert results.floors
    for name, floor in (found.floors | _merging(results.floors)).items():
        table.add_row(name, f"{floor:,.0f}", _ratio(found.rate, floor))
    yield table


def _isolation(results: Results) -> str:
    assert results.backfill
    return "Live events, 202 to row p50 / p99: " + "; ".join(
        f"{name}: {_times(one.before)} ms before ({one.before.count} events), {_times(one.during)} ms during "
        f"({one.during.count})"
        for name, one in _concurrent_backfills(results.backfill).items()
    )


def _concurrent_backfills(found: Backfill) -> dict[str, ConcurrentBackfill]:
    return {"no limit": found.unlimited, f"{Settings().request_rate} requests": found.as_shipped}


def _replay(results: Results) -> Iterable[Table]:
    columns = ["rows", "storing/s", "replaying/s", "ratio", "MB before", "MB after", "views"]
    table = new_table("Archived deliveries into an empty database, then again, 1 process", "", *columns)
    for one in results.replay or ():
        rates = (f"{one.storing:,.0f}", f"{one.again:,.0f}", f"{one.again / one.storing:.1f}")
        sizes = (f"{size / 2**20:,.1f}" for size in (one.bytes_before, one.bytes_after))
        table.add_row(one.kind, f"{one.count:,}", *rates, *sizes, "same" if one.is_same else "DIFFERENT")
    yield table


def _workers(results: Results) -> Iterable[Table]:
    found = results.workers
    assert found
    assert results.floors
    columns = ["accepted/s", "committed/s", "ratio to one worker", "ratio to Flask + verification", "CPU per event, µs"]
    table = new_table(f"Workouts by live worker processes, 32 connections, {results.cores} cores", "workers", *columns)
    for count, one in found.items():
        ratios = [
            _ratio(one.committed, found[1].committed),
            _ratio(one.committed, results.floors.verified),
        ]
        rates = (f"{one.accepted:,.0f}", f"{one.committed:,.0f}")
        table.add_row(str(count), *rates, *ratios, f"{one.cost_us:,.0f}")
    yield table


def _growth(results: Results) -> Iterable[Table]:
    columns = [
        "workouts/s",
        "CPU per workout, µs",
        "samples/s",
        "CPU per 1,000, µs",
        "CPU ratio to the first: workouts / samples",
    ]
    table = new_table("Committed by number of stored samples, 32 connections", "samples stored", *columns)
    found = results.growth or []
    for one in found:
        pairs = ((one.workouts, found[0].workouts), (one.samples, found[0].samples))
        workouts = (f"{one.workouts.committed:,.0f}", f"{one.workouts.cost_us:,.0f}")
        samples = (f"{one.samples.committed * SAMPLES_PER_EVENT:,.0f}", f"{one.samples.cost_us:,.0f}")
        costs = " / ".join(f"{now.cost_us / first.cost_us:.2f}" for now, first in pairs)
        table.add_row(f"{one.rows:,}", *workouts, *samples, costs)
    yield table


def _soak(results: Results) -> Iterable[Table]:
    soak = results.soak
    assert soak
    minutes = soak.seconds[-1] / 60
    table = new_table(
        f"Memory of the endpoint over {minutes:.1f} minutes at {soak.rate:,.0f} workouts/s", "", "MB (RSS)"
    )
    marks: Sequence[int] = [0, len(soak.mb) // 4, len(soak.mb) // 2, 3 * len(soak.mb) // 4, len(soak.mb) - 1]
    for mark in marks:
        table.add_row(f"after {soak.seconds[mark] / 60:.1f} min", f"{soak.mb[mark]:,.1f}")
    table.add_row("slope, a minute", f"{soak.slope:+.2f}")
    yield table


TABLES: dict[str, Callable[[Results], Iterable[Table]]] = {
    "floors": _floors,
    "idle": _idle,
    "live": _live,
    "samples": _samples,
    "backfill": _backfill,
    "replay": _replay,
    "workers": _workers,
    "growth": _growth,
    "soak": _soak,
}
