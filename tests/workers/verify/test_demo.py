"""The demo: how long it waits for history, and its verdict."""

import io
from functools import partial

import pytest
from rich.console import Console
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support.backfills import announce, notice
from tests.support.database import run
from tests.support.drill import IDS, LEDGER, ROWS, totals
from tests.support.patience import Clock, install
from workers.simulator import Simulator
from workers.verify import demo
from workers.verify.demo import show_proof, watch_history
from workers.verify.totals import EXIT_STATUS, Totals


def shown(proof: Totals, unsent: int = 0, backfills: int = 0) -> tuple[str, int]:
    """The last line, and the exit status."""
    console = Console(file=io.StringIO(), width=200)
    verdict = show_proof(console, proof, 10, unsent, backfills)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()[-1], EXIT_STATUS[verdict]


def test_the_verdict_is_proven_unfinished_or_not_proven() -> None:
    """Breaks if a busy machine leads to NOT PROVEN, or an unfinished demo to exit status 0 or 1."""
    assert shown(totals()) == ("Proven: nothing lost, nothing doubled.", 0)
    assert shown(totals(rows=ROWS[1:])) == ("NOT PROVEN.", 1)
    assert shown(totals(ledger=[*LEDGER, LEDGER[0]]), backfills=1) == ("NOT PROVEN.", 1)
    rest = totals(ledger=LEDGER[1:], queued={IDS["a"]}, rows=ROWS[1:])
    line, status = shown(rest, unsent=2, backfills=3)
    missing = "2 events not accepted, 1 deliveries without an outcome, 3 backfills still open"
    assert line == f"Unfinished: {missing}. There was no more progress; nothing is proven or refuted."
    assert status == 5


@pytest.mark.parametrize(("last", "still_open"), [("status = 'complete'", 0), ("records = 2", 1)])
def test_it_waits_for_history_while_there_is_progress(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, last: str, still_open: int
) -> None:
    """Breaks if the demo on a busy machine stops waiting for slow backfills, or waits on for one that stands still."""
    announce(engine, settings, notice())
    changes = ["records = 1", "records = 2", last]
    clock = Clock(80, [partial(run, engine, f"UPDATE headrace.backfills SET {change}") for change in changes])
    install(monkeypatch, clock, demo)

    found = watch_history(Console(file=io.StringIO()), engine, Simulator(users=1, days=1))

    assert found == still_open
    assert clock.sleeps <= 5
