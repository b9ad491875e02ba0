"""Objects and samples of Terra that cannot be used: each is refused alone, and can be replayed."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import apply, delivery
from tests.support.cases import each
from tests.support.terra import METADATA, NAMES, RECEIVED, USER, dead, event, item, of, parsed, recorded, series
from workers.actions import INFERRED, Connection, Notes, Parsed, Record, SampleRange, Samples
from workers.aggregators.terra import read_page
from workers.aggregators.terra.events import identify
from workers.aggregators.terra.shapes import Owner, samples_of

NO_KEY = "daily: without metadata.start_time the object has no key"
AHEAD = "more than two days after the receipt"
NOON = "2026-03-14T12:00:00+01:00"


def day(number: int, **parts: Any) -> dict[str, Any]:
    """The object of a day in March."""
    return item(**parts) | {"metadata": METADATA | {"start_time": f"2026-03-{number:02}T00:00:00+01:00"}}


def beats(*times: str) -> dict[str, Any]:
    """A day with heart rates 0, 1, 2 and so on at these times."""
    samples = [{"timestamp": text, "bpm": bpm} for bpm, text in enumerate(times)]
    return item(heart_rate_data={"detailed": {"hr_samples": samples}})


# Objects


@each(
    ({"distance_data": {"steps": 1}}, NO_KEY),
    (item(metadata=None), NO_KEY),
    ("canary", "daily: expected an object"),
    ([item()], "daily: expected an object"),
    (7, "daily: expected an object"),
)
def test_one_bad_object_of_27_is_refused_alone(bad: Any, reason: str) -> None:
    """Breaks if one object costs the others, is lost silently, or is refused without its user and type."""
    days = [day(number) for number in range(1, 28)]
    days[13] = bad
    found = parsed(event("daily", *days))
    assert [one.id for one in of(Record, found)] == [f"2026-03-{number:02}" for number in range(1, 28) if number != 14]
    (refused,) = found.refused
    assert (refused.reason, refused.items, found.ignored) == (reason, 1, None)
    user = {"user_id": "t1", "provider": "garmin"}
    assert msgspec.json.decode(refused.event) == {"type": "daily", "user": user, "data": [bad]}
    assert dead(refused.event) == reason


def test_a_delivery_of_bad_objects_only_is_a_dead_letter() -> None:
    """Breaks if a delivery of which nothing can be used counts as applied, or makes a connection."""
    assert dead(event("daily", {})) == NO_KEY
    assert dead(event("daily", {}, "canary")) == f"daily: all refused, first: {NO_KEY}"
    assert dead(event("athlete", "canary")) == "athlete: expected an object"


@each(Settings(resources=("sleep",)), Settings(providers=("oura",)))
def test_objects_of_excluded_data_are_not_refused(choice: Settings) -> None:
    """Breaks if data that the operator does not want fills the dead letters."""
    found = parsed(event("daily", item(), {}), choice)
    assert (found.actions, found.refused) == ((), ())


def test_an_object_with_odd_values_still_implies_a_connection() -> None:
    """Breaks if a lost connection event is not made up for because one value is odd."""
    found = parsed(event("daily", item(distance_data={"steps": "many"})))
    assert of(Connection, found) == [Connection("t1", "garmin", "connected", None, INFERRED)]


@each("NaN", "Infinity", "-Infinity")
def test_a_literal_that_is_not_json_costs_its_sample_only(literal: str) -> None:
    """Breaks if one value as Python's json.dumps writes it costs an event or a page, or is dropped silently."""
    days = [beats(NOON, "2026-03-14T12:01:00+01:00", "2026-03-14T12:02:00+01:00"), day(15, strain=float(literal))]
    days[0]["heart_rate_data"]["detailed"]["hr_samples"][1]["bpm"] = float(literal)
    body = json.dumps(event("daily", *days)).encode()
    in_event = parsed(body)
    in_page = read_page(catalogue().of_terra("daily"), "t1", body, RECEIVED, "garmin")
    for found in (in_event, in_page):
        assert [row.value for one in found.actions if isinstance(one, Samples) for row in one.rows] == [0, 2]
        payloads = [json.loads(one.payload) for one in found.actions if isinstance(one, Record)]
        assert (len(payloads), payloads[1]["strain"], found.refused) == (2, None, ())
    assert in_event.notes == Notes(has_nulls=True).sentences()
    assert in_page.notes == Notes(has_nulls=True)


