"""`./deploy/demo`: runs a complete stack with simulated users, and proves that nothing was lost or doubled."""

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
from app.config.settings import load
from app.errors import HeadraceError
from workers.local.patience import Patience
from workers.local.temporary import Stack, running_stack
from workers.simulator import Simulator, first_events, live_events, terra
from workers.simulator.events import every_type
from workers.simulator.sender import Sender
from workers.simulator.terra.sender import TerraSender
from workers.store.engine import make_engine, transaction
from workers.verify.expected import history, terra_history
from workers.verify.totals import EXIT_STATUS, IDLE_SECONDS, MAX_SECONDS, Totals, Verdict, prove

USERS, USERS_AT_TERRA, DAYS, SEED = 4, 2, 7, 7
LIVE_EVENTS, LIVE_EVENTS_OF_TERRA = 700, 120
PROVIDER_SLOWNESS = timedelta(minutes=30)  # places the simulated present after the demo, so that it does not move
DUPLICATES = REORDERING = 0.1
QUERIES = {
    "A query": """
SELECT client_user_id, provider, count(*) AS workouts,
       round(sum(distance)::numeric / 1000, 1) AS km, round(avg(average_hr)) AS heart_rate
FROM health.workouts GROUP BY 1, 2 ORDER BY km DESC NULLS LAST LIMIT 5""",
    "One person, through Junction and through Terra": """
SELECT client_user_id, provider, s.source_type, count(*) AS nights, round(avg(total) / 3600.0, 1) AS hours,
       (SELECT round(avg(value)) FROM health.heartrate h
        WHERE h.user_id = s.user_id AND h.provider = s.provider) AS heart_rate
FROM health.sleep s WHERE client_user_id = 'member-0001' GROUP BY 1, 2, 3, s.user_id ORDER BY 2""",
}

BACKFILLS = text("""
SELECT count(*) AS all, count(*) FILTER (WHERE status IN ('complete', 'failed')) AS done,
       coalesce(sum(records), 0) AS records
FROM health.backfills""")


def bar(console: Console) -> Progress:
    """A progress bar on a terminal; elsewhere the callers print lines."""
    parts = (TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*parts, console=console, disable=not console.is_terminal)


def send(console: Console, what: str, events: Sequence[Any], sender: Sender) -> None:
    """Sends events with a progress bar: some twice, some late, and each until it is accepted."""
    with bar(console) as progress:
        task = progress.add_task(what, total=len(events))
        for start in range(0, len(events), 100):
            sender.send_all(events[start : start + 100])
            progress.update(task, completed=min(start + 100, len(events)))
    if not console.is_terminal:
        console.print(f"{what}: {len(events)} sent")


def watch_history(console: Console, engine: Engine, simulator: Simulator) -> int:
    """Waits until all backfills have ended, or there is no progress. Returns the number of open backfills."""
    patience = Patience(IDLE_SECONDS, MAX_SECONDS)
    with bar(console) as progress:
        task = progress.add_task("history, fetched in chunks", total=None)
        while True:
            with transaction(engine) as connection:
                row = connection.execute(BACKFILLS).one()
            progress.update(task, total=row.all, completed=row.done)
            if row.done >= row.all or patience.ends(tuple(row)):
                break
            time.sleep(0.2)
    refused = sum(one["status"] != 200 for one in simulator.requests)
    console.print(
        f"{row.done} of {row.all} backfills ended: {row.records} records in {len(simulator.requests)} requests, "
        f"{refused} of them refused or broken by the provider"
    )
    return int(row.all - row.done)


def story(console: Console, stack: dict[str, Any], engine: Engine, simulator: Simulator) -> Verdict:
    """Connects users, sends live events in disorder while backfills fetch history, then compares and prints."""
    world = simulator.world
    simulator.faults.add("429", times=2, retry_after=1.0)
    simulator.faults.add("429", times=1, retry_after=2.0, as_date=True)
    simulator.faults.add("500", share=0.02)
    simulator.faults.add("truncated", share=0.02)
    twin, web = simulator.terra, f"{stack['web']}/webhooks"
    disorder: dict[str, Any] = {"duplicates": DUPLICATES, "reordering": REORDERING, "seed": SEED, "remember": True}
    with (
        Sender(f"{web}/junction", stack["junction_webhook_secret"], **disorder) as junction_sender,
        TerraSender(f"{web}/terra", stack["terra_signing_secret"], **disorder) as terra_sender,
    ):
        send(console, f"{USERS} people connect through Junction", list(first_events(world)), junction_sender)
        send(console, f"{USERS_AT_TERRA} of them also through Terra", list(terra.first_events(twin)), terra_sender)
        send(console, "one event of each of the 194 types", list(every_type(world)), junction_sender)
        live, growing = live_events(world, SEED), terra.live_events(twin, SEED)
        send(console, "live events, some twice, some late", list(islice(live, LIVE_EVENTS)), junction_sender)
        send(console, "growing days of Terra's people", list(islice(growing, LIVE_EVENTS_OF_TERRA)), terra_sender)
        backfills = watch_history(console, engine, simulator)
        accepted, truth = junction_sender.taken | terra_sender.taken, history(world) | terra_history(twin)
        proof = prove(engine, accepted, truth)
        counts = junction_sender.counts + terra_sender.counts
    show_tables(console, engine)
    return show_proof(console, proof, counts[202], counts.total() - counts[202], backfills)


