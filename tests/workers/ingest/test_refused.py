"""Odd data: what can be stored is stored, the rest becomes a dead letter, and no neighbour is affected."""

import json
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import apply, delivery, event, heartrate, rows, workout
from tests.support.cases import Failures
from tests.support.database import emptied
from tests.support.deliveries import OTHER_KEY
from workers.aggregators.junction import samples
from workers.ingest.apply import Applier
from workers.ingest.refused import MAX_ITEMS
from workers.ingest.replay import replay_dead_letters
from workers.operate import completeness, status_view
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
    "NaN in a sample": replaced(in_sample(), "60.0", "NaN"),
    "a number beyond floats in a sample": replaced(in_sample(), "60.0", "1e400"),
    "absurd depth": replaced(in_workout(sport=1), '"sport": 1', f'"sport": {DEEP}'),
    "a name twice": replaced(in_workout(), '"average_hr": 120', '"average_hr": 120, "average_hr": 121'),
    "a name twice in a sample": replaced(in_sample(), '"value": 60.0', '"value": 60.0, "value": 61.0'),
    "a sample in year 0": in_sample(timestamp="0000-01-01T00:00:00Z"),
    "a sample in year 1 of the reader's zone": in_sample(timestamp="0001-01-01T00:00:00Z"),
    "a sample years ahead": in_sample(timestamp="2105-01-01T00:00:00Z"),
    "a sample after the last year": in_sample(timestamp="9999-12-31T23:59:59-14:00"),
    "a record without an id": in_workout(id=""),
    "an id that is no scalar": in_workout(id=["sesame"]),
    "an id beyond an index": in_workout(id="sesame" * 100),
}
# The column that is NULL, or None if the character alone was replaced.
STORED: dict[str, tuple[bytes, str | None]] = {
    "NUL in a text": (in_workout(title="se\0same"), None),
    "NUL in a field without a column": (in_workout(sport={"slug": "\0"}), None),
    "NUL in an id": (in_workout(id="w\0"), None),
    "NUL in a unit": (in_sample(unit="b\0pm"), None),
    "NUL in a name": (in_workout(**{"\0sesame": 1}), None),
    "NUL in another field of a sample": (in_sample(comment="\0"), None),
    "NUL in a user": (json.dumps(workout("b\0d")).encode(), None),
    "NUL in a provider": (in_workout(source={"provider": "gar\0min"}), None),
    "a lone surrogate": (replaced(in_workout(title="sesame"), "sesame", "\\ud800"), None),
    "a lone surrogate in a sample": (replaced(in_sample(unit="sesame"), "sesame", "\\udfff"), None),
    "invalid UTF-8": (in_workout(title="sesame").replace(b"sesame", b"\xed\xa0\x80"), None),
    "a name that is no scalar": (
        json.dumps(workout("bad", "bad") | {"client_user_id": ["sesame"]}).encode(),
        "client_user_id",
    ),
    "a number beyond floats": (replaced(in_workout(), "8000.5", "1e400"), "distance"),
    "an integer beyond bigint": (in_workout(average_hr=2**63), "average_hr"),
    "an integer of 5,000 digits": (replaced(in_workout(), "120", "1" * 5000), "average_hr"),
    "a date in year 0": (in_workout(calendar_date="0000-01-01"), "calendar_date"),
    "a moment in year 0": (in_workout(time_start="0000-01-01T00:00:00Z"), "time_start"),
    "a moment after the last year": (in_workout(time_start="9999-12-31T23:59:59-14:00"), "time_start"),
    "a day that is none": (in_workout(calendar_date="2026-02-30"), "calendar_date"),
    "a version that is no moment": (in_workout(updated_at="sesame"), "updated_at"),
    "an empty text for a number": (in_workout(distance=""), "distance"),
    "a boolean for a number": (in_workout(distance=True), "distance"),
    "a list for a number": (in_workout(distance=[1]), "distance"),
    "a timezone beyond a day": (in_sample(timezone_offset=86_401), "timezone_offset"),
}


