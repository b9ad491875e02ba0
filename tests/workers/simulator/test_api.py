"""The simulated Junction API: routes, windows, pages, refusals and faults."""

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial

import pytest

from app.catalogue import catalogue
from workers.simulator.people import Query

UNTIL = datetime(2026, 11, 20, 12, tzinfo=UTC)
WEEK = {"start_date": "2026-11-13", "end_date": "2026-11-20"}


@pytest.fixture
def api(make_api):
    return make_api(users=3, days=60, until=UNTIL)


def samples_of(*pages):
    return [
        (provider, sample)
        for page in pages
        for provider, groups in page["groups"].items()
        for group in groups
        for sample in group["data"]
    ]


@pytest.mark.parametrize("resource", catalogue().of_kind("summary", "timeseries"), ids=lambda each: each.name)
def test_every_resource_answers_in_its_form(api, resource):
    dates = {} if resource.dates == "none" else {"start_date": "2026-10-01", "end_date": "2026-11-20"}

    answer = api.of(resource.name, **dates)

    assert answer.status_code == 200
    assert answer.json[resource.rows] if resource.rows else answer.json["id"]


def test_a_profile_is_a_bare_object_and_devices_a_bare_list(api):
    assert api.of("profile").json["user_id"] == api.world.members[0].user_id
    assert len(api.of("device").json) == len(api.world.members[0].connections)


@pytest.mark.parametrize(("stream", "of"), [("workout_stream", "workouts"), ("sleep_stream", "sleep")])
def test_a_stream_is_found_by_the_record_it_belongs_to(api, stream, of):
    record = api.of(of, **WEEK).json[of][0]
    names = {"workout_id": record["id"], "sleep_id": record["id"]}

    answer = api.get(catalogue()[stream].path.format(**names))

    assert answer.status_code == 200
    assert len(answer.json["heartrate"]) > 10
    unknown = dict.fromkeys(names, record["user_id"])
    assert api.get(catalogue()[stream].path.format(**unknown)).status_code == 404


