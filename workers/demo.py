"""`./deploy/demo`: a complete stack, simulated people, and the proof that nothing was lost or doubled."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config import load
from app.errors import HeadraceError
from workers.proof import Proof, prove
from workers.simulator import World, first_events, live_events
from workers.simulator.events import Event, every_type
from workers.simulator.sender import Sender
from workers.store.engine import make_engine
from workers.supervisor import NotStarted

USERS, DAYS, SEED = 12, 30, 7
LIVE_EVENTS = 2000
DUPLICATES = REORDERING = 0.1
START_SECONDS, SETTLE_SECONDS = 120, 60
QUERY = """
SELECT client_user_id, provider, count(*) AS workouts,
       round(sum(distance)::numeric / 1000, 1) AS km, round(avg(average_hr)) AS heart_rate
FROM health.workouts GROUP BY 1, 2 ORDER BY km DESC NULLS LAST LIMIT 5"""


@contextlib.contextmanager
def running_stack() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A data directory and what its stack.json says, of a `headrace up` that ends with the block. Raises NotStarted."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-demo-"))
    folder.chmod(0o755)  # as root, PostgreSQL's own user must get through
    command = [sys.executable, "-m", "workers.cli", "up", "--data-dir", str(folder / "data"), "--workers", "2"]
    with (folder / "up.log").open("wb") as log:
        # A session of its own: Ctrl-C reaches us, and we end it.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        yield folder / "data", _wait_ready(process, folder)
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_ready(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    deadline, stack = time.monotonic() + START_SECONDS, folder / "data" / "stack.json"
    while not stack.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            said = (folder / "up.log").read_text().strip().splitlines()
            raise NotStarted(f"the stack did not start: {said[-1] if said else 'it said nothing'}")
        time.sleep(0.1)
    return dict(json.loads(stack.read_bytes()))


def send(console: Console, what: str, events: Sequence[Event], sender: Sender) -> None:
    """Sends events, some twice and some late, each until it is taken."""
    with Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(what, total=len(events))
        for start in range(0, len(events), 100):
            sender.send_all(events[start : start + 100])
            progress.update(task, completed=min(start + 100, len(events)))
    if not console.is_terminal:
        console.print(f"{what}: {len(events)} sent")


def story(console: Console, stack: dict[str, Any], engine: Engine) -> Proof:
    """People connect, every kind of event arrives, then live events in disorder; and the account."""
    world = World(SEED, USERS, datetime.now(UTC), DAYS)
    first = list(first_events(world))
    url, secret = f"{stack['web']}/webhooks/junction", stack["junction_webhook_secret"]
    disorder = {"duplicates": DUPLICATES, "reordering": REORDERING, "seed": SEED}
    with Sender(url, secret, **disorder, remember=True) as sender:  # type: ignore[arg-type]
        send(console, f"{USERS} people connect, their history is announced", first, sender)
        send(console, "one event of each of the 194 types", list(every_type(world)), sender)
        send(console, "live events, some twice, some late", list(islice(live_events(world, SEED), LIVE_EVENTS)), sender)
        proof = prove(engine, sender.taken, SETTLE_SECONDS)
        sent = sender.counts[202]
    show_tables(console, engine)
    show_proof(console, proof, sent)
    return proof


def show_tables(console: Console, engine: Engine) -> None:
    """How much is stored, a row per resource, and what a reader would ask."""
    table = Table("view", "rows", "people", "from", "to", title="What is stored", title_justify="left")
    with engine.connect() as connection:
        for resource in catalogue().values():
            moment = "ts" if resource.kind == "timeseries" else "version"
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
        f"They hold {proof.expected} records and samples; in the views {proof.missing} are missing, "
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
        with running_stack() as (data_dir, stack):
            console.print(
                f"Ready after {time.monotonic() - began:.0f} s. Webhooks go to {stack['web']}/webhooks/junction"
            )
            engine = make_engine(load({"DATABASE_URL": stack["database_url"]}), "headrace-demo")
            proof = story(console, stack, engine)
            engine.dispose()
            if keep:
                look_around(console, stack, data_dir)
    except KeyboardInterrupt:
        console.print("stopped")
        sys.exit(130)
    except HeadraceError as error:
        click.echo(f"headrace: {error}", err=True)
        sys.exit(1)
    console.print(f"[dim]{time.monotonic() - began:.0f} s in all; everything has been ended and removed.[/dim]")
    sys.exit(0 if proof.holds else 1)


def look_around(console: Console, stack: dict[str, Any], data_dir: Path) -> None:
    """Says where everything is, and waits for Ctrl-C."""
    console.print(
        f"\nStill running, until Ctrl-C:\n  Flower   {stack['flower']} (login: flower_auth in {data_dir}/stack.json)\n"
        f"  status   .venv/bin/headrace status --watch --data-dir {data_dir}\n  logs     {data_dir}/log",
        soft_wrap=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    main()
