"""Large requests: counted in the ledger, in any order of arrival."""

import itertools

from sqlalchemy import Engine

from tests.support import START, rows
from tests.support.cases import Failures
from tests.support.database import emptied
from workers.actions import LargeRequest
from workers.store.engine import transaction
from workers.store.ledger import Outcome, OutcomeRow, expect, settle

FOUND = "SELECT expected, received, is_complete FROM health.large_requests WHERE reference = 'r1'"


def chunk(number: int, reference: str = "r1", outcome: Outcome = "applied", event_type: str = "activity") -> OutcomeRow:
    """A delivery that is a part of a large request."""
    return OutcomeRow("terra", f"t{number}", event_type, "u1", START, outcome, reference=reference)


def announce(engine: Engine, expected: int | None) -> bool:
    with transaction(engine) as connection:
        return expect(connection, "terra", LargeRequest("r1", "u1", "garmin", expected))


def come(engine: Engine, *settled: OutcomeRow) -> None:
    with transaction(engine) as connection:
        settle(connection, settled)


def test_it_is_complete_in_any_order(engine: Engine) -> None:
    """Breaks if a chunk before its announcement is not counted, or an announcement clears the number."""
    failures = Failures()
    for order in list(itertools.permutations(["processing", "sending", 1, 2])):
        with failures.of(order), emptied(engine):
            for one in order:
                if isinstance(one, int):
                    come(engine, chunk(one))
                    come(engine, chunk(one))
                else:
                    announce(engine, 2 if one == "sending" else None)
            assert rows(engine, FOUND) == [{"expected": 2, "received": 2, "is_complete": True}]
    assert failures == {}


def test_only_applied_chunks_count(engine: Engine) -> None:
    """Breaks if dead chunks, announcements or another request's chunks make it look complete."""
    announce(engine, 3)
    come(engine, chunk(1), chunk(2, outcome="dead"), chunk(3, event_type="large_request_sending"), chunk(4, "r2"))
    assert rows(engine, FOUND) == [{"expected": 3, "received": 1, "is_complete": False}]
    come(engine, chunk(2))
    assert rows(engine, FOUND) == [{"expected": 3, "received": 2, "is_complete": False}]


def test_without_a_number_it_is_never_complete(engine: Engine) -> None:
    """Breaks if a request without a stated number looks complete, or incomplete."""
    announce(engine, None)
    come(engine, chunk(1))
    assert rows(engine, FOUND) == [{"expected": None, "received": 1, "is_complete": None}]


def test_only_a_new_announcement_counts(engine: Engine) -> None:
    """Breaks if a repeated announcement counts as applied, or a late one clears the number."""
    assert [announce(engine, expected) for expected in (None, 2, 2, None)] == [True, True, False, False]
