"""A person reconnects and gets another id from Terra: one person stays one, in whatever order that is heard of."""

import itertools
import random
from typing import Any

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import START, apply, rows
from tests.support.cases import Failures
from tests.support.database import emptied
from tests.support.reconnections import EVENTS, MINUTE, REAUTH, late, story, terra, user
from workers.operate.erase import Eraser

LATE = late()
VIEWS = {
    "rides": "SELECT user_id, client_user_id, id, title FROM health.workouts ORDER BY id",
    "beats": "SELECT user_id, ts, value FROM health.heartrate ORDER BY ts, user_id",
    "people": "SELECT user_id, client_user_id FROM health.users ORDER BY user_id",
    "connections": "SELECT user_id, provider, status FROM health.connections ORDER BY user_id",
}


def seen(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    """What a reader sees of the person."""
    return {name: [tuple(row.values()) for row in rows(engine, query)] for name, query in VIEWS.items()}


def of_each(engine: Engine) -> dict[str, dict[str, list[tuple[Any, ...]]]]:
    """What a reader sees of each of several people, without what tells them apart."""
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
    """Breaks if an id that is no more keeps a part of the person, or its end is taken for the end of the new one.

    Each of the 120 orders is a person of its own, so that all of them go through the store together.
    """
    orders = {f"{n}": order for n, order in enumerate(itertools.permutations(range(len(EVENTS))))}
    told = {of: story(f"-{of}") for of in orders}
    for position in range(len(EVENTS)):
        assert "dead" not in apply(engine, settings, *(told[of][order[position]] for of, order in orders.items()))
    assert "dead" not in apply(engine, settings, *(late(f"-{of}") for of in orders))
    found = of_each(engine)
    assert {str(order): found.get(of) for of, order in orders.items() if found.get(of) != END} == {}
    assert found.keys() == orders.keys()


def test_the_order_does_not_matter_of_messages_with_one_event(engine: Engine, settings: Settings, full: bool) -> None:
    """Breaks if what the test above finds holds only while other people's events are in the same message."""
    orders = list(itertools.permutations(range(len(EVENTS))))
    if not full:
        orders = random.Random(11).sample(orders, 12)
    failures = Failures()
    for order in orders:
        with failures.of(order), emptied(engine):
            for number in order:
                assert "dead" not in apply(engine, settings, story("-1")[number])
            assert "dead" not in apply(engine, settings, late("-1"))
            assert of_each(engine) == {"1": END}
    assert failures == {}


def test_one_message_holds_all_of_it(engine: Engine, settings: Settings) -> None:
    """Breaks if what a message brings under the old id, beside the notice, stays behind."""
    assert apply(engine, settings, *EVENTS, LATE) == {"applied": 6}
    assert [row[0] for row in seen(engine)["rides"]] == ["new", "new"]
    assert rows(engine, "SELECT 1 FROM headrace.series WHERE user_id = 'old'") == []


def test_what_comes_late_counts_for_what_it_is(engine: Engine, settings: Settings) -> None:
    """Breaks if a retry under the old id is applied twice, or its connection comes back to life."""
    apply(engine, settings, *EVENTS)
    assert apply(engine, settings, LATE) == {"applied": 1}
    assert apply(engine, settings, LATE) == {"duplicate": 1}
    assert apply(engine, settings, terra(7, {"type": "auth", "status": "success", "user": user("old")})) == {
        "ignored": 1
    }
    assert seen(engine)["connections"] == [("new", "peloton", "connected")]


@pytest.mark.parametrize("old", [None, user("new")])
def test_a_notice_without_an_old_id_moves_nothing(engine: Engine, settings: Settings, old: Any) -> None:
    """Breaks if a notice that does not tell who it was is refused, or somebody succeeds themselves."""
    apply(engine, settings, EVENTS[0])
    assert apply(engine, settings, terra(3, REAUTH | {"old_user": old})) == {"applied": 1}
    assert [row[0] for row in seen(engine)["people"]] == ["new", "old"]


def test_what_came_with_the_reconnection_goes_with_the_person(engine: Engine, settings: Settings) -> None:
    """Breaks if an erasure leaves sealed bodies behind that came in the message in which the id changed."""
    apply(engine, settings, *EVENTS)
    assert rows(engine, "SELECT 1 FROM headrace.archive WHERE user_id = 'old'")
    Eraser(engine, settings).erase("new", lambda _: None)
    assert rows(engine, "SELECT user_id FROM headrace.archive") == []