def test_one_bad_delivery_of_a_hundred_costs_one_dead_letter(engine: Engine, settings: Settings, full: bool) -> None:
    """Breaks if data without a key or a value is lost, changed, retried for ever, or affects its neighbours.

    Without --full only the first kind has a hundred neighbours, and each of the others has a dozen.
    """
    failures, count = Failures(), NEIGHBOURS
    for name, bad in BAD.items():
        with failures.of(name), emptied(engine):
            neighbours = [delivery(workout(f"u{number}"), name=f"msg_{number}") for number in range(count)]
            together = [*neighbours[: count // 2], delivery(bad, name="msg_bad"), *neighbours[count // 2 :]]
            assert apply(engine, settings, *together) == {"applied": count, "dead": 1}
            (dead_letter,) = dead_letters.listed(engine)
            assert (dead_letter.message_id, dead_letter.item) == ("msg_bad", "")
            assert dead_letter.reason
            assert not any(word in dead_letter.reason for word in ("sesame", "120", "60.0", "8000"))
            assert rows(engine, "SELECT count(*) AS n FROM health.workouts") == [{"n": count}]
            assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 0}]
            assert apply(engine, settings, *together) == {"duplicate": count, "dead": 1}
        count = NEIGHBOURS if full else 12
    assert failures == {}


