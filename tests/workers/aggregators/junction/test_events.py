"""Junction's events: what each of them means, whose it is, and which version of it."""

import copy
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import START, event, heartrate, message_id, workout
from tests.support.cases import MALFORMED, each
from tests.support.junction import MOMENT, RECORDED, USER, dead, only, parsed, sample, survives
from workers.actions import Connection, Grants, LostDelivery, Notice, Record, Samples

DEEP = b"[" * 100_000
LATER = START + timedelta(days=1)

# Every recorded event


@each(
    ("today_workouts", "apple_health_kit", "watch", "b7867334-387c-5812-8123-7acc0043b644", "2026-03-14T09:30"),
    ("today_sleep_cycle", "oura", "ring", "b210fadf-c564-5f0e-88f4-70d1da97c1db", "2026-03-14T09:30"),
    ("today_profile", "fitbit", "app", "2adb5e47-b97f-5bd7-81d2-464b189f2245", "2026-03-14T09:30"),
    ("today_meal", "cronometer", "app", "4b7daf5a-9f2c-5dc0-80f9-4ad1723fba4c", "2026-03-14T09:30"),
    ("today_workout_stream", "peloton", "unknown", "b7867334-387c-5812-8123-7acc0043b644", "1970-01-01T00:00"),
    ("today_device", "oura", "ring", "5750fef2-b98e-52ee-9258-f035181c4268", None),
    ("transitional_workouts", "whoop_v2", "unknown", "7a000000-0000-4000-8000-000000000006", "2025-02-02T07:00"),
    ("old_zwift_workouts", "zwift", "unknown", "c90bd6fb-0000-4000-8000-000000000001", None),
    ("old_peloton_workouts", "peloton", "unknown", "5f2c9a3e-0000-4000-8000-000000000002", None),
    ("old_withings_activity", "withings", "unknown", "7a000000-0000-4000-8000-000000000003", None),
    ("old_withings_body", "withings", "unknown", "7a000000-0000-4000-8000-000000000004", None),
    ("old_withings_sleep", "withings", "unknown", "7a000000-0000-4000-8000-000000000005", None),
)
def test_recorded_records(recorded: Any, provider: Any, source_type: Any, identifier: Any, version: Any) -> None:
    """Breaks if an object of some era loses its user, id, provider or version, or is not kept as received."""
    body = RECORDED[recorded]
    record = parsed(body, name=message_id(LATER)).actions[0]
    assert isinstance(record, Record)
    assert (record.user_id, record.id, record.provider, record.source_type) == (USER, identifier, provider, source_type)
    assert record.version == (datetime.fromisoformat(version + "Z") if version else LATER)
    assert json.loads(record.payload) == body["data"]
    assert record.resource == body["event_type"].split(".")[2 if body["event_type"].startswith("daily") else 1]


