"""`python -m tests.bench.attacks`: good deliveries without and during each attack, as a table or as JSON."""

import contextlib
import json
import resource
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tests.bench.attacks.good import Spread
from tests.bench.attacks.run import ATTACKS, Plan, Row, measure
from tests.bench.attacks.watch import Resident
from tests.bench.processes import cores

WIDTH = 170


def table(rows: Sequence[Row], plan: Plan) -> Table:
    """The results, times in milliseconds as median / 99th percentile / longest."""
    found = Table(
        title=f"{plan.rate:g} good events a second for {plan.seconds:g} s; {cores()} cores", title_justify="left"
    )
    for column in ("attack", "answer, ms", "202 to row, ms", "sent", "5xx", "failed", "lost"):
        found.add_column(column, justify="left" if column == "attack" else "right")
    for column in ("web, MB before/peak/after", "worker, MB before/peak/after", "deaths"):
        found.add_column(column, justify="right")
    found.add_column("note")
    for row in rows:
        one = row.good
        found.add_row(
            row.attack,
            _times(one.answer),
            _times(one.to_row),
            *(f"{number:,}" for number in (one.sent, one.server_errors, one.failed, one.lost)),
            *(_memory(row.memory.get(group)) for group in ("web", "workers")),
            str(row.deaths),
            row.note,
        )
    return found


def _times(of: Spread) -> str:
    return f"{of.p50:,.0f} / {of.p99:,.0f} / {of.longest:,.0f}"


def _memory(of: Resident | None) -> str:
    return f"{of.before:,.0f} / {of.peak:,.0f} / {of.after:,.0f}" if of else "-"


def chosen(names: Sequence[str]) -> list[str]:
    """The attacks that are named, or that begin with a name such as `poison` or `idle`. Without names: all."""
    found = [one for one in ATTACKS if not names or any(one == name or one.startswith(f"{name}-") for name in names)]
    for name in names:
        if not any(one == name or one.startswith(f"{name}-") for one in ATTACKS):
            raise click.BadParameter(f"no attack is named {name!r}; the attacks are {', '.join(ATTACKS)}")
    return found


@click.command(context_settings={"show_default": True})
@click.argument("names", nargs=-1)
@click.option("--seconds", type=click.FloatRange(1), default=Plan.seconds, help="length of each attack")
@click.option("--rate", type=click.FloatRange(1), default=Plan.rate, help="good events a second")
@click.option("--settle", type=click.FloatRange(1), default=Plan.settle, help="seconds to wait for the last rows")
@click.option("--workers", type=click.IntRange(1), default=Plan.workers, help="worker processes per lane")
@click.option("--json", "as_json", is_flag=True, help="print JSON, and the table on standard error")
def main(*, names: Sequence[str], as_json: bool, **options: Any) -> None:
    """Measure good deliveries during attacks, each attack on a stack of its own.

    NAMES are attacks or their first words (poison, idle, trickle). The default is all of them.
    """
    plan, rows = Plan(**options), list[Row]()
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C shows the results until then
        for name in chosen(names):
            click.echo(f"running: {name}", err=True)
            try:
                rows.append(measure(name, plan))
            except (RuntimeError, TimeoutError) as error:
                click.echo(f"{name} was not measured: {error}", err=True)
    Console(width=max(Console().width, WIDTH), stderr=as_json).print(table(rows, plan))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
    raise SystemExit(len(rows) < len(chosen(names)))


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.attacks")
