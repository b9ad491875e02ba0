"""Items of fetched pages that cannot be used: their dead letters, and replays of these."""

import json
from datetime import UTC, datetime, timedelta

import httpx
from sqlalchemy import Engine

from app.config.settings import Settings
from app.sealing import Sealer
from tests.support import apply, delivery, heartrate, rows
from tests.support.backfills import backfill, fetch_history, notice
from tests.support.provider import GARMIN, Provider
from workers.actions import Refused
from workers.ingest.apply import Applier
from workers.ingest.refused import MAX_ITEMS, dead_letters_of, of_page
from workers.ingest.replay import replay_dead_letters
from workers.operate.erase import Eraser
from workers.store import dead_letters
from workers.store.dead_letters import add_items
from workers.store.engine import transaction


def test_a_refused_item_of_history_is_a_dead_letter(engine: Engine, settings: Settings) -> None:
    """Breaks if a bad sample of a page costs its neighbours, is lost, or is added again by the next fetch."""
    data = heartrate("u1", {0: 60, 1: 61, 2: 62})["data"]["data"]
    data[1]["value"] = None
    page = {"groups": {"garmin": [{"source": GARMIN, "data": data}]}}
    for name in ("first", "second"):
        provider = Provider(lambda _: httpx.Response(200, json=page))
        fetch_history(engine, settings, provider, notice(resource="heartrate", name=name))
    assert [row["value"] for row in rows(engine, "SELECT value FROM health.heartrate ORDER BY ts")] == [60, 62]
    (entry,) = dead_letters.listed(engine)
    assert (entry.message_id, entry.event_type, entry.user_id) == ("history", "fetch.heartrate", "u1")
    assert entry.reason == "heartrate: value: expected a number"
    assert replay_dead_letters(engine, Applier(engine, settings), [entry]) == {"dead": 1}
    sealed = dead_letters.delivery(engine, entry)
    event = json.loads(sealed.open(Sealer(settings.encryption_keys)))
    assert event["data"] == {"source": GARMIN, "data": [data[1]]}


def test_an_item_of_history_is_replayed_with_the_clock_of_its_page(engine: Engine, settings: Settings) -> None:
    """Breaks if a replay after an update overwrites newer data, or leaves its dead letter in the list."""
    page = heartrate("u1", {0: 60})
    old, new = (json.dumps(heartrate("u1", {0: value})).encode() for value in (61, 62))
    asked_at = datetime(2026, 3, 14, 12, tzinfo=UTC)
    sealer = Sealer(settings.encryption_keys)
    refused = [Refused("why", old), Refused("why", new)]
    with transaction(engine) as connection:
        add_items(connection, dead_letters_of(refused[:1], of_page("junction", asked_at), "fetch.x", "u1", sealer))
    apply(engine, settings, delivery(page, asked_at + timedelta(minutes=1)))
    assert replay_dead_letters(engine, Applier(engine, settings), dead_letters.listed(engine)) == {"applied": 1}
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 60.0}]
    with transaction(engine) as connection:
        later = of_page("junction", asked_at + timedelta(minutes=2))
        add_items(connection, dead_letters_of(refused[1:], later, "fetch.x", "u1", sealer))
    assert replay_dead_letters(engine, Applier(engine, settings), dead_letters.listed(engine)) == {"applied": 1}
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 62.0}]
    assert dead_letters.listed(engine) == []


def test_an_item_of_an_erased_user_is_not_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if the replay of an item stores data of an erased user, or adds a delivery to the ledger."""
    Eraser(engine, settings).erase("u1", lambda _: None)
    event = json.dumps(heartrate("u1", {0: 60})).encode()
    sealer = Sealer(settings.encryption_keys)
    (item,) = dead_letters_of([Refused("why", event)], of_page("junction", datetime.now(UTC)), "fetch.x", "u1", sealer)
    Applier(engine, settings).replay_item(item.delivery)
    assert rows(engine, "SELECT 1 FROM health.heartrate") == rows(engine, "SELECT 1 FROM health.deliveries") == []


def test_a_page_of_rubbish_makes_a_hundred_dead_letters(engine: Engine, settings: Settings) -> None:
    """Breaks if a page of many bad samples fills the table, or the others are not counted."""
    data = heartrate("u1", dict.fromkeys(range(MAX_ITEMS + 51), 60))["data"]["data"]
    for one in data[1:]:
        one["value"] = None
    page = {"groups": {"garmin": [{"source": GARMIN, "data": data}]}}
    fetch_history(engine, settings, Provider(lambda _: httpx.Response(200, json=page)), notice(resource="heartrate"))
    found = dead_letters.listed(engine, limit=1000)
    assert (len(found), sum(entry.items for entry in found)) == (MAX_ITEMS, MAX_ITEMS + 50)
    assert (backfill(engine)["error"] or "").startswith("150 refused, first: heartrate: value")
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 60.0}]
