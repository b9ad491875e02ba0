"""The audit log: an action of several transactions is recorded however it ends, and found by each of its users."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine

from app.errors import TryLater
from workers.store import audit
from workers.store.engine import transaction


def listed(engine: Engine, subject: str) -> list[tuple[str, object]]:
    with transaction(engine) as connection:
        found = audit.listed(connection, datetime.now(UTC) - timedelta(hours=1), subject and [subject])
    return [(one["action"], one["detail"]) for one in found]


def test_an_action_that_fails_halfway_is_recorded(engine: Engine) -> None:
    """Breaks if an outage hides that backfills were opened, or dead letters applied."""
    detail = {"opened": 0}

    def reconcile() -> None:
        with audit.recorded(engine, "reconcile", "u1", detail):
            detail["opened"] = 2
            raise TryLater("PostgreSQL is away")

    with pytest.raises(TryLater):
        reconcile()
    assert listed(engine, "u1") == [("reconcile", {"opened": 2})]


def test_an_entry_is_found_by_its_subject_and_by_each_of_its_users(engine: Engine) -> None:
    audit.record(engine, "console people", "people", {"users": ["u1", "u2"]})
    audit.record(engine, "erase", "u2", {"users": 3})
    assert listed(engine, "u1") == [("console people", {"users": ["u1", "u2"]})]
    assert [action for action, _ in listed(engine, "u2")] == ["console people", "erase"]
    assert listed(engine, "u") == []
