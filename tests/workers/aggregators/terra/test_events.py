"""The actions of Terra's events: connections, notices of history, records, and their versions."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from app.config.settings import Settings
from app.delivery import Delivery
from tests.support.cases import each
from tests.support.terra import MADE, NAMES, RECEIVED, RECORDED, USER, dead, event, item, of, parsed, record, recorded
from workers.actions import INFERRED, Action, Connection, Download, LargeRequest, Notice, Record, Samples, UserIdChange
from workers.aggregators.terra import parse

EVENTS = sorted(path.stem for path in (RECORDED / "events").glob("*.json"))
VARIANTS = sorted(path.stem for path in (RECORDED / "variants").glob("*.json"))
START = "2026-03-14T06:00:00Z"
PROVISIONAL = Connection("t1", "garmin", "connected", None, INFERRED)
IGNORED = {"auth_cancelled", "processing", "rate_limit_hit", "healthcheck", "google_no_datasource"}
IGNORED |= {"permission_change"}
NOT_OF_A_USER = {"auth_cancelled", "healthcheck", "s3_payload"}
FETCHED = {"activity", "sleep", "workouts", "body", "profile", "meal", "menstrual_cycle"}


def lifecycle(name: str, status: str | None = "success", **more: Any) -> dict[str, Any]:
    """An event about a connection or a request."""
    return {"type": name, "status": status, "message": "some words", "user": USER} | more


@each(*EVENTS)
def test_every_event_is_understood(name: Any) -> None:
    """Breaks if an event of Terra's list has no meaning, or loses its name or user."""
    found = parsed(recorded(f"events/{name}"))
    assert found.event_type == name
    assert (found.ignored is not None) == (name in IGNORED) == (found.actions == ())
    assert (found.user_id is None) == (name in NOT_OF_A_USER)
    assert found.occurred_at is not None


def test_no_event_is_missing_here() -> None:
    """Breaks if a recorded event is lost from the folder."""
    assert (len(EVENTS), len(VARIANTS)) == (26, 9)


@each(*VARIANTS)
def test_every_variant_is_understood(name: Any) -> None:
    """Breaks if an odd shape that Terra is known to send becomes a dead letter."""
    assert parsed(recorded(f"variants/{name}")).event_type == recorded(f"variants/{name}")["type"]


@each(*NAMES)
def test_data_names_its_user_in_our_words(name: Any) -> None:
    """Breaks if Terra's user, provider or reference is stored under another name, or its type is lost."""
    body = recorded(f"events/{name}")
    found, user = parsed(body), body["user"]
    owner = (user["user_id"], user["provider"].lower())
    assert (found.user_id, found.client_user_id) == (user["user_id"], user["reference_id"])
    data = of(Record, found) + of(Samples, found)
    assert {(one.user_id, one.provider, one.source_type) for one in data} == {(*owner, name)}
    assert of(Connection, found) == [Connection(*owner, "connected", None, INFERRED)]


@each(None, "", "absent")
def test_a_user_without_a_reference_has_no_client_user_id(reference: str | None) -> None:
    """Breaks if people without a reference become one person, or their data is refused."""
    user = {"user_id": "t1", "provider": "GARMIN"} | ({} if reference == "absent" else {"reference_id": reference})
    assert parsed(event("activity", item(), user=user)).client_user_id is None


@each(
    (MADE, MADE),
    (RECEIVED + timedelta(minutes=5), RECEIVED + timedelta(minutes=5)),
    (RECEIVED + timedelta(days=400), RECEIVED + timedelta(minutes=5)),
    (None, RECEIVED),
)
def test_the_version_is_when_terra_made_it(made: datetime | None, version: datetime) -> None:
    """Breaks if a retry's own time decides, or an unsigned header from the future wins over all that comes later."""
    found = parsed(event("daily", item(data_enrichment={"strain_index": 1})), made=made)
    assert {one.version for one in (*of(Record, found), *of(Samples, found))} == {version}
    assert found.occurred_at == version


def test_a_timestamp_beyond_the_calendar_is_replaced() -> None:
    """Breaks if fifteen digits of an unsigned header raise, and the delivery is lost."""
    delivery = Delivery("terra", "t", RECEIVED.timestamp(), b"", 999_999_999_999_999)
    assert parse(delivery, b'{"type":"healthcheck"}', Settings()).occurred_at == RECEIVED + timedelta(minutes=5)


@each({"data": []}, {"data": None}, {"data": [None]}, {})
def test_an_event_without_data_only_supposes_a_connection(content: dict[str, Any]) -> None:
    """Breaks if an empty event is refused, or changes stored data."""
    found = parsed({"type": "activity", "user": USER} | content)
    assert (found.actions, found.ignored) == ((PROVISIONAL,), None)


