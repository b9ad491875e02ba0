"""Introspection: the coverage that the read API has, and states that a test has set."""

from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from app.catalogue import catalogue
from workers.simulator.data import World
from workers.simulator.events import connection_error, supplied
from workers.simulator.introspection import extent
from workers.simulator.people import Query

PULLS, RESOURCES = "/v2/introspect/historical_pull", "/v2/introspect/resources"
UNTIL = datetime(2026, 11, 20, 12, 34, 56, tzinfo=UTC)


def moments_of(world, connection, resource, end):
    """The moment of every record or sample that the read API returns."""
    user = world.user(connection.user_id)
    query = Query(user, resource, world.start, end, connection.provider.slug)
    if resource.kind == "timeseries":
        return [datetime.fromisoformat(sample.body["timestamp"]) for sample in world.samples(query)]
    return [world.moment(slot) for slot in world.within(query)]


def one(api, path, user=0):
    """The introspection of a user's first connection."""
    member = api.world.members[user]
    slug = member.connections[0].provider.slug
    return api.get(path, user_id=member.user_id).json["data"][0]["provider"][slug]


@pytest.mark.parametrize("hour", [0, 1, 12, 23])
@pytest.mark.parametrize("days", [1, 2, 40])
def test_counts_match_the_data(days, hour, full):
    """Breaks if a number is estimated, for any resource, at either end of a window of any length."""
    if days == 40 and hour != 12 and not full:
        pytest.skip("the long window ends at one hour, and at each with --full")
    world = World(3, 2, UNTIL.replace(hour=hour), days)
    for connection in {each.provider.slug: each for user in world.members for each in user.connections}.values():
        for resource in supplied(connection):
            if days > 2 and resource.name == "heartrate":
                continue  # too many to count one by one
            moments = moments_of(world, connection, resource, world.until)
            found = extent(world, connection, resource, world.until)
            counted = (found.oldest, found.newest, found.count, found.days) if found else None
            exact = moments and (min(moments), max(moments), len(moments), len({each.date() for each in moments}))
            assert counted == (exact or None), resource.name


def test_counting_costs_the_same_for_ten_years(monkeypatch):
    """Breaks if every sample is generated."""
    world = World(1, 1, UNTIL, 3650)
    looked = []
    monkeypatch.setattr(world, "burst", lambda slot, real=world.burst: looked.append(slot) or real(slot))

    found = extent(world, world.members[0].connections[0], catalogue()["heartrate"], world.until)

    assert found.days == 3651
    assert found.count > 10**6
    assert len(looked) < 12


def test_a_pull_has_its_range_and_counts_and_ends_at_the_connection(api):
    """Breaks if a history pull grows with live data, or counts the days of another resource."""
    range_end = api.world.until.isoformat()
    api.world.until += timedelta(days=3)

    found, newest = one(api, PULLS), one(api, RESOURCES)

    assert found["not_pulled"] == []
    assert {name: pull["days_with_data"] for name, pull in found["pulled"].items() if name in ("hrv", "workouts")} == {
        "hrv": 21,
        "workouts": 10,
    }
    for pull in found["pulled"].values():
        assert (pull["status"], pull["error_details"]) == ("success", None)
        assert (pull["range_start"], pull["range_end"]) == (api.world.start.isoformat(), range_end)
        assert pull["timeline"] == dict.fromkeys(("scheduled_at", "started_at", "ended_at"), range_end)
    assert newest["hrv"]["newest_data"] > range_end


@pytest.mark.parametrize(
    ("status", "details", "expected", "reached"),
    [
        ("scheduled", None, None, []),
        ("in_progress", None, None, ["started_at"]),
        ("retrying", None, "provider_rate_limit_exceeded", ["started_at"]),
        ("retrying", "provider_unavailable", "provider_unavailable", ["started_at"]),
        ("failure", None, "non_retriable_error", ["started_at", "ended_at"]),
    ],
)
def test_one_pull_can_be_made_to_stand_otherwise(api, status, details, expected, reached):
    """Breaks if the setting has no effect, affects other pulls, or contradicts its timeline."""
    user = api.world.members[0]
    slug = user.connections[0].provider.slug
    named = {"user_id": user.user_id, "provider": slug, "resource": "sleep"}
    put = api.client.post("/simulate/pulls", json={"status": status, "error_details": details, **named})

    pulled = one(api, PULLS)["pulled"]

    assert put.status_code == 201
    assert (pulled["sleep"]["status"], pulled["sleep"]["error_details"]) == (status, expected)
    timeline = pulled["sleep"]["timeline"]
    assert [name for name in ("started_at", "ended_at") if timeline[name]] == reached
    assert pulled["sleep"]["days_with_data"] == (21 if reached else 0)
    assert {pull["status"] for name, pull in pulled.items() if name != "sleep"} == {"success"}
    assert one(api, PULLS, user=1)["pulled"]["sleep"]["status"] == "success"
    api.client.delete("/simulate/pulls")
    assert one(api, PULLS)["pulled"]["sleep"]["status"] == "success"


