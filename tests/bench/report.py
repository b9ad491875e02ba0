"""What a run found, as tables for people; every figure beside the floor that it stands on."""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table

from app.config.settings import Settings
from tests.bench import verdict
from tests.bench.results import SAMPLES_AN_EVENT, Backfill, Beside, Floors, Passage, Results, Times


def show(console: Console, results: Results, part: str) -> None:
    """The tables of one part."""
    if getattr(results, part) is not None:
        for table in TABLES[part](results):
            console.print(table)


def show_verdict(console: Console, results: Results) -> None:
    """Which aims were reached, as they stand and in proportion to how fast this machine is."""
    scale, found = verdict.machine(results), list(verdict.aims(results))
    caption = (
        f"This machine: Flask and verification at {scale:.2f} of the {verdict.REFERENCE_FLOOR:,}/s that rates are for"
    )
    table = _table("What it must show", "", "wanted", "found", "share", "reached", "scaled", "", caption=caption)
    for aim in found:
        scaled = "" if aim.scaled_share is None else f"{_reached(aim.scaled_share)} ({aim.scaled_share:.0%})"
        table.add_row(
            aim.name,
            aim.wanted,
            aim.found,
            f"{aim.share:.0%}",
            _reached(aim.share, is_whole=aim.is_whole),
            scaled,
            aim.remark,
        )
    if found:
        console.print(table)


def _reached(share: float, *, is_whole: bool = True) -> str:
    if share < 1:
        return "[red]no[/]"
    return "[green]yes[/]" if is_whole else "[yellow]so far[/]"


def _table(title: str, *columns: str, caption: str = "") -> Table:
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
    table = _table("Floors: what each part does alone", "", "a second", "answer p50 / p99, ms")
    table.add_row("bare Flask route, 32 connections", f"{floors.bare:,.0f}", _times(floors.bare_answer))
    table.add_row("Flask and verification, 32 connections", f"{floors.verified:,.0f}", _times(floors.verified_answer))
    table.add_row("verification alone, 1 process", f"{floors.verifying:,.0f}", "")
    for size, rate in floors.publishing.items():
        table.add_row(f"publishing alone, {size} to a message, 1 thread", f"{rate:,.0f}", "")
    for size, rate in floors.applying.items():
        table.add_row(f"applying alone, {size} to a message, 1 process", f"{rate:,.0f}", "")
    table.add_row("applying samples alone, 1 process", f"{floors.applying_samples:,.0f}", "")
    for name, rate in _merging(floors).items():
        table.add_row(name, f"{rate:,.0f}", "")
    yield table


def _merging(floors: Floors) -> dict[str, float]:
    return {f"bulk merge of samples alone, processes: {count}": rate for count, rate in floors.merging.items()}


def _live(results: Results) -> Iterable[Table]:
    live, floors = results.live, results.floors
    assert live
    assert floors
    table = _table(
        f"Workouts through the whole way, {results.plan.workers} live workers",
        *("connections", "accepted/s", "committed/s", "answer p50 / p99, ms", "202 to row p50 / p99, ms"),
        *("committed of Flask + verification", "of applying 50, all workers", "missing"),
    )
    for one in live.closed:
        table.add_row(*_passage(one, floors, results.plan.workers, ""))
    paced = _passage(live.paced, floors, results.plan.workers, _times(live.to_row))
    table.add_row(f"{live.paced.connections}, open loop at 80 %", *paced[1:])
    yield table
    yield _cpu("CPU for a workout, µs", {f"{one.connections} conn.": one for one in live.closed} | {"80 %": live.paced})
    memory = _table("Memory, MB", "", "processes", "largest (RSS)", "together (PSS)")
    for stage, has in live.memory.items():
        memory.add_row(stage, str(has.processes), f"{has.largest_mb:,.0f}", f"{has.together_mb:,.0f}")
    yield memory


def _passage(one: Passage, floors: Floors, workers: int, to_row: str) -> list[str]:
    ratios = [
        _ratio(one.committed, floors.verified),
        _ratio(one.committed, floors.applying[50] * workers),
    ]
    rates = [f"{one.accepted:,.0f}", f"{one.committed:,.0f}", _times(one.answer), to_row]
    return [str(one.connections), *rates, *ratios, _lost(one)]


def _lost(one: Passage) -> str:
    refused = f", {one.refused} refused" if one.refused else ""
    return f"{one.missing or 'none'}{refused}"


def _cpu(title: str, passages: dict[str, Passage]) -> Table:
    table = _table(title, "", *passages)
    for stage in next(iter(passages.values())).cpu_us:
        table.add_row(stage, *(f"{one.cpu_us.get(stage, 0):,.0f}" for one in passages.values()))
    table.add_section()
    table.add_row("the stack as a whole", *(f"{one.cost_us:,.0f}" for one in passages.values()))
    return table


