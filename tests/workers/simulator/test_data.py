"""The simulated world: every resource and event type, with the catalogue's types, repeatable by seed."""

import json
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest

from app.catalogue import catalogue
from workers.simulator import first_events, live_events
from workers.simulator.data import World
from workers.simulator.events import daily, every_type, historical
from workers.simulator.people import Query

UNTIL = datetime(2026, 11, 20, 12, tzinfo=UTC)
SUMMARIES = catalogue().of_kind("summary")
TIMESERIES = catalogue().of_kind("timeseries")
JSON_TYPES = {"text": str, "integer": int, "number": (int, float), "boolean": bool, "date": str, "datetime": str}


def make_world(seed=1, users=3, until=UNTIL, days=30):
    return World(seed, users, until, days)


def all_of(world, resource, user=0):
    return Query(world.members[user], resource, world.start, world.until)


def fits(value, field):
    if value is None:
        return True
    if field.type == "date":
        return date.fromisoformat(value).isoformat() == value
    if field.type == "datetime":
        return datetime.fromisoformat(value).tzinfo is not None
    return isinstance(value, JSON_TYPES[field.type]) and (field.type == "boolean" or not isinstance(value, bool))


def samples_of(world, resource, user=0):
    return [sample for group in world.groups(all_of(world, resource, user)) for sample in group["data"]]


def test_users_have_stable_ids_and_several_providers():
    world = make_world(users=12)

    assert [member.client_user_id for member in world.members[:2]] == ["member-0001", "member-0002"]
    assert len({UUID(member.user_id) for member in world.members}) == 12
    assert all(2 <= len(member.connections) <= 3 for member in world.members)
    slugs = {connection.provider.slug for member in world.members for connection in member.connections}
    assert slugs >= {"garmin", "oura", "withings", "fitbit", "freestyle_libre", "apple_health_kit"}


@pytest.mark.parametrize("resource", SUMMARIES, ids=lambda resource: resource.name)
def test_every_field_of_a_summary_is_there_and_fits(resource):
    world = make_world()

    for user in range(3):
        records = world.summaries(all_of(world, resource, user))
        assert records
        for record in records:
            assert not {field.name for field in resource.fields} - record.keys()
            assert [field.name for field in resource.fields if not fits(record[field.name], field)] == []
            assert record["source"]["provider"]
            assert record["source"]["type"]
            assert UUID(record["id"])
        assert len({record["id"] for record in records}) == len(records)


@pytest.mark.parametrize("resource", TIMESERIES, ids=lambda resource: resource.name)
def test_every_sample_has_what_its_row_says(resource):
    samples = samples_of(make_world(), resource)

    assert samples
    for sample in samples:
        assert sample["unit"] == (resource.unit or sample["unit"])
        assert ("end" in sample) == ("start" in sample) == resource.interval
        assert not resource.interval or sample["start"] == sample["timestamp"] < sample["end"]
        number_fields = {field.name for field in resource.fields if field.type == "number"} or {"value"}
        assert number_fields <= sample.keys()


@pytest.mark.parametrize(
    "resource", [resource for resource in TIMESERIES if resource.key], ids=lambda resource: resource.name
)
def test_no_two_samples_share_their_whole_key(resource):
    world = make_world()
    seen = set()

    for group in world.groups(all_of(world, resource)):
        for sample in group["data"]:
            parts = {**sample, **{f"source.{name}": value for name, value in group["source"].items()}}
            key = (*(parts[part] for part in resource.key), group["source"]["provider"], sample["timestamp"])
            assert key not in seen
            seen.add(key)


def test_samples_of_a_workout_name_a_workout_that_exists_and_its_sport():
    world = make_world()
    workouts = {each["id"]: each["sport"]["slug"] for each in world.summaries(all_of(world, catalogue()["workouts"]))}

    named = [group["source"] for group in world.groups(all_of(world, catalogue()["workout_distance"]))]

    past = [source for source in named if source["workout_id"] in workouts]
    assert len(past) >= len(named) - 2
    assert all(workouts[source["workout_id"]] == source["sport"] for source in past)


def test_a_night_adds_up_and_its_cycle_names_it():
    world = make_world()
    nights = world.summaries(all_of(world, catalogue()["sleep"]))
    cycles = world.summaries(all_of(world, catalogue()["sleep_cycle"]))

    assert all(night["total"] == night["light"] + night["rem"] + night["deep"] for night in nights)
    assert all(night["duration"] == night["total"] + night["awake"] for night in nights)
    assert {cycle["sleep_id"] for cycle in cycles} == {night["id"] for night in nights}


def test_electrocardiogram_voltage_is_finer_than_seconds():
    moments = [sample["timestamp"] for sample in samples_of(make_world(), catalogue()["electrocardiogram_voltage"])]

    assert len(set(moments)) == len(moments) > len({moment[:19] for moment in moments})


