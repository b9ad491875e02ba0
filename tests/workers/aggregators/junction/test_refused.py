"""Items of Junction's events and pages that cannot be used: each is refused alone, and can be replayed."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import event, heartrate, workout
from tests.support.cases import each, refusal
from tests.support.fuzzing import REPEATED, json_texts
from tests.support.junction import MOMENT, dead, parsed, series
from workers.actions import Notes, Parsed, Record, Refused, Samples
from workers.aggregators.junction import parse
from workers.aggregators.junction.api import read_page, read_stream
from workers.aggregators.junction.events import identify
from workers.aggregators.requests import Page

ASKED_AT = datetime(2026, 3, 20, 12, tzinfo=UTC)
GARMIN = {"provider": "garmin", "type": "watch"}
CAPITALS = "AAAAAAAA-0000-4000-8000-00000000000A"
NO_VALUE = "heartrate: value: expected a number"


def page(name: str, body: Any) -> Page:
    """The page in an answer about u1."""
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return read_page(catalogue()[name], "u1", raw, ASKED_AT)


def sample(minute: int = 0, value: Any = 60, **more: Any) -> dict[str, Any]:
    """A sample in today's shape."""
    return {"timestamp": f"2026-03-14T06:{minute:02}:00+00:00", "value": value, "unit": "bpm"} | more


def reason_of_replay(refused: Refused) -> str:
    """The reason for which `parse` refuses a refused item, under the clock of the page or event of ASKED_AT."""
    return refusal(parse, Delivery("junction", "history", ASKED_AT.timestamp(), b""), refused.event, Settings())


def values_of(found: Parsed | Page) -> list[float | None]:
    """The values of all samples."""
    return [row.value for one in found.actions if isinstance(one, Samples) for row in one.rows]


# Events


@each(
    (b'{"timestamp":"2026-03-14T06:30:00Z","value":null}', NO_VALUE),
    (b'{"timestamp":"2026-03-14T06:30:00Z","value":"fast"}', NO_VALUE),
    (b'{"timestamp":"2026-03-14T06:30:00Z","value":1e999}', "heartrate: Number out of range - at `$[...]`"),
    (b'{"value":1}', "heartrate: a sample has neither timestamp nor start"),
    (b'{"timestamp":null,"value":1}', "heartrate: a sample has neither timestamp nor start"),
    (b'{"timestamp":"soon","value":1}', "heartrate: timestamp: expected an ISO 8601 date and time"),
    (b'{"timestamp":"2199-01-01","value":1}', "heartrate: timestamp: more than two days after the receipt"),
    (b'{"timestamp":"2026-03-14T06:30:00Z","value":1,"value":2}', "heartrate: an object repeats a name"),
    (b'{"timestamp":"2026-03-14T06:30:00Z","value":1,"a":{"b":1,"b":2}}', "heartrate: an object repeats a name"),
    (b"null", "heartrate: Expected an object, got null"),
    (b'"canary"', "heartrate: Expected an object, got text"),
    (b"[]", "heartrate: Expected an object, got a list"),
)
def test_one_bad_sample_of_a_thousand_is_refused_alone(bad: bytes, reason: str) -> None:
    """Breaks if one bad sample costs the thousand others, or cannot be replayed with its user, type and source."""
    body = heartrate("u1", dict(enumerate(range(1000))), device_id="d1")
    body["data"]["data"][500] = {"put": "it here"}
    found = parsed(msgspec.json.encode(body).replace(b'{"put":"it here"}', bad))
    assert values_of(found) == [value for value in range(1000) if value != 500]
    (refused,) = found.refused
    assert (refused.reason, refused.items, found.ignored) == (reason, 1, None)
    head = (
        b'{"event_type":"daily.data.heartrate.created","user_id":"u1","client_user_id":"member-1","data":{"source":%s,'
        b'"data":[%s]}}'
    )
    assert refused.event == head % (msgspec.json.encode(body["data"]["source"]), bad)
    assert dead(refused.event) == reason


def test_one_odd_unit_of_a_thousand_is_null_in_its_sample() -> None:
    """Breaks if a unit that cannot be read costs a value, or that of its neighbours."""
    body = heartrate("u1", dict(enumerate(range(1000))))
    body["data"]["data"][500]["unit"] = ["bpm"]
    found = parsed(body)
    (samples,) = found.actions
    assert isinstance(samples, Samples)
    assert [row.unit for row in samples.rows] == ["bpm"] * 500 + [""] + ["bpm"] * 499
    assert (found.refused, found.notes) == ((), ("stored as NULL, because they cannot be read: unit",))


