"""A person reconnects and gets another id from Terra: one person stays one, in whatever order that is heard of."""

import itertools
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, seal
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, START, apply, rows
from workers.operate.erase import Eraser

SEALER = Sealer([ENCRYPTION_KEY])
MINUTE = timedelta(minutes=1)


def user(user_id: str) -> dict[str, Any]:
    """A user of Terra's."""
    return {"user_id": user_id, "provider": "PELOTON", "reference_id": "member-1"}


def terra(minute: int, body: dict[str, Any]) -> Delivery:
    """A delivery that Terra made at that minute."""
    ordering = int((START + minute * MINUTE).timestamp() * 1000)
    return seal("terra", Receipt(f"trace-{minute}", ordering), msgspec.json.encode(body), SEALER)


def ride(user_id: str, ride_id: str, name: str) -> dict[str, Any]:
    """A ride with two heart rates."""
    about = {"summary_id": ride_id, "name": name, "type": 8, "upload_type": 1}
    times = {"start_time": "2026-03-14T06:30:00+00:00", "end_time": "2026-03-14T07:00:00+00:00"}
    beats = [{"timestamp": f"2026-03-14T06:3{number}:00+00:00", "bpm": 100 + len(name)} for number in (1, 2)]
    heart = {"detailed": {"hr_samples": beats}}
    return {
        "type": "activity",
        "user": user(user_id),
        "data": [{"metadata": about | times, "heart_rate_data": heart}],
    }


REAUTH = {"type": "user_reauth", "status": "warning", "old_user": user("old"), "new_user": user("new")}
EVENTS = (
    terra(1, ride("old", "r1", "a")),
    terra(2, {"type": "deauth", "status": "success", "user": user("old")}),
    terra(3, REAUTH),
    terra(4, {"type": "auth", "status": "success", "user": user("new")}),
    terra(5, ride("new", "r1", "the newest")),
)
LATE = terra(6, ride("old", "r2", "late"))
VIEWS = {
    "rides": "SELECT user_id, client_user_id, id, title FROM health.workouts ORDER BY id",
    "beats": "SELECT user_id, ts, value FROM health.heartrate ORDER BY ts, user_id",
    "people": "SELECT user_id, client_user_id FROM health.users ORDER BY user_id",
    "connections": "SELECT user_id, provider, status FROM health.connections ORDER BY user_id",
}


def seen(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    """What a reader sees of the person."""
    return {name: [tuple(row.values()) for row in rows(engine, query)] for name, query in VIEWS.items()}


def test_the_order_does_not_matter(engine: Engine, settings: Settings) -> None:
    """Breaks if an id that is no more keeps a part of the person, or its end is taken for the end of the new one."""
    ends = []
    for number, order in enumerate(itertools.permutations(EVENTS)):
        if number:
            with engine.begin() as connection:
                tables = ('"workouts"', "samples", "series", "connections", "users", "deliveries", "archive", "chunks")
                for table in (*tables, "backfills"):
                    connection.exec_driver_sql(f"DELETE FROM headrace.{table}")
        for event in (*order, LATE):
            assert "dead" not in apply(engine, settings, event)
        ends.append(seen(engine))
    assert ends[0] == {
        "rides": [("new", "member-1", "r1", "the newest"), ("new", "member-1", "r2", "late")],
        "beats": [("new", START + minute * MINUTE, 104.0) for minute in (1, 2)],
        "people": [("new", "member-1")],
        "connections": [("new", "peloton", "connected")],
    }
    assert [end for end in ends if end != ends[0]] == []


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
