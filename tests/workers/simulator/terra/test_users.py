"""Terra's routes about accounts: connecting, reading and disconnecting them."""

import pytest

from tests.support.simulated import KEYS, UNTIL
from tests.workers.simulator.schemas import errors_of


def ask(api, method, path, **options):
    return api.client.open(f"/v2{path}", method=method, headers=KEYS, **options)


def checked(api, method, path, **options):
    """The body of a successful response that has the public form."""
    answer = ask(api, method, path, **options)
    assert answer.status_code == 200
    assert errors_of("terra", f"{method} {path}", answer.json) == []
    return answer.json


def test_authenticating_leads_to_a_link_and_to_the_account_it_names(api):
    """Breaks if the account has another id than the response, or the link connects more than one provider."""
    query = {"resource": "OURA"}
    body = checked(api, "POST", "/auth/authenticateUser", query_string=query, json={"reference_id": "newcomer"})

    assert set(body) == {"status", "user_id", "auth_url"}
    assert ask(api, "GET", "/userInfo", query_string={"user_id": body["user_id"]}).status_code == 404
    assert api.client.get(body["auth_url"]).json == {"connected": "OURA"}
    assert api.terra.pending()[0].event["user"]["user_id"] == body["user_id"]
    user = checked(api, "GET", "/userInfo", query_string={"user_id": body["user_id"]})["user"]
    assert user["reference_id"] == "newcomer"
    again = checked(api, "POST", "/auth/authenticateUser", query_string=query, json={"reference_id": "newcomer"})
    assert again["user_id"] == body["user_id"]


@pytest.mark.parametrize("query", [{}, {"resource": "OURAH"}])
def test_authenticating_with_no_known_provider_is_refused(api, query):
    answer = ask(api, "POST", "/auth/authenticateUser", query_string=query)
    assert answer.status_code == 400
    assert errors_of("terra", "error", answer.json) == []


def test_a_widget_session_and_a_token_have_the_public_form(api):
    session = checked(api, "POST", "/auth/generateWidgetSession", json={"reference_id": "m"})
    assert set(api.client.get(session["url"]).json["choose"]) > {"OURA", "GARMIN"}
    assert checked(api, "POST", "/auth/generateAuthToken")["expires_in"] == 180


def test_disconnecting_closes_the_account_and_is_announced(api):
    """Breaks if the data of a disconnected account is still served, or no `deauth` follows."""
    account = api.account("OURA")
    query = {"user_id": account.user_id}

    assert checked(api, "DELETE", "/auth/deauthenticateUser", query_string=query) == {"status": "success"}

    (event,) = api.terra.pending()
    assert (event.event["type"], event.event["user"]["user_id"]) == ("deauth", account.user_id)
    assert api.get("daily", account, start_date="2026-11-15").status_code == 404
    assert ask(api, "DELETE", "/auth/deauthenticateUser", query_string=query).status_code == 404
    assert ask(api, "DELETE", "/auth/deauthenticateUser").status_code == 400


def test_an_account_is_read_by_its_id_and_a_users_accounts_by_reference(api):
    """Breaks if an account has no time of its newest data, or a reference id finds one account only."""
    account = api.account("OURA")
    one = checked(api, "GET", "/userInfo", query_string={"user_id": account.user_id})
    reference = {"reference_id": account.person.client_user_id}

    assert one["is_authenticated"]
    assert one["user"]["most_recent_data_at"] < UNTIL.isoformat()
    assert len(checked(api, "GET", "/userInfo", query_string=reference)) == 2
    for query, status in (({}, 400), ({"user_id": "nobody"}, 404), ({"reference_id": "nobody"}, 404)):
        assert ask(api, "GET", "/userInfo", query_string=query).status_code == status


def test_several_accounts_are_read_at_once(api):
    ids = [account.user_id for account in api.terra.accounts()][:3]
    found = checked(api, "POST", "/bulkUserInfo", json=[*ids, "nobody"])
    assert [user["user_id"] for user in found] == ids
    assert ask(api, "POST", "/bulkUserInfo", json=["nobody"]).status_code == 404
    assert ask(api, "POST", "/bulkUserInfo", json={}).status_code == 400


def test_all_accounts_are_listed_whole_or_in_pages(api):
    """Breaks if the pages miss or repeat an account, or do not end."""
    ids = [account.user_id for account in api.terra.accounts()]
    assert [user["user_id"] for user in checked(api, "GET", "/subscriptions")["users"]] == ids
    read, page = [], 0
    while page is not None:
        body = checked(api, "GET", "/subscriptions", query_string={"page": page, "per_page": 5})["data"]
        assert body["max_page"] == 2
        read += [user["user_id"] for user in body["results"]]
        page = body["next"]
    assert read == ids
    for query in ({"page": "x"}, {"page": 0, "per_page": 0}):
        assert ask(api, "GET", "/subscriptions", query_string=query).status_code == 400


def test_the_integrations_are_listed(api):
    names = checked(api, "GET", "/integrations")["providers"]
    detailed = checked(api, "GET", "/integrations/detailed")["providers"]
    assert [one["provider"] for one in detailed] == names
    assert {one["provider"] for one in detailed if one["types"]["nutrition"]} == {"MYFITNESSPAL"}


def test_a_plan_is_read_by_an_id_of_its_own(api):
    """Breaks if two accounts have a plan of one id, or a plan cannot be read alone."""
    plans = [
        plan
        for account in api.terra.accounts()
        if account.provider.slug == "GARMIN"
        for plan in checked(api, "GET", "/plannedWorkouts", query_string={"user_id": account.user_id})
    ]
    ids = [plan["planned_workout_id"] for plan in plans]
    assert len(ids) == len(set(ids)) > 8
    one = ask(api, "GET", f"/plannedWorkouts/{ids[-1]}").json
    assert errors_of("terra", "GET /plannedWorkouts/{planned_workout_id}", one) == []
    assert {plans[-1][name] for name in one} == set(one.values())
    assert ask(api, "GET", "/plannedWorkouts/none").status_code == 404


def test_the_older_path_of_plans_has_an_envelope(api):
    """Breaks if Terra's SDKs, which use the older path, are refused."""
    account = api.account("GARMIN")
    old, new = (api.get(path, account).json for path in ("plannedWorkout", "plannedWorkouts"))
    assert (old["type"], old["data"]) == ("planned_workout", new)


def test_an_account_is_renamed_and_closed(api):
    """Breaks if a new reference id changes the account's data, or a closed account is still served."""
    account = api.account("OURA")
    path, window = f"/users/{account.user_id}", {"start_date": "2026-11-15", "to_webhook": "false"}
    before = api.get("daily", account, **window).json["data"]

    renamed = ask(api, "PATCH", path, json={"reference_id": "renamed"}).json["user"]
    assert (renamed["user_id"], renamed["reference_id"]) == (account.user_id, "renamed")
    assert api.get("daily", api.account("OURA"), **window).json["data"] == before != []
    assert ask(api, "PATCH", path, json={"active": False}).json["user"]["active"] is False
    assert ask(api, "PATCH", path, json={"reference_id": "x"}).status_code == 404
