"""The benchmark: `deploy/bench`. Complete stacks, real and durable, under signed load on loopback."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from tests.bench import backfill, floors, growth, live, plots, replay, report, soak
from tests.bench.processes import cores
from tests.bench.results import Plan, Results

# In the order in which they are measured. The floors always are: every other figure is also a ratio to one.
PARTS: dict[str, Callable[[Plan, Console], Any]] = {
    "floors": lambda plan, _: floors.measure(plan),
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
@click.option("--probes", type=click.FloatRange(1), default=DEFAULT.probes, help="events a second watched to their row")
@click.option("--people", type=click.IntRange(1), default=DEFAULT.people, help="backfill: each has 50,000 samples")
@click.option("--rows", type=click.IntRange(1), default=DEFAULT.rows, help="growth: samples stored at its end")
@click.option("--minutes", type=click.FloatRange(0.1), default=DEFAULT.minutes, help="soak: how long")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="folder for bench.json and the plots")
def main(*, parts: Sequence[str], out: Path | None, **asked: Any) -> None:
    """Measure this machine: tables here, bench.json and plots in a folder.

    PARTS are floors, live, samples, backfill, replay, workers, growth and soak; without any, all of them, which takes
    about half an hour, most of it growth (50 million rows, 8 GB of disk for a while) and soak.
    """
    # Wide enough for the tables, also where nobody has a terminal.
    console, out = Console(width=max(Console().width, WIDTH)), (out or Path(tempfile.gettempdir()) / "bench").absolute()
    out.mkdir(parents=True, exist_ok=True)
    results = Results(Plan(**asked), cores())
    console.print(f"{results.began:%Y-%m-%d %H:%M} UTC, {results.cores} cores, shared by everything that is measured")
    for part in [name for name in PARTS if not parts or name in parts or name == "floors"]:
        with console.status(f"measuring: {part}"):
            setattr(results, part, PARTS[part](results.plan, console))
        report.show(console, results, part)
        results.save(out)
    report.show_verdict(console, results)
    for file in (results.save(out), *plots.draw(results, out)):
        console.print(f"written: {file}", soft_wrap=True)


if __name__ == "__main__":
    main(prog_name="deploy/bench")
