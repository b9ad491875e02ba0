"""Users of the simulated Junction: creating them, and connecting providers."""

from datetime import UTC, datetime, timedelta
from itertools import islice

import pytest

from app.catalogue import catalogue
from tests.support.simulated import KEY
from tests.workers.simulator.schemas import errors_of
from workers.simulator import live_events
from workers.simulator.events import supplied
from workers.simulator.people import zone_of

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


def test_a_user_without_offsets_has_a_fallback_zone(make_api):
    """Breaks if no one can see, without an account, what the zone of a user is for."""
    api, zones = make_api(users=5), {}
    for user in api.world.members:
        zone = api.get(f"/v2/user/{user.user_id}").json["fallback_time_zone"]
        zones[user.number] = zone and zone["id"]
    assert zones == {number: None if zone_of(number)[0] else "Europe/Lisbon" for number in zones}
    assert set(zones.values()) == {None, "Europe/Lisbon"}


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


def delete(api, path):
    return api.client.delete(path, headers={"X-Vital-API-Key": KEY})


def test_a_deleted_user_is_gone_and_can_be_restored_without_connections(api):
    """Breaks if a deleted user's data or stream is still served, or a restored user has other connections than none."""
    user = api.world.members[0]
    workout = api.of("workouts", start_date="2026-11-01").json["workouts"][0]["id"]
    stream = catalogue()["workout_stream"].path.format(workout_id=workout)
    assert api.get(stream).status_code == 200

    deleted = delete(api, f"/v2/user/{user.user_id}")

    assert (deleted.status_code, errors_of("junction", "DELETE /v2/user/{user_id}", deleted.json)) == (200, [])
    paths = (f"/v2/user/{user.user_id}", f"/v2/user/resolve/{user.client_user_id}", stream)
    assert [api.get(path).status_code for path in paths] == [404, 404, 404]
    assert api.get("/v2/user").json["total"] == 1
    assert user.user_id not in {event["user_id"] for event in islice(live_events(api.world), 30)}
    assert delete(api, f"/v2/user/{user.user_id}").status_code == 404
    restored = api.post("/v2/user/undo_delete", query_string={"client_user_id": user.client_user_id})
    assert errors_of("junction", "POST /v2/user/undo_delete", restored.json) == []
    assert api.get(paths[0]).json["connected_sources"] == []
    assert api.post("/v2/user/undo_delete", query_string={"user_id": user.user_id}).status_code == 404


def test_a_name_that_was_taken_again_cannot_be_restored(api):
    """Breaks if two users have one client_user_id, or a new user gets the id of a deleted one."""
    user = api.world.members[0]
    delete(api, f"/v2/user/{user.user_id}")
    again = make(api, user.client_user_id).json

    assert again["user_id"] not in {user.user_id, api.world.members[0].user_id}
    assert api.post("/v2/user/undo_delete", query_string={"user_id": user.user_id}).status_code == 404


@pytest.mark.parametrize("query", [{}, {"user_id": "a", "client_user_id": "b"}])
def test_undoing_needs_one_name(api, query):
    assert api.post("/v2/user/undo_delete", query_string=query).status_code == 422


def test_without_users_there_are_no_events(api):
    """Breaks if `headrace simulate` ends with an error after the last user is deleted."""
    for user in api.world.members:
        delete(api, f"/v2/user/{user.user_id}")
    assert list(live_events(api.world)) == []


def test_a_provider_can_be_deregistered_and_connected_again(api):
    """Breaks if a deregistered connection is still listed, or connecting again has no effect and no event."""
    user = api.world.members[0]
    path, slug = f"/v2/user/{user.user_id}", user.connections[0].provider.slug

    gone = delete(api, f"{path}/{slug}")

    assert errors_of("junction", "DELETE /v2/user/{user_id}/{provider}", gone.json) == []
    assert slug not in {one["provider"]["slug"] for one in api.get(path).json["connected_sources"]}
    assert delete(api, f"{path}/{slug}").status_code == 404
    api.client.get(token(api, user.user_id, provider=slug).json["link_web_url"])
    assert slug in {one["provider"]["slug"] for one in api.get(path).json["connected_sources"]}
    assert next(live_events(api.world))["data"]["provider"]["slug"] == slug