def test_of_duplicate_records_the_last_wins() -> None:
    """Breaks if which of two wins depends on anything but their order."""
    items = [item(distance_data={"steps": steps}) for steps in (1, 2)]
    assert record("daily", *items).columns == b'{"calendar_date":"2026-03-14","steps":2,"timezone_offset":3600}'
    assert record("daily", *reversed(items)).payload.endswith(b'{"steps":1}}')


def test_a_new_connection_has_its_history_fetched() -> None:
    """Breaks if the history of a new connection is not fetched, because Terra does not announce it."""
    found = parsed(lifecycle("auth"))
    assert of(Connection, found) == [Connection("t1", "garmin", "connected", None, MADE)]
    notices = of(Notice, found)
    assert {one.resource for one in notices} == FETCHED
    window = (MADE - timedelta(days=365), MADE)
    assert {replace(one, resource="") for one in notices} == {Notice("t1", "garmin", "", *window, is_final=True)}


@each("error", None, "warning", "")
def test_a_failed_authentication_is_not_a_connection(status: str | None) -> None:
    """Breaks if the old `auth` with status error makes a connection, or opens a backfill."""
    found = parsed(lifecycle("auth", status))
    assert (found.actions, found.ignored, found.user_id) == ((), "no connection was made", "t1")


@each(
    ("deauth", "disconnected", None),
    ("access_revoked", "disconnected", None),
    ("connection_error", "error", "some words"),
)
def test_how_a_connection_ends(name: str, status: str, error: str | None) -> None:
    """Breaks if the end of a connection looks like an error, after which the data still counts."""
    (connection,) = parsed(lifecycle(name, "warning")).actions
    assert connection == Connection("t1", "garmin", status, error, MADE)  # type: ignore[arg-type]


def test_an_error_without_a_message_has_its_type_as_text() -> None:
    """Breaks if an error has no text, or a text without end is stored."""
    assert of(Connection, parsed(lifecycle("connection_error", message=None)))[0].error == "connection_error"
    (long,) = of(Connection, parsed(lifecycle("connection_error", message="x" * 10_000)))
    assert len(long.error or "") == 500


NEW = USER | {"user_id": "t2"}
CONNECTED = Connection("t2", "garmin", "connected", None, MADE)


@each((USER, (UserIdChange("t1", "t2"), CONNECTED)), (None, (CONNECTED,)), (NEW, (CONNECTED,)))
def test_a_reconnection_changes_the_user_id(old: Any, actions: tuple[Action, ...]) -> None:
    """Breaks if a person who reconnected becomes two, or an event without the old user is refused."""
    found = parsed({"type": "user_reauth", "status": "warning", "new_user": NEW, "old_user": old})
    assert (found.actions, found.user_id, found.client_user_id) == (actions, "t2", "member-1")
    if old is None:
        assert parsed({"type": "user_reauth", "new_user": NEW}).actions == actions


@each(
    *((600, 600.0), (1.5, 1.5), (None, 300.0), (-5, 0.0), (10**9, 3600.0)),
    *(("600", 600.0), ("soon", 300.0), ([600], 300.0), (True, 300.0), ("1e999", 300.0)),
)
def test_an_event_by_reference(expires_in: Any, seconds: float) -> None:
    """Breaks if an event at a URL is not fetched, its URL counts as valid forever, or an odd time costs the event."""
    for name in ("s3_payload", "s3_upload"):
        found = parsed({"type": name, "status": "success", "url": "https://x.invalid", "expires_in": expires_in})
        assert (found.actions, found.user_id) == ((Download("https://x.invalid", seconds),), None)
        assert parsed({"type": name, "url": "u"}).actions == (Download("u", 300.0),)


@each({}, {"url": None}, {"url": ""}, {"url": 1}, {"url": "x" * 9000})
def test_an_event_without_data_or_url_is_a_dead_letter(body: dict[str, Any]) -> None:
    """Breaks if an event is lost silently."""
    assert dead({"type": "s3_payload"} | body).startswith("s3_payload: ")


