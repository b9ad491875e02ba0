"""Junction: its signatures, and what its events mean in every shape that was ever documented."""

import copy
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.errors import InvalidSignature, Unprocessable
from app.signatures.junction import verify
from tests.support import JUNCTION_SECRET, ROOT, START, delivery, event, heartrate, message_id, signed, workout
from workers.actions import Connection, Notice, Parsed, Record, Sample, Samples
from workers.aggregators.junction import parse
from workers.aggregators.junction.shapes import SampleGroup, plain, samples

RECORDED = {
    file.stem: json.loads(file.read_text(encoding="utf-8"))
    for file in sorted((ROOT / "tests" / "recorded" / "junction").glob("*.json"))
}
USER = "0aaca0c5-ccf3-5e68-9bfe-e22fa6a0d79a"
EVERYTHING = Settings()
SETTINGS = Settings(junction_webhook_secrets=(JUNCTION_SECRET,))
MOMENT = "2026-03-14T06:30:00+00:00"


def parsed(body: dict[str, Any] | bytes, settings: Settings = EVERYTHING, name: str | None = None) -> Parsed:
    """What an event means, delivered at START."""
    sent = delivery(body, name=name)
    return parse(sent, body if isinstance(body, bytes) else msgspec.json.encode(body), settings)


def only(body: dict[str, Any]) -> Any:
    """The one action of an event."""
    (action,) = parsed(body).actions
    return action


def series(resource: str, *samples: dict[str, Any], **source: Any) -> dict[str, Any]:
    """A timeseries event."""
    data = {"source": {"provider": "garmin", "type": "watch"} | source, "data": list(samples)}
    return event(f"daily.data.{resource}.created", "u1", data)


def sample(**changes: Any) -> dict[str, Any]:
    """A sample in today's shape."""
    return {"timestamp": MOMENT, "value": 1, "unit": "x"} | changes


def dead(body: dict[str, Any] | bytes) -> str:
    """Why an event is a dead letter."""
    with pytest.raises(Unprocessable) as reason:
        parsed(body)
    assert reason.value.__cause__ is None
    assert "canary" not in str(reason.value)
    return str(reason.value)


# Signatures


def test_a_signature_is_checked_and_gives_the_id() -> None:
    """Breaks if a good signature is refused or its id is lost."""
    headers = {name.title(): value for name, value in signed(b"{}", name="msg_x").items()}
    assert verify(headers, b"{}", SETTINGS, START).message_id == "msg_x"


def reason(headers: dict[str, str], body: bytes = b"{}", settings: Settings = SETTINGS) -> str:
    """Why these headers are refused. In a plain mapping a header's name must be spelled as it is asked for."""
    with pytest.raises(InvalidSignature) as refused:
        verify({name.title(): value for name, value in headers.items()}, body, settings, START)
    return refused.value.reason


@pytest.mark.parametrize("prefix", ["Svix", "Webhook"])
@pytest.mark.parametrize("missing", ["Id", "Timestamp", "Signature"])
def test_each_header_is_needed(prefix: str, missing: str) -> None:
    """Breaks if a request without one of the three is taken."""
    headers = {name.title().replace("Svix", prefix): value for name, value in signed(b"{}").items()}
    assert verify(headers, b"{}", SETTINGS, START).message_id == "msg_1"
    assert reason(headers | {f"{prefix}-{missing}": ""}) == "missing"


@pytest.mark.parametrize(("minutes", "expected"), [(-6, "stale"), (6, "stale"), (-10_000, "stale")])
def test_stale_is_told_apart_from_wrong(minutes: int, expected: str) -> None:
    """Breaks if the operator cannot see that a clock is wrong rather than the secret."""
    assert reason(signed(b"{}", at=datetime.now(UTC) + timedelta(minutes=minutes))) == expected


@pytest.mark.parametrize("minutes", [-4, 0, 4])
def test_clocks_may_differ_by_minutes(minutes: int) -> None:
    """Breaks if a sender whose clock is a little off is refused."""
    headers = signed(b"{}", at=datetime.now(UTC) + timedelta(minutes=minutes))
    verify({name.title(): value for name, value in headers.items()}, b"{}", SETTINGS, START)


@pytest.mark.parametrize(
    "changes",
    [
        {"svix-signature": "v1"},
        {"svix-signature": "v1,a,b"},
        {"svix-signature": "v1,%%%=="},
        {"svix-signature": "v1,\u00e9"},
        {"svix-signature": "v2,AAAA"},
        {"svix-signature": "v1," + "A" * 9000},
        {"svix-timestamp": "nan"},
        {"svix-timestamp": "1e400"},
        {"svix-timestamp": "soon"},
        {"svix-timestamp": "9" * 5000},
        {"svix-id": "x" * 257},
        {"svix-id": "msg_\u00e9"},
        {"svix-id": "msg_\x00"},
    ],
)
def test_junk_is_refused(changes: dict[str, str]) -> None:
    """Breaks if what the library raises on junk (ValueError, binascii.Error, OverflowError) reaches the request."""
    assert reason(signed(b"{}") | changes) == "signature"


