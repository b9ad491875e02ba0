"""Junction's read API: the requests for each kind of resource, and the content of its pages."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from typing import Any

import msgspec
import pytest

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.errors import Misconfigured
from tests.support.cases import MALFORMED, each, refusal
from workers.actions import NO_NOTES, Notes, Record, Samples
from workers.aggregators import junction
from workers.aggregators.junction.api import connect, read_page, read_stream, request, stream_request
from workers.aggregators.requests import DateRange, Page

FROM, TO = datetime(2026, 3, 1, 6, 30, tzinfo=UTC), datetime(2026, 3, 14, 23, 59, 59, 999_999, tzinfo=UTC)
ASKED_AT = datetime(2026, 3, 20, 12, tzinfo=UTC)
PART = DateRange(FROM, TO)
GARMIN = {"provider": "garmin", "type": "watch"}
DATED = {"start_date": "2026-03-01T06:30:00+00:00", "end_date": "2026-03-14T23:59:59.999999+00:00"}
DAYS = {"start_date": "2026-03-01", "end_date": "2026-03-14"}


def of(name: str) -> Resource:
    """A resource of the catalogue."""
    return catalogue()[name]


def page(name: str, body: Any) -> Page:
    """The page in an answer about u1."""
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return read_page(of(name), "u1", raw, ASKED_AT)


def sample(minute: int = 0, value: Any = 60, **more: Any) -> dict[str, Any]:
    """A sample in today's shape."""
    return {"timestamp": f"2026-03-14T06:{minute:02}:00+00:00", "value": value, "unit": "bpm"} | more


# Requests


@each(
    ("activity", "/v2/summary/activity/u1", DATED),
    ("sleep", "/v2/summary/sleep/u1", DATED),
    ("workouts", "/v2/summary/workouts/u1", DATED),
    ("body", "/v2/summary/body/u1", DATED),
    ("meal", "/v2/summary/meal/u1", DATED),
    ("sleep_cycle", "/v2/summary/sleep_cycle/u1", DAYS),
    ("menstrual_cycle", "/v2/summary/menstrual_cycle/u1", DAYS),
    ("electrocardiogram", "/v2/summary/electrocardiogram/u1", DAYS),
    ("profile", "/v2/summary/profile/u1", {}),
    ("heartrate", "/v2/timeseries/u1/heartrate/grouped", DATED),
    ("weight", "/v2/timeseries/u1/body_weight/grouped", DATED),
    ("fat", "/v2/timeseries/u1/body_fat/grouped", DATED),
    ("note", "/v2/timeseries/u1/note/grouped", DATED),
    ("workout_distance", "/v2/timeseries/u1/workout_distance/grouped", DATED),
)
def test_each_kind_is_asked_for_in_its_own_way(name: Any, path: Any, query: Any) -> None:
    """Breaks if a resource is asked for under a wrong name or in a form that the provider refuses (422)."""
    asked = request(of(name), "u1", "garmin", PART)
    assert (asked.path, dict(asked.query)) == (path, {"provider": "garmin"} | query)
    assert asked == junction.request(of(name), "u1", "garmin", PART)


@each(*catalogue().of_kind("timeseries"))
def test_only_two_series_have_another_name_in_the_path(resource: Any) -> None:
    """Breaks if one of the fifty series is fetched from a place that does not exist."""
    segment = {"weight": "body_weight", "fat": "body_fat"}.get(resource.name, resource.name)
    assert request(resource, "u1", "", PART).path == f"/v2/timeseries/u1/{segment}/grouped"


@each("heartrate", "sleep", "sleep_cycle", "profile")
def test_a_notice_without_a_provider_is_asked_for_without_a_filter(name: str) -> None:
    """Breaks if an empty slug is sent, which filters everything out or is refused."""
    assert "provider" not in dict(request(of(name), "u1", "", PART).query)


def test_a_cursor_goes_with_the_same_window() -> None:
    """Breaks if the next page is asked for without its window or under the cursor's old name."""
    first, second = (dict(request(of("heartrate"), "u1", "oura", PART, cursor).query) for cursor in (None, "c=/+&?"))
    assert second == first | {"next_cursor": "c=/+&?"}
    assert "next_cursor" not in first


def test_days_are_those_of_utc_whatever_the_zone() -> None:
    """Breaks if the last second's fractions are cut off, or an instant loses its offset."""
    zone = timezone(timedelta(hours=-5))
    asked = dict(request(of("heartrate"), "u1", "", DateRange(FROM.astimezone(zone), TO)).query)
    assert datetime.fromisoformat(asked["start_date"]) == FROM
    assert datetime.fromisoformat(asked["end_date"]) == TO


