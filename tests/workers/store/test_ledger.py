"""The delivery ledger."""

from typing import Any

from sqlalchemy import Engine

from tests.support import START, rows
from tests.support.cases import Failures
from workers.store.engine import transaction
from workers.store.ledger import Outcome, OutcomeRow, settle

LEDGER = "SELECT outcome, attempts, error FROM health.deliveries WHERE message_id = :id"


def record(engine: Engine, *settled: OutcomeRow) -> None:
    with transaction(engine) as connection:
        settle(connection, settled)


def outcome(name: str, what: Outcome, **more: Any) -> OutcomeRow:
    given = {"event_type": "daily.data.sleep.created", "user_id": "u1", "received_at": START}
    return OutcomeRow("junction", name, outcome=what, **(given | more))


def test_the_first_outcome_stands_unless_it_was_dead(shared: Engine) -> None:
    """Breaks if a repeated message hides that it was applied once, or a resolved delivery stays dead."""
    failures = Failures()
    for first, second, stands in (
        ("applied", "duplicate", "applied"),
        ("ignored", "applied", "ignored"),
        ("stale", "dead", "stale"),
        ("dead", "applied", "applied"),
        ("dead", "duplicate", "duplicate"),
        ("dead", "dead", "dead"),
    ):
        with failures.of(first, second, stands):
            name = f"{first}-{second}"
            for what in (first, second):
                record(shared, outcome(name, what, error=f"why {what}" if what == "dead" else None))
            (row,) = rows(shared, LEDGER, id=name)
            assert row == {"outcome": stands, "attempts": 2, "error": "why dead" if stands == "dead" else None}
    assert failures == {}


def test_attempts_add_up(shared: Engine) -> None:
    """Breaks if the number of attempts is lost."""
    for attempts in (1, 5, 2):
        record(shared, outcome("counted", "applied", attempts=attempts))
    assert rows(shared, LEDGER, id="counted")[0]["attempts"] == 8


def test_one_id_of_two_aggregators_is_two_deliveries(shared: Engine) -> None:
    """Breaks if an id of Terra's hides the same id of Junction's."""
    terra = outcome("same", "applied")
    terra.aggregator = "terra"
    record(shared, outcome("same", "applied"), terra)
    found = rows(shared, "SELECT provider, attempts FROM health.deliveries WHERE message_id = 'same' ORDER BY 1")
    assert found == [{"provider": "junction", "attempts": 1}, {"provider": "terra", "attempts": 1}]


def test_every_column_is_recorded(shared: Engine) -> None:
    """Breaks if a column of the ledger has the wrong value, or an absent value of a dead delivery is required."""
    record(shared, outcome("full", "applied"), outcome("bare", "dead", event_type=None, user_id=None))
    query = "SELECT event_type, received_at, applied_at > received_at AS later FROM health.deliveries"
    (full,) = rows(shared, f"{query} WHERE message_id = 'full'")
    assert full == {"event_type": "daily.data.sleep.created", "received_at": START, "later": True}
    assert rows(shared, f"{query} WHERE message_id = 'bare'")[0]["event_type"] is None
    users = rows(shared, "SELECT user_id FROM headrace.deliveries WHERE message_id IN ('full', 'bare') ORDER BY 1")
    assert [row["user_id"] for row in users] == ["u1", None]


def test_an_empty_message_writes_nothing(shared: Engine) -> None:
    """Breaks if an empty message fails."""
    record(shared)
