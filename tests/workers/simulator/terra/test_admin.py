"""The simulated Admin API of Terra."""

from datetime import UTC, datetime, timedelta

import pytest

from tests.support import TERRA_SECRET
from tests.support.simulated import KEYS, Endpoint
from workers.simulator.terra import events
from workers.simulator.terra.admin import PREFIX, TOKEN
from workers.simulator.terra.api import DEV_ID
from workers.simulator.terra.sender import TerraSender


class Admin:
    """Sends requests to the Admin API of a world, with the token."""

    def __init__(self, api):
        self.terra, self.state, self.client = api.terra, api.admin, api.client

    def get(self, path, headers=None, **query):
        headers = {"Authorization": f"Bearer {TOKEN}"} if headers is None else headers
        return self.client.get(PREFIX + path, query_string=query, headers=headers)

    def of(self, part="events", dev_id=DEV_ID, **query):
        return self.get(f"/environments/{dev_id}/{part}", **query)

    def rows(self, **query):
        return self.of(**query).json["data"]

    def end(self, *statuses, provider="OURA", name="sleep"):
        """Ends a delivery of this type with each of these statuses."""
        account = next(one for one in self.terra.accounts() if one.provider.slug == provider)
        kind = next(one for one in self.terra.kinds(account) if one.name == name)
        for status in statuses:
            self.state.record(events.data(self.terra, account, kind), status)
        return account


@pytest.fixture
def admin(api):
    return Admin(api)


def test_the_token_is_required(admin):
    """Breaks if the Admin API accepts no token, a wrong one, or the keys of the read API."""
    for headers in ({}, {"Authorization": "Bearer terra_at_other"}, KEYS):
        refused = admin.get("/me", headers)
        assert (refused.status_code, refused.json["code"]) == (401, "unauthorized")
        assert refused.content_type == "application/problem+json"
    assert admin.get("/me").json["expires_at"] == admin.state.expires_at.isoformat()


def test_a_missing_scope_and_an_unknown_environment_are_named(admin):
    """Breaks if a client cannot tell a missing scope or an unknown environment from a missing path."""
    assert admin.of(dev_id="other").json["code"] == "dev_id_not_found"
    admin.state.scopes = {"connections:read"}
    refused = admin.of()
    assert (refused.status_code, refused.json["code"]) == (403, "scope_missing")
    assert "events:read" in refused.json["detail"]
    assert admin.of("users").status_code == 200
    admin.state.scopes = {"events:read"}
    assert "connections:read" in admin.of("users").json["detail"]


def test_only_one_path_of_deliveries_is_served(admin):
    """Breaks if a client that knows one of the two paths passes its tests."""
    for segment, other, time in (
        ("events", "webhook-events", "created_at"),
        ("webhook-events", "events", "sent_at"),
    ):
        admin.state.segment = segment
        admin.end(503)
        assert time in admin.of(segment).json["data"][0]
        assert (admin.of(other).status_code, admin.of(other).json["code"]) == (404, "not_found")


def test_deliveries_are_filtered(admin):
    """Breaks if a filter of the deliveries is ignored."""
    oura = admin.end(202, 503, 0)
    garmin = admin.end(500, provider="GARMIN", name="daily")
    assert [row.get("http_status") for row in admin.rows()] == [500, None, 503, 202]
    assert [row.get("http_status") for row in admin.rows(outcome="failed")] == [500, None, 503]
    assert [row["http_status"] for row in admin.rows(outcome="delivered")] == [202]
    assert len(admin.rows(provider="oura")) == len(admin.rows(data_type="sleep")) == 3
    assert len(admin.rows(user_id=oura.user_id)) == 3
    assert [row["data_type"] for row in admin.rows(reference_id=garmin.person.client_user_id)] == ["daily"]
    now = datetime.now(UTC)
    assert admin.rows(since=(now + timedelta(minutes=1)).isoformat()) == []
    assert admin.rows(until=(now - timedelta(minutes=1)).isoformat()) == []
    assert admin.of(user_id="nobody").status_code == 404
    assert admin.of(since="lately").status_code == 400


def test_no_row_names_a_user(admin):
    """Breaks if a client that expects the user in the rows passes its tests."""
    account = admin.end(503)
    assert account.user_id not in admin.of().text
    assert account.person.client_user_id not in admin.of().text


def test_pages_end_with_a_null_cursor(admin):
    """Breaks if a client that ignores the cursor passes its tests, or new rows shift the pages."""
    admin.end(*[503] * 5)
    first = admin.of(limit=2).json
    admin.end(503)
    second = admin.of(limit=2, cursor=first["next_cursor"]).json
    third = admin.of(limit=2, cursor=second["next_cursor"]).json
    found = [row["event_id"] for page in (first, second, third) for row in page["data"]]
    assert len(found) == len(set(found)) == 5
    assert [page["has_more"] for page in (first, second, third)] == [True, True, False]
    assert third["next_cursor"] is None


def test_users_have_the_time_of_their_newest_data(admin):
    """Breaks if a user has no time of its newest data, or it does not move with new data."""
    account = admin.end(202)
    (row,) = admin.of("users", user_id=account.user_id).json["data"]
    assert (row["provider"], row["active"]) == ("oura", True)
    assert row["most_recent_data_at"] == admin.terra.newest(account).isoformat()
    assert len(admin.of("users").json["data"]) == len(admin.terra.accounts())


def test_the_sender_reports_each_delivery_once(admin):
    """Breaks if attempts are listed instead of deliveries, or a delivery that arrived counts as failed."""
    account = next(one for one in admin.terra.accounts() if one.provider.slug == "OURA")
    with (
        Endpoint(lambda *_: None) as endpoint,
        TerraSender(endpoint.url, TERRA_SECRET, waits=(0.01, 0.01), ended=admin.state.record) as sender,
    ):
        endpoint.answers = [503, 503, 503, 503, 202]
        for _ in range(2):
            sender.send(events.athlete(admin.terra, account))
    assert [row["http_status"] for row in admin.rows()] == [202, 503]
    assert [row["data_type"] for row in admin.rows(outcome="failed")] == ["athlete"]


def test_a_delivery_with_a_url_has_the_type_of_its_event(admin):
    """Breaks if a delivery by URL is listed without its user or type."""
    account = next(one for one in admin.terra.accounts() if one.provider.slug == "OURA")
    admin.state.record(events.by_url(admin.terra, events.athlete(admin.terra, account), "http://simulator"), 503)
    assert [row["data_type"] for row in admin.rows(user_id=account.user_id)] == ["athlete"]
