"""Estimates of the cost of a history."""

from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import apply, delivery, workout
from tests.support.backfills import announce, change, notice, planned, put, settle
from tests.support.cases import Failures
from tests.support.database import emptied
from tests.support.provider import DAY, FIRST, Provider, daily, heartrates, hourly, workouts
from workers.simulator.server import API_KEY
from workers.store import backfill_admin
from workers.store.backfill_admin import Filter, RequestEstimate, listed
from workers.store.engine import transaction


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may fetch history, without a rate limit."""
    return replace(settings, broker_url=broker_url, junction_api_key=API_KEY, request_rate="1000000/second")


def experienced(engine: Engine) -> RequestEstimate:
    with transaction(engine) as connection:
        return backfill_admin.measured_costs(connection)


def test_an_estimate_follows_from_measured_costs() -> None:
    """Breaks if an estimate does not follow from the costs of earlier backfills."""
    failures = Failures()
    for known, provider, name, days, requests in (
        ({("garmin", "heartrate"): (10.0, 100.0)}, "garmin", "heartrate", 998, (100, True)),
        ({("garmin", "heartrate"): (10.0, 100.0)}, "garmin", "heartrate", 1001, (101, True)),
        ({("garmin", "heartrate"): (10.0, 100.0)}, "garmin", "heartrate", 1, (1, True)),
        # For a provider without measured costs, the costs of the others.
        ({("garmin", "heartrate"): (10, 100), ("oura", "heartrate"): (50, 100)}, "", "heartrate", 198, (60, True)),
        ({("garmin", "heartrate"): (10, 100), ("oura", "heartrate"): (50, 100)}, "oura", "heartrate", 198, (100, True)),
        # For a resource without measured costs, the lower bound: 14 + 28 + 56 days.
        ({("garmin", "steps"): (10, 100)}, "garmin", "heartrate", 96, (3, False)),
        ({}, "garmin", "heartrate", 97, (4, False)),
        ({}, "garmin", "workouts", 58, (1, False)),
        ({}, "garmin", "workouts", 59, (2, False)),
        ({}, "garmin", "workout_stream", 29, (2, False)),
        # A resource without dates costs one request.
        ({("garmin", "profile"): (900, 100)}, "garmin", "profile", 3650, (1, True)),
        ({}, "", "device", 3650, (1, True)),
    ):
        with failures.of(known, provider, name, days, requests):
            assert RequestEstimate(known).requests(provider, catalogue()[name], FIRST, FIRST + days * DAY) == requests
    assert failures == {}


def test_only_complete_backfills_are_measured(engine: Engine, settings: Settings) -> None:
    """Breaks if a failed or running backfill, or one workout's stream, is measured."""
    numbers = announce(engine, settings, *(notice(f"u{n}", days=(0, 54)) for n in range(4)))
    provider = Provider(heartrates(daily(60), 5))
    settle(engine, provider.fetcher(engine, settings))
    put(engine, numbers[2], "failed")
    put(engine, numbers[3], "running")
    assert len(provider.requests) == 4 * 12
    found = experienced(engine)
    assert found.of == {("garmin", "heartrate"): (24, 112)}
    assert found.requests("garmin", catalogue()["heartrate"], FIRST, FIRST + 110 * DAY) == (24, True)
    for change_to in ("item = 'w1'", "pages = 0"):
        change(engine, numbers[0], change_to)
        change(engine, numbers[1], change_to)
        assert experienced(engine).of == {}


def test_the_measured_cost_is_the_next_cost(engine: Engine, settings: Settings) -> None:
    """Breaks if the measured cost of a history differs from its cost the second time."""
    answers = {"heartrate": heartrates(hourly(54), 100), "workouts": workouts(daily(54))}
    answers["workout_stream"] = answers["workouts"]
    for name, answer in answers.items():
        announce(engine, settings, notice(resource=name, days=(0, 54)))
        settle(engine, Provider(answer).fetcher(engine, settings), 200)
    for name, answer in answers.items():
        (one,) = planned(engine, settings, providers=("garmin",), resources=(name,))
        with transaction(engine) as connection:
            backfill_admin.start(connection, one)
        again = Provider(answer)
        settle(engine, again.fetcher(engine, settings), 200)
        assert (name, len(again.requests), one.is_measured) == (name, one.requests, True)


def nothing(request: httpx.Request) -> httpx.Response:
    """A provider without data."""
    path = request.url.path
    if "profile" in path:
        return httpx.Response(404)
    if path.endswith("/device"):
        return httpx.Response(200, json=[])
    names: dict[str, Any] = {one.rows: [] for one in catalogue().values() if one.rows}
    return httpx.Response(200, json=names | {"groups": {}})


def test_an_empty_history_costs_the_lower_bound(engine: Engine, settings: Settings) -> None:
    """Breaks if the lower bound differs from the number of requests for an empty history."""
    failures = Failures()
    for name in ("heartrate", "workouts", "sleep_cycle", "workout_stream", "sleep_stream", "profile", "device"):
        with failures.of(name), emptied(engine):
            until, provider = FIRST + 54 * DAY, Provider(nothing)
            for days in (0.5, 54, 55, 400, 3650):
                user = f"u{days}"
                (one,) = planned(
                    engine, settings, user_id=user, since=until - days * DAY, until=until, resources=(name,)
                )
                assert (one.provider, one.resource, one.is_measured) == ("", name, name in ("profile", "device"))
                with transaction(engine) as connection:
                    number = backfill_admin.start(connection, one)
                before = len(provider.requests)
                settle(engine, provider.fetcher(engine, settings))
                (done,) = listed(engine, Filter(ids=(number,)))
                assert (done.status, done.pages) == ("complete", len(provider.requests) - before)
                assert one.requests == len(provider.requests) - before, days
                change(engine, number, "pages = 0")  # not measured for the next one
    assert failures == {}


def test_each_stream_costs_a_request(engine: Engine, settings: Settings) -> None:
    """Breaks if the streams of a hundred workouts are estimated like a list."""
    days = [(FIRST + n * DAY).date().isoformat() for n in range(5)]
    bodies = [workout("u1", f"w{n}", calendar_date=day) for n, day in enumerate(days)]
    bodies += [workout("u2", "w8"), workout("u1", "w9", source={"provider": "oura", "type": "ring"})]
    apply(engine, settings, *map(delivery, bodies))
    (one,) = planned(engine, settings, providers=("garmin",), resources=("workout_stream",))
    assert (one.requests, one.is_measured) == (2 + 5, False)
    with transaction(engine) as connection:
        backfill_admin.start(connection, one)
    provider = Provider(workouts([FIRST + n * DAY for n in range(5)]))
    settle(engine, provider.fetcher(engine, settings))
    assert len(provider.requests) == 7
    (again,) = planned(engine, settings, providers=("garmin",), resources=("workout_stream",))
    assert (again.requests, again.is_measured) == (7, True)


def test_streams_of_other_years_cost_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if streams outside of the window are counted."""
    bodies = [workout("u1", f"w{n}", calendar_date="2020-05-05") for n in range(9)]
    apply(engine, settings, *map(delivery, bodies))
    (one,) = planned(engine, settings, providers=("garmin",), resources=("workout_stream",))
    assert one.requests == 2
