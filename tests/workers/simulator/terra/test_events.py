"""Terra's events at an endpoint: signatures, ids, order, duplicates, delays and chunks."""

import threading
from datetime import UTC, datetime
from itertools import islice

import pytest

from app.config.settings import Settings
from app.signatures import VERIFIERS
from tests.support import TERRA_SECRET
from tests.support.simulated import Endpoint
from workers.simulator import run
from workers.simulator.terra import first_events, live_events
from workers.simulator.terra.events import by_url, deauth
from workers.simulator.terra.sender import TerraSender

SETTINGS = Settings(terra_signing_secrets=(TERRA_SECRET,))


@pytest.fixture
def endpoint():
    with Endpoint(lambda headers, body: VERIFIERS["terra"](headers, body, SETTINGS, datetime.now(UTC))) as endpoint:
        yield endpoint


def test_every_event_passes_the_endpoints_own_check(endpoint, terra):
    """Breaks if signature, id or time differ from Terra's form."""
    events = [*first_events(terra), *islice(live_events(terra), 40)]
    with TerraSender(endpoint.url, TERRA_SECRET) as sender:
        assert sender.send_all(events) == {202: len(events)}
    received = {receipt.message_id: (receipt, event) for receipt, event in endpoint.received}
    assert len(received) == len(events)
    for event in events:
        receipt, body = received[event.trace_id]
        assert (receipt.ordering_ms, receipt.reference) == (event.ordering_ms, event.reference)
        assert body["type"] == event.event["type"]


def test_a_retry_says_the_same_as_the_first_attempt(endpoint, terra):
    """Breaks if a late retry looks newer than the events that overtook it."""
    endpoint.answers = [503, 500]
    with TerraSender(endpoint.url, TERRA_SECRET, waits=(0.01, 0.01)) as sender:
        assert sender.send(next(first_events(terra))) == 202
    assert len({(receipt.message_id, receipt.ordering_ms) for receipt, _ in endpoint.received}) == 1
    assert len(endpoint.received) == 3


def test_disorder_is_the_same_as_junctions(endpoint, terra):
    events = list(islice(live_events(terra), 30))
    with TerraSender(
        endpoint.url, TERRA_SECRET, connections=1, duplicates=0.5, reordering=0.4, seed=2, remember=True
    ) as sender:
        sender.send_all(events)
        assert sender.taken == {event.trace_id: event for event in events}
    stamps = [receipt.ordering_ms for receipt, _ in endpoint.received]
    assert len(stamps) > 30
    assert stamps != sorted(stamps)
    assert set(stamps) == {event.ordering_ms for event in events}


def test_no_two_events_are_of_one_moment(terra):
    """Breaks if two events about a day can be equally new."""
    stamps = [event.ordering_ms for event in islice(live_events(terra), 50)]
    assert stamps == sorted(set(stamps))


def test_live_events_are_of_every_type_and_correct_some(terra):
    """Breaks if a type is never sent, or no object is sent twice."""
    events = list(islice(live_events(terra, seed=3), 300))
    objects = [
        (
            event.event["user"]["user_id"],
            event.event["type"],
            one["metadata"].get("summary_id") or one["metadata"]["start_time"],
        )
        for event in events
        for one in event.event["data"]
        if "metadata" in one
    ]
    types = {event.event["type"] for event in events}
    assert types == {"activity", "daily", "sleep", "body", "nutrition", "menstruation", "planned_workout"}
    assert len(objects) > len(set(objects))


def test_the_stream_ends_when_the_last_account_is_closed(terra):
    """Breaks if the stream ends with an error, or continues with closed accounts."""
    for account in terra.accounts():
        terra.put(*deauth(terra, account))
    types = [event.event["type"] for event in live_events(terra)]
    assert types == ["deauth"] * 12


def test_a_ping_leads_to_the_event(api, terra):
    """Breaks if an s3_payload has more fields than Terra's, or its URL has another event."""
    made = next(first_events(terra))
    ping = by_url(terra, made, "http://localhost")
    assert set(ping.event) == {"type", "status", "url", "expires_in"}
    assert (ping.trace_id, ping.ordering_ms) == (made.trace_id, made.ordering_ms)
    assert api.client.get(ping.event["url"]).json == made.event
    assert api.client.get("/simulate/payloads/none").status_code == 400


def test_pings_come_in_the_share_that_was_asked_for(terra):
    """Breaks if `--pinged` has no effect, or applies to every event."""
    types = [event.event["type"] for event in islice(live_events(terra, pinged=0.5, base_url="http://x"), 60)]
    assert 15 < types.count("s3_payload") < 45


def test_run_sends_to_terras_endpoint_too(endpoint, capsys):
    """Breaks if `headrace simulate --terra-to` sends no events, or does not print Terra's URL."""
    stop = threading.Event()
    options = {"users": 1, "days": 3, "terra_to": endpoint.url, "terra_secret": TERRA_SECRET, "rate": 100, "stop": stop}
    running = threading.Thread(target=run, kwargs=options)
    running.start()
    while not any("data" in event for _, event in endpoint.received):
        assert running.is_alive()
        stop.wait(0.02)
    stop.set()
    running.join(5)
    assert not running.is_alive()
    assert endpoint.received[0][1]["type"] in ("auth", "athlete")
    printed = capsys.readouterr().out
    assert "TERRA_BASE_URL=http://127.0.0.1:" in printed
    assert "TERRA_DEV_ID=simulated-dev" in printed


def test_terra_without_a_secret_is_refused():
    with pytest.raises(ValueError, match="secret"):
        run(terra_to="http://127.0.0.1:9")
