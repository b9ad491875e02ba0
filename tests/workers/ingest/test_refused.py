"""Data that PostgreSQL rejects: one delivery of a hundred becomes a dead letter, the others are applied."""

import json
from typing import Any

from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, event, heartrate, rows, workout
from tests.support.cases import Failures
from tests.support.database import emptied
from workers.store import dead_letters

NEIGHBOURS = 99
DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000


def in_workout(**changes: Any) -> bytes:
    """A workout with invalid fields."""
    return json.dumps(workout("bad", "bad", **changes)).encode()


def in_sample(**changes: Any) -> bytes:
    """A sample with invalid fields."""
    body = heartrate("bad", {0: 60.0})
    body["data"]["data"][0] |= changes
    return json.dumps(body).encode()


def replaced(body: bytes, old: str, new: str) -> bytes:
    """A body that no encoder would write."""
    assert old.encode() in body
    return body.replace(old.encode(), new.encode())


BAD = {
    "NUL in a text": in_workout(title="se\0same"),
    "NUL in a field without a column": in_workout(sport={"slug": "\0"}),
    "NUL in an id": in_workout(id="w\0"),
    "NUL in a unit": in_sample(unit="b\0pm"),
    "NUL in a name": in_workout(**{"\0sesame": 1}),
    "NUL in what a sample has beside": in_sample(comment="\0"),
    "NUL in a user": json.dumps(workout("b\0d")).encode(),
    "NUL in a provider": in_workout(source={"provider": "gar\0min"}),
    "NaN": replaced(in_workout(), "8000.5", "NaN"),
    "NaN in a sample": replaced(in_sample(), "60.0", "NaN"),
    "Infinity": replaced(in_workout(), "8000.5", "Infinity"),
    "a lone surrogate": replaced(in_workout(title="sesame"), "sesame", "\\ud800"),
    "a lone surrogate in a sample": replaced(in_sample(unit="sesame"), "sesame", "\\udfff"),
    "a number beyond floats": replaced(in_workout(), "8000.5", "1e400"),
    "a number beyond floats in a sample": replaced(in_sample(), "60.0", "1e400"),
    "an integer beyond bigint": in_workout(average_hr=2**63),
    "an integer of 5,000 digits": replaced(in_workout(), "120", "1" * 5000),
    "a fraction where there is none": in_workout(average_hr=120.5),
    "absurd depth": replaced(in_workout(sport=1), '"sport": 1', f'"sport": {DEEP}'),
    "a name twice": replaced(in_workout(), '"average_hr": 120', '"average_hr": 120, "average_hr": 121'),
    "a name twice in a sample": replaced(in_sample(), '"value": 60.0', '"value": 60.0, "value": 61.0'),
    "a date in year 0": in_workout(calendar_date="0000-01-01"),
    "a moment in year 0": in_workout(time_start="0000-01-01T00:00:00Z"),
    "a sample in year 0": in_sample(timestamp="0000-01-01T00:00:00Z"),
    "a day that is none": in_workout(calendar_date="2026-02-30"),
    "an offset beyond PostgreSQL's": in_workout(time_start="2026-03-14T06:30:00+20:00"),
    "a version that is no moment": in_workout(updated_at="sesame"),
    "a timezone beyond a day": in_sample(timezone_offset=86_401),
}


def test_one_bad_delivery_of_a_hundred_costs_one_dead_letter(engine: Engine, settings: Settings, full: bool) -> None:
    """Breaks if data that PostgreSQL rejects is lost, changed, retried for ever, or affects its neighbours.

    Without --full only the first kind has a hundred neighbours, and each of the others has a dozen.
    """
    failures, count = Failures(), NEIGHBOURS
    for name, bad in BAD.items():
        with failures.of(name), emptied(engine):
            neighbours = [delivery(workout(f"u{number}"), name=f"msg_{number}") for number in range(count)]
            together = [*neighbours[: count // 2], delivery(bad, name="msg_bad"), *neighbours[count // 2 :]]
            assert apply(engine, settings, *together) == {"applied": count, "dead": 1}
            (dead_letter,) = dead_letters.listed(engine)
            assert dead_letter.message_id == "msg_bad"
            assert dead_letter.reason
            assert not any(word in dead_letter.reason for word in ("sesame", "120", "60.0", "8000"))
            assert rows(engine, "SELECT count(*) AS n FROM health.workouts") == [{"n": count}]
            assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 0}]
            assert apply(engine, settings, *together) == {"duplicate": count, "dead": 1}
        count = NEIGHBOURS if full else 12
    assert failures == {}


def test_unusual_but_valid_data_is_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if valid data is rejected: the largest numbers, the oldest and the newest days."""
    odd = {"average_hr": 2**63 - 1, "distance": 1.7e308, "calendar_date": "0001-01-01", "title": "\u0001 é 🏃 \\u0000"}
    future = event("daily.data.workouts.created", "u2", workout("u2")["data"] | {"time_start": "9999-12-31T23:59:59Z"})
    assert apply(engine, settings, delivery(workout("u1", **odd)), delivery(future)) == {"applied": 2}
    (row,) = rows(engine, "SELECT average_hr, distance, title FROM health.workouts WHERE user_id = 'u1'")
    assert row == {"average_hr": 2**63 - 1, "distance": 1.7e308, "title": "\u0001 é 🏃 \\u0000"}