@pytest.mark.parametrize("page_size", [1, 7, 5000])
@pytest.mark.parametrize("resource", ["cholesterol", "workout_distance", "hrv", "electrocardiogram_voltage"])
def test_the_pages_hold_every_sample_once(make_api, resource, page_size):
    api, start = make_api(users=3, days=60, until=UNTIL, page_size=page_size), UNTIL - timedelta(days=9)
    whole = api.world.groups(Query(api.world.members[0], catalogue()[resource], start, UNTIL))
    expected = [(group["source"]["provider"], sample) for group in whole for sample in group["data"]]

    pages = api.pages(partial(api.of, resource), start_date=start.isoformat(), end_date=UNTIL.isoformat())

    read = samples_of(*pages)
    assert len(read) == len(expected) > 0
    assert sorted(map(str, read)) == sorted(map(str, expected))
    assert len(pages) == -(-len(expected) // page_size)


@pytest.mark.parametrize("bound", ["start_date", "end_date"])
def test_both_ends_of_a_window_belong_to_it(api, bound):
    moments = {"start_date": "2026-11-10T08:00:00Z", "end_date": "2026-11-10T09:00:00+00:00"}

    found = [sample["timestamp"] for _, sample in samples_of(api.of("steps", **moments).json)]

    assert moments[bound][:19] in {moment[:19] for moment in found}


def test_a_bare_end_date_is_the_last_second_of_that_day(api):
    found = samples_of(api.of("vo2_max", start_date="2026-11-10", end_date="2026-11-10").json)
    days = [sample["timestamp"][:10] for _, sample in found]

    assert days == ["2026-11-10"] * 4


def test_without_an_end_the_window_goes_to_the_newest(api):
    found = samples_of(api.of("steps", start_date="2026-11-20").json)

    assert max(sample["timestamp"] for _, sample in found) == UNTIL.isoformat()


@pytest.mark.parametrize(
    "dates",
    [
        {},
        {"end_date": "2026-11-20"},
        {"start_date": "yesterday"},
        {"start_date": "2026-02-30"},
        {"start_date": "2026-11-10T00:00:00 00:00"},
        {"start_date": "2026-11-20", "end_date": "2026-11-10"},
    ],
)
def test_missing_or_wrong_dates_are_refused(api, dates):
    answer = api.of("activity", **dates)

    assert answer.status_code == 422
    assert answer.json["detail"][0]["loc"][0] == "query"


@pytest.mark.parametrize("resource", [each for each in catalogue().values() if each.dates == "day"], ids=str)
def test_where_days_are_asked_for_a_datetime_is_refused(api, resource):
    assert api.of(resource.name, start_date="2026-11-01T00:00:00Z").status_code == 422
    assert api.of(resource.name, start_date="2026-11-01").status_code == 200


def test_the_provider_filter_leaves_only_that_provider(api):
    slug = api.world.members[0].connections[0].provider.slug

    assert set(api.of("steps", provider=slug, **WEEK).json["groups"]) == {slug}
    assert api.of("steps", provider="nobody", **WEEK).json["groups"] == {}
    assert api.of("profile", provider="nobody").status_code == 404


def test_without_the_key_every_route_is_401(api):
    assert api.client.get(api.path("profile")).status_code == 401
    assert api.client.get(api.path("profile"), headers={"X-Vital-API-Key": "sk_us_other"}).status_code == 401


@pytest.mark.parametrize("resource", ["activity", "steps", "profile", "device"])
def test_an_unknown_user_is_not_found(api, resource):
    address = catalogue()[resource].path.format(user_id="00000000-0000-0000-0000-000000000000")

    assert api.get(address, **WEEK).status_code == 404


def test_an_unknown_cursor_is_refused(api):
    assert api.of("steps", next_cursor="nonsense", **WEEK).status_code == 422


def test_users_are_listed_by_offset_and_limit(api):
    answer = api.get("/v2/user", offset=1, limit=1).json

    assert [user["client_user_id"] for user in answer["users"]] == ["member-0002"]
    assert (answer["total"], answer["offset"], answer["limit"]) == (3, 1, 1)
    assert api.get("/v2/user", limit=501).status_code == 422
    assert api.get(f"/v2/user/{api.world.members[2].user_id}").json["client_user_id"] == "member-0003"


def test_a_users_providers_are_listed_with_their_status(api):
    answer = api.get(f"/v2/user/providers/{api.world.members[0].user_id}").json

    assert {each["slug"]: each["status"] for each in answer["providers"]} == {
        connection.provider.slug: "connected" for connection in api.world.members[0].connections
    }


@pytest.mark.parametrize("route", ["historical_pull", "resources"])
def test_introspection_lists_all_users_in_pages(api, route):
    pages = api.pages(partial(api.get, f"/v2/introspect/{route}"), user_limit=2)

    providers = {entry["user_id"]: entry["provider"] for page in pages for entry in page["data"]}
    assert list(providers) == [member.user_id for member in api.world.members]
    assert [len(page["data"]) for page in pages] == [2, 1]
    slug = api.world.members[0].connections[0].provider.slug
    one = api.get(f"/v2/introspect/{route}", user_id=api.world.members[0].user_id, provider=slug).json["data"]
    assert [list(entry["provider"]) for entry in one] == [[slug]]


def test_introspection_has_the_oldest_and_newest_data_of_the_api(api):
    user = api.world.members[0]
    slug = user.connections[0].provider.slug
    coverage = api.get("/v2/introspect/resources", user_id=user.user_id).json["data"][0]["provider"][slug]["hrv"]

    samples = api.world.groups(Query(user, catalogue()["hrv"], api.world.start, UNTIL, slug))[0]["data"]

    assert (coverage["oldest_data"], coverage["newest_data"]) == (samples[0]["timestamp"], samples[-1]["timestamp"])
    assert coverage["sent_count"] == len(samples)


@pytest.mark.parametrize("kind", ["400", "401", "404", "413", "422", "429", "500", "502", "503", "504"])
def test_a_fault_answers_its_status_as_often_as_asked_and_only_there(api, kind):
    assert api.client.post("/simulate/faults", json={"kind": kind, "where": "profile", "times": 2}).status_code == 201

    assert api.of("device").status_code == 200
    assert [api.of("profile").status_code for _ in range(3)] == [int(kind), int(kind), 200]


def test_a_422_has_the_form_of_a_real_one(api):
    api.client.post("/simulate/faults", json={"kind": "422", "times": 1})

    (detail,) = api.of("profile").json["detail"]

    assert detail.keys() == {"loc", "msg", "type"}


def test_retry_after_comes_in_both_forms_or_not_at_all(api):
    wanted = [{"retry_after": 7}, {"retry_after": 60, "as_date": True}, {}]
    api.client.post("/simulate/faults", json=[{"kind": "429", "times": 1, **each} for each in wanted])

    seconds, as_date, absent = [api.of("profile").headers.get("Retry-After") for _ in wanted]

    assert seconds == "7"
    assert 50 < (parsedate_to_datetime(as_date) - datetime.now(UTC)).total_seconds() <= 60
    assert absent is None


def test_a_share_of_the_requests_fails_and_the_same_ones_for_the_same_seed(make_api):
    def statuses():
        api = make_api()
        api.client.post("/simulate/faults", json={"kind": "503", "share": 0.5})
        return [api.of("device").status_code for _ in range(60)]

    first = statuses()

    assert 15 < first.count(503) < 45
    assert statuses() == first


def test_an_expired_cursor_only_affects_requests_with_a_cursor(make_api):
    api = make_api(page_size=10)
    api.client.post("/simulate/faults", json={"kind": "expired_cursor", "times": 1})
    first = api.of("steps", **WEEK).json

    refused = api.of("steps", next_cursor=first["next_cursor"], **WEEK)

    assert (refused.status_code, refused.json) == (400, {"detail": "cursor_expired"})
    assert api.of("steps", next_cursor=first["next_cursor"], **WEEK).status_code == 200


def test_faults_can_be_cleared_and_wrong_ones_are_refused(api):
    api.client.post("/simulate/faults", json={"kind": "500"})
    api.client.delete("/simulate/faults")

    assert api.of("profile").status_code == 200
    assert api.client.post("/simulate/faults", json={"kind": "418"}).status_code == 422
    assert api.client.post("/simulate/faults", json={"kind": "500", "wher": "x"}).status_code == 422


def test_every_request_is_in_the_log_with_its_status(api):
    api.of("profile")
    api.client.get(api.path("device"))

    log = api.client.get("/simulate/requests").json

    assert [(entry["id"], entry["path"], entry["status"]) for entry in log] == [
        (1, api.path("profile"), 200),
        (2, api.path("device"), 401),
    ]
    assert datetime.fromisoformat(log[0]["time"]) <= datetime.now(UTC)
