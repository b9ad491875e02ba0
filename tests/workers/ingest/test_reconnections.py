"""Terra's reconnections: one user with a new id stays one user, in any order of events."""

import itertools
import random
from typing import Any

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import START, apply, rows
from tests.support.cases import Failures
from tests.support.database import emptied
from tests.support.reconnections import EVENTS, MINUTE, REAUTH, late, reconnection, terra, user
from workers.operate.erase import Eraser

LATE = late()
VIEWS = {
    "rides": "SELECT user_id, client_user_id, id, title FROM health.workouts ORDER BY id",
    "beats": "SELECT user_id, ts, value FROM health.heartrate ORDER BY ts, user_id",
    "people": "SELECT user_id, client_user_id FROM health.users ORDER BY user_id",
    "connections": "SELECT user_id, provider, status FROM health.connections ORDER BY user_id",
}


def seen(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    return {name: [tuple(row.values()) for row in rows(engine, query)] for name, query in VIEWS.items()}


def of_each(engine: Engine) -> dict[str, dict[str, list[tuple[Any, ...]]]]:
    """The rows of each of several users, without the suffix that distinguishes the users."""
    found: dict[str, dict[str, list[tuple[Any, ...]]]] = {}
    for name, all_rows in seen(engine).items():
        for user_id, *others in all_rows:
            kind, _, of = user_id.partition("-")
            row = (kind, *("member" if one == f"member-{of}" else one for one in others))
            found.setdefault(of, {view: [] for view in VIEWS})[name].append(row)
    return found


END = {
    "rides": [("new", "member", "r1", "the newest"), ("new", "member", "r2", "late")],
    "beats": [("new", START + minute * MINUTE, 104.0) for minute in (1, 2)],
    "people": [("new", "member")],
    "connections": [("new", "peloton", "connected")],
}


def test_the_order_does_not_matter(engine: Engine, settings: Settings) -> None:
    """Breaks if data stays under the former id, or the former connection's end counts as the new one's.

    Each of the 120 orders has a user of its own, so that one message can hold all of them.
    """
    orders = {f"{n}": order for n, order in enumerate(itertools.permutations(range(len(EVENTS))))}
    events = {of: reconnection(f"-{of}") for of in orders}
    for position in range(len(EVENTS)):
        assert "dead" not in apply(engine, settings, *(events[of][order[position]] for of, order in orders.items()))
    assert "dead" not in apply(engine, settings, *(late(f"-{of}") for of in orders))
    found = of_each(engine)
    assert {str(order): found.get(of) for of, order in orders.items() if found.get(of) != END} == {}
    assert found.keys() == orders.keys()


def test_the_order_does_not_matter_of_messages_with_one_event(engine: Engine, settings: Settings, full: bool) -> None:
    """Breaks if the result of the test above depends on other users' events in the same message."""
    orders = list(itertools.permutations(range(len(EVENTS))))
    if not full:
        orders = random.Random(11).sample(orders, 12)
    failures = Failures()
    for order in orders:
        with failures.of(order), emptied(engine):
            for number in order:
                assert "dead" not in apply(engine, settings, reconnection("-1")[number])
            assert "dead" not in apply(engine, settings, late("-1"))
            assert of_each(engine) == {"1": END}
    assert failures == {}


def test_one_message_with_all_events(engine: Engine, settings: Settings) -> None:
    """Breaks if data of the same message stays under the former id."""
    assert apply(engine, settings, *EVENTS, LATE) == {"applied": 6}
    assert [row[0] for row in seen(engine)["rides"]] == ["new", "new"]
    assert rows(engine, "SELECT 1 FROM headrace.series WHERE user_id = 'old'") == []


def test_late_events_of_the_former_id(engine: Engine, settings: Settings) -> None:
    """Breaks if a retry under the former id is applied twice, or restores its connection."""
    apply(engine, settings, *EVENTS)
    assert apply(engine, settings, LATE) == {"applied": 1}
    assert apply(engine, settings, LATE) == {"duplicate": 1}
    assert apply(engine, settings, terra(7, {"type": "auth", "status": "success", "user": user("old")})) == {
        "ignored": 1
    }
    assert seen(engine)["connections"] == [("new", "peloton", "connected")]


@pytest.mark.parametrize("old", [None, user("new")])
def test_a_notice_without_an_old_id_moves_nothing(engine: Engine, settings: Settings, old: Any) -> None:
    """Breaks if a notice without a former id is rejected, or merges a user into itself."""
    apply(engine, settings, EVENTS[0])
    assert apply(engine, settings, terra(3, REAUTH | {"old_user": old})) == {"applied": 1}
    assert [row[0] for row in seen(engine)["people"]] == ["new", "old"]


def test_an_erasure_includes_deliveries_of_the_reconnection_message(engine: Engine, settings: Settings) -> None:
    """Breaks if an erasure leaves sealed bodies of the message in which the id changed."""
    apply(engine, settings, *EVENTS)
    assert rows(engine, "SELECT 1 FROM headrace.archive WHERE user_id = 'old'")
    Eraser(engine, settings).erase("new", lambda _: None)
    assert rows(engine, "SELECT user_id FROM headrace.archive") == []