def test_records_stay_inside_the_world():
    world = make_world(days=3)

    for resource in TIMESERIES:
        for sample in samples_of(world, resource):
            assert world.start <= datetime.fromisoformat(sample["timestamp"]) <= world.until
    for resource in SUMMARIES:
        for record in world.summaries(all_of(world, resource)):
            assert datetime.fromisoformat(record["updated_at"]) <= world.until


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    once, again, other = make_world(), make_world(), make_world(seed=2)

    assert list(every_type(once)) == list(every_type(again))
    assert samples_of(once, catalogue()["hrv"]) == samples_of(again, catalogue()["hrv"])
    assert {member.user_id for member in once.members}.isdisjoint(member.user_id for member in other.members)


def test_a_part_of_a_window_holds_exactly_what_the_whole_holds_there():
    world = make_world()
    user, resource = world.members[0], catalogue()["hrv"]
    start, end = UNTIL - timedelta(days=20), UNTIL - timedelta(days=19)

    part = [sample for group in world.groups(Query(user, resource, start, end)) for sample in group["data"]]

    whole = samples_of(world, resource)
    assert part == [each for each in whole if start <= datetime.fromisoformat(each["timestamp"]) <= end]
    assert part[0]["timestamp"] == start.isoformat()


def test_a_window_costs_its_own_size_and_not_the_worlds():
    world = make_world(days=3650)

    found = world.groups(Query(world.members[0], catalogue()["heartrate"], UNTIL - timedelta(hours=1), UNTIL))

    assert len(found[0]["data"]) == 13


def test_every_event_type_of_the_catalogue_is_made_once():
    made = list(every_type(make_world()))

    assert sorted(event["event_type"] for event in made) == sorted(catalogue().event_names)
    assert len(made) == 194
    assert json.loads(json.dumps(made)) == made


def test_every_envelope_names_its_user_but_for_match_reviews():
    world = make_world()

    for event in every_type(world):
        assert event["team_id"] == world.team_id
        assert event["data"]
        named = event.get("user_id"), event.get("client_user_id")
        is_anonymous = event["event_type"].startswith("labtest.match_review")
        assert named == ((None, None) if is_anonymous else (world.members[0].user_id, "member-0001"))


@pytest.mark.parametrize(
    "resource", [each for each in SUMMARIES if each.has_version], ids=lambda resource: resource.name
)
def test_an_update_of_a_summary_is_newer_and_the_read_api_has_it(resource):
    world = make_world()
    user = world.members[0]
    connection = world.connections(user, resource)[0]
    first = daily(world, connection, resource)["data"]

    second = daily(world, connection, resource, updated=True)["data"]

    assert second["id"] == first["id"]
    assert second["created_at"] == first["created_at"]
    assert second["updated_at"] > first["updated_at"]
    assert {name for name in first if first[name] != second[name]} > {"updated_at"}
    assert second in world.summaries(all_of(world, resource))


def test_an_update_of_samples_changes_values_and_no_moment():
    world = make_world()
    user, resource = world.members[0], catalogue()["heartrate"]
    first = daily(world, user.connections[0], resource)["data"]

    second = daily(world, user.connections[0], resource, updated=True)["data"]

    assert [sample["timestamp"] for sample in second["data"]] == [sample["timestamp"] for sample in first["data"]]
    assert all(new["value"] != old["value"] for new, old in zip(second["data"], first["data"], strict=True))
    assert all(40 <= sample["value"] <= 190 for sample in second["data"])
    assert second["data"][-1] in world.groups(Query(user, resource, UNTIL - timedelta(hours=1), UNTIL))[0]["data"]


def test_an_event_about_the_past_carries_what_was_newest_then():
    world = make_world()
    user, resource = world.members[0], catalogue()["steps"]
    at = UNTIL - timedelta(days=9)

    event = daily(world, user.connections[0], resource, at=at)

    assert at - timedelta(minutes=15) < datetime.fromisoformat(event["data"]["data"][-1]["timestamp"]) <= at


def test_a_historical_notice_carries_a_window_and_no_data():
    world = make_world()
    connection = world.members[0].connections[0]

    event = historical(world, connection, catalogue()["steps"])

    assert event["event_type"] == "historical.data.steps.created"
    assert event["data"] == {
        "user_id": connection.user_id,
        "start_date": world.start.isoformat(),
        "end_date": UNTIL.isoformat(),
        "is_final": True,
        "provider": connection.provider.slug,
    }


def test_people_connect_before_their_history_is_announced():
    kinds = [event["event_type"].split(".")[0] for event in first_events(make_world(users=1))]

    assert kinds[0] == "provider"
    assert kinds.count("provider") == len(make_world(users=1).members[0].connections)
    assert kinds.count("historical") > 60


def test_live_events_are_endless_known_and_correct_some_of_what_was_sent():
    events = [event for event, _ in zip(live_events(make_world()), range(200), strict=False)]

    assert {event["event_type"].rpartition(".")[2] for event in events} == {"created", "updated"}
    assert all(catalogue().event(event["event_type"]).does == "data" for event in events)