def test_each_of_several_bad_samples_is_an_item() -> None:
    """Breaks if bad samples of one delivery are counted as one, or the same dead letter stands for all."""
    found = parsed(heartrate("u1", {0: 60, 1: "x", 2: 62, 3: "y", 4: None}))  # type: ignore[dict-item]
    assert values_of(found) == [60, 62]
    assert len({one.event for one in found.refused}) == len(found.refused) == 3


def test_a_delivery_of_bad_samples_only_is_a_dead_letter() -> None:
    """Breaks if a delivery of which nothing can be used counts as applied."""
    assert dead(heartrate("u1", {0: "canary"})) == NO_VALUE  # type: ignore[dict-item]
    two = heartrate("u1", {0: "canary", 1: None})  # type: ignore[dict-item]
    assert dead(two) == f"heartrate: all refused, first: {NO_VALUE}"


@each(Settings(resources=("sleep",)), Settings(providers=("oura",)))
def test_items_of_excluded_data_are_not_refused(choice: Settings) -> None:
    """Breaks if data that the operator does not want fills the dead letters."""
    found = parsed(heartrate("u1", {0: 60, 1: "x"}), choice)  # type: ignore[dict-item]
    assert (found.actions, found.refused) == ((), ())
    assert found.ignored


@each(
    (timedelta(days=2) - timedelta(minutes=1), 0),
    (timedelta(days=2) + timedelta(minutes=1), 1),
)
def test_a_sample_is_at_most_two_days_after_its_receipt(ahead: timedelta, count: int) -> None:
    """Breaks if a wrong clock hides all later samples of a series, or a time zone costs today's."""
    body = msgspec.json.encode(series("heartrate", sample(), sample(timestamp=(ASKED_AT + ahead).isoformat())))
    found = parse(Delivery("junction", "m", ASKED_AT.timestamp(), b""), body, Settings())
    assert (len(values_of(found)), len(found.refused)) == (2 - count, count)


@each({}, {"type": None, "note": "read as a mapping"})
def test_a_sample_ends_at_most_two_days_after_its_receipt(more: dict[str, Any]) -> None:
    """Breaks if an interval that ends years ahead is stored because it began in time."""
    ends = (ASKED_AT + timedelta(days=days) for days in (1, 365))
    body = series("heartrate", *(sample(n, end=end.isoformat(), **more) for n, end in enumerate(ends)))
    found = parse(Delivery("junction", "m", ASKED_AT.timestamp(), b""), msgspec.json.encode(body), Settings())
    assert values_of(found) == [60]
    assert [one.reason for one in found.refused] == ["heartrate: end: more than two days after the receipt"]


