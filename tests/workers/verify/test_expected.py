"""Expected rows of Terra: they match the rows stored from events in disorder, and the read API."""

from datetime import UTC, datetime, timedelta
from itertools import islice
from random import Random
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery, Receipt, seal
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, apply
from workers.aggregators import terra
from workers.aggregators.requests import DateRange, Page
from workers.fetch.http import Client
from workers.simulator import Simulator
from workers.simulator.data import World
from workers.simulator.terra import TerraWorld, first_events, live_events
from workers.simulator.terra.api import API_KEY, DEV_ID
from workers.simulator.terra.events import Message
from workers.verify.expected import contents, expected, terra_history, wanted
from workers.verify.totals import prove

UNTIL = datetime(2026, 11, 20, 12, 34, 56, tzinfo=UTC)


@pytest.fixture
def twin() -> TerraWorld:
    """Four users with five days at Terra."""
    return TerraWorld(World(1, 4, UNTIL, 5))


def delivered(event: Message) -> Delivery:
    """An event as the endpoint would have sealed it."""
    receipt = Receipt(event.trace_id, event.ordering_ms, event.reference)
    return seal("terra", receipt, msgspec.json.encode(event.event), Sealer([ENCRYPTION_KEY]))


def test_terras_events_in_disorder_end_in_what_is_expected(
    engine: Engine, settings: Settings, twin: TerraWorld
) -> None:
    """Breaks if an older event about a day replaces a newer one, or the expected rows differ."""
    events = [*first_events(twin), *islice(live_events(twin, 3), 120)]
    disturbed = events + events[::7]
    Random(5).shuffle(disturbed)
    for start in range(0, len(disturbed), 20):
        apply(engine, settings, *map(delivered, disturbed[start : start + 20]))
    totals = prove(engine, {event.trace_id: event for event in events}, {}, idle=0)
    assert totals.holds, totals
    assert totals.expected > 1000


def test_terras_data_overrides_its_events(twin: TerraWorld) -> None:
    """Breaks if an outdated row is accepted because it matches an event."""
    events = {event.trace_id: event for event in islice(live_events(twin, 3), 60)}
    truth = terra_history(twin)
    newest = wanted(events, truth)
    assert all(truth[key] == newest[key][1][0] for key in truth)
    from_events = expected(events)
    assert from_events.keys() - truth.keys() == {key for key in from_events if key[0] == "terra_planned_workout"}
    assert all(content[0] == truth[key] for key, (_, content) in from_events.items() if key in truth)


@pytest.mark.parametrize("days", [1, 28])
def test_the_history_is_what_the_read_api_gives(days: int) -> None:
    """Breaks if the expected rows have records that cannot be fetched, or lack some that can."""
    found: dict[Any, Any] = {}
    with Simulator(3, 5, until=UNTIL) as simulator:
        client = Client(simulator.terra_url, {"dev-id": DEV_ID, "x-api-key": API_KEY})
        for account in simulator.terra.accounts():
            for resource in (one for one in catalogue().values() if one.terra):
                for step in range(0, 28, days):
                    end = UNTIL - timedelta(days=step)
                    asked = terra.request(resource, account.user_id, "", DateRange(end - timedelta(days=days), end))
                    answer = client.fetch(asked)
                    if b'"processing"' in answer.body:
                        answer = client.fetch(asked)
                    assert answer.status == 200
                    page = terra.read_page(resource, account.user_id, answer.body, UNTIL)
                    assert page.refused == ()
                    found |= expected_of(page)
        client.close()
        assert found == terra_history(simulator.terra)


def expected_of(page: Page) -> dict[Any, Any]:
    """The contents of a page, by the key of the row."""
    return {key: content for action in page.actions for key, _, content in contents(action)}
