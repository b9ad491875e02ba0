"""The users' data at Terra: repeatable by seed, growing during the day, in Terra's form."""

import json
from datetime import datetime, timedelta

import msgspec
import pytest

from app.catalogue import catalogue
from tests.support import ROOT
from tests.support.simulated import UNTIL
from workers.actions import Record, Samples
from workers.aggregators.terra import read_page
from workers.simulator.data import World
from workers.simulator.terra.data import STEP, TerraWorld
from workers.simulator.terra.events import envelope
from workers.simulator.terra.objects import KINDS

RECORDED = ROOT / "tests" / "recorded" / "terra" / "generated"


@pytest.fixture
def terra():
    """Terra's data without its API."""
    return TerraWorld(World(1, 6, UNTIL, 20))


def packed(objects):
    """Objects as hashable values: comparing large objects pairwise takes seconds."""
    return [msgspec.json.encode(one) for one in objects]


def test_no_user_has_the_id_of_a_junction_user(terra):
    """Breaks if a demo or a drill with both aggregators sends deliveries that name each other's users."""
    both = {one.user_id for one in terra.accounts()} & {one.user_id for one in terra.world.members}
    assert (len(terra.accounts()) > len(terra.world.members), both) == (True, set())


def all_of(terra, account, kind, **options):
    return terra.objects(account, kind, terra.world.start, terra.world.until, **options)


def having(terra, name):
    """The accounts that have objects of a type."""
    return [account for account in terra.accounts() if KINDS[name] in terra.kinds(account)]


def merged(old, new):
    """Whether an object contains another: its arrays may be longer, and its numbers other."""
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(merged(old[name], new[name]) for name in old)
    if isinstance(old, list):
        return new[: len(old)] == old
    return isinstance(old, float | int) or old is None or old == new


def strange(value, document, path=""):
    """The paths at which an object has a name or type that the document does not have."""
    if value is None or document is None:
        return
    if isinstance(value, dict) and isinstance(document, dict):
        for name, one in value.items():
            yield from strange(one, document[name], f"{path}.{name}") if name in document else [f"{path}.{name}"]
    elif isinstance(value, list) and isinstance(document, list):
        for one in value:
            yield from strange(one, document[0] if document else None, f"{path}[]")
    elif isinstance(value, bool) != isinstance(document, bool) or not (
        isinstance(value, type(document)) or (isinstance(value, int | float) and isinstance(document, int | float))
    ):
        yield path


def test_people_are_the_same_and_have_the_same_names():
    """Breaks if a user who is connected through both aggregators has two names."""
    world = World(1, 4, UNTIL, 5)
    names = {account.person.client_user_id for account in TerraWorld(world).accounts()}
    assert names == {user.client_user_id for user in world.members}


def test_the_number_of_users_at_terra_can_be_limited():
    """Breaks if a test cannot limit Terra's users, or they vary."""
    terra = TerraWorld(World(1, 4, UNTIL, 5), people=1)
    assert [account.provider.slug for account in terra.accounts()] == ["OURA", "FREESTYLELIBRE"]


@pytest.mark.parametrize("name", KINDS)
def test_there_is_nothing_that_ended_before_the_world_began(name):
    """Breaks if a wider window than the world returns more objects."""
    terra = TerraWorld(World(1, 6, UNTIL, 10))
    for account in having(terra, name):
        long_ago = terra.world.start - timedelta(days=30)
        assert terra.objects(account, KINDS[name], long_ago, UNTIL) == all_of(terra, account, KINDS[name])


@pytest.mark.parametrize("name", KINDS)
def test_the_same_seed_gives_the_same_objects(name):
    """Breaks if a failed test cannot be repeated, or an account's id changes from run to run."""

    def objects(seed):
        terra = TerraWorld(World(seed, 6, UNTIL, 10))
        return [(account.user_id, all_of(terra, account, KINDS[name])) for account in having(terra, name)]

    assert objects(1) == objects(1) != objects(2)