def test_a_body_that_is_not_utf8_is_refused() -> None:
    """Breaks if bytes that the library cannot decode raise something else."""
    assert reason(signed(b"{}"), b"\xff\xfe") == "signature"


def test_without_a_secret_nothing_is_taken() -> None:
    """Breaks if verification can be left out by not setting a secret."""
    assert reason(signed(b"{}"), settings=EVERYTHING) == "missing"


def test_any_of_several_secrets_will_do() -> None:
    """Breaks if a good signature is refused because an earlier secret does not fit."""
    other = "whsec_" + "b3RoZXItc2VjcmV0LW90aGVyLXNlY3JldA=="
    settings = replace(SETTINGS, junction_webhook_secrets=(other, JUNCTION_SECRET))
    for secret in settings.junction_webhook_secrets:
        headers = {name.title(): value for name, value in signed(b"{}", secret=secret).items()}
        assert verify(headers, b"{}", settings, START).message_id == "msg_1"


# Every recorded event


@pytest.mark.parametrize(
    ("recorded", "provider", "source_type", "identifier", "version"),
    [
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
    ],
)
def test_recorded_records(recorded: str, provider: str, source_type: str, identifier: str, version: str | None) -> None:
    """Breaks if an object of some era loses its user, id, provider or version, or is not kept as received."""
    body = RECORDED[recorded]
    record = parsed(body).actions[0]
    assert isinstance(record, Record)
    assert (record.user_id, record.id) == (USER, identifier)
    assert (record.provider, record.source_type) == (provider, source_type)
    assert record.version == (datetime.fromisoformat(version + "Z") if version else START)
    assert json.loads(record.payload) == body["data"]
    assert record.resource == body["event_type"].split(".")[2 if body["event_type"].startswith("daily") else 1]


@pytest.mark.parametrize(
    ("recorded", "provider", "source_type", "subtype", "values"),
    [
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
    ],
)
def test_recorded_samples(
    recorded: str, provider: str, source_type: str, subtype: str, values: list[float | None]
) -> None:
    """Breaks if samples of some era lose their user, series or values."""
    body = RECORDED[recorded]
    samples = only(body)
    assert isinstance(samples, Samples)
    resource = body["event_type"].split(".")[2]
    assert samples.series == (USER, resource, provider, source_type, subtype)
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
    assert kinds == {
        "cholesterol/ldl": [3.1],
        "cholesterol/hdl": [1.3],
        "cholesterol/total": [5.0],
        "cholesterol/triglycerides": [1.2],
    }
    assert found.duplicate_samples == 0


@pytest.mark.parametrize(
    ("recorded", "provider", "status", "error"),
    [
        ("today_connection", "oura", "connected", None),
        ("future_connection_provider_only", "oura", "connected", None),
        ("mid_connection_source_only", "freestyle_libre_ble", "connected", None),
        ("old_strava_connection", "strava", "connected", None),
        ("today_connection_error", "garmin", "error", "token_refresh_failed: refresh token rejected"),
    ],
)
def test_recorded_connections(recorded: str, provider: str, status: str, error: str | None) -> None:
    """Breaks if a connection of some era has no provider, or its error is lost."""
    assert only(RECORDED[recorded]) == Connection(USER, provider, status, error, START)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recorded", "provider", "start", "end", "final"),
    [
        ("today_historical_workouts", "apple_health_kit", "2025-12-14T06:30:00Z", "2026-03-14T06:30:00Z", True),
        ("old_historical_not_final", "zwift", "2026-02-14T00:00:00Z", "2026-03-14T00:00:00Z", False),
        ("old_historical_inverted", "zwift", "1996-11-02T14:39:28Z", "2020-06-21T08:23:01Z", True),
        ("old_peloton_historical_workouts", "peloton", "1996-03-01T00:00:00Z", "2020-09-12T00:00:00Z", True),
    ],
)
def test_recorded_notices(recorded: str, provider: str, start: str, end: str, *, final: bool) -> None:
    """Breaks if an inverted window is not turned round, or an absent `is_final` counts as false."""
    edges = (datetime.fromisoformat(start), datetime.fromisoformat(end))
    assert only(RECORDED[recorded]) == Notice(USER, provider, "workouts", *edges, final)


@pytest.mark.parametrize(
    ("recorded", "reason"),
    [
        ("today_match_review", "not data of a wearable"),
        ("today_query", "not data of a wearable"),
        ("svix_attempt_exhausted", "an unknown event type"),
    ],
)
def test_recorded_events_that_are_ignored(recorded: str, reason: str) -> None:
    """Breaks if an event without a user, or with another envelope, becomes a dead letter."""
    found = parsed(RECORDED[recorded])
    assert (found.actions, found.ignored) == ((), reason)
    assert found.event_type == RECORDED[recorded].get("event_type", "message.attempt.exhausted")


