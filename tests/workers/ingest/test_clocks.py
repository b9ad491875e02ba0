"""Clocks: which of two versions is stored, when their times are wrong, equal or missing."""

import itertools
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, START, apply, delivery, heartrate, rows, workout
from tests.support.database import emptied
from tests.support.deliveries import received
from tests.support.terra import event, item
from workers.ingest.apply import Applier

HOUR, SKEW = timedelta(hours=1), timedelta(minutes=5)
STORED = "SELECT distance, version FROM health.workouts"


def version(distance: float, updated_at: datetime | None, created_at: datetime) -> Delivery:
    """A version of one workout."""
    return delivery(workout("u1", distance=distance, updated_at=updated_at and updated_at.isoformat()), created_at)


AHEAD = START + timedelta(days=30_000)
WRONG = version(1, AHEAD, START)  # a wrong clock, clamped to START + SKEW
CASES: list[tuple[str, tuple[Delivery, ...], float, datetime]] = [
    ("the later event of one time", (version(1, START, START), version(2, START, START + HOUR)), 2, START),
    ("a correction after a wrong clock", (WRONG, version(2, START - HOUR, START + HOUR)), 2, START - HOUR),
    ("a correction at once", (WRONG, version(2, START + SKEW / 5, START + SKEW / 5)), 2, START + SKEW / 5),
    ("a wrong clock after a right one", (version(1, START - HOUR, START - HOUR), WRONG), 1, START + SKEW),
    ("two wrong clocks", (WRONG, version(2, AHEAD - HOUR, START + HOUR)), 2, START + HOUR + SKEW),
    ("a version without a time after a wrong clock", (WRONG, version(2, None, START + HOUR)), 2, START + HOUR),
    (
        "a wrong clock between two right ones",
        (version(3, START - HOUR, START - HOUR), WRONG, version(2, START + HOUR, START + HOUR)),
        2,
        START + HOUR,
    ),
    ("content, if both times are equal", (version(1, START, START), version(2, START, START)), 2, START),
]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("deliveries", "distance", "at"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_every_order_ends_in_the_same_version(
    engine: Engine,
    settings: Settings,
    deliveries: tuple[Delivery, ...],
    distance: float,
    at: datetime,
    *,
    together: bool,
) -> None:
    """Breaks if a wrong clock wins for ever, or a tie is decided by the order of arrival."""
    for order in itertools.permutations(deliveries):
        with emptied(engine):
            for message in [order] if together else [[one] for one in order]:
                Applier(engine, settings).apply(pack(message))
            assert rows(engine, STORED) == [{"distance": distance, "version": at}]


def undated(value: int, name: str, minute: int) -> Delivery:
    """A delivery of a sender that gives no time, which arrives at a minute."""
    body = msgspec.json.encode(event("daily", item(distance_data={"steps": value})))
    sealed = seal("terra", Receipt(name), body, Sealer([ENCRYPTION_KEY]))
    return received(sealed, START + timedelta(minutes=minute))


@pytest.mark.parametrize("redelivered", [True, False])
def test_a_repetition_keeps_the_clock_of_its_first_arrival(
    engine: Engine, settings: Settings, *, redelivered: bool
) -> None:
    """Breaks if an old delivery of a sender without a clock is newer than an update, because it arrives again."""
    applier = Applier(engine, settings)
    for one in (undated(1, "first", 0), undated(2, "second", 1), undated(1, "first", 2)):
        applier.apply(pack([one]), redelivered=redelivered)
    assert rows(engine, "SELECT steps FROM health.activity") == [{"steps": 2}]
    assert rows(engine, "SELECT attempts FROM health.deliveries WHERE message_id = 'first'") == [{"attempts": 2}]


@pytest.mark.parametrize(("ahead", "count"), [(timedelta(days=2), 1), (timedelta(days=2, seconds=1), 0)])
def test_a_sample_may_be_two_days_ahead(engine: Engine, settings: Settings, ahead: timedelta, count: int) -> None:
    """Breaks if a sample of the far future is stored, or one of tomorrow's time zone is refused."""
    body: Any = heartrate("u1", {0: 60, 1: 61})
    body["data"]["data"][1]["timestamp"] = (START + ahead).isoformat()
    apply(engine, settings, received(delivery(body), START))
    assert rows(engine, "SELECT count(*) - 1 AS n FROM health.heartrate") == [{"n": count}]
    assert rows(engine, "SELECT count(*) AS n FROM headrace.dead_letters WHERE item <> ''") == [{"n": 1 - count}]


def test_a_user_id_in_capitals_is_the_same_person(engine: Engine, settings: Settings) -> None:
    """Breaks if a phone that prints UUIDs in capitals makes a second person of one."""
    user = "b7867334-387c-5812-8123-7acc0043b644"
    upper = event("daily", item(distance_data={"steps": 1})) | {"user": {"user_id": user.upper(), "provider": "GARMIN"}}
    terra = seal("terra", Receipt("t", 1), msgspec.json.encode(upper), Sealer([ENCRYPTION_KEY]))
    apply(engine, settings, delivery(workout(user, "w1")), delivery(workout(user.upper(), "w2")), terra)
    assert rows(engine, "SELECT user_id FROM health.users") == [{"user_id": user}]
    assert rows(engine, "SELECT count(*) AS n FROM health.workouts") == [{"n": 2}]