def test_resources_that_were_not_pulled_are_listed_separately(api):
    """Breaks if a resource is in both lists or in neither."""
    api.client.post("/simulate/pulls", json=[{"status": "failure"}, {"status": "not_pulled", "resource": "steps"}])

    found = one(api, PULLS)

    assert found["not_pulled"] == ["steps"]
    assert set(found["pulled"]) == {each.name for each in supplied(api.world.members[0].connections[0])} - {"steps"}
    assert {pull["status"] for pull in found["pulled"].values()} == {"failure"}


@pytest.mark.parametrize(
    ("setting", "body"),
    [
        ("pulls", {"status": "failure", "user_id": "nobody"}),
        ("pulls", {"status": "failure", "resource": "sleeep"}),
        ("pulls", {"status": "lost"}),
        ("pulls", {"status": "failure", "user": "x"}),
        ("connections", {"status": "error", "provider": "nobody"}),
        ("connections", {"status": "broken"}),
        ("connections", {"status": "error", "errored_at": "2026-11-20T12:00:00"}),
    ],
)
def test_a_setting_without_effect_is_refused(api, setting, body):
    """Breaks if a misspelt name is accepted: a test that uses it could never fail."""
    assert api.client.post(f"/simulate/{setting}", json=body).status_code == 422


def test_a_connection_can_be_in_error_and_well_again(api):
    """Breaks if the error differs from Junction's form, affects another connection, or stays."""
    user = api.world.members[0]
    broken = user.connections[1]
    error = {
        "error_type": "provider_password_expired",
        "error_message": "the password was changed",
        "errored_at": "2026-11-19T08:00:00Z",
    }
    named = {"user_id": user.user_id, "provider": broken.provider.slug}
    api.client.post("/simulate/connections", json={"status": "error", **named, **error})

    def states():
        providers = api.get(f"/v2/user/providers/{user.user_id}").json["providers"]
        return {each["slug"]: (each["status"], each["error_details"]) for each in providers}

    assert states().pop(broken.provider.slug) == ("error", error)
    assert {state for slug, state in states().items() if slug != broken.provider.slug} == {("connected", None)}
    attempts = api.get(RESOURCES, user_id=user.user_id).json["data"][0]["provider"][broken.provider.slug].values()
    assert {each["last_attempt"]["status"] for each in attempts} == {"failure"}
    event = connection_error(api.world, broken)["data"]
    assert (event["error_type"], event["error_details"]) == (error["error_type"], error["error_message"])
    api.client.delete("/simulate/connections")
    assert set(states().values()) == {("connected", None)}


def test_a_connection_that_is_gone_is_listed_nowhere_and_its_data_stays(api):
    user = api.world.members[0]
    gone = user.connections[1]
    slug = gone.provider.slug
    api.client.post("/simulate/connections", json={"status": "deregistered", "provider": slug})

    providers = api.get(f"/v2/user/providers/{user.user_id}").json["providers"]
    sources = api.get(f"/v2/user/{user.user_id}").json["connected_sources"]
    found = api.get(PULLS, user_id=user.user_id).json["data"][0]["provider"]

    assert slug not in {*(each["slug"] for each in providers), *(each["source"]["slug"] for each in sources), *found}
    assert len(providers) == len(sources) == len(found) == len(user.connections) - 1
    assert api.of("profile", provider=slug).status_code == 200


@pytest.mark.parametrize("path", [PULLS, RESOURCES])
def test_short_and_empty_pages_are_not_the_end(make_api, path):
    """Breaks if a page that is not full ends the list, or the cursor of an empty page repeats."""
    api = make_api(users=7, days=1)
    api.faults.add("short_page", times=3, where=path)
    api.faults.add("short_page", times=2, records=1)

    pages = api.pages(partial(api.get, path), user_limit=3)

    assert [len(page["data"]) for page in pages] == [0, 0, 0, 1, 1, 3, 2]
    assert [entry["user_id"] for page in pages for entry in page["data"]] == [
        each.user_id for each in api.world.members
    ]


def test_pages_of_samples_can_be_short_and_empty_too(make_api):
    """Breaks if a sample is lost or doubled around a short page."""
    api = make_api(days=1, page_size=20)
    whole = api.pages(partial(api.of, "steps"), start_date="2026-11-19")
    api.faults.add("short_page", times=2)
    api.faults.add("short_page", times=1, records=3)

    pages = api.pages(partial(api.of, "steps"), start_date="2026-11-19")

    def samples(pages):
        return [
            each for page in pages for groups in page["groups"].values() for group in groups for each in group["data"]
        ]

    assert [len(samples([page])) for page in pages[:4]] == [0, 0, 3, 20]
    assert samples(pages) == samples(whole)
    assert len(samples(whole)) > 100


def test_what_does_not_page_is_never_short(api):
    """Breaks if a response without pages uses up the fault."""
    api.faults.add("short_page", times=1)

    assert api.of("sleep", start_date="2026-11-01").json["sleep"]
    assert api.get("/v2/user").json["users"]
    assert api.get(PULLS).json["data"] == []