# The envelope


@pytest.mark.parametrize(
    ("top", "inner", "user"),
    [("u1", "u1", "u1"), (None, "u2", "u2"), ("", "u2", "u2"), ("u1", None, "u1"), ("u1", "u2", "u1")],
)
def test_the_user_stands_at_the_top_or_in_data(top: str | None, inner: str | None, user: str) -> None:
    """Breaks if old envelopes, or today's timeseries, belong to nobody."""
    for body in (workout("x"), heartrate("x", {0: 70})):
        body["user_id"], body["data"]["user_id"] = top, inner
        found = parsed(body)
        assert {found.user_id, *(action.user_id for action in found.actions)} == {user}
        del body["user_id" if not top else "client_user_id"]
        assert parsed(body).user_id == user


@pytest.mark.parametrize("data", [None, [], "text", 1, {}, {"user_id": None}, {"user_id": 1}, {"user_id": ""}])
def test_an_event_of_nobody_is_a_dead_letter(data: Any) -> None:
    """Breaks if data is stored under no user."""
    assert dead({"event_type": "daily.data.workouts.created", "data": data}).startswith("no user")


@pytest.mark.parametrize("client_user_id", ["01HW3FSNVCHC3B2QB5N0ZAAAVG", "member 1", "\u00e9", "", None])
def test_a_client_user_id_is_any_text(client_user_id: str | None) -> None:
    """Breaks if a customer's own id has to be a UUID."""
    found = parsed(workout("u1") | {"client_user_id": client_user_id})
    assert found.client_user_id == client_user_id


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"[]", b"1", b"null", b'"text"', b"{", b"{}", b'{"event_type":null}', b'{"event_type":1}',
        b'{"event_type":""}', b'{"data":{}}', b'{"event_type":"\xff"}', b"\xef\xbb\xbf{}", b"[" * 100_000,
        b'{"event_type":"x","data":' + b"[" * 100_000, b'{"event_type":"x","user_id":{"canary":1}}',
    ],
)  # fmt: skip
def test_what_is_no_event_is_a_dead_letter(body: bytes) -> None:
    """Breaks if a strange body raises what no worker expects, or a part of it is quoted."""
    assert dead(body).startswith("not a Junction event")


@pytest.mark.parametrize(
    "name", ["raw.garmin.dailies", "daily.workout_stream.unavailable", "provider.connection.updated"]
)
@pytest.mark.parametrize("data", [None, [], "text", {"user_id": "u1"}])
def test_unknown_events_are_ignored_whatever_they_hold(name: str, data: Any) -> None:
    """Breaks if tomorrow's event types become dead letters."""
    found = parsed({"event_type": name, "user_id": "u1", "data": data})
    assert (found.event_type, found.user_id, found.ignored) == (name, "u1", "an unknown event type")


def test_the_old_spelling_is_understood() -> None:
    """Breaks if `daily.timeseries.hypnogram.created` is not the hypnogram."""
    body = RECORDED["old_withings_hypnogram"] | {"event_type": "daily.timeseries.hypnogram.created"}
    assert only(body).resource == "hypnogram"
    assert parsed(body).event_type == "daily.timeseries.hypnogram.created"


@pytest.mark.parametrize("name", catalogue().event_names)
def test_every_event_of_the_catalogue_is_parsed(name: str) -> None:
    """Breaks if an event name has no meaning, or stands for another resource."""
    does, resource = catalogue().event(name).does, catalogue().event(name).resource
    point = sample(systolic=120, diastolic=80, **({"value": "text"} if ".note." in name else {}))
    data = {"id": "i", "workout_id": "i", "provider": "oura", "source": {"provider": "oura"}, "data": [point]}
    found = parsed(event(name, "u1", data))
    if does in ("query", "lab"):
        assert found.ignored == "not data of a wearable"
        return
    action = found.actions[0]
    is_stream = does == "data" and resource is not None and resource.kind == "stream"
    assert found.actions[1:] == ((Notice("u1", "oura", "workout_stream", None, None, True, "i"),) if is_stream else ())
    expected = {"connection": Connection, "historical": Notice, "device": Record}
    kind = Samples if resource and resource.kind == "timeseries" else Record
    assert type(action) is expected.get(does, kind)
    assert (action.user_id, action.provider) == ("u1", "oura")
    assert resource is None or getattr(action, "resource", None) == resource.name


# Sources