def _samples(results: Results) -> Iterable[Table]:
    one, floors = results.samples, results.floors
    assert one
    assert floors
    columns = [
        "accepted/s",
        "committed/s",
        "answer p50 / p99, ms",
        "of bulk merge alone",
        "of applying alone",
        "missing",
    ]
    table = _table("Samples, 1,000 an event, 32 connections", *columns)
    rates = [rate * SAMPLES_AN_EVENT for rate in (one.accepted, one.committed)]
    ratios = [
        _ratio(rates[1], floors.merging[results.plan.workers]),
        _ratio(rates[1], floors.applying_samples * results.plan.workers),
    ]
    table.add_row(*(f"{rate:,.0f}" for rate in rates), _times(one.answer), *ratios, _lost(one))
    yield table
    yield _cpu("CPU for an event of 1,000 samples, µs", {"32 conn.": one})


def _backfill(results: Results) -> Iterable[Table]:
    found = results.backfill
    assert found
    table = _table("History, in pages of 1,000 samples", "", "samples/s", "history is at", caption=_isolation(results))
    lost = f", {found.missing:,} MISSING" if found.missing else ""
    table.add_row(f"{found.samples:,} samples{lost}", f"{found.rate:,.0f}", "")
    for name, beside in _besides(found).items():
        table.add_row(
            f"beside live events, {name}", f"{beside.rate:,.0f}", f"{_ratio(beside.rate, found.rate)} of it alone"
        )
    assert results.floors
    for name, floor in (found.floors | _merging(results.floors)).items():
        table.add_row(name, f"{floor:,.0f}", _ratio(found.rate, floor))
    yield table


def _isolation(results: Results) -> str:
    assert results.backfill
    return "A live event from its 202 to its row, p50 / p99: " + "; ".join(
        f"{name}: {_times(one.before)} ms before ({one.before.count} events), {_times(one.during)} ms beside "
        f"({one.during.count})"
        for name, one in _besides(results.backfill).items()
    )


def _besides(found: Backfill) -> dict[str, Beside]:
    return {"no limit": found.unlimited, f"{Settings().request_rate} requests": found.as_shipped}


def _replay(results: Results) -> Iterable[Table]:
    columns = ["rows", "storing/s", "replaying/s", "times", "MB before", "MB after", "views"]
    table = _table("Kept deliveries into an empty database, then again, 1 process", "", *columns)
    for one in results.replay or ():
        rates = (f"{one.storing:,.0f}", f"{one.again:,.0f}", f"{one.again / one.storing:.1f}")
        sizes = (f"{size / 2**20:,.1f}" for size in (one.bytes_before, one.bytes_after))
        table.add_row(one.kind, f"{one.count:,}", *rates, *sizes, "same" if one.is_same else "DIFFERENT")
    yield table


def _workers(results: Results) -> Iterable[Table]:
    found = results.workers
    assert found
    assert results.floors
    columns = ["accepted/s", "committed/s", "of one worker's", "of Flask + verification", "CPU for an event, µs"]
    table = _table(f"Workouts by live worker processes, 32 connections, {results.cores} cores", "workers", *columns)
    for count, one in found.items():
        ratios = [
            _ratio(one.committed, found[1].committed),
            _ratio(one.committed, results.floors.verified),
        ]
        rates = (f"{one.accepted:,.0f}", f"{one.committed:,.0f}")
        table.add_row(str(count), *rates, *ratios, f"{one.cost_us:,.0f}")
    yield table


def _growth(results: Results) -> Iterable[Table]:
    columns = ["workouts/s", "CPU each, µs", "samples/s", "CPU for 1,000, µs", "CPU, of the first: workouts / samples"]
    table = _table("Committed with so many samples stored, 32 connections", "samples stored", *columns)
    found = results.growth or []
    for one in found:
        pairs = ((one.workouts, found[0].workouts), (one.samples, found[0].samples))
        workouts = (f"{one.workouts.committed:,.0f}", f"{one.workouts.cost_us:,.0f}")
        samples = (f"{one.samples.committed * SAMPLES_AN_EVENT:,.0f}", f"{one.samples.cost_us:,.0f}")
        costs = " / ".join(f"{now.cost_us / first.cost_us:.2f}" for now, first in pairs)
        table.add_row(f"{one.rows:,}", *workouts, *samples, costs)
    yield table


def _soak(results: Results) -> Iterable[Table]:
    soak = results.soak
    assert soak
    minutes = soak.seconds[-1] / 60
    table = _table(f"The endpoint's memory over {minutes:.1f} minutes at {soak.rate:,.0f} workouts/s", "", "MB (RSS)")
    marks: Sequence[int] = [0, len(soak.mb) // 4, len(soak.mb) // 2, 3 * len(soak.mb) // 4, len(soak.mb) - 1]
    for mark in marks:
        table.add_row(f"after {soak.seconds[mark] / 60:.1f} min", f"{soak.mb[mark]:,.1f}")
    table.add_row("slope, a minute", f"{soak.slope:+.2f}")
    yield table


TABLES: dict[str, Callable[[Results], Iterable[Table]]] = {
    "floors": _floors,
    "live": _live,
    "samples": _samples,
    "backfill": _backfill,
    "replay": _replay,
    "workers": _workers,
    "growth": _growth,
    "soak": _soak,
}
