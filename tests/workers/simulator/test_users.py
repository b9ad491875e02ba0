"""Users of the simulated Junction: creating them, and connecting providers."""

from itertools import islice

import pytest

from workers.simulator import live_events
from workers.simulator.events import supplied

USER_FIELDS = {"user_id", "team_id", "client_user_id", "created_on", "connected_sources", "fallback_time_zone"}


def make(api, name):
    return api.post("/v2/user", json={"client_user_id": name})


def token(api, user_id, **more):
    return api.post("/v2/link/token", json={"user_id": user_id, **more})


def test_a_user_is_made_once_and_found_by_name(api):
    """Breaks if creating a user twice makes two, or the error does not name the existing one."""
    made = make(api, "team/7").json

    conflict = make(api, "team/7")

    assert set(made) == USER_FIELDS
    assert made["connected_sources"] == []
    assert conflict.status_code == 400
    assert set(conflict.json["detail"]) == {"error_type", "error_message", "user_id", "created_on"}
    assert conflict.json["detail"]["user_id"] == made["user_id"]
    assert api.get("/v2/user/resolve/team%2F7").json == made
    assert api.get("/v2/user/resolve/nobody").status_code == 404
    assert api.get("/v2/user").json["total"] == 3


@pytest.mark.parametrize("body", [{}, {"client_user_id": 7}, []])
def test_a_user_without_a_name_is_refused(api, body):
    """Breaks if a request is accepted that Junction would refuse."""
    assert api.post("/v2/user", json=body).status_code == 422


def test_opening_a_link_connects_the_user_once(api):
    """Breaks if a link has no effect, works twice, or connects another provider."""
    user_id = make(api, "new").json["user_id"]
    link = token(api, user_id, filter_on_providers=["garmin", "oura"]).json["link_web_url"]

    choice = api.client.get(link)

    assert set(choice.json["choose"]) == {"garmin", "oura"}
    assert api.client.get(f"{link}/strava").status_code == 404
    assert api.client.get(choice.json["choose"]["garmin"]).json == {"connected": "garmin"}
    assert api.client.get(link).status_code == 404
    sources = api.get(f"/v2/user/{user_id}").json["connected_sources"]
    assert [source["provider"]["slug"] for source in sources] == ["garmin"]
    assert api.get(f"/v2/summary/sleep/{user_id}", start_date="2026-11-01").json["sleep"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("token", {"provider": "garmn"}),
        ("token", {"filter_on_providers": ["garmin", "x"]}),
        ("connect/demo", {"provider": "garmin"}),
        ("connect/demo", {}),
    ],
)
def test_unknown_providers_are_refused(api, route, body):
    """Breaks if a misspelt provider is accepted, which Junction would refuse."""
    user_id = api.world.members[0].user_id
    assert api.post(f"/v2/link/{route}", json={"user_id": user_id, **body}).status_code == 422


@pytest.mark.parametrize(("route", "body"), [("token", {}), ("connect/demo", {"provider": "oura"})])
def test_an_unknown_user_is_not_found(api, route, body):
    assert api.post(f"/v2/link/{route}", json={"user_id": "nobody", **body}).status_code == 404


def test_a_new_connection_is_announced_first_and_once(api):
    """Breaks if no event announces a user who connects while events are sent."""
    user_id = make(api, "new").json["user_id"]
    assert api.post("/v2/link/connect/demo", json={"user_id": user_id, "provider": "oura"}).json["success"]
    user = api.world.user(user_id)
    resources = supplied(user.connections[0])

    events = list(islice(live_events(api.world), len(resources) + 30))

    assert events[0]["event_type"] == "provider.connection.created"
    announced = [event["event_type"] for event in events if event["event_type"].startswith("historical")]
    assert announced == [f"historical.data.{resource.name}.created" for resource in resources]
    assert {event["client_user_id"] for event in events[: len(resources) + 1]} == {"new"}
    assert api.world.arrived() == []


def test_a_user_without_a_connection_has_no_events(api):
    """Breaks if a user without a connection ends the stream of events, or is in it."""
    make(api, "new")
    assert "new" not in {event["client_user_id"] for event in islice(live_events(api.world), 50)}