def show_tables(console: Console, engine: Engine) -> None:
    """Prints a row for each resource that has stored data, and sample queries with their results."""
    table = Table("view", "rows", "people", "from", "to", title="What is stored", title_justify="left")
    with transaction(engine) as connection:
        for resource in catalogue().values():
            moment = "ts" if resource.is_series else "version"
            counts = f"count(*), count(DISTINCT user_id), min({moment})::date, max({moment})::date"
            row = connection.execute(text(f"SELECT {counts} FROM health.{resource.name}")).one()  # noqa: S608
            if row[0]:
                table.add_row(f"health.{resource.name}", *(str(value) for value in row))
        console.print(table)
        for title, query in QUERIES.items():
            answer = connection.execute(text(query))
            found = Table(*answer.keys())
            for row in answer:
                found.add_row(*(str(value) for value in row))
            console.print(f"\n{title}:[dim]{query}[/dim]\n", found)


def show_proof(console: Console, proof: Totals, sent: int, unsent: int, backfills: int) -> Verdict:
    """Prints the totals and the verdict, and returns it. `unsent` events were never accepted; `backfills` are open."""
    outcomes = " + ".join(f"{count} {outcome}" for outcome, count in sorted(proof.outcomes.items()) if count)
    console.print(
        f"\n{sent} requests were answered 202, for {proof.accepted} deliveries: {outcomes}.\n"
        f"Events and provider contained {proof.expected} records and samples. In the views {len(proof.missing)} are "
        f"missing, {len(proof.outdated)} not in the newest version, {len(proof.surplus)} doubled or unexplained."
    )
    verdict = proof.verdict(finished=not (unsent or backfills))
    missing = {"events not accepted": unsent, "deliveries without an outcome": len(proof.pending)}
    missing["backfills still open"] = backfills
    parts = ", ".join(f"{count} {what}" for what, count in missing.items() if count)
    texts: dict[Verdict, str] = {
        "proven": "[green]Proven: nothing lost, nothing doubled.[/]",
        "unfinished": f"[yellow]Unfinished: {parts}. There was no more progress; nothing is proven or refuted.[/]",
        "different": "[red]NOT PROVEN.[/]",
    }
    console.print(texts[verdict], style="bold", soft_wrap=True)
    return verdict


@click.command()
@click.option("--keep", is_flag=True, help="keep the stack running until Ctrl-C")
def main(*, keep: bool) -> None:
    """Run Headrace with real PostgreSQL, a real broker, web, workers, beat, Flower and simulated users.

    The exit status is 0 if all stored rows are as expected, 1 if they differ, and 5 if the work did not finish.
    """
    # Without a terminal rich assumes 80 columns, and would cut the tables.
    console, began = Console(width=None if sys.stdout.isatty() else 110), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console.print("Starting PostgreSQL, Valkey, web, workers, beat and Flower ...")
    try:
        until = datetime.now(UTC) + PROVIDER_SLOWNESS
        with (
            Simulator(USERS, DAYS, SEED, until=until, at_terra=USERS_AT_TERRA) as simulator,
            running_stack("demo", simulator.environment | {"HEADRACE_REQUEST_RATE": "200/second"}) as stack,
        ):
            info = stack.info()
            console.print(f"Ready after {time.monotonic() - began:.0f} s. Webhooks go to {info['web']}/webhooks")
            engine = make_engine(load({"DATABASE_URL": info["database_url"]}), "headrace-demo")
            try:
                verdict = story(console, info, engine, simulator)
            except HeadraceError:
                print_kept(stack)
                raise
            engine.dispose()
            if verdict != "proven":
                print_kept(stack)
            if keep:
                look_around(console, stack)
    except KeyboardInterrupt:
        console.print("stopped")
        sys.exit(130)
    except HeadraceError as error:
        click.echo(f"headrace: {error}", err=True)
        sys.exit(1)
    seconds = time.monotonic() - began
    files = "are kept" if stack.keep else "are deleted"
    console.print(f"[dim]{seconds:.0f} s in total. All processes have ended; all files {files}.[/dim]")
    sys.exit(EXIT_STATUS[verdict])


def print_kept(stack: Stack) -> None:
    """Keeps data and logs, and prints where they are."""
    stack.keep = True
    click.echo(f"Data and logs are kept in {stack.folder}", err=True)


def look_around(console: Console, stack: Stack) -> None:
    """Prints where to look, and waits for Ctrl-C."""
    data, flower = stack.data, stack.info()["flower"]
    console.print(
        f"\nStill running, until Ctrl-C:\n  Flower   {flower} (login: flower_auth in {data}/stack.json)\n"
        f"  status   .venv/bin/headrace status --watch --data-dir {data}\n  logs     {data}/log",
        soft_wrap=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    main()
