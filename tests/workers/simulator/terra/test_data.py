"""What the simulated people have at Terra: the same for the same seed, growing through the day, of Terra's shapes."""

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
    """Terra without its API, which takes 60 ms to make."""
    return TerraWorld(World(1, 6, UNTIL, 20))


def packed(objects):
    """Objects that can be looked up: of large ones, comparing each with each takes seconds."""
    return [msgspec.json.encode(one) for one in objects]


def all_of(terra, account, kind, **options):
    return terra.objects(account, kind, terra.world.start, terra.world.until, **options)


def having(terra, name):
    """Every account that has something of a type."""
    return [account for account in terra.accounts() if KINDS[name] in terra.kinds(account)]


def merged(old, new):
    """Whether everything of an object is in another: its arrays may be longer, its numbers higher."""
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(merged(old[name], new[name]) for name in old)
    if isinstance(old, list):
        return new[: len(old)] == old
    return isinstance(old, float | int) or old is None or old == new


def strange(value, document, path=""):
    """The paths of an object at which the document has no such name, or something of another type."""
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
    """Breaks if a person connected through both aggregators cannot be told to be one."""
    world = World(1, 4, UNTIL, 5)
    names = {account.person.client_user_id for account in TerraWorld(world).accounts()}
    assert names == {user.client_user_id for user in world.members}


def test_not_everybody_needs_to_be_at_terra():
    """Breaks if a test cannot keep Terra small, or it is somebody else who is there each time."""
    terra = TerraWorld(World(1, 4, UNTIL, 5), people=1)
    assert [account.provider.slug for account in terra.accounts()] == ["OURA", "FREESTYLELIBRE"]


@pytest.mark.parametrize("name", KINDS)
def test_there_is_nothing_that_ended_before_the_world_began(name):
    """Breaks if whoever asks for all of the world misses what a wider window would bring."""
    terra = TerraWorld(World(1, 6, UNTIL, 10))
    for account in having(terra, name):
        long_ago = terra.world.start - timedelta(days=30)
        assert terra.objects(account, KINDS[name], long_ago, UNTIL) == all_of(terra, account, KINDS[name])


@pytest.mark.parametrize("name", KINDS)
def test_the_same_seed_gives_the_same_objects(name):
    """Breaks if a test that fails cannot be repeated, or an account's id changes from run to run."""

    def objects(seed):
        terra = TerraWorld(World(seed, 6, UNTIL, 10))
        return [(account.user_id, all_of(terra, account, KINDS[name])) for account in having(terra, name)]

    assert objects(1) == objects(1) != objects(2)


@pytest.mark.parametrize("name", KINDS)
def test_windows_that_touch_hold_everything_and_an_edge_twice(terra, name):
    """Breaks if a reader in slices misses an object, or Terra's rule for what crosses an edge is not kept."""
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
def test_a_day_is_told_again_with_more_in_it(terra, name):
    """Breaks if a day's later telling takes back what an earlier one said."""
    account = having(terra, name)[0]
    days, grown = {}, 0
    for _ in range(6):
        for one in terra.tell(account, KINDS[name]):
            before = days.get(one["metadata"]["start_time"], one)
            assert merged(before, one)
            grown += before != one
            days[one["metadata"]["start_time"]] = one
    assert grown > 1
    assert all_of(terra, account, KINDS[name])[-len(days) :] == list(days.values())


@pytest.mark.parametrize("name", KINDS)
def test_the_read_api_says_what_was_told_last(terra, name):
    """Breaks if what is fetched and what is sent differ, so that nobody could say what must be stored."""
    account, kind = having(terra, name)[0], KINDS[name]
    before = {msgspec.json.encode(one) for one in all_of(terra, account, kind)}
    told = []
    for number in range(8):
        told += terra.tell(account, kind, updated=number % 2 == 0)
    after = [msgspec.json.encode(one) for one in all_of(terra, account, kind)]
    newest = {}
    for one in told:
        newest[one.get("planned_workout_id") or one["metadata"]["start_time"]] = msgspec.json.encode(one)
    assert newest
    assert set(after) - before <= set(newest.values())
    assert set(newest.values()) <= set(after)


def test_what_nobody_told_does_not_change(terra):
    """Breaks if the read API moves on by itself, and with it what must be stored."""
    account, kind = having(terra, "daily")[0], KINDS["daily"]
    before = all_of(terra, account, kind)
    terra.world.until += timedelta(hours=5)
    assert all_of(terra, account, kind) == before
    assert terra.tell(account, kind) != before[-1:]