@each(
    ("today_heartrate", "garmin", "watch", "", [70.0, 72.0, 75.0]),
    ("today_steps", "apple_health_kit", "watch", "", [120.0, 64.0, 233.0]),
    ("today_ige", "ayumetrix", "lab", "ige/peanut", [35.0]),
    ("today_electrocardiogram_voltage", "apple_health_kit", "watch", "lead_1", [-0.373, -0.371, -0.366]),
    (
        "today_workout_distance",
        "apple_health_kit",
        "watch",
        "b7867334-387c-5812-8123-7acc0043b644/running",
        [37.0, 38.0, 39.0],
    ),
    ("today_blood_pressure", "withings", "cuff", "", [None, None, None]),
    ("today_note", "freestyle_libre", "automatic", "", [None]),
    ("old_glucose_naive", "freestyle_libre", "unknown", "", [5.1]),
    ("old_withings_hypnogram", "withings", "unknown", "", [2.0, 4.0]),
    ("old_withings_steps", "withings", "unknown", "", [312.0, 0.0]),
)
def test_recorded_samples(recorded: Any, provider: Any, source_type: Any, subtype: Any, values: Any) -> None:
    """Breaks if samples of some era lose their user, series or values."""
    body = RECORDED[recorded]
    samples = only(body)
    assert isinstance(samples, Samples)
    resource = body["event_type"].split(".")[2]
    assert samples.key == (USER, resource, provider, source_type, subtype)
    assert [row.value for row in samples.rows] == values
    first = body["data"]["data"][0]
    moment = datetime.fromisoformat(first["timestamp"])
    assert samples.rows[0].ts == (moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    assert samples.rows[0].unit == first["unit"]
    assert samples.version == START


def test_a_cholesterol_panel_is_four_series() -> None:
    """Breaks if the four values of one blood sample overwrite each other."""
    found = parsed(RECORDED["today_cholesterol"])
    kinds = {action.subtype: [row.value for row in action.rows] for action in found.actions}  # type: ignore[union-attr]
    values = {"ldl": [3.1], "hdl": [1.3], "total": [5.0], "triglycerides": [1.2]}
    assert kinds == {f"cholesterol/{kind}": value for kind, value in values.items()}
    assert found.duplicate_samples == 0


@each(
    ("today_connection", "oura", "connected", None),
    ("future_connection_provider_only", "oura", "connected", None),
    ("mid_connection_source_only", "freestyle_libre_ble", "connected", None),
    ("old_strava_connection", "strava", "connected", None),
    ("today_connection_error", "garmin", "error", "token_refresh_failed: refresh token rejected"),
)
def test_recorded_connections(recorded: str, provider: str, status: str, error: str | None) -> None:
    """Breaks if a connection of some era has no provider, or its error is lost."""
    connection, *others = parsed(RECORDED[recorded]).actions
    assert connection == Connection(USER, provider, status, error, START)  # type: ignore[arg-type]
    assert all(isinstance(one, Grants) for one in others)


@each(
    ("today_historical_workouts", "apple_health_kit", "2025-12-14T06:30:00Z", "2026-03-14T06:30:00Z", True),
    ("old_historical_not_final", "zwift", "2026-02-14T00:00:00Z", "2026-03-14T00:00:00Z", False),
    ("old_historical_inverted", "zwift", "1996-11-02T14:39:28Z", "2020-06-21T08:23:01Z", True),
    ("old_peloton_historical_workouts", "peloton", "1996-03-01T00:00:00Z", "2020-09-12T00:00:00Z", True),
)
def test_recorded_notices(recorded: str, provider: str, start: str, end: str, final: Any) -> None:
    """Breaks if the edges of an inverted window are not swapped, or an absent `is_final` counts as false."""
    edges = (datetime.fromisoformat(start), datetime.fromisoformat(end))
    assert only(RECORDED[recorded]) == Notice(USER, provider, "workouts", *edges, final)


@each(
    ("today_match_review", "no wearable data"),
    ("today_query", "no wearable data"),
)
def test_recorded_events_that_are_ignored(recorded: str, reason: str) -> None:
    """Breaks if an event without a user, or with another envelope, becomes a dead letter."""
    found = parsed(RECORDED[recorded])
    assert (found.actions, found.ignored) == ((), reason)
    assert found.event_type == RECORDED[recorded]["event_type"]


def test_an_exhausted_attempt_is_a_lost_delivery() -> None:
    """Breaks if Svix's own event, which has another envelope and names no user, becomes a dead letter or is ignored."""
    found = parsed(RECORDED["svix_attempt_exhausted"])
    (lost,) = found.actions
    assert isinstance(lost, LostDelivery)
    assert (found.event_type, found.ignored) == ("message.attempt.exhausted", None)


# The envelope


@each(("u1", "u1", "u1"), (None, "u2", "u2"), ("", "u2", "u2"), ("u1", None, "u1"), ("u1", "u2", "u1"))
def test_the_user_is_at_the_top_level_or_in_data(top: str | None, inner: str | None, user: str) -> None:
    """Breaks if old envelopes, or today's timeseries, have no user."""
    for body in (workout("x"), heartrate("x", {0: 70})):
        body["user_id"], body["data"]["user_id"] = top, inner
        found = parsed(body)
        assert {found.user_id, *(action.user_id for action in found.actions)} == {user}
        del body["user_id" if not top else "client_user_id"]
        assert parsed(body).user_id == user


@each(None, [], "text", 1, {}, {"user_id": None}, {"user_id": ""}, {"user_id": ["u1"]}, {"user_id": {"id": "u1"}})
def test_an_event_without_a_user_is_a_dead_letter(data: Any) -> None:
    """Breaks if data is stored under no user."""
    assert dead({"event_type": "daily.data.workouts.created", "data": data}).startswith("no user")


@each(
    *MALFORMED,
    *(b'{"event_type":%s}' % value for value in (b"null", b'""', b'{"canary":1}', b"[]", b'"x","data":' + DEEP)),
    *(b'{"data":{}}', b'{"event_type":"a","event_type":"b"}', b'{"event_type":"a","user_id":"a","user_id":"b"}'),
)
def test_an_invalid_event_is_a_dead_letter(body: bytes) -> None:
    """Breaks if a strange body raises an unexpected error, or a part of it is quoted."""
    assert dead(body).startswith("not a Junction event")


@each("raw.garmin.dailies", "daily.workout_stream.unavailable", "provider.connection.updated", 1, "\ud800", "a\u0000")
def test_unknown_events_are_ignored_with_any_content(name: Any) -> None:
    """Breaks if tomorrow's event types become dead letters, or a name that PostgreSQL refuses reaches the ledger."""
    stored = str(name).replace("\ud800", "\ufffd").replace("\u0000", "\ufffd")
    for data in (None, [], "text", {"user_id": "u1"}):
        found = parsed(json.dumps({"event_type": name, "user_id": "u1", "data": data}).encode())
        assert (found.event_type, found.user_id, found.ignored) == (stored, "u1", "an unknown event type")


def test_the_old_spelling_is_understood() -> None:
    """Breaks if `daily.timeseries.hypnogram.created` is not the hypnogram."""
    body = RECORDED["old_withings_hypnogram"] | {"event_type": "daily.timeseries.hypnogram.created"}
    assert only(body).resource == "hypnogram"
    assert parsed(body).event_type == "daily.timeseries.hypnogram.created"


@each(*catalogue().event_names)
def test_every_event_of_the_catalogue_is_parsed(name: Any) -> None:
    """Breaks if an event name is not mapped, or mapped to another resource."""
    does, resource = catalogue().event(name).does, catalogue().event(name).resource
    point = sample(systolic=120, diastolic=80, **({"value": "text"} if ".note." in name else {}))
    data = {"id": "i", "workout_id": "i", "provider": "oura", "source": {"provider": "oura"}, "data": [point]}
    found = parsed(event(name, "u1", data))
    if does in ("query", "lab"):
        assert found.ignored == "no wearable data"
        return
    action = found.actions[0]
    is_stream = does == "data" and resource is not None and resource.kind == "stream"
    assert found.actions[1:] == ((Notice("u1", "oura", "workout_stream", None, None, True, "i"),) if is_stream else ())
    expected = {"connection": Connection, "historical": Notice, "device": Record}
    kind = Samples if resource and resource.kind == "timeseries" else Record
    assert type(action) is expected.get(does, kind)
    assert (action.user_id, action.provider) == ("u1", "oura")
    assert resource is None or getattr(action, "resource", None) == resource.name


# Records


@each(
    ("2026-03-14T08:00:00.5+02:00", datetime(2026, 3, 14, 6, 0, 0, 500_000, tzinfo=UTC)),
    ("2026-03-14T06:00:00", datetime(2026, 3, 14, 6, tzinfo=UTC)),
    ("2026-03-14", datetime(2026, 3, 14, tzinfo=UTC)),
    (1773468000, datetime(2026, 3, 14, 6, tzinfo=UTC)),
    ("1773468000000", datetime(2026, 3, 14, 6, tzinfo=UTC)),
    ("2026-03-14T06:35:00Z", START + timedelta(minutes=5)),
    ("2026-03-14T06:35:00.000001Z", START + timedelta(minutes=5)),
    ("2199-01-01T00:00:00Z", START + timedelta(minutes=5)),
    (None, START),
    ("", START),
    ("soon", START),
    ([1], START),
)
def test_its_own_time_of_change_is_the_version(updated_at: Any, version: datetime) -> None:
    """Breaks if a late delivery of an old version counts as new, or a wrong clock wins over all later versions."""
    assert only(workout("u1", updated_at=updated_at)).version == version


def test_without_one_the_version_is_the_time_in_the_delivery_id() -> None:
    """Breaks if an attempt's time, which changes with each retry, is used although the id contains the original one."""
    created = datetime(2026, 3, 1, 12, 0, 0, 4000, tzinfo=UTC)
    assert parsed(heartrate("u1", {0: 70}), name=message_id(created)).actions[0].version == created  # type: ignore[union-attr]


def test_an_id_without_a_time_falls_back_to_the_receipt() -> None:
    """Breaks if a delivery whose id is no KSUID has no version."""
    before = datetime.now(UTC)
    version = parsed(heartrate("u1", {0: 70}), name="msg_other").actions[0].version  # type: ignore[union-attr]
    assert before <= version <= datetime.now(UTC)


# Connections


@each(
    ({"provider": {"slug": "oura"}, "source": {"slug": "other"}}, "oura"),
    ({"provider": {"slug": ""}, "source": {"slug": "oura"}}, "oura"),
    ({"provider": None, "source": {"source_slug": "oura"}}, "oura"),
    ({"source": {"provider": "oura"}}, "oura"),
    ({"provider": "Oura"}, "oura"),
    ({"provider": {"slug": ["canary"], "name": 1}, "source": "oura"}, "oura"),
    ({"provider": {"slug": "oura", "logo": {"url": "canary"}}}, "oura"),
)
def test_the_provider_of_a_connection(data: dict[str, Any], provider: str) -> None:
    """Breaks if a provider is not found in one of the places where it stood over the years."""
    for name in ("created", "error"):
        assert only(event(f"provider.connection.{name}", "u1", data)).provider == provider


@each({}, {"provider": ""}, {"provider": {}}, {"source": {"name": "canary"}}, {"provider": [{"slug": "x"}]}, None, [])
def test_a_connection_without_a_provider_is_a_dead_letter(data: Any) -> None:
    """Breaks if a connection without a provider is stored."""
    assert dead(event("provider.connection.created", "u1", data)).startswith("connection: ")


@each(
    ({"error_type": "user_not_found", "error_details": "gone"}, "user_not_found: gone"),
    ({"error_type": "of_tomorrow"}, "of_tomorrow"),
    ({"error_type": None, "error_details": "gone"}, "gone"),
    ({"error_type": 401, "error_details": {"canary": 1}}, "401"),
    ({}, "unknown"),
)
def test_the_error_of_a_connection(fields: dict[str, Any], error: str) -> None:
    """Breaks if an error has no text, or a type that was added since is refused."""
    assert only(event("provider.connection.error", "u1", {"provider": "oura"} | fields)).error == error


# Notices of history


@each(
    *(({}, True), ({"is_final": None}, True), ({"is_final": True}, True), ({"is_final": False}, False)),
    *(({"is_final": odd}, False) for odd in ("false", "False", 0, "0", 0.0)),
    *(({"is_final": odd}, True) for odd in ("true", 1, "soon", "", [], {"canary": 1}, 2)),
)
def test_is_final(given: dict[str, Any], final: Any) -> None:
    """Breaks if a notice without a readable flag never completes a backfill, or costs the history."""
    assert only(event("historical.data.sleep.created", "u1", {"provider": "oura"} | given)).is_final is final


@each(
    ({}, (None, None)),
    ({"start_date": MOMENT}, (None, None)),
    ({"end_date": MOMENT}, (None, None)),
    ({"start_date": None, "end_date": ""}, (None, None)),
    ({"start_date": MOMENT, "end_date": MOMENT}, (START, START)),
    ({"start_date": "2026-03-14T06:30:00", "end_date": "1996-01-01"}, (datetime(1996, 1, 1, tzinfo=UTC), START)),
    (
        {"start_date": "2026-03-14T07:30:00+01:00", "end_date": "2026-03-15"},
        (START, datetime(2026, 3, 15, tzinfo=UTC)),
    ),
    ({"start_date": 1773469800, "end_date": "1773469860000"}, (START, START + timedelta(minutes=1))),
)
def test_windows(edges: Any, expected: Any) -> None:
    """Breaks if a missing edge fails, an inverted window stays so, or naive and aware edges cannot be compared."""
    body = event("historical.data.sleep.created", "u1", {"provider": "oura"} | edges)
    notice = only(body)
    assert (notice.window_start, notice.window_end, parsed(body).notes) == (*expected, ())


@each("soon", "0000-00-00T00:00:00Z", "9999-12-31T23:59:59-14:00", 20260314, True, {}, "1" * 400)
def test_an_absurd_window_means_the_default_range(edge: Any) -> None:
    """Breaks if a window that cannot be read costs a user their history, or the ledger does not say so."""
    body = event("historical.data.sleep.created", "u1", {"provider": "oura", "start_date": edge, "end_date": MOMENT})
    assert only(body).window_start is None
    assert parsed(body).notes == ("the default window is fetched, because these cannot be read: start_date",)


@each(
    *(("oura", "oura"), ("OURA", "oura"), ({"slug": "oura"}, "oura"), (None, ""), ("", "")),
    *((7, "7"), ({"slug": 7}, "7"), ({"slug": ["canary"]}, ""), ([], ""), ({}, "")),
)
def test_the_provider_of_a_notice(provider: Any, slug: str) -> None:
    """Breaks if history is asked for under a name that the API does not know."""
    assert only(event("historical.data.sleep.created", "u1", {"provider": provider})).provider == slug


# The operator's filter


@each(
    (Settings(resources=("workouts",)), True),
    (Settings(resources=("sleep",)), False),
    (Settings(providers=("garmin", "apple_health_kit")), True),
    (Settings(providers=("oura",)), False),
)
def test_excluded_data_is_ignored(choice: Settings, kept: Any) -> None:
    """Breaks if data that the operator did not ask for is stored or fetched, or silently dropped."""
    for body in (workout("u1"), RECORDED["today_historical_workouts"]):
        found = parsed(body, choice)
        assert bool(found.actions) is kept
        assert found.ignored == (None if kept else "left out by HEADRACE_RESOURCES or HEADRACE_PROVIDERS")


@each(Settings(resources=("workouts",)), Settings(providers=("garmin",)))
def test_a_connection_is_always_kept(choice: Settings) -> None:
    """Breaks if choosing resources or providers hides who is connected with what."""
    body = event("provider.connection.created", "u1", {"provider": {"slug": "oura", "name": "Oura", "logo": ""}})
    assert len(parsed(body, choice).actions) == 1


# Any input

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), name=st.sampled_from(sorted(RECORDED)), value=JSON)
def test_no_value_in_any_place_raises(data: st.DataObject, name: str, value: Any) -> None:
    """Breaks if a value of an unexpected type, anywhere in a real event, raises an unexpected error."""
    body = copy.deepcopy(RECORDED[name])
    at: Any = body
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = value
    survives(json.dumps(body).encode())


@given(name=st.sampled_from(sorted(RECORDED)), position=st.integers(0, 10_000), junk=st.text(max_size=4))
def test_no_damage_raises(name: str, position: int, junk: str) -> None:
    """Breaks if a body that is no JSON, or another, raises an unexpected error."""
    body = json.dumps(RECORDED[name])
    position %= len(body)
    survives((body[:position] + junk + body[position + len(junk) :]).encode())
    survives(body[:position].encode())
