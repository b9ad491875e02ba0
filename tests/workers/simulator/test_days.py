"""Days whose samples add up to their summaries, and a user whose two sources overlap."""

from collections import defaultdict
from datetime import datetime, timedelta

import msgspec
import pytest

from app.catalogue import catalogue
from tests.support.simulated import UNTIL
from workers.actions import Record, Samples
from workers.aggregators.terra import read_page
from workers.simulator.data import World
from workers.simulator.events import daily
from workers.simulator.people import Query
from workers.simulator.summaries import TOTALS
from workers.simulator.terra.data import TerraWorld
from workers.simulator.terra.events import data, envelope
from workers.simulator.terra.objects import KINDS

SERIES = sorted(set(TOTALS["activity"].values()))


@pytest.fixture
def world():
    """Five users, so that each time zone and each provider with every resource is among them."""
    return World(1, 5, UNTIL, 6)


def add(totals, provider, samples):
    """Adds samples to the totals by (provider, day), for days of UTC and for local days."""
    for sample in samples:
        at = datetime.fromisoformat(sample["timestamp"])
        totals["utc"][provider, at.date().isoformat()] += sample["value"]
        local = at + timedelta(seconds=sample["timezone_offset"] or 0)
        totals["local"][provider, local.date().isoformat()] += sample["value"]


def totals_of(world, user, series):
    totals = {"utc": defaultdict(float), "local": defaultdict(float)}
    for group in world.groups(Query(user, catalogue()[series], world.start, world.until)):
        add(totals, group["source"]["provider"], group["data"])
    return totals


def days_of(world, user):
    return world.summaries(Query(user, catalogue()["activity"], world.start, world.until))


def differing(world):
    """The days whose samples do not add up to the summary, by user, provider, day and field."""
    found, compared = [], 0
    for user in world.members:
        totals = {series: totals_of(world, user, series) for series in SERIES}
        for day in days_of(world, user):
            key = day["source"]["provider"], day["calendar_date"]
            for field, series in TOTALS["activity"].items():
                sums = {zone: round(one[key], 1) for zone, one in totals[series].items() if key in one}
                compared += len(sums)
                if set(sums.values()) != ({day[field]} if day[field] is not None else set()):
                    found.append((user.number, *key, field, day[field], sums))
    assert compared > 100
    return found


def test_the_samples_of_a_day_add_up_to_its_summary(world):
    """Breaks if a summary has a total of its own, or the day of the user's time zone has another."""
    assert differing(world) == []
    assert all(3000 < day["steps"] < 20000 for day in days_of(world, world.members[1]))


def test_a_day_that_is_not_over_has_no_summary(world):
    """Breaks if a summary has a total whose samples are still to come."""
    days = {day["calendar_date"] for day in days_of(world, world.members[0])}
    assert max(days) == (UNTIL - timedelta(days=1)).date().isoformat()
    assert all(day["updated_at"] <= UNTIL.isoformat() for day in days_of(world, world.members[0]))


def test_corrected_samples_add_up_to_the_same_summary(world):
    """Breaks if a correction of samples changes the day's total: no event about the summary follows."""
    user, changed = world.members[0], 0
    for series in SERIES:
        query = Query(user, catalogue()[series], world.start, world.until)
        before = [sample.body["value"] for sample in world.samples(query)]
        world.change(query, 30)
        changed += before != [sample.body["value"] for sample in world.samples(query)]
    assert changed == len(SERIES)
    assert differing(world) == []


def test_the_events_of_a_day_add_up_to_the_event_of_its_summary(world):
    """Breaks if webhooks have other values than the read API, or a corrected batch lacks a moved value."""
    user = world.members[0]
    connection = user.connections[0]
    day = daily(world, connection, catalogue()["activity"])["data"]
    begin = datetime.fromisoformat(day["date"])
    for field, series in TOTALS["activity"].items():
        held = {}
        for hours in range(24):
            at = begin + timedelta(hours=hours, minutes=45)
            event = daily(world, connection, catalogue()[series], at=at, updated=hours % 3 == 0)
            held |= {sample["timestamp"]: sample for sample in event["data"]["data"]}
        totals = {"utc": defaultdict(float), "local": defaultdict(float)}
        add(totals, "all", held.values())
        sums = {round(one["all", day["calendar_date"]], 1) for one in totals.values()}
        assert sums == {day[field]}, series


def summed(actions):
    totals = defaultdict(float)
    for action in actions:
        if isinstance(action, Samples) and action.resource in SERIES:
            totals[action.resource] += sum(row.value for row in action.rows)
    return {name: round(total, 1) for name, total in totals.items()}


@pytest.mark.parametrize("through", ["history", "webhook"])
def test_the_samples_of_terras_days_add_up_to_their_totals(world, through):
    """Breaks if the differences of Terra's running totals do not add up to the day's total, however they arrive."""
    terra, kind, resource = TerraWorld(world), KINDS["daily"], catalogue()["activity"]
    accounts = [account for account in terra.accounts() if kind in terra.kinds(account)]
    assert accounts
    for account in accounts:
        if through == "webhook":
            objects = [one for _ in range(6) for one in data(terra, account, kind, updated=True).event["data"]]
        else:
            objects = terra.objects(account, kind, world.start, world.until)
        for one in objects:
            body = msgspec.json.encode(envelope(terra, account, kind.name, [one]))
            actions = read_page(resource, account.user_id, body, UNTIL).actions
            (record,) = (action for action in actions if isinstance(action, Record))
            columns, sums = msgspec.json.decode(record.columns), summed(actions)
            assert {name: sums.get(name, 0) for name in SERIES} == {name: columns[name] for name in SERIES}


def test_the_first_user_has_two_sources_that_count_the_same_movement(world):
    """Breaks if priorities cannot be tried: the first user has one source, or two whose values are unrelated."""
    user = world.members[0]
    for series in ("steps", "distance"):
        groups = world.groups(Query(user, catalogue()[series], world.start, world.until))
        values = defaultdict(dict)
        for group in groups:
            source = group["source"]["provider"], group["source"]["type"]
            values[source] |= {sample["timestamp"]: sample["value"] for sample in group["data"]}
        watch, phone = values["garmin", "watch"], values["apple_health_kit", "phone"]
        assert watch.keys() == phone.keys()
        assert all(abs(phone[at] - 0.8 * watch[at]) < 0.51 for at in watch)
        assert sum(phone.values()) < sum(watch.values())
    assert [day["source"]["type"] for day in days_of(world, user)].count("phone") == 6
