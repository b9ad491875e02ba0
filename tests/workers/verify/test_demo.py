"""The verdict of the demo."""

import io

from rich.console import Console

from tests.support.drill import IDS, LEDGER, ROWS, totals
from workers.verify.demo import show_proof
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