@pytest.mark.parametrize(
    ("source", "provider", "kind"),
    [
        ({"provider": "garmin", "type": "watch"}, "garmin", "watch"),
        ({"provider": "garmin"}, "garmin", "unknown"),
        ({"provider": "garmin", "type": None}, "garmin", "unknown"),
        ({"provider": "garmin", "type": ""}, "garmin", "unknown"),
        ({"provider": "garmin", "slug": "", "name": "", "logo": ""}, "garmin", "unknown"),
        ({"provider": "garmin", "slug": "other"}, "garmin", "unknown"),
        ({"provider": "", "slug": "garmin"}, "garmin", "unknown"),
        ({"name": "Garmin", "slug": "garmin", "logo": "x"}, "garmin", "unknown"),
        ({"source_name": "Garmin", "source_slug": "garmin"}, "garmin", "unknown"),
        ({"provider": "GARMIN"}, "garmin", "unknown"),
        ({}, "", "unknown"),
        (None, "", "unknown"),
    ],
)
def test_sources_of_all_eras(source: dict[str, Any] | None, provider: str, kind: str) -> None:
    """Breaks if one provider gets two names, or an empty string counts as one."""
    records, samples = workout("u1"), heartrate("u1", {0: 70})
    records["data"]["source"] = samples["data"]["source"] = source
    assert (only(records).provider, only(records).source_type) == (provider, kind)
    assert (only(samples).provider, only(samples).source_type) == (provider, kind)


def test_summaries_that_repeat_the_source_do_without_it() -> None:
    """Breaks if a sleep cycle without `source` has no provider."""
    body = copy.deepcopy(RECORDED["today_sleep_cycle"])
    del body["data"]["source"]
    assert (only(body).provider, only(body).source_type) == ("oura", "ring")


# Records


def test_its_own_time_of_change_is_the_version() -> None:
    """Breaks if a late delivery of an old version counts as new."""
    assert only(workout("u1", updated_at="2026-05-01T00:00:00.5+02:00")).version == datetime(
        2026, 4, 30, 22, 0, 0, 500_000, tzinfo=UTC
    )
    assert only(workout("u1", updated_at="2026-05-01T00:00:00")).version == datetime(2026, 5, 1, tzinfo=UTC)
    for absent in (None, ""):
        assert (
            dead(workout("u1", updated_at=""))
            if absent == ""
            else only(workout("u1", updated_at=None)).version == START
        )


def test_without_one_the_id_of_the_delivery_tells_it() -> None:
    """Breaks if an attempt's time, which is new with each retry, is taken where the id holds the real one."""
    created = datetime(2026, 3, 1, 12, 0, 0, 4000, tzinfo=UTC)
    assert parsed(heartrate("u1", {0: 70}), name=message_id(created)).actions[0].version == created  # type: ignore[union-attr]


def test_an_id_without_a_time_falls_back_to_the_receipt() -> None:
    """Breaks if a delivery whose id is no KSUID has no version."""
    before = datetime.now(UTC)
    version = parsed(heartrate("u1", {0: 70}), name="msg_other").actions[0].version  # type: ignore[union-attr]
    assert before <= version <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"id": None}, "$.id"),
        ({"id": 1}, "$.id"),
        ({"id": ""}, "$.id"),
        ({"id": "x" * 257}, "$.id"),
        ({"average_hr": "canary"}, "$.average_hr"),
        ({"average_hr": True}, "$.average_hr"),
        ({"distance": {"canary": 1}}, "$.distance"),
        ({"title": 1}, "$.title"),
        ({"time_start": "canary"}, "$.time_start"),
        ({"time_start": 1773512405}, "$.time_start"),
        ({"calendar_date": "14.3.2026"}, "$.calendar_date"),
        ({"source": "canary"}, "$.source"),
        ({"source": {"provider": 1}}, "$.source.provider"),
        ({"updated_at": "2026-99-99"}, "updated_at"),
    ],
)
def test_a_record_that_does_not_fit_names_the_field(changes: dict[str, Any], field: str) -> None:
    """Breaks if a wrong type reaches the database, or the dead letter's reason quotes a value."""
    assert field in dead(workout("u1", **changes))


def test_unknown_fields_are_kept_and_null_ones_allowed() -> None:
    """Breaks if a field that Junction adds tomorrow is refused, or today's are all required."""
    fields = {field.name: None for field in catalogue()["workouts"].fields}
    body = workout("u1", **fields, tomorrow={"a": [1]})
    assert json.loads(only(body).payload)["tomorrow"] == {"a": [1]}


def test_a_record_needs_nothing_but_an_id() -> None:
    """Breaks if an old object that lacks today's fields is refused."""
    assert only(event("daily.data.sleep.created", "u1", {"id": "s1"})).id == "s1"


# Samples


