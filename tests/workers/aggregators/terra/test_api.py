"""Terra's read API: requests, pages, and the other answers of status 200."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import Misconfigured, NotYet
from tests.support.cases import MALFORMED, each, refusal
from tests.support.terra import METADATA, NAMES, USER, dead, item, of, parsed, recorded
from workers.actions import Notes, Record, Samples
from workers.aggregators.requests import DateRange, Page
from workers.aggregators.terra import API_LIMITS, connect, read_page, request

ASKED = datetime(2026, 3, 20, 12, tzinfo=UTC)
DAY = timedelta(days=1)
MAX_WINDOW = timedelta(days=API_LIMITS.max_slice_days)
UNTIL = datetime(2026, 3, 14, tzinfo=UTC)
FETCHED = [one for one in catalogue().values() if one.terra]


def page(name: str, body: Any, provider: str = "") -> Page:
    """The page in an answer about one of Terra's types."""
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return read_page(catalogue().of_terra(name), "t1", raw, ASKED, provider)


def test_the_host_and_the_account_of_a_request() -> None:
    """Breaks if requests have another host, or lack the account."""
    settings = Settings(terra_dev_id="dev", terra_api_key="key", terra_base_url="http://127.0.0.1:1/v2/")
    assert connect(settings) == ("http://127.0.0.1:1/v2", {"dev-id": "dev", "x-api-key": "key"})


@each((Settings(terra_api_key="key"), "TERRA_DEV_ID"), (Settings(terra_dev_id="dev"), "TERRA_API_KEY"))
def test_without_an_account_nothing_is_asked(settings: Settings, named: str) -> None:
    """Breaks if requests without a key are sent, or the error does not name the missing setting."""
    with pytest.raises(Misconfigured, match=named):
        connect(settings)


@each(*FETCHED)
def test_the_parameters_of_a_request(resource: Any) -> None:
    """Breaks if a type is requested under our name, without samples, or with an answer to the webhook."""
    found = request(resource, "t 1", "garmin", DateRange(UNTIL - 7 * DAY, UNTIL))
    query = dict(found.query)
    assert (found.method, found.path, found.has_cursor) == ("GET", f"/{resource.terra}", False)
    assert (query.pop("user_id"), query.pop("to_webhook")) == ("t 1", "false")
    if resource.name == "profile":
        assert query == {}
    else:
        assert query.pop("with_samples") == "true"
        assert query == {"start_date": "1772841600", "end_date": "1773446401"}


@each(
    (DateRange(UNTIL, UNTIL), "1773446400", "1773446401"),
    (DateRange(UNTIL - DAY / 2, UNTIL), "1773403200", "1773446401"),
    (DateRange(UNTIL - 1.5 * DAY, UNTIL), "1773316800", "1773446401"),
    (DateRange(UNTIL - MAX_WINDOW, UNTIL), "1771027200", "1773446401"),
    (DateRange(UNTIL, UNTIL + timedelta(milliseconds=500)), "1773446400", "1773446401"),
    (DateRange(datetime(2000, 1, 1, tzinfo=UTC), datetime(2000, 1, 2, tzinfo=UTC)), "1000000000", "1000000001"),
)
def test_which_time_is_asked_for(part: Any, start: Any, end: Any) -> None:
    """Breaks if the last second of a slice is not asked for, since Terra's end is exclusive."""
    found = request(catalogue()["sleep"], "t1", "garmin", part)
    assert {"start_date": start, "end_date": end}.items() <= dict(found.query).items()


def test_a_window_that_would_be_answered_in_webhooks_is_not_asked_for() -> None:
    """Breaks if history is sent to the webhook, and the backfill waits forever."""
    with pytest.raises(ValueError, match="webhooks"):
        request(catalogue()["sleep"], "t1", "garmin", DateRange(UNTIL - MAX_WINDOW - timedelta(seconds=1), UNTIL))


@each(*[name for name in NAMES if catalogue().of_terra(name).terra])
def test_a_page_is_read_as_an_event_is(name: Any) -> None:
    """Breaks if a fetched object is stored under another key than a sent one, or without the time of its request."""
    body = recorded(f"events/{name}")
    user, body["user"]["user_id"] = body["user"], "t1"
    found = page(name, {"type": name, "user": user} | {key: body[key] for key in ("data", "athlete") if key in body})
    sent = parsed(body)

    expected = [replace(one, version=ASKED) for one in sent.actions if isinstance(one, Record | Samples)]
    assert list(found.actions) == expected
    assert (found.records, found.cursor, found.refused) == (len(of(Record, sent)), None, ())


def test_an_empty_array_closes_a_window() -> None:
    """Breaks if a window in which nothing happened is asked for again and again."""
    assert page("sleep", {"type": "sleep", "user": USER, "data": []}) == Page((), 0)


@each(
    (USER, "fitbit", "garmin"),
    (None, "Fitbit", "fitbit"),
    *(({"provider": odd}, "fitbit", "fitbit") for odd in (None, "", {}, "x" * 101)),
    *((odd, "fitbit", "fitbit") for odd in ("x", 7, ["x"])),
    ({"provider": 7}, "fitbit", "7"),
    (None, "", ""),
)
def test_the_owner_of_an_object_if_the_response_has_none(user: Any, provider: str, expected: str) -> None:
    """Breaks if a fetched object belongs to another provider than a sent one."""
    (found,) = page("daily", {"user": user, "data": [item()]}, provider).actions
    assert (found.provider, found.user_id) == (expected, "t1")  # type: ignore[union-attr]


