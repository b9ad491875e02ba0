"""`headrace drill`: injects faults into a stack under load, then checks that no event was lost or doubled."""

# ruff: noqa: PLC0415 - the libraries of a drill cost 0.5 s of CPU, which would delay --help and the first line
import json
import random
import signal
import sys
import time
from typing import TYPE_CHECKING

import click

from app.config.settings import load, process_environment
from app.errors import HeadraceError
from workers.cli import options
from workers.verify.drill.plan import Options

if TYPE_CHECKING:
    from rich.console import Console

    from workers.cli import output
    from workers.local.temporary import Stack
    from workers.verify.drill.report import Report, Snapshot

VISIBILITY_SECONDS = 15  # instead of 60: messages of killed workers are redelivered sooner
SEEDS = 1_000_000
OURS = {"postgres": "DATABASE_URL", "broker": "BROKER_URL"}


@click.command("drill")
@click.option("--minutes", type=click.FloatRange(0.1), default=2.0, show_default=True, help="duration of the load")
@click.option("--seed", type=int, help="repeats the users, events and faults of an earlier drill (default: random)")
@click.option("--rate", type=click.FloatRange(1), default=100.0, show_default=True, help="events per second")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="worker processes per lane")
@click.option("--keep", is_flag=True, help="keep data and logs (always kept after a failure)")
@options.json_option
def command(*, minutes: float, seed: int | None, rate: float, workers: int, keep: bool, as_json: bool) -> None:
    """Test a stack under load and faults. Kills, freezes and restarts processes, then checks every accepted event.

    The exit status is 0 only if nothing was lost or doubled, 1 if the drill failed, and 5 if the work did not finish.
    """
    seed = random.SystemRandom().randrange(SEEDS) if seed is None else seed
    visibility = load().visibility_timeout_seconds
    if "HEADRACE_VISIBILITY_TIMEOUT_SECONDS" not in process_environment():
        visibility = VISIBILITY_SECONDS
    again = f"headrace drill --minutes {minutes:g} --rate {rate:g} --workers {workers} --seed {seed}"
    click.echo(f"Seed {seed}. To repeat this drill: {again}", err=as_json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _drill(Options(minutes * 60, seed, rate, visibility), workers, keep=keep, as_json=as_json)
    except KeyboardInterrupt:
        click.echo("interrupted; all processes of the stack have been stopped", err=as_json)
        sys.exit(130)


def _drill(options: Options, workers: int, *, keep: bool, as_json: bool) -> None:
    """Runs a drill, prints its report, and ends the process with its exit status."""
    from rich.console import Console

    from workers.cli import drill_report, output
    from workers.verify.totals import EXIT_STATUS

    console = Console(stderr=True) if as_json else Console(width=None if sys.stdout.isatty() else 140)
    report = _run(console, options, workers, keep=keep)
    if as_json:
        output.print_json(drill_report.plain(report))
    else:
        drill_report.show(console, report)
    sys.exit(EXIT_STATUS[report.verdict])


def _run(console: "Console", options: Options, workers: int, *, keep: bool) -> "Report":
    from workers.cli import drill_report, output
    from workers.local.temporary import running_stack
    from workers.verify.drill.provider import PauseRecorder, make_simulator
    from workers.verify.drill.run import Drill, environment

    began = time.monotonic()
    console.print("Starting a stack ...")
    pauses = PauseRecorder()
    with make_simulator(options, pauses.note) as simulator:
        with running_stack("drill", environment(simulator, options), workers) as stack:
            console.print(f"Ready after {time.monotonic() - began:.0f} s.", highlight=False)
            _print_external_causes(console, stack)
            try:
                with output.progress("load", screen=console) as update:
                    report = Drill(
                        simulator,
                        pauses,
                        stack,
                        options,
                        show=lambda moment: _show_progress(update, moment),
                        on_progress=lambda fault: console.print(str(fault), style="dim", highlight=False),
                    ).run()
            except HeadraceError:
                stack.keep = True
                console.print(f"Data and logs are kept in {stack.folder}", soft_wrap=True)
                raise
            stack.keep = keep or not report.holds
        if stack.keep:
            (stack.folder / "report.json").write_text(json.dumps(drill_report.plain(report), indent=2, default=str))
            console.print(f"Data, logs and report.json are kept in {stack.folder}", soft_wrap=True)
    return report


def _print_external_causes(console: "Console", stack: "Stack") -> None:
    processes = stack.info()["processes"]
    for group, variable in OURS.items():
        if group not in processes:
            console.print(f"{variable} is set: the {group} is not part of this stack and gets no faults.")


def _show_progress(update: "output.Update", moment: "Snapshot") -> None:
    total, done = moment.seconds + moment.left, moment.seconds
    if moment.phase == "settling":
        total, done = moment.acked, min(moment.settled, moment.acked)
    time_text = f"{moment.left:.0f} s left" if moment.phase == "load" else f"for {moment.seconds:.0f} s"
    counts = (
        f"acked {moment.acked:,} · in the ledger {moment.settled:,}, applied {moment.applied:,} · "
        f"faults {moment.faults} · open backfills {moment.backfills_open}"
    )
    update(done, total or None, phase=moment.phase, detail=f"{time_text} · {counts}")
