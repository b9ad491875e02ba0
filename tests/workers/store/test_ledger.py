"""The ledger, and what could not be applied."""

from typing import Any

import pytest
from sqlalchemy import Engine

from app.delivery import Delivery
from tests.support import START, delivery, rows
from workers.store.dead_letters import add_dead_letter
from workers.store.engine import transaction
from workers.store.ledger import Outcome, OutcomeRow, settle

LEDGER = "SELECT outcome, attempts, error FROM health.deliveries WHERE message_id = :id"


def record(engine: Engine, *settled: OutcomeRow) -> None:
    """Settles in a transaction of its own."""
    with transaction(engine) as connection:
        settle(connection, settled)


def outcome(name: str, what: Outcome, **more: Any) -> OutcomeRow:
    """What became of a delivery."""
    given = {"event_type": "daily.data.sleep.created", "user_id": "u1", "received_at": START}
    return OutcomeRow("junction", name, outcome=what, **(given | more))


@pytest.mark.parametrize(
    ("first", "second", "stands"),
    [
        ("applied", "duplicate", "applied"),
        ("ignored", "applied", "ignored"),
        ("stale", "dead", "stale"),
        ("dead", "applied", "applied"),
        ("dead", "duplicate", "duplicate"),
        ("dead", "dead", "dead"),
    ],
)
def test_the_first_outcome_stands_unless_it_was_dead(
    shared: Engine, first: Outcome, second: Outcome, stands: str
) -> None:
    """Breaks if a repeated message hides that it was applied once, or a mended delivery stays dead."""
    name = f"{first}-{second}"
    for what in (first, second):
        record(shared, outcome(name, what, error=f"why {what}" if what == "dead" else None))
    (row,) = rows(shared, LEDGER, id=name)
    assert row == {"outcome": stands, "attempts": 2, "error": "why dead" if stands == "dead" else None}


def test_attempts_add_up(shared: Engine) -> None:
    """Breaks if how often a sender tried cannot be seen."""
    for attempts in (1, 5, 2):
        record(shared, outcome("counted", "applied", attempts=attempts))
    assert rows(shared, LEDGER, id="counted")[0]["attempts"] == 8


def test_one_id_of_two_aggregators_is_two_deliveries(shared: Engine) -> None:
    """Breaks if an id of Terra's hides one of Junction's."""
    terra = outcome("same", "applied")
    terra.aggregator = "terra"
    record(shared, outcome("same", "applied"), terra)
    found = rows(shared, "SELECT provider, attempts FROM health.deliveries WHERE message_id = 'same' ORDER BY 1")
    assert found == [{"provider": "junction", "attempts": 1}, {"provider": "terra", "attempts": 1}]


def test_all_that_is_known_is_recorded(shared: Engine) -> None:
    """Breaks if a column of the ledger is filled from the wrong one, or what a dead delivery lacks is wanted."""
    record(shared, outcome("full", "applied"), outcome("bare", "dead", event_type=None, user_id=None))
    query = "SELECT event_type, received_at, applied_at > received_at AS later FROM health.deliveries"
    (full,) = rows(shared, f"{query} WHERE message_id = 'full'")
    assert full == {"event_type": "daily.data.sleep.created", "received_at": START, "later": True}
    assert rows(shared, f"{query} WHERE message_id = 'bare'")[0]["event_type"] is None
    users = rows(shared, "SELECT user_id FROM headrace.deliveries WHERE message_id IN ('full', 'bare') ORDER BY 1")
    assert [row["user_id"] for row in users] == ["u1", None]


def test_nothing_settled_is_nothing_written(shared: Engine) -> None:
    """Breaks if an empty message fails."""
    record(shared)


def test_a_dead_letter_is_kept_once_and_whole(shared: Engine) -> None:
    """Breaks if a second attempt overwrites or doubles what was kept, or anything that opens it again is lost."""
    kept: Delivery = delivery(b"{half", name="msg_dead", aggregator="terra")
    for reason in ("the first reason", "the second"):
        with transaction(shared) as connection:
            add_dead_letter(connection, kept, None, reason)
    (row,) = rows(shared, "SELECT * FROM headrace.dead_letters WHERE message_id = 'msg_dead'")
    assert (row["aggregator"], row["reason"], row["event_type"]) == ("terra", "the first reason", None)
    assert bytes(row["sealed"]) == kept.sealed
    assert b"half" not in row["sealed"]
    assert (row["received_at"], row["ordering_ms"], row["reference"]) == (kept.received, None, None)