def test_the_providers_are_listed(api):
    """Breaks if the lists differ from the public API's form, or need a key that the public API does not ask for."""
    providers, links = api.get("/v2/providers").json, api.client.get("/v2/link/providers").json
    assert errors_of("junction", "GET /v2/providers", providers) == []
    assert errors_of("junction", "GET /v2/link/providers", links) == []
    assert [one["slug"] for one in providers] == [one["slug"] for one in links]
    assert [one["slug"] for one in api.get("/v2/providers", source_type="ring").json] == ["oura"]
    (ring,) = (one for one in providers if one["slug"] == "oura")
    assert set(ring["supported_resources"]) > {"sleep", "steps"}


def test_a_link_code_has_the_form_of_a_real_one(api):
    user_id = api.world.members[0].user_id
    made = api.post("/v2/link/code/create", query_string={"user_id": user_id}).json
    assert errors_of("junction", "POST /v2/link/code/create", made) == []
    left = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    for query, status in (({}, 422), ({"user_id": "nobody"}, 404), ({"user_id": user_id, "expires_at": "soon"}, 422)):
        assert api.post("/v2/link/code/create", query_string=query).status_code == status


@pytest.mark.parametrize("name", ["activity", "body", "devices", "profile", "sleep", "workouts"])
def test_raw_records_have_the_public_form(api, name):
    """Breaks if a raw record differs from the public API's form, or is of another window than the unified one."""
    resource = {"devices": "device"}.get(name, name)
    window = {"start_date": "2026-11-10", "end_date": "2026-11-15"}
    user_id = api.world.members[0].user_id

    raw = api.get(f"/v2/summary/{name}/{user_id}/raw", **window).json

    assert errors_of("junction", f"GET /v2/summary/{name}/{{user_id}}/raw", raw) == []
    unified = api.of(resource, **window).json
    records = unified.get(name, [unified]) if isinstance(unified, dict) else unified
    found = raw[name] if isinstance(raw[name], list) else [raw[name]]
    assert [one["data"] for one in found] == records != []


def test_raw_records_are_refused_like_others(api):
    user_id = api.world.members[0].user_id
    assert api.get(f"/v2/summary/activity/{user_id}/raw").status_code == 422
    assert api.get(f"/v2/summary/meal/{user_id}/raw").status_code == 404
    assert api.get("/v2/summary/activity/nobody/raw", start_date="2026-11-10").status_code == 404


def test_a_user_is_changed(api):
    """Breaks if a new name or zone is not read again, or a name is given to two users."""
    first, second = api.world.members
    path = f"/v2/user/{first.user_id}"

    def change(**fields):
        return api.client.patch(path, json=fields, headers={"X-Vital-API-Key": KEY}).status_code

    assert change(client_user_id="renamed", fallback_time_zone="Europe/Brussels", ingestion_start="2026-01-01") == 204
    user = api.get("/v2/user/resolve/renamed").json
    assert (user["user_id"], user["fallback_time_zone"]["id"]) == (first.user_id, "Europe/Brussels")
    assert change(client_user_id=second.client_user_id) == 400
    assert change(fallback_time_zone=None) == 204
    assert api.get(path).json == user | {"fallback_time_zone": None}
    assert change(client_user_id=7) == 422


def test_one_device_is_read(api):
    user_id = api.world.members[0].user_id
    devices = api.get(f"/v2/user/{user_id}/device").json
    assert [api.get(f"/v2/user/{user_id}/device/{one['id']}").json for one in devices] == devices
    assert api.get(f"/v2/user/{user_id}/device/none").status_code == 404


def test_a_sign_in_token_names_its_user(api):
    user_id = api.world.members[0].user_id
    assert api.post(f"/v2/user/{user_id}/sign_in_token").json["user_id"] == user_id
    assert api.post("/v2/user/nobody/sign_in_token").status_code == 404


def test_an_oauth_link_connects_the_provider_of_a_link_token(api):
    """Breaks if the link connects another provider or user, or is issued for a token that does not allow it."""
    user_id = make(api, "new").json["user_id"]
    given = token(api, user_id, filter_on_providers=["garmin", "oura"]).json["link_token"]

    def link(slug, link_token):
        return api.client.get(f"/v2/link/provider/oauth/{slug}", headers={"X-Vital-Link-Token": link_token})

    assert (link("strava", given).status_code, link("oura", "x").status_code) == (401, 401)
    assert link("ouraring", given).status_code == 422
    assert api.client.get(link("oura", given).json["oauth_url"]).json == {"connected": "oura"}
    sources = api.get(f"/v2/user/{user_id}").json["connected_sources"]
    assert [source["provider"]["slug"] for source in sources] == ["oura"]