@each(*({name: odd} for name in ("type", "status", "reference", "retry_after_seconds") for odd in (7, "x", {}, [1])))
def test_an_odd_field_of_a_page_costs_nothing(odd: Any) -> None:
    """Breaks if a field that is of no use for data costs a page of it."""
    assert len(page("daily", {"user": USER, "data": [item()]} | odd).actions) == 1


def test_an_invalid_object_is_refused_alone() -> None:
    """Breaks if one bad object or value costs a page of good ones, is silently lost, or cannot be replayed."""
    beats = [{"timestamp": "2026-03-14T08:00:00Z", "bpm": bpm} for bpm in (70, "fast", None, [71])]
    odd = item(heart_rate_data={"detailed": {"hr_samples": beats}}, distance_data={"steps": "many"})
    next_day = {"metadata": METADATA | {"start_time": "2026-03-15T00:00:00Z"}}
    data = [odd, None, {"metadata": METADATA | {"start_time": "canary"}}, "canary", next_day]
    found = page("daily", {"user": USER, "data": data})
    assert [one.id for one in found.actions if isinstance(one, Record)] == ["2026-03-14", "2026-03-15"]
    assert [[row.value for row in one.rows] for one in found.actions if isinstance(one, Samples)] == [[70]]
    assert (len(found.actions), found.records) == (3, 2)
    assert [(one.reason, one.items) for one in found.refused] == [
        ("daily: heart_rate_data.detailed.hr_samples: bpm: expected a number", 2),
        ("daily: without metadata.start_time the object has no key", 1),
        ("daily: expected an object", 1),
    ]
    for refused, raw in zip(found.refused, (odd, *data[2:4]), strict=True):
        body = msgspec.json.decode(refused.event)
        assert body == {"type": "daily", "user": {"user_id": "t1", "provider": "garmin"}, "data": [raw]}


def test_a_page_says_what_it_does_not_store_as_received() -> None:
    """Breaks if history loses values without a time, fields or characters silently, unlike a delivery."""
    beats = [{"timestamp": time, "bpm": bpm} for time, bpm in ((None, 60), ("2026-03-14T08:00:00Z", 61), ("", 62))]
    again = {"timestamp": "2026-03-14T08:00:00Z", "bpm": 63}
    odd = item(heart_rate_data={"detailed": {"hr_samples": [*beats, again]}}, distance_data={"steps": "many\0"})
    found = page("daily", {"user": USER, "data": [odd]})
    assert (found.refused, found.duplicate_samples) == ((), 1)
    assert found.notes == Notes(("distance_data.steps",), without_timestamp=2, is_replaced=True)


def test_an_athlete_that_is_no_object_is_refused() -> None:
    """Breaks if the one object of a page without an array costs the whole answer instead of itself."""
    found = page("athlete", {"user": USER, "athlete": "canary"})
    assert (found.actions, [one.reason for one in found.refused]) == ((), ["athlete: expected an object"])
    assert dead(found.refused[0].event) == "athlete: expected an object"


@each(
    ({"type": "processing", "status": "success", "retry_after_seconds": 30}, "processing", 30),
    ({"status": "processing", "retry_after_seconds": 0}, "processing", 1),
    ({"type": "processing", "retry_after_seconds": 1e9}, "processing", 21_600),
    ({"type": "processing"}, "processing", 60),
    ({"type": 7, "status": "processing", "retry_after_seconds": "30"}, "processing", 30),
    ({"type": "processing", "status": [], "retry_after_seconds": "soon"}, "processing", 60),
    ({"type": "no_data", "message": "x"}, "no_data", 900),
    ({"status": "no_data", "data": None}, "no_data", 900),
    ({"type": "rate_limit", "status": "error"}, "rate_limit", 900),
    ({"type": "large_request_processing", "status": "processing", "reference": "r1"}, "accepted", 900),
    ({"type": "large_request_processing"}, "accepted", 900),
    ({"status": "success", "type": "activity", "reference": "r1", "trace_id": "r1"}, "accepted", 900),
)
def test_an_answer_that_is_no_data_closes_no_window(body: Any, what: Any, seconds: Any) -> None:
    """Breaks if a status message counts as an empty window, so that a backfill ends without data."""
    for name in ("activity", "athlete"):
        with pytest.raises(NotYet) as refused:
            page(name, body)
        assert (refused.value.what, refused.value.seconds) == (what, seconds)


@each(
    *MALFORMED,
    *(b'{"data":{}}', b'{"data":1}', b'{"data":[', b'{"data":[],"data":[1]}', b'{"data":' + b"[" * 100_000),
    b'{"status":"error","message":"canary"}',
    b'{"type":"activity","data":null}',
    b'{"type":"activity","reference":{"canary":1}}',
)
def test_an_invalid_page_is_rejected(body: bytes) -> None:
    """Breaks if an answer that is cut short, or an error, counts as an empty window."""
    assert refusal(page, "activity", body).startswith("workouts: ")