@pytest.mark.parametrize(
    ("resource", "points", "source", "subtypes"),
    [
        ("cholesterol", [{"type": "a"}, {"type": "b"}], {}, {"a", "b"}),
        ("ige", [{"type": "a"}, {"type": "b"}, {}], {}, {"a", "b", ""}),
        ("igg", [{"type": "a"}, {"type": None}], {}, {"a", ""}),
        ("heart_rate_alert", [{"type": "low"}, {"type": "high"}], {}, {"low", "high"}),
        ("insulin_injection", [{"type": "rapid_acting"}, {"type": "long_acting"}], {}, {"rapid_acting", "long_acting"}),
        ("electrocardiogram_voltage", [{"type": "lead_1"}, {"type": "lead_2"}], {}, {"lead_1", "lead_2"}),
        (
            "workout_duration",
            [{"intensity": "low"}, {"intensity": "high"}, {"intensity": None}],
            {},
            {"low", "high", ""},
        ),
        ("workout_distance", [{}], {"workout_id": "w", "sport": "running"}, {"w/running"}),
        ("workout_distance", [{}], {"workout_id": "w"}, {"w/"}),
        ("workout_swimming_stroke", [{}], {"sport": "swimming", "workout_id": None}, {"/swimming"}),
        ("distance", [{}], {"sport": "wheelchair_push"}, {"wheelchair_push"}),
        ("distance", [{"type": "a"}], {}, {""}),
        ("stand_hour", [{"type": "stood"}], {}, {""}),
        ("sleep_breathing_disturbance", [{"type": "elevated"}], {}, {""}),
        ("glucose", [{"type": "automatic"}], {}, {""}),
        ("heartrate", [{"type": "a"}], {"workout_id": "w", "sport": "x", "device_id": "d", "app_id": "a"}, {""}),
    ],
)
def test_subtypes(resource: str, points: list[dict[str, Any]], source: dict[str, Any], subtypes: set[str]) -> None:
    """Breaks if facts that coincide overwrite each other, or a mutable attribute doubles a sample."""
    found = parsed(series(resource, *(sample(**point) for point in points), **source))
    assert {action.subtype for action in found.actions} == subtypes  # type: ignore[union-attr]
    assert sum(len(action.rows) for action in found.actions) == len(points)  # type: ignore[union-attr]
    assert found.duplicate_samples == 0


def test_two_samples_with_one_key_are_counted_and_the_last_wins() -> None:
    """Breaks if one statement would write a row twice, which PostgreSQL refuses, or a gap in the key goes unnoticed."""
    found = parsed(series("heartrate", sample(value=1), sample(value=2), sample(value=2), sample(value=3)))
    (samples,) = found.actions
    assert isinstance(samples, Samples)
    assert ([row.value for row in samples.rows], found.duplicate_samples) == ([3.0], 2)


def test_one_instant_in_two_offsets_is_one_sample() -> None:
    """Breaks if the key is wall time rather than the instant."""
    found = only(
        series("heartrate", sample(timestamp="2026-10-25T00:30:00Z"), sample(timestamp="2026-10-25T02:30:00+02:00"))
    )
    assert len(found.rows) == 1
    two = only(
        series(
            "heartrate", sample(timestamp="2026-10-25T02:30:00+02:00"), sample(timestamp="2026-10-25T02:30:00+01:00")
        )
    )
    assert len(two.rows) == 2


@pytest.mark.parametrize(
    ("times", "ts", "end"),
    [
        ({"timestamp": MOMENT}, START, None),
        ({"timestamp": None, "start": MOMENT, "end": "2026-03-14T06:45:00Z"}, START, START + timedelta(minutes=15)),
        ({"timestamp": "", "start": MOMENT}, START, None),
        ({"timestamp": MOMENT, "start": "2020-01-01T00:00:00Z", "end": None}, START, None),
        ({"timestamp": "2026-03-14T06:30:00"}, START, None),
        ({"timestamp": "2026-03-14T06:30:00Z"}, START, None),
        ({"timestamp": "2026-03-14T07:30:00+01:00"}, START, None),
        ({"timestamp": "2026-03-14T06:30:00.001953+00:00"}, START + timedelta(microseconds=1953), None),
        ({"timestamp": "2026-03-14"}, datetime(2026, 3, 14, tzinfo=UTC), None),
    ],
)
def test_times(times: dict[str, Any], ts: datetime, end: datetime | None) -> None:
    """Breaks if an interval without a timestamp is lost, a naive time is refused, or a fraction of a second cut off."""
    (row,) = only(series("steps", sample(**times))).rows
    assert (row.ts, row.ts_end) == (ts, end)


def test_extra_holds_what_has_no_column() -> None:
    """Breaks if tomorrow's fields of a sample are lost, or a column's value stands there twice."""
    point = sample(
        id=17, start=MOMENT, end=MOMENT, timezone_offset=3600, type=None, sensor_location="wrist", tags=["a"]
    )
    (row,) = only(series("body_temperature", point)).rows
    assert row == Sample(START, START, 1.0, "x", 3600, b'{"sensor_location":"wrist","tags":["a"]}')
    assert only(series("heartrate", sample())).rows[0].extra is None