@pytest.mark.parametrize("name", KINDS)
def test_windows_that_touch_hold_everything_and_an_edge_twice(terra, name):
    """Breaks if adjacent windows miss an object, or an object on their edge is not in both."""
    kind, edge = KINDS[name], UNTIL - timedelta(days=9, hours=12)
    for account in having(terra, name):
        first = packed(terra.objects(account, kind, terra.world.start, edge))
        second = packed(terra.objects(account, kind, edge, UNTIL))
        whole = packed(all_of(terra, account, kind))
        assert whole
        assert {*first, *second} - {*whole} == set()
        both = {*first} & {*second}
        assert len(first) + len(second) == len(whole) + len(both)
        assert len(both) <= 1


@pytest.mark.parametrize("name", ["daily", "body", "nutrition"])
def test_a_day_is_sent_again_with_more_data(terra, name):
    """Breaks if a later event about a day lacks data of an earlier one."""
    account = having(terra, name)[0]
    days, grown = {}, 0
    for _ in range(6):
        for one in terra.advance(account, KINDS[name]):
            before = days.get(one["metadata"]["start_time"], one)
            assert merged(before, one)
            grown += before != one
            days[one["metadata"]["start_time"]] = one
    assert grown > 1
    assert all_of(terra, account, KINDS[name])[-len(days) :] == list(days.values())


@pytest.mark.parametrize("name", KINDS)
def test_the_read_api_returns_the_newest_event(terra, name):
    """Breaks if the read API and the events differ, so that the expected rows are undefined."""
    account, kind = having(terra, name)[0], KINDS[name]
    before = {msgspec.json.encode(one) for one in all_of(terra, account, kind)}
    sent = []
    for number in range(8):
        sent += terra.advance(account, kind, updated=number % 2 == 0)
    after = [msgspec.json.encode(one) for one in all_of(terra, account, kind)]
    newest = {}
    for one in sent:
        newest[one.get("planned_workout_id") or one["metadata"]["start_time"]] = msgspec.json.encode(one)
    assert newest
    assert set(after) - before <= set(newest.values())
    assert set(newest.values()) <= set(after)


def test_data_does_not_change_without_an_event(terra):
    """Breaks if the read API changes without an event, and with it the expected rows."""
    account, kind = having(terra, "daily")[0], KINDS["daily"]
    before = all_of(terra, account, kind)
    terra.world.until += timedelta(hours=5)
    assert all_of(terra, account, kind) == before
    assert terra.advance(account, kind) != before[-1:]


def test_events_advance_to_the_present_and_no_further(terra):
    """Breaks if data is from the future, or the newest is never sent."""
    account, kind = having(terra, "daily")[0], KINDS["daily"]
    for _ in range(30):
        terra.advance(account, kind)
    newest = all_of(terra, account, kind)[-1]["heart_rate_data"]["detailed"]["hr_samples"][-1]["timestamp"]
    assert UNTIL - STEP < datetime.fromisoformat(newest) < UNTIL


def test_running_totals_never_fall_and_end_in_the_sum(terra):
    """Breaks if steps are counted per interval, which Terra does not do."""
    account = having(terra, "daily")[0]
    for one in all_of(terra, account, KINDS["daily"]):
        totals = [sample["steps"] for sample in one["distance_data"]["detailed"]["step_samples"]]
        assert totals == sorted(totals)
        assert one["distance_data"]["steps"] == (totals[-1] if totals else 0)


def test_a_corrected_night_ends_later_under_the_same_id(terra):
    """Breaks if a corrected night is a second object, or lacks earlier samples."""
    account, kind = having(terra, "sleep")[0], KINDS["sleep"]
    old, new = all_of(terra, account, kind)[-1], terra.advance(account, kind, updated=True)[-1]
    new = new if old["metadata"]["summary_id"] == new["metadata"]["summary_id"] else None
    for _ in range(12):
        old = new or terra.advance(account, kind)[-1]
        new = terra.advance(account, kind, updated=True)[-1]
        if old["metadata"]["summary_id"] == new["metadata"]["summary_id"]:
            break
    assert old["metadata"]["start_time"] == new["metadata"]["start_time"]
    assert old["metadata"]["end_time"] < new["metadata"]["end_time"]
    hypnograms = [[s["timestamp"] for s in one["sleep_durations_data"]["hypnogram_samples"]] for one in (old, new)]
    assert hypnograms[1][: len(hypnograms[0])] == hypnograms[0]


