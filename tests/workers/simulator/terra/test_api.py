"""The simulated Terra API: windows, refusals, limits, faults, data as webhooks, and sessions."""

from datetime import timedelta

import pytest

from tests.support.simulated import KEYS, UNTIL
from workers.simulator.terra.objects import KINDS

START = (UNTIL - timedelta(days=5)).date().isoformat()


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if not kind.path])
def test_every_type_answers_in_its_form(api, kind):
    """Breaks if a response differs from Terra's form, or lacks the objects of the window."""
    account = (
        next(one for one in api.terra.accounts() if kind in api.terra.kinds(one) and one.provider.slug != "GARMIN")
        if kind.name != "menstruation"
        else api.account("GARMIN")
    )
    api.get(kind.name, account, start_date=START)
    answer = api.get(kind.name, account, start_date=START)
    assert answer.status_code == 200
    assert set(answer.json) == {"type", "user", "data"}
    assert answer.json["type"] == kind.name
    assert answer.json["data"]
    user = answer.json["user"]
    assert (user["user_id"], user["provider"]) == (account.user_id, account.provider.slug)
    assert user["reference_id"] == account.person.client_user_id


def test_profiles_and_plans_have_separate_forms(api):
    """Breaks if these two respond with an array in `data`."""
    account = api.account("GARMIN")
    athlete = api.get("athlete", account).json
    assert set(athlete) == {"type", "user", "athlete"}
    planned = api.get("plannedWorkouts", account).json
    days = [one["planned_date"] for one in planned]
    assert len(days) > 3
    assert [
        one["planned_date"] for one in api.get("plannedWorkouts", account, start_date=days[1], end_date=days[2]).json
    ] == days[1:3]


def test_the_end_of_a_window_does_not_belong_to_it(api):
    """Breaks if the end is inclusive: a client that misses a day at Terra would not miss it here."""
    account = api.account("OURA")
    one, two = ("2026-11-16", "2026-11-17")
    (first,) = api.get("daily", account, start_date="2026-11-16T"[:10], end_date=two).json["data"][-1:]
    assert first["metadata"]["start_time"][:10] == one
    assert api.get("daily", account, start_date="2026-11-30", end_date="2026-12-01").json["data"] == []


def test_unix_seconds_are_accepted(api):
    """Breaks if a window cannot be a part of a day."""
    account = api.account("OURA")
    edges = [int((UNTIL - timedelta(days=days)).timestamp()) for days in (4, 2)]
    by_seconds = api.get("sleep", account, start_date=edges[0], end_date=edges[1]).json["data"]
    assert 2 <= len(by_seconds) <= 3


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ({}, "missing start_date"),
        ({"start_date": "yesterday"}, "invalid start_date"),
        ({"start_date": "2026-13-01"}, "invalid start_date"),
        ({"start_date": START, "end_date": "1"}, "invalid end_date"),
        ({"start_date": START, "end_date": "2020-01-01"}, "start_date is after end_date"),
        ({"start_date": START, "user_id": ""}, "missing user_id"),
    ],
)
def test_a_wrong_request_is_refused_in_terras_form(api, query, detail):
    """Breaks if a request is accepted that Terra would refuse, or the error is not in the form of RFC 9457."""
    answer = api.get("daily", api.account("OURA"), **query)
    assert (answer.status_code, answer.content_type) == (400, "application/problem+json")
    assert set(answer.json) == {"type", "title", "instance", "detail"}
    assert answer.json["detail"] == detail
    assert answer.json["instance"].startswith("/v2/daily?")


@pytest.mark.parametrize("missing", KEYS)
def test_both_keys_are_needed(api, missing):
    """Breaks if one of the two keys is enough, or Junction's key is accepted."""
    wrong = [{**KEYS, missing: "wrong"}, {name: key for name, key in KEYS.items() if name != missing}]
    for headers in [*wrong, {"X-Vital-API-Key": "sk_us_test"}]:
        answer = api.client.get("/v2/daily", headers=headers)
        assert (answer.status_code, answer.json["title"]) == (401, "unauthorized")


def test_an_unknown_or_closed_account_is_not_found(api):
    """Breaks if a closed account looks like one without data."""
    account = api.account("OURA")
    assert api.get("daily", account, start_date=START, user_id="nobody").status_code == 404
    api.terra.close(account)
    assert api.get("daily", account, start_date=START).json["detail"] == "user not found"


def test_the_first_call_of_a_garmin_account_brings_no_data(api):
    """Breaks if a client that treats `processing` as an empty window passes its tests."""
    account = api.account("GARMIN")
    first = api.get("daily", account, start_date=START)
    assert (first.status_code, first.json["type"]) == (200, "processing")
    assert first.json["retry_after_seconds"] > 0
    assert api.get("daily", account, start_date=START).json["data"]


def test_processing_can_be_asked_for(api):
    """Breaks if a test cannot make an account wait."""
    account = api.account("OURA")
    api.faults.add("processing", where=account.user_id, times=2, seconds=30)
    other = next(one for one in api.terra.accounts() if one.provider.slug == "WITHINGS")
    assert api.get("sleep", other, start_date=START).json["data"]
    answers = [api.get("daily", account, start_date=START).json for _ in range(3)]
    assert [one.get("retry_after_seconds") for one in answers] == [30, 30, None]


def test_a_window_that_is_too_large_is_413(api):
    answer = api.get("daily", api.account("OURA"), start_date="2026-01-01")
    assert (answer.status_code, answer.json["title"]) == (413, "request entity too large")


