"""`./deploy/demo`: a complete stack, simulated people, and the proof that nothing was lost or doubled."""

import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config import load
from app.errors import HeadraceError
from workers.proof import Proof, history, prove
from workers.simulator import Simulator, first_events, live_events
from workers.simulator.events import Event, every_type
from workers.simulator.sender import Sender
from workers.stack import Stack, running_stack
from workers.store.engine import make_engine

USERS, DAYS, SEED = 4, 7, 7
LIVE_EVENTS = 1000
PROVIDER_SLOWNESS = timedelta(minutes=30)  # the simulated present, which must not move while it is compared
DUPLICATES = REORDERING = 0.1
SETTLE_SECONDS, HISTORY_SECONDS = 60, 120
QUERY = """
SELECT client_user_id, provider, count(*) AS workouts,
       round(sum(distance)::numeric / 1000, 1) AS km, round(avg(average_hr)) AS heart_rate
FROM health.workouts GROUP BY 1, 2 ORDER BY km DESC NULLS LAST LIMIT 5"""


BACKFILLS = text("""
SELECT count(*) AS all, count(*) FILTER (WHERE status IN ('complete', 'failed')) AS done,
       coalesce(sum(records), 0) AS records
FROM health.backfills""")


def bar(console: Console) -> Progress:
    """A bar on a terminal; elsewhere the lines around it have to do."""
    parts = (TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*parts, console=console, disable=not console.is_terminal)


def send(console: Console, what: str, events: Sequence[Event], sender: Sender) -> None:
    """Sends events, some twice and some late, each until it is taken."""
    with bar(console) as progress:
        task = progress.add_task(what, total=len(events))
        for start in range(0, len(events), 100):
            sender.send_all(events[start : start + 100])
            progress.update(task, completed=min(start + 100, len(events)))
    if not console.is_terminal:
        console.print(f"{what}: {len(events)} sent")


def watch_history(console: Console, engine: Engine, simulator: Simulator) -> None:
    """Waits until all history has arrived."""
    deadline = time.monotonic() + HISTORY_SECONDS
    with bar(console) as progress:
        task = progress.add_task("history, fetched in chunks", total=None)
        while True:
            with engine.connect() as connection:
                row = connection.execute(BACKFILLS).one()
            progress.update(task, total=row.all, completed=row.done)
            if row.done >= row.all or time.monotonic() > deadline:
                break
            time.sleep(0.2)
    refused = sum(one["status"] != 200 for one in simulator.requests)
    console.print(
        f"{row.done} of {row.all} backfills ended: {row.records} records in {len(simulator.requests)} requests, "
        f"{refused} of them refused or broken by the provider"
    )


def story(console: Console, stack: dict[str, Any], engine: Engine, simulator: Simulator) -> Proof:
    """People connect, history comes in chunks while live events arrive in disorder; and the account."""
    world = simulator.world
    simulator.faults.add("429", times=2, retry_after=1.0)
    simulator.faults.add("429", times=1, retry_after=2.0, as_date=True)
    simulator.faults.add("500", share=0.02)
    simulator.faults.add("truncated", share=0.02)
    url, secret = f"{stack['web']}/webhooks/junction", stack["junction_webhook_secret"]
    disorder = {"duplicates": DUPLICATES, "reordering": REORDERING, "seed": SEED}
    with Sender(url, secret, **disorder, remember=True) as sender:  # type: ignore[arg-type]
        send(console, f"{USERS} people connect, their history is announced", list(first_events(world)), sender)
        send(console, "one event of each of the 194 types", list(every_type(world)), sender)
        send(console, "live events, some twice, some late", list(islice(live_events(world, SEED), LIVE_EVENTS)), sender)
        watch_history(console, engine, simulator)
        proof = prove(engine, sender.taken, history(world), SETTLE_SECONDS)
        sent = sender.counts[202]
    show_tables(console, engine)
    show_proof(console, proof, sent)
    return proof


def show_tables(console: Console, engine: Engine) -> None:
    """How much is stored, a row per resource, and what a reader would ask."""
    table = Table("view", "rows", "people", "from", "to", title="What is stored", title_justify="left")
    with engine.connect() as connection:
        for resource in catalogue().values():
            moment = "ts" if resource.is_series else "version"
            counts = f"count(*), count(DISTINCT user_id), min({moment})::date, max({moment})::date"
            row = connection.execute(text(f"SELECT {counts} FROM health.{resource.name}")).one()  # noqa: S608
            if row[0]:
                table.add_row(f"health.{resource.name}", *(str(value) for value in row))
        console.print(table)
        answer = connection.execute(text(QUERY))
        found = Table(*answer.keys())
        for row in answer:
            found.add_row(*(str(value) for value in row))
    console.print(f"\nA query:[dim]{QUERY}[/dim]\n", found)


def show_proof(console: Console, proof: Proof, sent: int) -> None:
    """The account, in numbers that add up."""
    told = " + ".join(f"{count} {outcome}" for outcome, count in sorted(proof.settled.items()))
    console.print(
        f"\n{sent} requests were answered 202, for {proof.accepted} deliveries: {told}.\n"
        f"They and the provider hold {proof.expected} records and samples; in the views {proof.missing} are missing, "
        f"{proof.outdated} are not the newest version, {proof.unexpected} are doubled or unexplained."
    )
    verdict = "[green]Proven: nothing lost, nothing doubled.[/]" if proof.holds else "[red]NOT PROVEN.[/]"
    console.print(verdict, style="bold")


@click.command()
@click.option("--keep", is_flag=True, help="leave it running to look around, until Ctrl-C")
def main(*, keep: bool) -> None:
    """Show Headrace at work: real PostgreSQL, a real broker, web, workers, beat, Flower and simulated people."""
    # Piped into a file, a console would be 80 columns wide and cut the tables.
    console, began = Console(width=None if sys.stdout.isatty() else 110), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console.print("Starting PostgreSQL, Valkey, web, workers, beat and Flower ...")
    try:
        until = datetime.now(UTC) + PROVIDER_SLOWNESS
        with (
            Simulator(USERS, DAYS, SEED, until=until) as simulator,
            running_stack(
                "demo",
                {
                    "JUNCTION_BASE_URL": simulator.url,
                    "JUNCTION_API_KEY": simulator.api_key,
                    "HEADRACE_REQUEST_RATE": "200/second",
                },
            ) as stack,
        ):
            says = stack.says()
            console.print(
                f"Ready after {time.monotonic() - began:.0f} s. Webhooks go to {says['web']}/webhooks/junction"
            )
            engine = make_engine(load({"DATABASE_URL": says["database_url"]}), "headrace-demo")
            proof = story(console, says, engine, simulator)
            engine.dispose()
            if keep:
                look_around(console, stack)
    except KeyboardInterrupt:
        console.print("stopped")
        sys.exit(130)
    except HeadraceError as error:
        click.echo(f"headrace: {error}", err=True)
        sys.exit(1)
    console.print(f"[dim]{time.monotonic() - began:.0f} s in all; everything has been ended and removed.[/dim]")
    sys.exit(0 if proof.holds else 1)


def look_around(console: Console, stack: Stack) -> None:
    """Says where everything is, and waits for Ctrl-C."""
    data, flower = stack.data, stack.says()["flower"]
    console.print(
        f"\nStill running, until Ctrl-C:\n  Flower   {flower} (login: flower_auth in {data}/stack.json)\n"
        f"  status   .venv/bin/headrace status --watch --data-dir {data}\n  logs     {data}/log",
        soft_wrap=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    main()