def test_telling_goes_on_to_the_present_and_no_further(terra):
    """Breaks if anything is measured in the future, or the newest is never told."""
    account, kind = having(terra, "daily")[0], KINDS["daily"]
    for _ in range(30):
        terra.tell(account, kind)
    newest = all_of(terra, account, kind)[-1]["heart_rate_data"]["detailed"]["hr_samples"][-1]["timestamp"]
    assert UNTIL - STEP < datetime.fromisoformat(newest) < UNTIL


def test_running_totals_never_fall_and_end_in_the_sum(terra):
    """Breaks if steps are told per interval, which Terra does not do."""
    account = having(terra, "daily")[0]
    for one in all_of(terra, account, KINDS["daily"]):
        totals = [sample["steps"] for sample in one["distance_data"]["detailed"]["step_samples"]]
        assert totals == sorted(totals)
        assert one["distance_data"]["steps"] == (totals[-1] if totals else 0)


def test_a_corrected_night_ends_later_under_the_same_id(terra):
    """Breaks if a corrected night is a second one, or forgets what it had."""
    account, kind = having(terra, "sleep")[0], KINDS["sleep"]
    old, new = all_of(terra, account, kind)[-1], terra.tell(account, kind, updated=True)[-1]
    new = new if old["metadata"]["summary_id"] == new["metadata"]["summary_id"] else None
    for _ in range(12):
        old = new or terra.tell(account, kind)[-1]
        new = terra.tell(account, kind, updated=True)[-1]
        if old["metadata"]["summary_id"] == new["metadata"]["summary_id"]:
            break
    assert old["metadata"]["start_time"] == new["metadata"]["start_time"]
    assert old["metadata"]["end_time"] < new["metadata"]["end_time"]
    hypnograms = [[s["timestamp"] for s in one["sleep_durations_data"]["hypnogram_samples"]] for one in (old, new)]
    assert hypnograms[1][: len(hypnograms[0])] == hypnograms[0]


@pytest.mark.parametrize("name", ["activity", "daily", "sleep", "body"])
def test_without_samples_the_sums_are_the_same(terra, name):
    """Breaks if leaving out samples changes what is said of them."""

    def emptied(value):
        if isinstance(value, dict):
            return {key: emptied(one) for key, one in value.items()}
        return [] if isinstance(value, list) else value

    account, kind = having(terra, name)[0], KINDS[name]
    assert all_of(terra, account, kind, with_samples=False) == [emptied(one) for one in all_of(terra, account, kind)]


def test_some_know_their_offset_and_some_do_not(terra):
    """Breaks if nobody tells local time without an offset, as some of Terra's providers do."""
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
    """Breaks if a reader that takes a summary_id for unique over all accounts is not found out."""
    ids = [
        one["metadata"]["summary_id"] for a in having(terra, "activity") for one in all_of(terra, a, KINDS["activity"])
    ]
    assert len(ids) > len(set(ids))


def test_a_renewed_account_has_the_same_data_under_another_id(terra):
    """Breaks if reconnecting begins a new history, or the old id still opens it."""
    account = having(terra, "sleep")[0]
    before = all_of(terra, account, KINDS["sleep"])
    renewed = terra.renew(account)
    assert renewed.user_id != account.user_id
    assert terra.account(account.user_id) is None
    assert all_of(terra, terra.account(renewed.user_id), KINDS["sleep"]) == before


@pytest.mark.parametrize("name", [*KINDS, "athlete"])
def test_objects_have_no_name_and_no_type_that_terras_document_has_not(terra, name):
    """Breaks if what is simulated is not what Terra sends. The recorded object has every name of the document."""
    document = json.loads((RECORDED / f"{name}.full.json").read_text())
    if name == "athlete":
        objects = [terra.athlete(account) for account in terra.accounts()]
    else:
        objects = [one for account in having(terra, name) for one in all_of(terra, account, KINDS[name])]
    for one in objects:
        assert list(strange(one, document)) == []


@pytest.mark.parametrize("resource", [one for one in catalogue().values() if one.terra and one.terra != "athlete"])
def test_every_object_can_be_read(terra, resource):
    """Breaks if an object cannot be used, or a value of it has no time."""
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


def test_the_check_of_names_and_types_finds_a_stranger():
    """Breaks if the test above would pass whatever the objects hold."""
    document = {"a": {"b": [{"c": 1}]}, "d": "text"}
    assert list(strange({"a": {"b": [{"c": 2.5}]}, "d": None}, document)) == []
    assert list(strange({"a": {"b": [{"x": 1}]}}, document)) == [".a.b[].x"]
    assert list(strange({"a": {"b": {}}, "d": 1}, document)) == [".a.b", ".d"]