def test_what_is_part_of_the_key_is_not_extra() -> None:
    """Breaks if a discriminator is stored once more with each sample; a `type` that is none is kept."""
    assert only(series("ige", sample(type="a"))).rows[0].extra is None
    assert only(series("workout_duration", sample(intensity="low"))).rows[0].extra is None
    assert only(series("stand_hour", sample(type="idle"))).rows[0].extra == b'{"type":"idle"}'


def test_devices_are_attributes() -> None:
    """Breaks if the app or the device, which come and go, are lost or become part of the key."""
    (row,) = only(series("heartrate", sample(), app_id="com.apple", device_id="d1")).rows
    assert json.loads(row.extra) == {"app_id": "com.apple", "device_id": "d1"}
    assert only(series("heartrate", sample(), app_id=None, device_id="")).rows[0].extra is None


@pytest.mark.parametrize(
    ("provider", "floating"),
    [("freestyle_libre", True), ("abbott_libreview", True), ("Freestyle_Libre", True), ("dexcom", False)],
)
def test_floating_time_is_kept_as_it_came_and_marked(provider: str, *, floating: bool) -> None:
    """Breaks if local time that is called UTC cannot be told from real UTC, or is converted."""
    for moment in (MOMENT, "2026-03-14T06:30:00"):
        (row,) = only(series("glucose", sample(timestamp=moment), provider=provider)).rows
        assert row.ts == START
        assert (row.extra == b'{"is_floating":true}') is floating


def test_blood_pressure_has_two_numbers() -> None:
    """Breaks if systolic and diastolic are lost, or their group."""
    (row, *_) = only(RECORDED["today_blood_pressure"]).rows
    assert row.value is None
    assert json.loads(row.extra) == {"systolic": 122.0, "diastolic": 78.0, "grouping": ["cuff", None, None, None]}


def test_a_note_is_text() -> None:
    """Breaks if a note's text, which stands where others have a number, is refused or lost."""
    (row,) = only(RECORDED["today_note"]).rows
    assert row.value is None
    assert json.loads(row.extra) == {"text": "Felt shaky before lunch", "tags": ["food"], "is_floating": True}


@pytest.mark.parametrize(
    ("resource", "changes", "reason"),
    [
        ("heartrate", {"value": "canary"}, "heartrate: expected a number"),
        ("heartrate", {"value": None}, "heartrate: expected a number"),
        ("heartrate", {"value": True}, "heartrate: expected a number"),
        ("heartrate", {"value": [1]}, "heartrate: expected a number"),
        ("heartrate", {"timestamp": None}, "heartrate: a sample has neither timestamp nor start"),
        ("heartrate", {"timestamp": "canary"}, "timestamp: expected an ISO 8601 date and time"),
        ("heartrate", {"timestamp": 1773512405}, "timestamp: expected an ISO 8601 date and time"),
        ("heartrate", {"end": "canary"}, "end: expected an ISO 8601 date and time"),
        ("heartrate", {"unit": 1}, "heartrate: unit: expected text"),
        ("heartrate", {"timezone_offset": "3600"}, "heartrate: timezone_offset: expected seconds"),
        ("heartrate", {"timezone_offset": 1.5}, "heartrate: timezone_offset: expected seconds"),
        ("heartrate", {"timezone_offset": True}, "heartrate: timezone_offset: expected seconds"),
        ("heartrate", {"timezone_offset": 86_401}, "heartrate: timezone_offset: expected seconds"),
        ("cholesterol", {"type": 1}, "type: expected text"),
        ("blood_pressure", {"systolic": 120}, "blood_pressure: diastolic: expected a number"),
        ("note", {"value": 1}, "note: value: expected text"),
    ],
)
def test_a_sample_that_does_not_fit_says_why(resource: str, changes: dict[str, Any], reason: str) -> None:
    """Breaks if a wrong type reaches the database, or the dead letter's reason quotes a value."""
    assert dead(series(resource, sample(**changes))) == reason


@pytest.mark.parametrize("data", [None, [], "canary", {"data": None}, {"data": {}}, {"data": ["canary"]}])
def test_a_group_that_is_none_says_so(data: Any) -> None:
    """Breaks if a timeseries event of another form raises something else."""
    assert dead(event("daily.data.heartrate.created", "u1", data)).startswith(
        "heartrate: data is not a group of samples"
    )


def test_a_group_without_samples_does_nothing() -> None:
    """Breaks if an empty group is a dead letter, or counted as left out."""
    found = parsed(series("heartrate"))
    assert (found.actions, found.ignored) == ((), None)


# Connections