def test_a_record_or_sample_with_a_key_is_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if one odd field costs its record, is lost in silence, or its value gets into the ledger."""
    failures = Failures()
    for name, (odd, column) in STORED.items():
        with failures.of(name), emptied(engine):
            assert apply(engine, settings, delivery(odd, name="msg_odd"), delivery(workout("u1"))) == {"applied": 2}
            (entry,) = rows(engine, "SELECT error FROM health.deliveries WHERE message_id = 'msg_odd'")
            assert (column or "U+FFFD") in entry["error"]
            assert "sesame" not in entry["error"]
            view = "heartrate" if b"heartrate" in odd else "workouts"
            query = f"SELECT {column or 'NULL'} AS value FROM health.{view} WHERE user_id <> 'u1'"
            assert rows(engine, query) == [{"value": None}]
            assert dead_letters.listed(engine) == []
    assert failures == {}


def test_a_literal_that_is_not_json_is_stored_as_null(engine: Engine, settings: Settings) -> None:
    """Breaks if NaN costs its record, or PostgreSQL gets a payload that is not JSON."""
    odd = replaced(in_workout(), "8000.5", "NaN")
    assert apply(engine, settings, delivery(odd, name="msg_odd"), delivery(workout("u1"))) == {"applied": 2}
    assert rows(engine, "SELECT error FROM health.deliveries WHERE message_id = 'msg_odd'") == [
        {"error": "NaN and Infinity, which are not JSON, were read as null"}
    ]
    query = "SELECT distance, average_hr, payload -> 'distance' AS sent FROM health.workouts WHERE id = 'bad'"
    assert rows(engine, query) == [{"distance": None, "average_hr": 120, "sent": None}]


READ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a number as text": ({"distance": " 12.5 "}, {"distance": 12.5}),
    "an integer as text": ({"average_hr": "146"}, {"average_hr": 146}),
    "a whole float": ({"average_hr": 146.0}, {"average_hr": 146}),
    "a half": ({"average_hr": 146.5}, {"average_hr": 147}),
    "a negative half": ({"timezone_offset": -0.5}, {"timezone_offset": -1}),
    "a half as text": ({"average_hr": "2.5"}, {"average_hr": 3}),
    "a number too small for a float": ({"distance": 5e-324}, {"distance": 5e-324}),
    "a number as a title": ({"title": 7}, {"title": "7"}),
    "a numeric id": ({"id": 7, "title": "Run"}, {"id": "7", "title": "Run"}),
    "epoch seconds": ({"created_at": 1763618400}, {"created_at": datetime(2025, 11, 20, 6, tzinfo=UTC)}),
    "epoch milliseconds": ({"created_at": 1763618400000}, {"created_at": datetime(2025, 11, 20, 6, tzinfo=UTC)}),
    "an epoch as text": ({"created_at": "1763618400"}, {"created_at": datetime(2025, 11, 20, 6, tzinfo=UTC)}),
    "an epoch for a day": ({"calendar_date": 1763618400}, {"calendar_date": date(2025, 11, 20)}),
    "an offset beyond PostgreSQL's": (
        {"time_start": "2026-03-14T06:30:00+20:00"},
        {"time_start": datetime(2026, 3, 13, 10, 30, tzinfo=UTC)},
    ),
    "a text as the source": ({"source": "oura"}, {"provider": "oura"}),
    "a numeric source type": ({"source": {"provider": "oura", "type": 3}}, {"source_type": "3"}),
}


def test_a_scalar_of_another_type_is_read(engine: Engine, settings: Settings) -> None:
    """Breaks if a scalar whose meaning is clear is NULL, or the payload does not keep what came."""
    failures = Failures()
    for name, (odd, expected) in READ.items():
        with failures.of(name), emptied(engine):
            assert apply(engine, settings, delivery(in_workout(**odd))) == {"applied": 1}
            (row,) = rows(engine, "SELECT * FROM health.workouts")
            assert {column: row[column] for column in expected} == expected
            assert row["payload"].items() >= odd.items()
            assert rows(engine, "SELECT error FROM health.deliveries") == [{"error": None}]
    assert failures == {}


TOO_SMALL = {
    "a number that underflows": '{"id": "bad", "distance": 1e-400}',
    "a number beyond numeric": '{"id": "bad", "sport": {"huge": 1e200000}}',
}


def test_a_record_that_postgresql_refuses_is_repaired(engine: Engine, settings: Settings) -> None:
    """Breaks if a number that only PostgreSQL refuses costs its record or the deliveries of the same message."""
    failures = Failures()
    for name, data in TOO_SMALL.items():
        with failures.of(name), emptied(engine):
            body = f'{{"event_type": "daily.data.workouts.created", "user_id": "bad", "data": {data}}}'.encode()
            assert apply(engine, settings, delivery(body), delivery(workout("u1"))) == {"applied": 2}
            assert rows(engine, "SELECT distance FROM health.workouts WHERE id = 'bad'") == [
                {"distance": 0.0 if "distance" in data else None}
            ]
    assert failures == {}


def test_unusual_but_valid_data_is_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if valid data is rejected: the largest numbers, the oldest and the newest days."""
    odd = {
        "average_hr": 9_200_000_000_000_000_000,
        "distance": 1.7e308,
        "calendar_date": "0001-01-01",
        "title": "\u0001 é 🏃 \\u0000",
    }
    future = event("daily.data.workouts.created", "u2", workout("u2")["data"] | {"time_start": "9999-12-29T23:59:59Z"})
    assert apply(engine, settings, delivery(workout("u1", **odd)), delivery(future)) == {"applied": 2}
    (row,) = rows(engine, "SELECT average_hr, distance, title FROM health.workouts WHERE user_id = 'u1'")
    assert row == {"average_hr": 9_200_000_000_000_000_000, "distance": 1.7e308, "title": "\u0001 é 🏃 \\u0000"}


# Counts and replays of refused items

ERROR = "SELECT error FROM health.deliveries"
VALUES = "SELECT count(*) AS n FROM health.heartrate"
REFUSED_IN_WEBHOOKS = ("headrace_refused_items_total", {"origin": "webhook"})


def bad_samples(count: int) -> Delivery:
    """A sample, and others of one minute each whose value is a word."""
    body = heartrate("u1", dict.fromkeys(range(count + 1), 60))
    for one in body["data"]["data"][1:]:
        one["value"] = "sixty"
    return delivery(body)