@each(("workout_stream", "/v2/timeseries/workouts/w1/stream"), ("sleep_stream", "/v2/timeseries/sleep/w1/stream"))
def test_a_stream_is_asked_for_by_its_owner(name: str, path: str) -> None:
    """Breaks if a stream is asked for by a person, or with a window."""
    asked = stream_request(of(name), "w1")
    assert (asked.path, asked.query) == (path, ())


@each(
    (Settings(junction_api_key="sk_eu_x"), "https://api.sandbox.eu.junction.com"),
    (Settings(junction_api_key="pk_us_x"), "https://api.us.junction.com"),
    (Settings(junction_api_key="odd_x", junction_base_url="http://127.0.0.1:1/"), "http://127.0.0.1:1"),
)
def test_the_key_goes_in_its_header_to_its_region(settings: Settings, base: str) -> None:
    """Breaks if a key is sent to another region, or in a form that the provider does not read."""
    assert connect(settings) == (base, {"X-Vital-API-Key": settings.junction_api_key})


def test_a_key_of_no_region_is_refused() -> None:
    """Breaks if a key is sent somewhere on a guess."""
    with pytest.raises(Misconfigured) as error:
        connect(Settings(junction_api_key="odd_sesame"))
    assert "sesame" not in str(error.value)


# Pages

ROWS = {"meal": "meals"}
SUMMARIES = [one.name for one in catalogue().of_kind("summary") if one.name != "profile"]


@each(*SUMMARIES)
def test_the_records_of_a_summary(name: Any) -> None:
    """Breaks if a summary's rows are looked for under another key, or a record loses its id or source."""
    rows = [{"id": f"r{n}", "user_id": "u1", "source": GARMIN, "more": {"deep": [n]}} for n in range(3)]
    found = page(name, {ROWS.get(name, name): rows})
    assert (found.records, found.cursor, found.refused) == (3, None, ())
    for n, action in enumerate(found.actions):
        assert isinstance(action, Record)
        assert (action.resource, action.user_id, action.id) == (name, "u1", f"r{n}")
        assert (action.provider, action.source_type, action.version) == ("garmin", "watch", ASKED_AT)
        assert msgspec.json.decode(action.payload) == rows[n]


def test_a_profile_is_the_answer_itself() -> None:
    """Breaks if the only summary without an envelope counts as an empty page."""
    found = page("profile", {"id": "p1", "user_id": "u1", "source": GARMIN, "height": 180})
    (action,) = found.actions
    assert isinstance(action, Record)
    assert (action.id, action.provider, found.records, found.cursor) == ("p1", "garmin", 1, None)


def test_a_records_own_version_goes_before_the_asking() -> None:
    """Breaks if a page that was asked for later overwrites a newer version of the same record."""
    body = {"workouts": [{"id": "w1", "source": GARMIN, "updated_at": "2026-03-15T00:00:00Z"}]}
    (action,) = page("workouts", body).actions
    assert isinstance(action, Record)
    assert action.version == datetime(2026, 3, 15, tzinfo=UTC)


def test_the_samples_of_all_groups() -> None:
    """Breaks if one of several sources or providers of a page is dropped or mixed with another."""
    groups = {
        "garmin": [
            {"source": GARMIN, "data": [sample(0), sample(1)]},
            {"source": GARMIN | {"type": "scale"}, "data": [sample(0)]},
        ],
        "oura": [{"source": {"provider": "oura", "type": "ring"}, "data": [sample(2, 71.5)]}],
    }
    found = page("heartrate", {"groups": groups, "next_cursor": None})
    assert all(isinstance(action, Samples) for action in found.actions)
    assert [(one.provider, one.source_type, len(one.rows), one.version) for one in found.actions] == [
        ("garmin", "watch", 2, ASKED_AT),
        ("garmin", "scale", 1, ASKED_AT),
        ("oura", "ring", 1, ASKED_AT),
    ]
    assert found.records == 4
    assert found.actions[2].rows[0].value == 71.5


