"""Draws the results of a run as PNGs."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from tests.bench.results import SAMPLES_PER_EVENT, GrowthStep, Live, PipelineRun, Results, Soak
from tests.bench.verdict import ANSWER_MS

mpl.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN = "tab:blue", "tab:orange", "tab:green"
THOUSANDS = FuncFormatter(lambda value, _: f"{round(value, 2):,g}")


def draw(results: Results, folder: Path) -> Iterator[Path]:
    """Every plot with results."""
    if results.live:
        yield _connections(results, results.live, folder / "connections.png")
    if results.workers or results.growth:
        yield _cost(results, folder / "growth.png")
    if results.soak:
        yield _memory(results.soak, folder / "memory.png")


def _connections(results: Results, live: Live, file: Path) -> Path:
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    rates, times = figure.subplots(1, 2)
    counts = [one.connections for one in live.closed]
    rates.plot(counts, [one.accepted for one in live.closed], "o-", color=BLUE, label="accepted")
    rates.plot(counts, [one.committed for one in live.closed], "s-", color=ORANGE, label="committed")
    if results.floors:
        floor = results.floors.verified
        rates.axhline(floor, color="gray", linestyle="--", label=f"Flask and verification alone ({floor:,.0f}/s)")
    _label(rates, "Workouts, closed loop", "connections", "events a second")
    times.plot(counts, [one.answer.p50 for one in live.closed], "o-", color=BLUE, label="p50, closed loop")
    times.plot(counts, [one.answer.p99 for one in live.closed], "s-", color=ORANGE, label="p99, closed loop")
    paced, at = live.paced, f"at 80 % ({live.rate:,.0f}/s)"
    times.plot(paced.connections, paced.answer.p50, "o", color=GREEN, label=f"p50 {at}", markersize=10)
    times.plot(paced.connections, paced.answer.p99, "s", color=GREEN, label=f"p99 {at}", markersize=10)
    times.axhline(ANSWER_MS, color="gray", linestyle="--", label=f"target for p99 at 80 % ({ANSWER_MS} ms)")
    times.set_yscale("log")
    _label(times, "Response time", "connections", "milliseconds")
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axes in (rates, times):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    return _saved(figure, file)


def _cost(results: Results, file: Path) -> Path:
    figure = Figure(figsize=(12, 9), layout="constrained")
    (workers, workouts), (samples, cpu) = figure.subplots(2, 2)
    scaled, grown = results.workers or {}, results.growth or []
    workers.plot(list(scaled), [one.committed for one in scaled.values()], "o-", color=ORANGE, label="committed")
    workers.plot(list(scaled), [one.accepted for one in scaled.values()], "o--", color=BLUE, label="accepted")
    workers.set_xticks(list(scaled) or [1])
    _label(workers, f"Workouts by worker processes ({results.cores} cores)", "live worker processes", "events a second")
    _by_rows(workouts, grown, [one.workouts.committed for one in grown], "workouts a second")
    _by_rows(samples, grown, [one.samples.committed * SAMPLES_PER_EVENT for one in grown], "samples a second")
    _by_cost(cpu, grown)
    return _saved(figure, file)


def _by_rows(axes: Axes, grown: list[GrowthStep], rates: list[float], unit: str) -> None:
    axes.plot([one.rows / 1e6 for one in grown], rates, "o-", color=ORANGE, label="committed")
    _label(axes, f"Committed {unit}", "samples already stored, millions", unit)


def _by_cost(axes: Axes, grown: list[GrowthStep]) -> None:
    millions = [one.rows / 1e6 for one in grown]
    axes.axhspan(0.8, 1.2, color="gray", alpha=0.15, label="within 20 %")
    axes.plot(millions, _relative([one.workouts for one in grown]), "o-", color=BLUE, label="a workout")
    axes.plot(millions, _relative([one.samples for one in grown]), "s-", color=GREEN, label="an event of 1,000 samples")
    _label(axes, "CPU of the stack for an event", "samples already stored, millions", "ratio to the first step")


def _relative(runs: list[PipelineRun]) -> list[float]:
    return [one.cost_us / runs[0].cost_us for one in runs]


def _memory(soak: Soak, file: Path) -> Path:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([at / 60 for at in soak.seconds], soak.mb, color=BLUE, label=f"slope {soak.slope:+.2f} MB a minute")
    _label(axes, f"The endpoint's memory at {soak.rate:,.0f} workouts a second", "minutes", "MB", legend="lower right")
    return _saved(figure, file)


def _label(axes: Axes, title: str, x: str, y: str, legend: str = "best") -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_yscale() == "linear":  # from zero, because small differences would otherwise look large
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    axes.yaxis.set_major_formatter(THOUSANDS)
    axes.legend(loc=legend)


def _saved(figure: Figure, file: Path) -> Path:
    figure.savefig(file, dpi=120)
    return file
