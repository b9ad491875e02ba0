"""What users granted: the newest answer, and since when it has been the same."""

import itertools
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, event

from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import START, apply, delivery, heartrate, rows, workout
from tests.support import event as junction_event
from tests.support.database import emptied
from workers.operate.erase import Eraser
from workers.store.engine import transaction
from workers.store.user_merges import merge_user

HOUR = timedelta(hours=1)
STATUS = {True: "available", False: "unavailable", None: None}


def connected(hours: float, user: str = "u1", **granted: bool | None) -> Delivery:
    """A connection event of so many hours after START; None: an entry that cannot be read."""
    availability = {name: {"status": STATUS[value]} for name, value in granted.items()}
    data = {"provider": {"slug": "fitbit"}, "resource_availability": availability}
    return delivery(junction_event("provider.connection.created", user, data), START + hours * HOUR)


def grants(engine: Engine) -> dict[str, tuple[bool, float]]:
    """By resource: whether it is granted, and since how many hours after START."""
    found = rows(engine, "SELECT resource, granted, since FROM health.grants ORDER BY resource")
    return {row["resource"]: (row["granted"], (row["since"] - START) / HOUR) for row in found}


def test_every_resource_is_a_row_of_the_view(engine: Engine, settings: Settings) -> None:
    """Breaks if a grant has no user or provider, or an unreadable one costs the others."""
    assert apply(engine, settings, connected(0, sleep=True, body=False, steps=None)) == {"applied": 1}
    assert rows(engine, "SELECT * FROM health.grants ORDER BY resource") == [
        {"user_id": "u1", "provider": "fitbit", "resource": name, "granted": granted, "since": START}
        for name, granted in (("body", False), ("sleep", True))
    ]
    (entry,) = rows(engine, "SELECT outcome, error FROM health.deliveries")
    assert entry == {"outcome": "applied", "error": "grants that cannot be read: 1"}


def test_the_newest_answer_wins_in_all_orders(engine: Engine, settings: Settings) -> None:
    """Breaks if an older event that arrives late restores what the user has withdrawn.

    `since` is the time of the first event that was received with the newest answer, which depends on the order.
    """
    for order in itertools.permutations([(0, True), (1, False), (2, True), (3, False)]):
        with emptied(engine):
            for hours, granted in order:
                apply(engine, settings, connected(hours, sleep=granted))
            assert grants(engine)["sleep"] in {(False, 3), (False, 1)}, order


def test_since_is_when_the_present_answer_began(engine: Engine, settings: Settings) -> None:
    """Breaks if `since` moves with every event, or stays when the answer changes."""
    for hours, granted, since in ((0, True, 0), (1, True, 0), (2, False, 2), (3, False, 2), (1.5, True, 2)):
        apply(engine, settings, connected(hours, sleep=granted))
        assert grants(engine)["sleep"] == (granted if hours != 1.5 else False, since)


def test_an_event_that_changes_only_a_grant_is_applied(engine: Engine, settings: Settings) -> None:
    """Breaks if the outcome is that of the connection alone, or a repetition is a change."""
    first, second = connected(0, sleep=True), connected(1, sleep=False)
    assert apply(engine, settings, first) == {"applied": 1}
    assert apply(engine, settings, second) == {"applied": 1}
    assert apply(engine, settings, connected(1, sleep=False)) == {"duplicate": 1}
    assert apply(engine, settings, connected(0.5, sleep=True)) == {"stale": 1}


def test_erasure_removes_grants(engine: Engine, settings: Settings, broker_url: str) -> None:
    del broker_url
    apply(engine, settings, connected(0, sleep=True), connected(0, "u2", sleep=True))
    removed = Eraser(engine, settings).erase("u1", lambda _: None).removed
    assert removed["grants"] == 1
    assert rows(engine, "SELECT user_id FROM health.grants") == [{"user_id": "u2"}]


def test_grants_of_a_former_connection_are_dropped(engine: Engine, settings: Settings) -> None:
    """Breaks if a reconnection inherits what the user allowed before, or a late event restores it."""
    apply(engine, settings, connected(0, "old", sleep=True), connected(0, "new", sleep=False))
    with transaction(engine) as connection:
        assert merge_user(connection, "old", "new")
    apply(engine, settings, connected(1, "old", sleep=True))
    assert rows(engine, "SELECT user_id, granted FROM health.grants") == [{"user_id": "new", "granted": False}]


def test_the_ledger_has_the_team(engine: Engine, settings: Settings) -> None:
    """Breaks if support cannot tell which team of Junction's a delivery came from."""
    apply(engine, settings, delivery(workout("u1") | {"team_id": "t1"}))
    assert rows(engine, "SELECT team_id FROM headrace.deliveries") == [{"team_id": "t1"}]


def test_only_deliveries_with_grants_touch_the_table(engine: Engine, settings: Settings) -> None:
    """Breaks if every message pays for grants that it does not have."""
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(Engine, "before_cursor_execute", note)
    try:
        apply(engine, settings, *map(delivery, (workout("u1"), heartrate("u1", {0: 60}))), connected(0))
        assert not [one for one in statements if "headrace.grants" in one or "headrace.lost_deliveries" in one]
        apply(engine, settings, connected(1, sleep=True))
        assert sum("headrace.grants" in one for one in statements) == 1
    finally:
        event.remove(Engine, "before_cursor_execute", note)