def test_more_than_five_years_at_once_is_a_429_without_a_time(api):
    """Breaks if a client that retries, instead of requesting less, passes its tests."""
    answer = api.get("daily", api.account("OURA"), start_date="2020-01-01")
    assert (answer.status_code, answer.headers["X-Terra-RateLimit-Rule"]) == (429, "r1")
    assert "Retry-After" not in answer.headers


def test_six_thousand_days_an_hour_are_what_one_account_has(api, clock):
    """Breaks if accounts share the limit, it does not recover after an hour, or Retry-After is wrong."""
    account = api.account("OURA")

    def ask(who=account):
        return api.get("daily", who, start_date="2021-12-01", end_date="2026-11-01", to_webhook="true")

    answers = [ask() for _ in range(3)]
    clock[0] += 600
    refused = ask()
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].headers["X-Terra-RateLimit-Limit"] == "6000"
    left = [int(answer.headers["X-Terra-RateLimit-Remaining"]) for answer in answers]
    assert left[0] - left[1] == left[1] - left[2] == 6000 - left[0]
    assert (refused.status_code, refused.headers["X-Terra-RateLimit-Rule"]) == (429, "r2")
    assert refused.headers["Retry-After"] == "3000"
    assert refused.json == {"detail": "rate limit exceeded"}
    assert ask(api.account("WITHINGS")).status_code == 200
    clock[0] += 3000
    assert ask().status_code == 200


@pytest.mark.parametrize("kind", ["400", "429", "500", "503", "504"])
def test_faults_have_terras_form(api, kind):
    """Breaks if faults do not apply to Terra, or have Junction's form."""
    api.faults.add(kind, where="/v2/daily", times=1, retry_after=7)
    account = api.account("OURA")
    assert api.get("sleep", account, start_date=START).status_code == 200
    failed = api.get("daily", account, start_date=START)
    assert (failed.status_code, failed.content_type) == (int(kind), "application/problem+json")
    assert failed.headers["Retry-After"] == "7"
    assert api.get("daily", account, start_date=START).status_code == 200


def test_data_requested_as_webhooks_is_sent_as_an_event(api):
    """Breaks if the response has data, or the event has another reference than the response."""
    account = api.account("OURA")
    answer = api.get("sleep", account, start_date=START, to_webhook="true").json
    assert (answer["status"], answer["type"], answer["reference"]) == ("success", "sleep", answer["trace_id"])
    assert not {"data", "message"} & set(answer)
    (event,) = api.terra.pending()
    assert (event.reference, event.event["type"]) == (answer["reference"], "sleep")
    assert event.event["data"] == api.get("sleep", account, start_date=START).json["data"]


def test_a_large_request_is_sent_in_chunks_of_one_reference(api):
    """Breaks if a receiver that treats chunks with one reference as duplicates passes its tests."""
    account = api.account("OURA")
    answer = api.get("sleep", account, start_date="2026-10-01", to_webhook="true").json
    processing, sending, *chunks = api.terra.pending()
    assert "chunks" in answer["message"]
    assert {one.reference for one in (processing, sending, *chunks)} == {answer["reference"]}
    assert [processing.event["type"], sending.event["type"]] == ["large_request_processing", "large_request_sending"]
    assert sending.event["expected_payloads"] == len(chunks) > 1
    assert len({one.trace_id for one in chunks}) == len(chunks)
    assert max(len(one.event["data"]) for one in chunks) == 10


def test_data_is_sent_as_webhooks_by_default(api):
    """Breaks if the default of to_webhook is not true, as at Terra."""
    answer = api.client.get(
        "/v2/sleep", query_string={"user_id": api.account("OURA").user_id, "start_date": START}, headers=KEYS
    )
    assert "reference" in answer.json


def test_opening_a_session_connects_the_user(api):
    """Breaks if opening a session connects no user, or another one."""
    session = api.post("/v2/auth/generateWidgetSession", {"reference_id": "newcomer", "providers": "OURA,GARMIN"}).json
    assert set(session) == {"status", "session_id", "url", "expires_in"}
    choice = api.client.get(session["url"]).json["choose"]
    assert set(choice) == {"OURA", "GARMIN"}
    assert api.client.get(choice["OURA"]).json == {"connected": "OURA"}
    auth, athlete = api.terra.pending()
    assert auth.event["user"]["reference_id"] == "newcomer"
    assert [auth.event["type"], athlete.event["type"]] == ["auth", "athlete"]
    account = api.terra.account(auth.event["user"]["user_id"])
    assert api.get("sleep", account, start_date=START).json["data"]


@pytest.mark.parametrize("body", [{"reference_id": "m", "providers": "OURAH"}, [], {"reference_id": 7}])
def test_a_session_for_nothing_is_refused(api, body):
    """Breaks if a body is accepted that Terra would refuse."""
    assert api.post("/v2/auth/generateWidgetSession", body).status_code == 400


def test_an_incident_of_an_account_is_sent(api):
    oura = api.account("OURA")

    def befall(kind, user_id):
        return api.client.post("/simulate/terra", json={"kind": kind, "user_id": user_id}).status_code

    assert befall("connection_error", oura.user_id) == 201
    assert befall("reauth", oura.user_id) == 201
    broken, reauth, auth = api.terra.pending()
    assert broken.event["type"] == "connection_error"
    assert reauth.event["old_user"]["user_id"] == oura.user_id
    renewed = reauth.event["new_user"]["user_id"]
    assert auth.event["user"]["user_id"] == renewed
    assert befall("deauth", renewed) == 201
    (deauth,) = api.terra.pending()
    assert (deauth.event["type"], deauth.event["user"]["active"]) == ("deauth", False)
    assert befall("deauth", renewed) == 404
    assert befall("eaten", renewed) == 400