@pytest.fixture
def update(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a version of the parser that can read the word."""
    number = samples.number
    return lambda: monkeypatch.setattr(samples, "number", lambda value: 60.0 if value == "sixty" else number(value))


def replay_all(engine: Engine, settings: Settings) -> dict[str, int]:
    found = dead_letters.listed(engine, limit=1000)
    return {str(name): n for name, n in replay_dead_letters(engine, Applier(engine, settings), found).items()}


def refused_items(engine: Engine) -> tuple[int, int]:
    """Their number in the dead letters, and in the report."""
    now = datetime.now(UTC)
    report = completeness.read_report(engine, [], now - timedelta(days=1), now + timedelta(days=1), None)
    return sum(entry.items for entry in dead_letters.listed(engine, limit=1000)), report.refused_items


@pytest.mark.parametrize("bad", [[None] * 500, [None] * 150 + [7, {"value": 1}]])
def test_every_count_of_refused_items_is_the_same(engine: Engine, settings: Settings, bad: list[Any]) -> None:
    """Breaks if the ledger, `status`, the report and the metric disagree about items that are equal."""
    body = heartrate("u1", {0: 60})
    body["data"]["data"] += bad
    before = REGISTRY.get_sample_value(*REFUSED_IN_WEBHOOKS) or 0
    apply(engine, settings, delivery(body))
    assert rows(engine, ERROR)[0]["error"].startswith(f"{len(bad)} refused, first: ")
    assert refused_items(engine) == (len(bad), len(bad))
    (shown,) = status_view.read(engine, [], []).refused_items
    assert (shown["origin"], shown["items"]) == ("webhooks", len(bad))
    assert (REGISTRY.get_sample_value(*REFUSED_IN_WEBHOOKS) or 0) - before == len(bad)


def test_items_that_are_only_counted_are_applied_by_a_replay(engine: Engine, settings: Settings, update: Any) -> None:
    """Breaks if a replay after an update loses the items beyond the limit, and says that all were applied."""
    apply(engine, settings, bad_samples(MAX_ITEMS + 50))
    (counter,) = [entry for entry in dead_letters.listed(engine, limit=1000) if entry.is_counter]
    assert (counter.items, refused_items(engine)) == (50, (MAX_ITEMS + 50, MAX_ITEMS + 50))
    assert counter.reason.endswith("expected a number (counted only: headrace dead replay applies the delivery again)")
    assert replay_all(engine, settings) == {"dead": MAX_ITEMS + 1}
    assert refused_items(engine) == (MAX_ITEMS + 50, MAX_ITEMS + 50)
    update()
    assert replay_all(engine, settings) == {"applied": MAX_ITEMS + 1}
    assert rows(engine, VALUES) == [{"n": MAX_ITEMS + 51}]
    assert rows(engine, ERROR) == [{"error": "the refused items were applied by a replay"}]
    assert refused_items(engine) == (0, 0)


def test_counted_items_of_a_delivery_without_archive_stay(engine: Engine, settings: Settings, update: Any) -> None:
    """Breaks if items that nobody can apply any more count as applied, or the operator is not told what to do."""
    apply(engine, replace(settings, keep_days=0), bad_samples(MAX_ITEMS + 50))
    update()
    assert replay_all(engine, settings) == {"applied": MAX_ITEMS, "dead": 1}
    (counter,) = dead_letters.listed(engine)
    assert (counter.items, rows(engine, VALUES)) == (50, [{"n": MAX_ITEMS + 1}])
    assert "headrace backfill start" in counter.reason
    assert rows(engine, ERROR)[0]["error"].startswith("150 refused")


def test_a_replay_that_cannot_open_a_delivery_keeps_its_items(engine: Engine, settings: Settings) -> None:
    """Breaks if a replay with a wrong key deletes the refused items, and says that they were applied."""
    one = bad_samples(2)
    apply(engine, settings, one)
    assert Applier(engine, replace(settings, encryption_keys=(OTHER_KEY,))).replay([one]).outcomes == {"dead": 1}
    assert refused_items(engine) == (2, 2)
    assert rows(engine, ERROR)[0]["error"].startswith("2 refused")