@each(
    ({"reference": "r1"}, None, "r1", None),
    ({"reference": "r1", "expected_payloads": 3}, "r2", "r1", 3),
    ({"expected_payloads": 3.0}, "r2:chunk:1", "r2", 3),
    ({"reference": "r1", "expected_payloads": -1}, None, "r1", None),
    ({"reference": "r1", "expected_payloads": 1e9}, None, "r1", None),
    ({"reference": 17, "expected_payloads": "3"}, None, "17", 3),
    ({"reference": ["r1"], "expected_payloads": "many"}, "r2", "r2", None),
)
def test_a_large_request(more: Any, header: str | None, reference: str, expected: int | None) -> None:
    """Breaks if the deliveries of a large request cannot be counted, or an absurd count is awaited."""
    for name in ("large_request_processing", "large_request_sending"):
        found = parsed(lifecycle(name, **more), reference=header)
        assert found.actions == (LargeRequest(reference, "t1", "garmin", expected),)


def test_a_large_request_without_a_name_is_ignored() -> None:
    """Breaks if it is counted under an empty name, together with all others."""
    assert parsed(lifecycle("large_request_sending")).ignored == "it does not name the request that it belongs to"


def test_a_report_belongs_to_a_person_without_a_connection() -> None:
    """Breaks if a report is refused because it has no user, is not found by our own id, or loses its status."""
    found = parsed(recorded("events/lab_report.completed"))
    (report,) = of(Record, found)
    assert (found.user_id, found.client_user_id) == ("reference:member-1004", "member-1004")
    key = ("terra_lab_report", "reference:member-1004", "297405620317847552")
    assert (report.resource, report.user_id, report.id) == key
    assert report.version == datetime(2026, 3, 14, 10, tzinfo=UTC)
    assert b'"status":"completed"' in (report.columns or b"")
    assert of(Connection, found) == []
    (failed,) = of(Record, parsed(recorded("events/lab_report.failed")))
    assert b'"error_code":"file_unreadable"' in (failed.columns or b"")


@each((None, MADE), ("", MADE), ("2026-03-14T19:00:00Z", RECEIVED + timedelta(minutes=5)))
def test_when_a_report_is_from(occurred: str | None, version: datetime) -> None:
    """Breaks if a report without a time has no version, or one from the future cannot be replaced."""
    found = parsed({"type": "lab_report.failed", "occurred_at": occurred, "data": {"session_id": "1"}})
    assert of(Record, found)[0].version == version
    assert (found.user_id, found.client_user_id) == ("reference:", None)


@each("brand_new_event", "route", "Activity", "lab_report.other", "a.b:c-d_1")
def test_unknown_events_are_ignored_whatever_they_hold(name: str) -> None:
    """Breaks if tomorrow's event types become dead letters, or are not recorded under their name."""
    for user in (USER, None, "t1", {}, {"user_id": [1]}, {"user_id": "t1", "provider": None}):
        found = parsed({"type": name, "user": user, "data": "text", "status": 1, "url": []})
        assert (found.event_type, found.ignored, found.actions) == (name, "an unknown event type", ())
        assert found.user_id == ("t1" if user == USER else None)


@each("", "x" * 101, "a b", "a\u0000", "\u00e9", "a\n", "<script>", "\ud800")
def test_a_weird_name_is_not_repeated(name: Any) -> None:
    """Breaks if a name without bounds, or with what PostgreSQL refuses, reaches the ledger."""
    found = parsed(json.dumps({"type": name}).encode())
    assert (found.event_type, found.ignored) == ("unknown", "an unknown event type")


@each(
    (Settings(), {"activity", "steps", "terra_scores"}),
    (Settings(resources=("steps",)), {"steps"}),
    (Settings(providers=("garmin",)), {"activity", "steps", "terra_scores"}),
    (Settings(providers=("oura",)), None),
    (Settings(resources=("workouts",)), None),
)
def test_excluded_data_is_ignored(settings: Settings, kept: set[str] | None) -> None:
    """Breaks if Terra's events ignore HEADRACE_RESOURCES or HEADRACE_PROVIDERS, or data is left out silently."""
    steps = {"detailed": {"step_samples": [{"timestamp": START, "steps": 3}]}}
    body = event("daily", item(distance_data=steps, data_enrichment={"strain_index": 1}))
    found = parsed(body, settings)
    if kept is None:
        assert (found.actions, found.ignored) == ((), "left out by HEADRACE_RESOURCES or HEADRACE_PROVIDERS")
    else:
        assert {one.resource for one in (*of(Record, found), *of(Samples, found))} == kept
        assert found.actions[-1] == PROVISIONAL


def test_excluded_resources_are_not_fetched() -> None:
    """Breaks if a connection starts backfills of excluded resources, or is excluded itself."""
    found = parsed(lifecycle("auth"), Settings(resources=("sleep",)))
    assert [type(one) for one in found.actions] == [Connection, Notice]
    assert of(Notice, found)[0].resource == "sleep"
    assert len(parsed(lifecycle("auth"), Settings(providers=("oura",))).actions) == 1
