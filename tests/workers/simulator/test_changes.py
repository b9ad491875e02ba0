"""Data that changes between two pages: the reader's copy, the API's final state, and the events about it."""

from functools import partial

import pytest

from app.catalogue import catalogue
from workers.simulator import Simulator, live_events
from workers.simulator.people import Query
from workers.verify.expected import history

MONTH = {"start_date": "2026-10-20", "end_date": "2026-11-20"}


def read(api, resource):
    """All samples of a resource from one provider, as {timestamp: value} in the order of the pages."""
    slug = api.world.members[0].connections[0].provider.slug
    pages = api.pages(partial(api.of, resource, provider=slug), **MONTH)
    samples = [each for page in pages for group in page["groups"][slug] for each in group["data"]]
    return {each["timestamp"]: each["value"] for each in samples}


def nights(api):
    return {record["id"]: record for record in api.of("sleep", **MONTH).json["sleep"]}


def test_what_was_read_and_what_was_not_yet_both_change_between_two_pages(make_api):
    """Breaks if the fault changes only records still to be read, or only records already read."""
    api = make_api(page_size=100)
    before = read(api, "hrv")
    api.faults.add("changing", times=1)

    during = read(api, "hrv")

    after = read(api, "hrv")
    moments = list(before)
    assert list(during) == list(after) == moments
    assert during[moments[0]] == before[moments[0]] != after[moments[0]]
    assert during[moments[-1]] == after[moments[-1]] != before[moments[-1]]
    assert sum(after[moment] != before[moment] for moment in moments) == 10


def test_a_changed_summary_is_newer_than_the_one_that_was_read(api):
    """Breaks if a client that keeps the newest version would keep the old one."""
    api.faults.add("changing", times=1, where="/sleep/", records=3)
    held = nights(api)

    newest = nights(api)

    changed = [name for name in held if held[name] != newest[name]]
    assert len(changed) == 3
    assert all(newest[name]["updated_at"] > held[name]["updated_at"] for name in changed)


def test_the_final_state_that_the_proof_reads_is_what_the_api_serves(make_api):
    """Breaks if the proof rejects a store that has exactly the API's final state."""
    api = make_api(users=1, days=3, page_size=7)
    api.faults.add("changing", times=5, records=4)
    first_nights, _ = nights(api), read(api, "hrv")
    api.faults.clear()

    truth = history(api.world)

    slug = api.world.members[0].connections[0].provider.slug
    samples = {key[5].isoformat(): value for key, value in truth.items() if key[0] == "hrv" and key[2] == slug}
    assert samples == read(api, "hrv")
    records = {key[2]: record for key, record in truth.items() if key[0] == "sleep"}
    assert records == nights(api) != first_nights


@pytest.mark.parametrize("resource", ["sleep", "hrv", "cholesterol"])
def test_events_correct_records_that_were_read_before(api, resource):
    """Breaks if a change has no event, one with an old version, one about another record, or two."""
    world, row = api.world, catalogue()[resource]
    whole = Query(world.members[0], row, world.start, world.until)
    before = world.summaries(whole) if row.kind == "summary" else [each.body for each in world.samples(whole)]
    api.faults.add("changing", times=2, where=row.path.split("{")[0], records=3)
    api.of(resource, **MONTH)
    api.of(resource, **MONTH)
    with_id = "id" if row.kind == "summary" else "timestamp"
    after = world.summaries(whole) if row.kind == "summary" else [each.body for each in world.samples(whole)]

    shown = api.client.get("/simulate/changes").json
    events = api.client.get("/simulate/changes").json
    api.client.delete("/simulate/changes")

    assert shown == events
    assert {event["event_type"] for event in events} == {f"daily.data.{resource}.updated"}
    sent = [each for event in events for each in ([event["data"]] if "id" in event["data"] else event["data"]["data"])]
    changed = [new for new, old in zip(after, before, strict=True) if new != old]
    assert changed
    assert [each for each in changed if each not in sent] == []
    assert [each for each in sent if each not in after] == []
    assert len({(each[with_id], each.get("type")) for each in sent}) == len(sent)
    assert api.client.get("/simulate/changes").json == []


def test_events_about_changes_are_sent_first_and_once(make_api):
    """Breaks if `headrace simulate --to` sends no event about a change."""
    api = make_api(users=1, days=3)
    api.faults.add("changing", times=1, records=2)
    api.of("hrv", **MONTH)

    events = [event for event, _ in zip(live_events(api.world), range(20), strict=False)]

    assert [event["event_type"] for event in events[:2]] == ["daily.data.hrv.updated"] * 2
    assert api.world.changed() == []


def test_the_simulator_returns_each_change_once():
    with Simulator(users=1, days=3) as simulator:
        world = simulator.world
        world.change(Query(world.members[0], catalogue()["steps"], world.start, world.until), 4)

        assert len(simulator.changes()) == 4
        assert simulator.changes() == []


@pytest.mark.parametrize(("limit", "changed"), [(0, 0), (1, 1), (2, 2), (5, 5), (10**6, 20)])
def test_as_many_records_change_as_requested(api, limit, changed):
    """Breaks if `records` is ignored, or a window with fewer records is an error."""
    world = api.world
    slug = world.members[0].connections[0].provider.slug
    days = Query(world.members[0], catalogue()["activity"], world.start, world.until, slug)

    world.change(days, limit)

    assert len(world.changed()) == changed


def test_a_request_without_a_window_uses_up_no_change(api):
    """Breaks if a request to another route uses up the fault."""
    api.faults.add("changing", times=1)

    assert api.get("/v2/user").status_code == 200
    assert api.world.changed() == []
    api.of("activity", **MONTH)
    assert len(api.world.changed()) == 10


def test_a_refused_request_changes_nothing(api):
    api.faults.add("changing", times=1)

    assert api.of("activity").status_code == 422
    assert api.world.changed() == []