@each("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "0000-01-01T00:00:00Z", "12026-01-01T00:00:00Z")
def test_a_sample_in_a_year_that_cannot_be_read_is_refused(moment: str) -> None:
    """Breaks if a year that psycopg cannot read is stored, so that every query of the series fails."""
    found = parsed(series("heartrate", sample(), sample(timestamp=moment)))
    assert (len(values_of(found)), len(found.refused)) == (1, 1)


# What a dead letter says about its user and type


@each(
    (workout("u1") | {"data": {}}, ("daily.data.workouts.created", "u1", "member-1")),
    (workout("u1") | {"user_id": 17, "client_user_id": 1.5}, ("daily.data.workouts.created", "17", "1.5")),
    ({"event_type": "x" * 300, "user_id": None, "data": {"user_id": "u2"}}, ("x" * 200, "u2", None)),
    ({"type": "message.attempt.exhausted", "data": [1]}, ("message.attempt.exhausted", None, None)),
    ({"event_type": ["canary"], "user_id": CAPITALS}, ("", CAPITALS.lower(), None)),
    (
        {"event_type": "daily.data.sleep.created", "client_user_id": ["canary"]},
        ("daily.data.sleep.created", None, None),
    ),
    ({}, ("", None, None)),
    ([], ("", None, None)),
    ("canary", ("", None, None)),
)
def test_identify(body: Any, expected: Any) -> None:
    """Breaks if a dead letter does not name the user and the type that could be read, or `identify` raises."""
    found = identify(msgspec.json.encode(body))
    assert (found.event_type, found.user_id, found.client_user_id) == expected
    assert found.actions == ()


@each(b"", b"{", b"\xff", b"[" * 100_000, b'{"event_type":"a","data":' + b"[" * 100_000, b'{"event_type":1e999}')
def test_identify_of_what_is_no_event(body: bytes) -> None:
    """Breaks if a body that is no JSON raises while its dead letter is written."""
    assert identify(body) == Parsed("")


def test_identify_replaces_characters() -> None:
    """Breaks if a character that PostgreSQL refuses reaches the dead letter's columns."""
    found = identify(b'{"event_type":"a\\u0000","user_id":"\xff"}')
    assert (found.event_type, found.user_id) == ("a\ufffd", "\ufffd")


# Pages


NO_ID = "workouts: id: expected an id of 1 to 256 characters"


@each(
    ({"source": GARMIN}, NO_ID),
    ({"id": ""}, NO_ID),
    ({"id": ["canary"]}, NO_ID),
    (None, "workouts: Expected an object, got null"),
    ("canary", "workouts: Expected an object, got text"),
)
def test_one_bad_record_of_many_is_refused_alone(bad: Any, reason: str) -> None:
    """Breaks if one record costs its page, is lost silently, cannot be replayed, or its value gets into a log."""
    good = [{"id": f"r{n}", "source": GARMIN} for n in range(3)]
    found = page("workouts", {"workouts": [good[0], bad, *good[1:]]})
    assert [action.id for action in found.actions if isinstance(action, Record)] == ["r0", "r1", "r2"]
    assert (found.records, [(one.reason, one.items) for one in found.refused]) == (3, [(reason, 1)])
    assert dead(found.refused[0].event) == reason


@each(
    ({"id": 7}, {"id": 7}),
    ({"id": "x", "average_hr": "canary", "distance": "12.5"}, {"distance": 12.5, "id": "x"}),
    ({"id": "x", "title": 146.5, "source": ["canary"]}, {"title": "146.5", "id": "x"}),
    ({"id": "x", "calendar_date": "none", "time_start": 1773469800}, {"time_start": MOMENT, "id": "x"}),
    ({"id": "x", "updated_at": "2026-03-15canary"}, {"id": "x"}),
)
def test_a_record_with_odd_scalars_is_stored(odd: Any, expected: dict[str, Any]) -> None:
    """Breaks if one odd field of a fetched record costs it, or its page."""
    found = page("workouts", {"workouts": [{"id": "r0", "source": GARMIN}, odd]})
    first, record = found.actions
    assert isinstance(record, Record)
    assert (found.records, found.refused, first.columns) == (2, (), None)  # type: ignore[union-attr]
    assert record.id == str(expected.pop("id"))
    assert (json.loads(record.columns or b""), record.version) == (expected, ASKED_AT)
    assert json.loads(record.payload) == odd


@each(
    ("2026-03-20T12:05:00Z", "2026-03-20T12:05:00Z"),
    ("2026-03-20T12:05:01Z", "2026-03-20T12:05:00Z"),
    ("2199-01-01", "2026-03-20T12:05:00Z"),
)
def test_a_record_is_no_newer_than_its_request(updated_at: str, version: str) -> None:
    """Breaks if a wrong clock wins over all later versions of a fetched record."""
    (record,) = page("workouts", {"workouts": [{"id": "w1", "updated_at": updated_at}]}).actions
    assert isinstance(record, Record)
    assert (record.version, record.event_at) == (datetime.fromisoformat(version), ASKED_AT)


BAD_GROUPS: list[tuple[str, str]] = [
    ("null", "heartrate: data: Expected an object, got null"),
    ('"canary"', "heartrate: data: Expected an object, got text"),
    ('{"data":{"canary":1}}', "heartrate: data: Expected a list or null, got an object"),
    ('{"data":[],"data":[{"canary":1}]}', "heartrate: data: an object repeats a name"),
]


@each(*BAD_GROUPS)
def test_one_bad_group_of_three_and_one_bad_sample_in_another(bad: str, reason: str) -> None:
    """Breaks if a group or a sample that cannot be read costs its neighbours, or is dropped silently."""
    groups = [
        {"source": GARMIN, "data": [sample(0), sample(1, "canary"), sample(2)]},
        {"source": GARMIN | {"type": "scale"}, "data": [sample()]},
    ]
    good = b",".join(map(msgspec.json.encode, groups))
    found = page("heartrate", b'{"groups":{"garmin":[%s,%s]},"next_cursor":"c1"}' % (bad.encode(), good))
    kept = [(one.source_type, [row.ts.minute for row in one.rows]) for one in found.actions if isinstance(one, Samples)]
    assert kept == [("watch", [0, 2]), ("scale", [0])]
    assert (found.records, found.cursor) == (3, "c1")
    assert [one.reason for one in found.refused] == [reason, "heartrate: value: expected a number"]
    assert dead(found.refused[1].event) == found.refused[1].reason
    refusal(parsed, found.refused[0].event)


@each('{"canary":1}', '"canary"', "1")
def test_groups_that_are_no_list_are_refused_alone(bad: str) -> None:
    """Breaks if the groups of one provider cost those of another, or are lost silently."""
    good = msgspec.json.encode({"source": GARMIN, "data": [sample()]})
    found = page("heartrate", b'{"groups":{"oura":%s,"garmin":[%s]}}' % (bad.encode(), good))
    assert (found.records, len(found.actions)) == (1, 1)
    (refused,) = found.refused
    assert dead(refused.event) == refused.reason == "heartrate: data: Expected an object, got a list"


@each(
    ("value", None, "heartrate: value: expected a number"),
    ("timestamp", None, "heartrate: a sample has neither timestamp nor start"),
    ("timestamp", "canary", "heartrate: timestamp: expected an ISO 8601 date and time"),
    ("timestamp", "2026-03-22T12:00:01Z", "heartrate: timestamp: more than two days after the receipt"),
)
def test_one_bad_sample_of_a_page_is_refused_alone(name: str, value: Any, reason: str) -> None:
    """Breaks if one sample costs the history of a source, silently."""
    data = [sample(n) for n in range(50)]
    data[17] = data[17] | {name: value}
    found = page("heartrate", {"groups": {"garmin": [{"source": GARMIN, "data": data}]}})
    assert (found.records, [one.reason for one in found.refused]) == (49, [reason])
    event = json.loads(found.refused[0].event)
    assert (event["user_id"], event["data"]) == ("u1", {"source": GARMIN, "data": [data[17]]})


@each('"canary"', "[7]", '{"id":"r1","id":"r2"}', '{"id":"r1","laps":[{"a":1,"a":2}]}')
def test_a_record_that_repeats_a_name_is_refused_alone(bad: str) -> None:
    """Breaks if a repeated name costs the page, or one of two values is silently dropped."""
    found = page("workouts", b'{"workouts":[{"id":"r0"},%s,{"id":"r3"}]}' % bad.encode())
    assert [action.id for action in found.actions if isinstance(action, Record)] == ["r0", "r3"]
    assert len(found.refused) == 1


def test_characters_of_a_page_that_postgresql_refuses_are_replaced() -> None:
    """Breaks if one character costs a page of history."""
    body = b'{"workouts":[{"id":"r0","title":"a\\u0000\xff\\ud800"},{"id":"r1"}]}'
    found = page("workouts", body)
    assert [json.loads(one.payload).get("title") for one in found.actions] == ["a\ufffd\ufffd\ufffd", None]  # type: ignore[union-attr]


NULLS = "NaN and Infinity, which are not JSON, were read as null"


@each("NaN", "Infinity", "-Infinity")
def test_a_literal_that_is_not_json_costs_its_sample_only(literal: str) -> None:
    """Breaks if one value as Python's json.dumps writes it costs an event or a page, or is dropped silently."""
    data = {"source": GARMIN, "data": [sample(n, float(literal) if n == 7 else 60 + n) for n in range(20)]}
    in_event = parsed(json.dumps(event("daily.data.heartrate.created", "u1", data)).encode())
    in_page = page("heartrate", json.dumps({"groups": {"garmin": [data]}, "next_cursor": "c2"}).encode())
    for found in (in_event, in_page):
        assert values_of(found) == [60 + n for n in range(20) if n != 7]
        (refused,) = found.refused
        assert (refused.reason, json.loads(refused.event)["data"]["data"]) == (NO_VALUE, [sample(7, None)])
    assert (in_event.notes, in_page.notes, in_page.cursor) == ((NULLS,), Notes(has_nulls=True), "c2")


def test_a_literal_that_is_not_json_is_null_in_a_record() -> None:
    """Breaks if PostgreSQL gets a payload that is not JSON, or the other fields are lost."""
    body = json.dumps(workout("u1", distance=float("nan"))).encode()
    (record,) = (found := parsed(body)).actions
    assert isinstance(record, Record)
    payload = msgspec.json.decode(record.payload)
    assert (payload["distance"], payload["id"], found.notes, found.refused) == (None, record.id, (NULLS,), ())
    stream = b'{"heartrate":[60,NaN]}'
    read = read_stream(catalogue()["workout_stream"], record, stream, ASKED_AT)
    assert [one.payload for one in read.actions if isinstance(one, Record)] == [b'{"heartrate":[60,null]}']
    assert read.notes == Notes(has_nulls=True)


def test_a_duplicate_name_beside_a_literal_is_refused() -> None:
    """Breaks if an event whose user_id stands twice is applied, or its dead letter names one of the two users."""
    body = json.dumps(heartrate("u1", {1: float("nan")})).replace('"user_id"', '"user_id": "u2", "user_id"').encode()
    assert dead(body) == "not a Junction event: an object repeats a name"
    assert (identify(body).event_type, identify(body).user_id) == ("daily.data.heartrate.created", None)


def test_an_event_of_literals_only_names_its_user() -> None:
    """Breaks if the dead letter of an event without a usable sample cannot be found by its user."""
    body = json.dumps(heartrate("u1", {1: float("nan")})).encode()
    assert dead(body) == NO_VALUE
    assert identify(body).user_id == "u1"


# Any input

ITEMS = json_texts()
FIELDS = ["timestamp", "start", "end", "value", "unit", "timezone_offset", "type", "id", "more"]


def with_part(body: dict[str, Any], part: bytes) -> bytes:
    """The body with a part in place of "here"."""
    return msgspec.json.encode(body).replace(b'"here"', part)


@given(at=st.integers(0, 4), field=st.sampled_from([None, *FIELDS]), part=ITEMS)
@example(at=2, field=None, part=b'{"timestamp":1773469800,"value":1,"value":2}')
def test_any_sample_leaves_its_neighbours(at: int, field: str | None, part: bytes) -> None:
    """Breaks if some value in some place of one sample costs another sample, or raises an unexpected error."""
    items: list[Any] = [sample(n, 60 + n, start=None) for n in range(5)]
    items[at] = "here" if field is None else items[at] | {field: "here"}
    others = [60 + n for n in range(5) if n != at]
    data = {"source": GARMIN, "data": items}
    for found in (
        parsed(with_part(event("daily.data.heartrate.created", "u1", data), part)),
        page("heartrate", with_part({"groups": {"garmin": [data]}}, part)),
    ):
        assert set(others) <= set(values_of(found))
        assert len(values_of(found)) + len(found.refused) >= 4
        for refused in found.refused:
            assert reason_of_replay(refused) == refused.reason


@given(at=st.integers(0, 2), part=ITEMS)
def test_any_record_leaves_its_neighbours(at: int, part: bytes) -> None:
    """Breaks if some value in place of a record costs another record of its page, or raises an unexpected error."""
    rows: list[Any] = [{"id": f"r{n}", "source": GARMIN} for n in range(3)]
    rows[at] = "here"
    found = page("workouts", with_part({"workouts": rows}, part))
    kept = [one.id for one in found.actions if isinstance(one, Record)]
    assert [one for one in kept if one in {"r0", "r1", "r2"}] == [f"r{n}" for n in range(3) if n != at]
    assert len(found.refused) + len(kept) == 3


@settings(deadline=None)
@given(name=st.sampled_from([one.name for one in catalogue()["workouts"].fields]), part=ITEMS)
def test_any_field_leaves_its_record(name: str, part: bytes) -> None:
    """Breaks if some value of some field costs a record, or the other columns."""
    body = with_part(workout("u1", **{name: "here"}), part)
    if part == REPEATED:
        assert dead(body) == "not a Junction event: an object repeats a name"
        return
    (record,) = parsed(body).actions
    assert isinstance(record, Record)
    if record.columns is not None and name != "time_end":
        assert json.loads(record.columns)["time_end"] == "2026-03-14T07:15:00+00:00"