@pytest.mark.parametrize(
    ("data", "provider"),
    [
        ({"provider": {"slug": "oura"}, "source": {"slug": "other"}}, "oura"),
        ({"provider": {"slug": ""}, "source": {"slug": "oura"}}, "oura"),
        ({"provider": None, "source": {"source_slug": "oura"}}, "oura"),
        ({"source": {"provider": "oura"}}, "oura"),
        ({"provider": "Oura"}, "oura"),
    ],
)
def test_the_provider_of_a_connection(data: dict[str, Any], provider: str) -> None:
    """Breaks if a provider is not found in one of the places where it stood over the years."""
    for name in ("created", "error"):
        assert only(event(f"provider.connection.{name}", "u1", data)).provider == provider


@pytest.mark.parametrize("data", [{}, {"provider": ""}, {"provider": {}}, {"source": {"name": "canary"}}, None, []])
def test_a_connection_without_a_provider_is_a_dead_letter(data: Any) -> None:
    """Breaks if a connection with nobody is stored."""
    assert dead(event("provider.connection.created", "u1", data)).startswith("connection: ")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"error_type": "user_not_found", "error_details": "gone"}, "user_not_found: gone"),
        ({"error_type": "of_tomorrow"}, "of_tomorrow"),
        ({"error_type": None, "error_details": "gone"}, "gone"),
        ({}, "unknown"),
    ],
)
def test_the_error_of_a_connection(fields: dict[str, Any], error: str) -> None:
    """Breaks if an error has no text, or a type that was added since is refused."""
    assert only(event("provider.connection.error", "u1", {"provider": "oura"} | fields)).error == error


# Notices of history


@pytest.mark.parametrize(
    ("given", "final"),
    [({}, True), ({"is_final": None}, True), ({"is_final": True}, True), ({"is_final": False}, False)],
)
def test_is_final(given: dict[str, Any], *, final: bool) -> None:
    """Breaks if a notice of today, which may lack the flag, never completes a backfill."""
    assert only(event("historical.data.sleep.created", "u1", {"provider": "oura"} | given)).is_final is final


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
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
    ],
)
def test_windows(edges: dict[str, Any], expected: tuple[datetime | None, datetime | None]) -> None:
    """Breaks if a missing edge fails, an inverted window stays so, or naive and aware edges cannot be compared."""
    notice = only(event("historical.data.sleep.created", "u1", {"provider": "oura"} | edges))
    assert (notice.window_start, notice.window_end) == expected


@pytest.mark.parametrize("edge", ["soon", "0000-00-00T00:00:00Z", 1773512405])
def test_an_absurd_window_means_the_default_range(edge: Any) -> None:
    """Breaks if a window that cannot be read costs a user their history."""
    data = {"provider": "oura", "start_date": edge, "end_date": MOMENT}
    assert only(event("historical.data.sleep.created", "u1", data)).window_start is None


@pytest.mark.parametrize(
    ("provider", "slug"), [("oura", "oura"), ("OURA", "oura"), ({"slug": "oura"}, "oura"), (None, ""), ("", "")]
)
def test_the_provider_of_a_notice(provider: Any, slug: str) -> None:
    """Breaks if history is asked for under a name that the API does not know."""
    assert only(event("historical.data.sleep.created", "u1", {"provider": provider})).provider == slug


# What the operator does not want


@pytest.mark.parametrize("body", [workout("u1"), RECORDED["today_historical_workouts"]])
@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        (Settings(resources=("workouts",)), True),
        (Settings(resources=("sleep",)), False),
        (Settings(providers=("garmin", "apple_health_kit")), True),
        (Settings(providers=("oura",)), False),
    ],
)
def test_what_is_not_wanted_is_left_out(body: dict[str, Any], choice: Settings, *, kept: bool) -> None:
    """Breaks if data that the operator did not ask for is stored or fetched, or left out without a word."""
    found = parsed(body, choice)
    assert bool(found.actions) is kept
    assert found.ignored == (None if kept else "left out by HEADRACE_RESOURCES or HEADRACE_PROVIDERS")


@pytest.mark.parametrize(
    "choice",
    [Settings(resources=("workouts",)), Settings(providers=("garmin",))],
    ids=["one resource", "another provider"],
)
def test_a_connection_is_always_kept(choice: Settings) -> None:
    """Breaks if choosing resources or providers hides who is connected with what."""
    body = event("provider.connection.created", "u1", {"provider": {"slug": "oura", "name": "Oura", "logo": ""}})
    assert len(parsed(body, choice).actions) == 1


# Whatever comes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def survives(body: bytes) -> None:
    """Parses, or refuses as it should: any other error is one."""
    try:
        found = parsed(body)
    except Unprocessable:
        return
    assert found.ignored or found.user_id