def test_a_duplicate_name_beside_a_literal_is_refused() -> None:
    """Breaks if a repeated name is read because a literal makes the event unusual, or names two users."""
    body = json.dumps(event("daily", item(strain=float("nan")))).replace('"user_id"', '"user_id": "t2", "user_id"')
    assert dead(body.encode()) == "not a Terra event: an object repeats a name"
    assert identify(body.encode()) == Parsed("daily")


# Users


@each(
    *((17, "17"), (1.5, "1.5"), (True, "true"), ("member-1", "member-1"), ("a\u0000b", "a\ufffdb")),
    *((odd, None) for odd in (None, "", ["canary"], {"canary": 1})),
)
def test_a_reference_is_any_scalar(reference: Any, client_user_id: str | None) -> None:
    """Breaks if an odd reference costs the data."""
    found = parsed(event("daily", item(), user=USER | {"reference_id": reference}))
    assert (found.client_user_id, len(of(Record, found))) == (client_user_id, 1)


def test_a_reference_beyond_double_precision_costs_no_data() -> None:
    """Breaks if a number that no double holds, in a field that is only a name, costs the delivery."""
    body = msgspec.json.encode(event("daily", item(), user=USER | {"reference_id": "here"}))
    found = parsed(body.replace(b'"here"', b"1e999"))
    assert (found.client_user_id, len(of(Record, found))) == (None, 1)


@each(
    (17, "17"),
    ("AAAAAAAA-0000-4000-8000-00000000000A", "aaaaaaaa-0000-4000-8000-00000000000a"),
    ("Member-A", "Member-A"),
)
def test_a_user_id_is_one_user_in_any_spelling(given: Any, user_id: str) -> None:
    """Breaks if a UUID in capitals is another user, or a numeric user_id costs the data."""
    found = parsed(event("daily", beats(NOON), user=USER | {"user_id": given}))
    data = (*of(Record, found), *of(Samples, found), *of(Connection, found))
    assert {found.user_id, *(one.user_id for one in data)} == {user_id}


@each(*NAMES, "auth", "connection_error", "large_request_sending", "brand_new_event")
def test_identify(name: str) -> None:
    """Breaks if a dead letter does not name the user and the type that could be read."""
    body: dict[str, Any] = {"type": name, "user": USER | {"user_id": 17, "reference_id": 5}, "data": "canary"}
    assert identify(msgspec.json.encode(body)) == Parsed(name, "17", "5")
    for user in (None, "canary", {}, {"user_id": "t1"}, {"user_id": ["canary"], "provider": "X"}):
        assert identify(msgspec.json.encode(body | {"user": user})) == Parsed(name)


@each(b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"type":1}', b'{"type":null}', b'{"user":{}}')
def test_identify_of_what_is_no_event(body: bytes) -> None:
    """Breaks if a body that is no event raises while its dead letter is written."""
    assert identify(body) == Parsed("")


# Times


@each(
    (RECEIVED + timedelta(days=2), 0),
    (RECEIVED + timedelta(days=2, microseconds=1), 1),
    (datetime(2199, 1, 1, tzinfo=UTC), 1),
    (datetime(9999, 12, 30, tzinfo=UTC), 1),
)
def test_a_sample_is_at_most_two_days_after_its_receipt(moment: datetime, count: int) -> None:
    """Breaks if a wrong clock hides all later samples of a series, or a time zone costs today's."""
    found = parsed(event("daily", beats(NOON, moment.isoformat(), moment.isoformat())))
    (samples,) = of(Samples, found)
    assert len(samples.rows) == 2 - count
    assert [(one.reason, one.items) for one in found.refused] == [(f"heartrate: timestamp: {AHEAD}", 2)] * count
    (record,) = of(Record, found)
    (range_,) = record.sample_ranges
    assert (range_.first, range_.last) == (samples.rows[0].ts, samples.rows[-1].ts)


def test_a_running_total_of_the_future_is_refused() -> None:
    """Breaks if the last interval of a day ends in another century, and is counted as a reset."""
    times = ("2026-03-14T08:00:00Z", "2026-03-14T09:00:00Z", "2199-01-01T00:00:00Z")
    given = [{"timestamp": text, "steps": steps} for text, steps in zip(times, (100, 150, 20), strict=True)]
    body = event("daily", item(distance_data={"detailed": {"step_samples": given}}))
    assert [one.value for one in series(body, "steps")] == [100, 50]
    assert [one.reason for one in parsed(body).refused] == [f"steps: timestamp: {AHEAD}"]


def test_scores_of_a_future_day_are_refused() -> None:
    """Breaks if a day of the future brings samples, which no time of receipt explains."""
    found = parsed(event("daily", day(20, data_enrichment={"strain_index": 1}), day(14)))
    assert [one.id for one in of(Record, found)] == ["2026-03-20", "2026-03-14"]
    assert (of(Samples, found), [one.reason for one in found.refused]) == ([], [f"terra_scores: timestamp: {AHEAD}"])