@pytest.mark.parametrize("name", ["activity", "daily", "sleep", "body"])
def test_without_samples_the_sums_are_the_same(terra, name):

    def emptied(value):
        if isinstance(value, dict):
            return {key: emptied(one) for key, one in value.items()}
        return [] if isinstance(value, list) else value

    account, kind = having(terra, name)[0], KINDS[name]
    assert all_of(terra, account, kind, with_samples=False) == [emptied(one) for one in all_of(terra, account, kind)]


def test_some_providers_know_the_offset_and_some_do_not(terra):
    """Breaks if no provider has local times without an offset, as some of Terra's have."""
    starts = {
        account.person.number: all_of(terra, account, kind)[-1]["metadata"]["start_time"]
        for account in terra.accounts()
        for kind in terra.kinds(account)
        if kind.name in ("daily", "body", "nutrition")
    }
    assert starts[1].endswith("T00:00:00-05:00")
    assert starts[2].endswith("T00:00:00+09:00")
    assert starts[3].endswith("T00:00:00")


def test_two_accounts_may_use_the_same_summary_id(terra):
    """Breaks if a client that treats summary_id as unique across accounts passes its tests."""
    ids = [
        one["metadata"]["summary_id"] for a in having(terra, "activity") for one in all_of(terra, a, KINDS["activity"])
    ]
    assert len(ids) > len(set(ids))


def test_a_renewed_account_has_the_same_data_under_another_id(terra):
    """Breaks if reconnecting starts another history, or the old id is still valid."""
    account = having(terra, "sleep")[0]
    before = all_of(terra, account, KINDS["sleep"])
    renewed = terra.renew(account)
    assert renewed.user_id != account.user_id
    assert terra.account(account.user_id) is None
    assert all_of(terra, terra.account(renewed.user_id), KINDS["sleep"]) == before


@pytest.mark.parametrize("name", [*KINDS, "athlete"])
def test_objects_have_no_name_and_no_type_that_terras_document_has_not(terra, name):
    """Breaks if objects differ from Terra's form. The recorded object has every name of the document."""
    document = json.loads((RECORDED / f"{name}.full.json").read_text())
    if name == "athlete":
        objects = [terra.athlete(account) for account in terra.accounts()]
    else:
        objects = [one for account in having(terra, name) for one in all_of(terra, account, KINDS[name])]
    for one in objects:
        assert list(strange(one, document)) == []


@pytest.mark.parametrize("resource", [one for one in catalogue().values() if one.terra and one.terra != "athlete"])
def test_every_object_can_be_read(terra, resource):
    """Breaks if an object cannot be read, or one of its values has no time."""
    kind = KINDS[resource.terra]
    for account in having(terra, kind.name):
        page = envelope(terra, account, kind.name, all_of(terra, account, kind))
        read = read_page(resource, account.user_id, msgspec.json.encode(page), UNTIL)
        assert (read.records, read.refused) == (len(page["data"]), ())
        records = [action for action in read.actions if isinstance(action, Record)]
        assert len(records) == read.records
        assert {action.provider for action in read.actions} == {account.provider.slug.lower()}
        if kind.name != "menstruation":
            assert any(isinstance(action, Samples) for action in read.actions)


def test_the_check_of_names_and_types_can_fail():
    """Breaks if the test above would pass for any object."""
    document = {"a": {"b": [{"c": 1}]}, "d": "text"}
    assert list(strange({"a": {"b": [{"c": 2.5}]}, "d": None}, document)) == []
    assert list(strange({"a": {"b": [{"x": 1}]}}, document)) == [".a.b[].x"]
    assert list(strange({"a": {"b": {}}, "d": 1}, document)) == [".a.b", ".d"]