@given(data=st.data(), name=st.sampled_from(sorted(RECORDED)), value=JSON)
def test_no_value_in_any_place_raises(data: st.DataObject, name: str, value: Any) -> None:
    """Breaks if a value of an unexpected type, anywhere in a real event, raises what no worker expects."""
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
    """Breaks if a body that is no JSON, or another, raises what no worker expects."""
    body = json.dumps(RECORDED[name])
    position %= len(body)
    survives((body[:position] + junk + body[position + len(junk) :]).encode())
    survives(body[:position].encode())


@pytest.mark.parametrize(
    "body",
    [
        b'{"event_type":"daily.data.sleep.created","user_id":"u1","data":{"id":"\x80"}}',
        b'{"event_type":"daily.data.sleep.created","data":{"user_id":"\x80","id":"1"}}',
        b'{"event_type":"\x80","user_id":"u1","data":{}}',
    ],
)
def test_bytes_that_are_no_text_are_a_dead_letter(body: bytes) -> None:
    """Breaks if bytes that are not UTF-8 raise what no worker expects."""
    with pytest.raises(Unprocessable):
        parse(delivery(body), body, Settings())


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" + "0" * 6000, "NaN", "9223372036854775808", "1e-400"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(heartrate("u1", {0: 70}), id="value"),
        pytest.param(series("heartrate", sample(more=70)), id="extra"),
        pytest.param(series("heartrate", sample(timezone_offset=70)), id="offset"),
        pytest.param(workout("u1", distance=70), id="record"),
    ],
)
def test_no_number_raises(body: dict[str, Any], number: str) -> None:
    """Breaks if a number that no float holds raises what no worker expects."""
    survives(json.dumps(body).replace("70", number).encode())


@pytest.mark.parametrize("body", [heartrate("u1", {0: 70}), workout("u1", distance=70)], ids=["value", "record"])
def test_an_integer_that_no_float_holds_does_not_raise(body: dict[str, Any]) -> None:
    """Breaks if an integer of four hundred digits raises what no worker expects."""
    survives(json.dumps(body).replace("70", "7" * 400).encode())


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-03-14T24:00:00Z"])
def test_no_time_raises(moment: str) -> None:
    """Breaks if a time at the edge of what can be told raises what no worker expects."""
    survives(msgspec.json.encode(series("steps", sample(timestamp=moment, end=moment))))
    survives(msgspec.json.encode(workout("u1", updated_at=moment)))
    survives(
        msgspec.json.encode(event("historical.data.sleep.created", "u1", {"start_date": moment, "end_date": MOMENT}))
    )


# Plain samples, which are decoded in another way

PLAIN = [resource for resource in catalogue().values() if resource.kind == "timeseries" and not resource.fields]
ODD: dict[str, list[Any]] = {
    "timestamp": [MOMENT, "2026-03-14T06:30:00.1234567Z", "2026-03-14", "20260314T063000Z", "", None, 5, "never"],
    "start": [MOMENT, None, ""],
    "end": [MOMENT, None, "", 3],
    "value": [1, 1.5, -0.0, 2**70, True, None, "1", [1]],
    "unit": ["x", "", None, 7],
    "timezone_offset": [0, -3600, 86_401, 3600.0, True, None, "0"],
    "id": [1, "1", None],
    "type": ["a", "", None, 4],
    "intensity": ["low", None, 1],
    "grouping": [{"a": 1}, None],
}
items = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in ODD.items()}).map(
    lambda item: {"timestamp": MOMENT, "value": 1} | item
)


@given(st.sampled_from(PLAIN), st.lists(items, max_size=3), st.sampled_from(["watch", "a/b", None]))
def test_plain_samples_mean_what_any_others_do(
    resource: Resource, data: list[dict[str, Any]], kind: str | None
) -> None:
    """Breaks if the quick way to read samples stores another value, moment or series, or refuses less."""
    body = msgspec.json.encode({"source": {"provider": "garmin", "type": kind, "device_id": "d"}, "data": data})
    try:
        quick = msgspec.json.decode(body, type=plain(resource))
    except msgspec.ValidationError:
        return  # which is read in the other way then
    slow = msgspec.json.decode(body, type=SampleGroup)

    def meant(group: SampleGroup) -> Any:
        duplicate_samples: list[int] = []
        try:
            return list(samples(resource, "u1", group, START, duplicate_samples)), duplicate_samples
        except Unprocessable as reason:
            return str(reason)

    assert meant(quick) == meant(slow)


def test_samples_as_they_come_every_day_are_plain() -> None:
    """Breaks if the quick way is never taken."""
    for resource in PLAIN:
        data = [sample(timezone_offset=0, type=None), {"start": MOMENT, "end": MOMENT, "value": 2.5, "unit": ""}]
        body = msgspec.json.encode({"source": {"provider": "garmin"}, "data": data})
        assert len(msgspec.json.decode(body, type=plain(resource)).data) == 2, resource.name