@each("9999-12-31T23:59:59", "9999-12-31T00:00:00Z", "9999-12-30T23:00:00-14:00")
def test_a_time_that_psycopg_cannot_read_is_stored_nowhere(text: str) -> None:
    """Breaks if a year that psycopg cannot read is stored, so that every query of the record or series fails."""
    found = parsed(event("activity", item(metadata=METADATA | {"end_time": text})))
    (record,) = of(Record, found)
    assert b"time_end" not in (record.columns or b"")
    assert found.notes == ("stored as NULL, because they cannot be read: metadata.end_time",)
    found = parsed(event("daily", beats(NOON, text)))
    assert ([len(one.rows) for one in of(Samples, found)], len(found.refused)) == ([1], 1)


# The ranges of samples


def test_a_record_has_the_range_of_each_series() -> None:
    """Breaks if a newer version of an object does not replace all of the samples of the older one, or others."""
    stress = [{"timestamp": NOON, "level": 20}, {"timestamp": "2026-03-14T09:00:00+01:00", "level": None}]
    given = beats("2026-03-14T10:00:00Z", "2026-03-14T08:00:00Z", "2026-03-14T09:00:00Z")
    given |= {"stress_data": {"samples": stress}, "distance_data": {"detailed": {"step_samples": []}}}
    (record,) = of(Record, parsed(event("daily", given)))
    eight, ten, noon = (datetime(2026, 3, 14, hour, tzinfo=UTC) for hour in (8, 10, 11))
    ranges = (SampleRange("heartrate", "", eight, ten), SampleRange("stress_level", "", noon, noon))
    assert record.sample_ranges == ranges
    assert record.series == [("t1", name, "garmin", "daily", "") for name in ("heartrate", "stress_level")]


def test_a_record_has_the_range_of_each_subtype() -> None:
    """Breaks if a score or a kind of insulin that is gone stays, or an absent one deletes what is stored."""
    (record,) = of(Record, parsed(event("daily", item(data_enrichment={"a": 1, "b": None, "c": {"d": 1}}))))
    start = datetime.fromisoformat(METADATA["start_time"])  # type: ignore[arg-type]
    assert record.sample_ranges == tuple(SampleRange("terra_scores", name, start, start) for name in ("a", "c"))


@each(*NAMES)
def test_the_ranges_enclose_the_samples(name: str) -> None:
    """Breaks if a sample is outside of the ranges of its record, or two arrays of one series make two ranges.

    A newer version would not replace that sample. PostgreSQL refuses two ranges of one series in one statement.
    """
    found = parsed(event(name, recorded(f"generated/{name}.full")))
    (record,) = of(Record, found)
    ranges = {(one.resource, one.subtype): one for one in record.sample_ranges}
    samples = of(Samples, found)
    assert set(ranges) == {(one.resource, one.subtype) for one in samples}
    for one in samples:
        assert one.record_id == record.id
        times = [row.ts for row in one.rows]
        known = ranges[one.resource, one.subtype]
        assert (known.first, known.last) == (min(times), max(times))
    assert record.series == [one.key for one in samples]


def test_two_arrays_of_one_series_are_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if two ranges of one series are written at once: PostgreSQL refuses that, and the delivery never ends."""
    for array in ("blood_glucose_samples", "detailed_blood_glucose_samples"):
        assert array in recorded("generated/body.full")["glucose_data"]
    body = event("body", recorded("generated/body.full"))
    assert apply(engine, settings, delivery(body, aggregator="terra", name="trace-1")) == {"applied": 1}


def test_a_retracted_object_has_no_ranges() -> None:
    """Breaks if an object that Terra deletes brings samples."""
    body = event("activity", beats(NOON) | {"metadata": METADATA | {"upload_type": 4}})
    found = parsed(body)
    (record,) = of(Record, found)
    assert (record.is_deleted, record.sample_ranges, of(Samples, found)) == (True, (), [])


def test_a_stored_object_brings_no_refused_sample_back() -> None:
    """Breaks if a sample that was refused for its time is stored when an overlapping object is replaced."""
    raw = msgspec.json.encode(beats(NOON, "2031-01-01T12:00:00Z"))
    stored_at = datetime(2026, 3, 15, tzinfo=UTC)
    (found,) = samples_of(Owner("t1", "garmin"), "daily", raw, stored_at, stored_at)
    assert [row.value for row in found.rows] == [0]
