"""Items of fetched pages that cannot be used: their dead letters, and replays of these."""

import json
from datetime import UTC, datetime, timedelta

import httpx
from prometheus_client import REGISTRY
from sqlalchemy import Engine

from app.config.settings import Settings
from app.sealing import Sealer
from tests.support import apply, delivery, heartrate, rows
from tests.support.backfills import announce, backfill, fetch_history, notice, settle, status
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


def test_a_backfill_names_the_fields_that_it_could_not_read(engine: Engine, settings: Settings) -> None:
    """Breaks if a column of history is NULL although the provider has sent a value, and nothing says so."""
    page = {"workouts": [{"id": "w1", "source": GARMIN, "calories": "many", "distance": {"a": 1}, "title": "a\0"}]}
    fetch_history(engine, settings, Provider(lambda _: httpx.Response(200, json=page)), notice(resource="workouts"))
    found = rows(engine, "SELECT status, error FROM health.backfills WHERE resource = 'workouts'")
    null = "stored as NULL, because they cannot be read: calories, distance"
    replaced = "characters that PostgreSQL cannot store were replaced by U+FFFD"
    assert found == [{"status": "complete", "error": f"{null}; {replaced}"}]
    assert dead_letters.listed(engine) == []


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
    assert (len(found), sum(entry.items for entry in found)) == (MAX_ITEMS + 1, MAX_ITEMS + 50)
    assert (backfill(engine)["error"] or "").startswith("150 refused, first: heartrate: value")
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 60.0}]


def test_counted_items_of_history_are_fetched_again(engine: Engine, settings: Settings) -> None:
    """Breaks if a replay declares items resolved that were never fetched, or fetches a window once for each page."""
    data = heartrate("u1", dict.fromkeys(range(2 * MAX_ITEMS + 20), 60))["data"]["data"]
    for one in data:
        one["value"] = None
    halves = [data[: MAX_ITEMS + 10], data[MAX_ITEMS + 10 :]]
    bad = [{"groups": {"garmin": [{"source": GARMIN, "data": half}]}} for half in halves]
    bad[0]["next_cursor"] = "c"  # type: ignore[assignment]
    provider = Provider(lambda request: httpx.Response(200, json=bad["next_cursor" in request.url.params]))
    announce(engine, settings, notice(resource="heartrate"))
    settle(engine, provider.fetcher(engine, settings, pages=1))
    counters = [entry for entry in dead_letters.listed(engine, limit=1000) if entry.is_counter]
    assert [(entry.items, entry.message_id, entry.user_id) for entry in counters] == [(10, "history", "u1")] * 2
    assert all("headrace dead replay fetches the history again" in entry.reason for entry in counters)
    asked = len(provider.requests)
    assert replay_dead_letters(engine, Applier(engine, settings), counters) == {"applied": 2}
    assert [entry for entry in dead_letters.listed(engine, limit=1000) if entry.is_counter] == []
    assert status(engine) == [("complete", 1, 1), ("pending", 0, 1)]
    for one in data:
        one["value"] = 60
    settle(engine, provider.fetcher(engine, settings))
    assert status(engine) == [("complete", 1, 1)] * 2
    assert len(provider.requests) == 2 * asked
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": len(data)}]


def test_counted_items_of_an_open_backfill_are_fetched_again(engine: Engine, settings: Settings) -> None:
    """Breaks if counted items are lost because their backfill, which has passed their page, is not complete yet."""
    (number,) = announce(engine, settings, notice(resource="heartrate"))
    refused = [Refused("why", b"%d" % n) for n in range(MAX_ITEMS + 1)]
    page = of_page("junction", datetime.now(UTC))
    sealer = Sealer(settings.encryption_keys)
    letters = dead_letters_of(refused, page, "fetch.heartrate", "u1", sealer, backfill_id=number)
    with transaction(engine) as connection:
        add_items(connection, letters[-1:])
    assert replay_dead_letters(engine, Applier(engine, settings), dead_letters.listed(engine)) == {"applied": 1}
    assert (status(engine)[-1][1:], dead_letters.listed(engine)) == ((0, 1), [])
    assert rows(engine, "SELECT count(*) AS n FROM headrace.chunks") == [{"n": 2}]


def test_refused_items_of_history_are_in_the_metric(engine: Engine, settings: Settings) -> None:
    """Breaks if the alert for refused items never fires for history."""
    sample = ("headrace_refused_items_total", {"origin": "backfill"})
    before = REGISTRY.get_sample_value(*sample) or 0
    data = [*heartrate("u1", {0: 60})["data"]["data"], None, None, 7]
    page = {"groups": {"garmin": [{"source": GARMIN, "data": data}]}}
    fetch_history(engine, settings, Provider(lambda _: httpx.Response(200, json=page)), notice(resource="heartrate"))
    assert (REGISTRY.get_sample_value(*sample) or 0) - before == 3
    assert sum(entry.items for entry in dead_letters.listed(engine)) == 3