@each(
    ({}, None),
    ({"next_cursor": None}, None),
    ({"next_cursor": ""}, None),
    ({"next_cursor": "c1"}, "c1"),
    ({"next": "c1"}, "c1"),
    ({"next_cursor": None, "next": "c1"}, "c1"),
    ({"next_cursor": "c2", "next": "c1"}, "c2"),
    ({"next_cursor": 7}, "7"),
    ({"next_cursor": False}, None),
    ({"next_cursor": "None"}, None),
)
def test_the_cursor_under_both_names(more: Any, cursor: Any) -> None:
    """Breaks if the pages after the first are never fetched, or the last one is never reached."""
    assert page("heartrate", {"groups": {}} | more).cursor == cursor
    by_item = {"groups": {"garmin": [{"source": GARMIN, "data": [sample(0), None]}]}}
    assert page("heartrate", by_item | more).cursor == cursor


def test_the_notes_of_a_page_name_its_fields() -> None:
    """Breaks if history does not say which fields are NULL, or that characters were replaced, as a delivery does."""
    records = [{"id": "w1", "calories": "many"}, {"id": "w2", "distance": {}, "calories": []}, {"id": "w3"}]
    assert page("workouts", {"workouts": records}).notes == Notes(("calories", "distance"))
    samples = [{"source": GARMIN, "data": [sample(0) | {"unit": []}, sample(0)]}, {"source": GARMIN, "data": []}]
    found = page("heartrate", {"groups": {"garmin": samples}})
    assert (found.notes, found.duplicate_samples) == (Notes(("unit",)), 1)
    assert page("workouts", rb'{"workouts":[{"id":"w1","title":"a\u0000"}]}').notes == Notes(is_replaced=True)
    assert page("workouts", {"workouts": records[2:]}).notes == NO_NOTES
    stream = read_stream(of("workout_stream"), OWNER, rb'{"unit":["\ud800"]}', ASKED_AT)
    assert stream.notes == Notes(is_replaced=True)


@each(
    *((name, {ROWS.get(name, name): []}) for name in SUMMARIES),
    *(("heartrate", {"groups": groups}) for groups in ({}, {"garmin": []})),
)
def test_an_empty_page_is_a_page(name: str, body: Any) -> None:
    """Breaks if a person without data, as every new one of Garmin's, counts as an error."""
    assert page(name, body) == Page((), 0)


def test_unknown_fields_are_ignored() -> None:
    """Breaks if the provider cannot add a field without stopping every backfill."""
    assert page("workouts", {"workouts": [], "total": 0, "more": {}}) == Page((), 0)
    assert page("heartrate", {"groups": {}, "total": 0, "more": []}) == Page((), 0)


@each(
    *product(("workouts", "meal", "sleep_cycle", "heartrate"), [*MALFORMED, b"<html>canary</html>"]),
    ("workouts", b'{"workouts":null}'),
    ("workouts", b'{"workouts":{"canary":1}}'),
    ("workouts", b'{"workouts":[{"id":"r0"}'),
    ("workouts", b'{"workouts":[]}{}'),
    ("heartrate", b'{"groups":null}'),
    ("heartrate", b'{"groups":[]}'),
    ("heartrate", b'{"groups":{"garmin":[{"data":[{"value":'),
    ("heartrate", b'{"groups":{},"next_cursor":["canary"]}'),
    ("heartrate", b'{"groups":{},"next_cursor":true}'),
    ("workouts", b'{"detail":"canary"}'),
    ("meal", b'{"meal":[]}'),
    ("profile", b'{"id":"p1"'),
    ("profile", b""),
)
def test_an_invalid_page_raises(name: str, body: bytes) -> None:
    """Breaks if half an answer, or one of another form, counts as a page without history, or is quoted."""
    refusal(page, name, body)


OWNER = Record("workouts", "u1", "w1", "garmin", "watch", b"{}", FROM)


def test_a_stream_is_stored_under_its_workout() -> None:
    """Breaks if a stream, which names neither person nor source, cannot be found from its workout."""
    body = b'{"time":[1,2],"heartrate":[60,null],"cadence":[]}'
    found = read_stream(of("workout_stream"), OWNER, body, ASKED_AT)
    expected = replace(OWNER, resource="workout_stream", payload=body, version=ASKED_AT)
    assert found == Page((expected,), 1)


@each(*(body for body in MALFORMED if body != b"{}"), b"<html>canary</html>", b'{"time":[1,2', b'{"time":}')
def test_an_invalid_stream_raises(body: bytes) -> None:
    """Breaks if an incomplete stream is stored, because it would never be fetched again."""
    refusal(read_stream, of("workout_stream"), OWNER, body, ASKED_AT)
