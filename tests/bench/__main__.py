"""The benchmark: `deploy/bench`. It loads complete, durable stacks with signed events on loopback."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from tests.bench import backfill, floors, growth, idle, live, plots, replay, report, soak
from tests.bench.processes import cores
from tests.bench.results import Plan, Results

# In the order of measurement. Floors are always measured, because other figures are also shown as ratios to them.
PARTS: dict[str, Callable[[Plan, Console], Any]] = {
    "floors": lambda plan, _: floors.measure(plan),
    "idle": lambda plan, _: idle.measure(plan),
    "live": lambda plan, _: live.measure(plan),
    "samples": lambda plan, _: live.samples(plan),
    "backfill": lambda plan, _: backfill.measure(plan),
    "replay": lambda plan, _: replay.measure(plan),
    "workers": lambda plan, _: live.scaling(plan),
    "growth": growth.measure,
    "soak": lambda plan, _: soak.measure(plan),
}
DEFAULT, WIDTH = Plan(), 125


@click.command(context_settings={"show_default": True})
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--seconds", type=click.FloatRange(1), default=DEFAULT.seconds, help="length of each load")
@click.option("--workers", type=click.IntRange(1), default=DEFAULT.workers, help="worker processes per lane")
@click.option(
    "--probes", type=click.FloatRange(1), default=DEFAULT.probes, help="probe events a second, each timed until its row"
)
@click.option("--idle", type=click.FloatRange(1), default=DEFAULT.idle, help="idle: seconds without load")
@click.option("--people", type=click.IntRange(1), default=DEFAULT.people, help="backfill: each has 50,000 samples")
@click.option("--rows", type=click.IntRange(1), default=DEFAULT.rows, help="growth: samples stored at its end")
@click.option("--minutes", type=click.FloatRange(0.1), default=DEFAULT.minutes, help="soak: its length")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="folder for bench.json and the plots")
def main(*, parts: Sequence[str], out: Path | None, **options: Any) -> None:
    """Measure this machine: print tables, and write bench.json and plots to a folder.

    PARTS are floors, idle (a stack without load), live (workouts at 1, 8, 32 and 128 connections), samples, backfill,
    replay, workers, growth and soak. The default is all of them, which takes about half an hour, mostly for growth (50
    million rows, temporarily 8 GB of disk) and soak. `python -m tests.bench.quote` copies the tables to the docs.
    """
    # Wide enough for the tables, also without a terminal.
    console, out = Console(width=max(Console().width, WIDTH)), (out or Path(tempfile.gettempdir()) / "bench").absolute()
    out.mkdir(parents=True, exist_ok=True)
    results = Results(Plan(**options), cores())
    console.print(f"{results.began:%Y-%m-%d %H:%M} UTC, {results.cores} cores, shared by all measured processes")
    for part in [name for name in PARTS if not parts or name in parts or name == "floors"]:
        with console.status(f"measuring: {part}"):
            setattr(results, part, PARTS[part](results.plan, console))
        report.show(console, results, part)
        results.save(out)
    console.print(report.targets(results))
    for file in (results.save(out), *plots.draw(results, out)):
        console.print(f"written: {file}", soft_wrap=True)


if __name__ == "__main__":
    main(prog_name="deploy/bench")
