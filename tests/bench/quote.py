"""Copies the tables of a run into deploy/docs/benchmarks.md, and its highest rate and idle figures into README.md.

PYTHONPATH=. .venv/bin/python -P -m tests.bench.quote [--results FILE] [--peer FILE]
"""

import re
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
from rich.table import Table
from rich.text import Text

from tests.bench import report
from tests.bench.results import Results
from tests.support import ROOT

PAGE, README = ROOT / "deploy" / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- bench: {} -->\n", "<!-- end -->"
RATE = re.compile(r"\[[\d,]+ workouts a second\]")
READY, IDLE = re.compile(r"is ready after \d+ s"), re.compile(r"\[[\d,]+ MB and [\d.]+ % of a core\]")


class Level(msgspec.Struct):
    """Headrace beside the peer with one number of connections: events a second, and response times in milliseconds."""

    peer: float
    accepted: float
    committed: float
    ratio: float  # committed to peer
    peer_p99: float
    p99: float
    peer_p50: float | None = None
    p50: float | None = None


class Comparison(msgspec.Struct):
    """Medians of the rounds of a comparison, by connections, and the ratio of the highest rates."""

    levels: dict[int, Level]
    best: float


def peer_table(found: Comparison) -> Table:
    """The comparison with the peer."""
    caption = f"Highest committed rate to the highest rate of the peer: {found.best:.2f}."
    columns = ("connections", "peer/s", "accepted/s", "committed/s", "ratio", "peer p50 / p99, ms", "our p50 / p99, ms")
    table = report.new_table("Headrace and a request-synchronous peer in turns", *columns, caption=caption)
    for connections, one in found.levels.items():
        rates = (f"{rate:,.0f}" for rate in (one.peer, one.accepted, one.committed))
        times = (_times(one.peer_p50, one.peer_p99), _times(one.p50, one.p99))
        table.add_row(str(connections), *rates, f"{one.ratio:.2f}", *times)
    return table


def _times(p50: float | None, p99: float) -> str:
    return " / ".join("-" if value is None else f"{value:,.1f}" for value in (p50, p99))


def markdown(table: Table, run: str) -> str:
    """A table in Markdown below its title and the description of its run."""
    rows = zip(*(map(_plain, column.cells) for column in table.columns), strict=True)
    lines = [[_plain(column.header) for column in table.columns], ["---"] * len(table.columns), *rows]
    parts = [f"{table.title}. {run}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*parts, str(table.caption)] if table.caption else parts) + "\n"


def _plain(cell: object) -> str:
    return Text.from_markup(str(cell)).plain


def fill(page: str, name: str, tables: Iterable[str]) -> str:
    """The page with these tables in its block `name`. Raises ValueError if the page does not have it exactly once."""
    begin = BEGIN.format(name)
    if page.count(begin) != 1:
        raise ValueError(f"{PAGE.name} needs one block that begins with {begin.strip()} and ends with {END}")
    before, _, rest = page.partition(begin)
    return "\n".join([before + begin, *tables, rest[rest.index(END) :]])


def blocks(results: Results) -> Iterator[tuple[str, list[str]]]:
    """The name and the tables of each part that was run. The targets need all parts."""
    run = (
        f"Run of {results.began:%Y-%m-%d %H:%M} UTC, {results.cores} cores, {results.plan.seconds:.0f} s for each load."
    )
    measured = [part for part in report.TABLES if getattr(results, part) is not None]
    for part in measured:
        yield part, [markdown(table, run) for table in report.TABLES[part](results)]
    if measured == list(report.TABLES):
        yield "targets", [markdown(report.targets(results), run)]


def readme(text: str, results: Results) -> str:
    """README.md with the figures of this run."""
    if live := results.live:
        best = round(max(one.committed for one in live.closed), -2)
        text = _replaced(RATE, f"[{best:,.0f} workouts a second]", text)
    if idle := results.idle:
        mb, percent = sum(one.mb for one in idle.pss.values()), sum(idle.cpu_percent.values())
        text = _replaced(READY, f"is ready after {idle.ready_seconds:.0f} s", text)
        text = _replaced(IDLE, f"[{mb:,.0f} MB and {percent:.1f} % of a core]", text)
    return text


def _replaced(pattern: re.Pattern[str], by: str, text: str) -> str:
    text, count = pattern.subn(by, text)
    if count != 1:
        raise ValueError(f"README.md needs one text of the form {pattern.pattern}")
    return text


@click.command(context_settings={"show_default": True})
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=Path(tempfile.gettempdir()) / "bench" / "bench.json",
    help="written by deploy/bench",
)
@click.option(
    "--peer", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="a comparison with a peer, as JSON"
)
def main(*, results: Path, peer: Path | None) -> None:
    """Update deploy/docs/benchmarks.md and README.md. Tables of parts that were not run stay as they are."""
    found = msgspec.json.decode(results.read_bytes(), type=Results)
    page = PAGE.read_text(encoding="utf-8")
    for name, tables in blocks(found):
        page = fill(page, name, tables)
    if peer:
        compared = msgspec.json.decode(peer.read_bytes(), type=Comparison)
        when = datetime.fromtimestamp(peer.stat().st_mtime, UTC)
        page = fill(page, "peer", [markdown(peer_table(compared), f"Run of {when:%Y-%m-%d %H:%M} UTC.")])
    README.write_text(readme(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.quote")
