"""Signing and sending: requests in Svix's form, retries, duplicates and delays."""

import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from itertools import count

import pytest
from svix.webhooks import Webhook, WebhookVerificationError

from tests.support.simulated import Endpoint
from workers.simulator import live_events, run
from workers.simulator.data import World
from workers.simulator.events import every_type
from workers.simulator.sender import NO_ANSWER, Sender, new_message_id, sign

SECRET = "whsec_c2ltdWxhdGVkLXNlY3JldC0wMDAx"
UNTIL = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture
def endpoint():
    def verify(headers, body):
        Webhook(SECRET).verify(body, dict(headers))
        return headers["svix-id"]

    with Endpoint(verify) as endpoint:
        yield endpoint


def some_events(number):
    return [{"event_type": "test", "data": {"number": each}} for each in range(number)]


def test_a_signature_is_one_that_the_svix_library_accepts():
    body = '{"name": "Zoë"}'.encode()

    for zone in (UTC, timezone(timedelta(hours=-5))):
        headers = sign(SECRET, "msg_1", datetime.now(zone), body)
        Webhook(SECRET).verify(body, headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(body + b" ", headers)


def test_a_message_id_holds_its_moment_and_sorts_by_it():
    moments = [UNTIL + timedelta(milliseconds=4 * step) for step in range(600)]

    names = [new_message_id(moment) for moment in moments]

    assert names == sorted(names)
    assert all(len(name) == 31 and name.startswith("msg_") and name[4:].isalnum() for name in names)
    assert len({new_message_id(UNTIL) for _ in range(100)}) == 100


def test_a_message_id_decodes_to_its_moment():
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    number = 0
    for digit in new_message_id(UNTIL + timedelta(milliseconds=500)).removeprefix("msg_"):
        number = number * 62 + digits.index(digit)

    raw = number.to_bytes(20)

    assert int.from_bytes(raw[:4]) + 1_400_000_000 == UNTIL.timestamp()
    assert raw[4] == 125


def test_every_event_type_arrives_signed(endpoint):
    events = list(every_type(World(1, 1, UNTIL, 30)))

    with Sender(endpoint.url, SECRET) as sender:
        assert sender.send_all(events) == {202: 194}

    assert sorted(event["event_type"] for _, event in endpoint.received) == sorted(
        event["event_type"] for event in events
    )


@pytest.mark.parametrize("failure", [503, 500, 401, 301, 404])
def test_any_status_but_2xx_is_sent_again_under_the_same_id(endpoint, failure):
    endpoint.answers = [failure, failure]

    with Sender(endpoint.url, SECRET, waits=(0.01, 0.01, 0.01)) as sender:
        assert sender.send(some_events(1)[0]) == 202
        assert sender.counts == {202: 1}

    assert len(endpoint.received) == 3
    assert len({message_id for message_id, _ in endpoint.received}) == 1


def test_after_the_last_attempt_the_last_status_counts(endpoint):
    endpoint.answers = [503] * 3

    with Sender(endpoint.url, SECRET, waits=(0.01, 0.01)) as sender:
        assert sender.send(some_events(1)[0]) == 503
        assert sender.counts == {503: 1}


def test_an_endpoint_that_is_away_is_no_answer():
    with Sender("http://127.0.0.1:9/webhooks", SECRET, waits=(0.01,)) as sender:
        assert sender.send(some_events(1)[0]) == NO_ANSWER


def test_a_stopped_sender_waits_for_no_further_attempt(endpoint):
    endpoint.answers = [503]
    stop = threading.Event()
    stop.set()

    with Sender(endpoint.url, SECRET, waits=(60,), stop=stop) as sender:
        assert sender.send(some_events(1)[0]) == 503


def test_a_duplicate_has_the_id_of_the_first(endpoint):
    with Sender(endpoint.url, SECRET, duplicates=1.0) as sender:
        assert sender.send_all(some_events(5)) == {202: 10}

    assert len({message_id for message_id, _ in endpoint.received}) == 5


def test_reordering_loses_nothing_and_is_the_same_for_the_same_seed(endpoint):
    def order(seed):
        endpoint.received.clear()
        with Sender(endpoint.url, SECRET, connections=1, reordering=0.4, seed=seed) as sender:
            sender.send_all(some_events(30))
        return [event["data"]["number"] for _, event in endpoint.received]

    first = order(3)

    assert sorted(first) == list(range(30)) != first
    assert order(3) == first


def test_late_events_come_long_after_newer_ones_under_their_first_id(endpoint, monkeypatch):
    """Breaks if a late event is sent soon, never, twice, or under an id that makes it look new."""
    made = count()
    monkeypatch.setattr("workers.simulator.sender.new_message_id", lambda _at: f"msg_{next(made):04d}")

    with Sender(endpoint.url, SECRET, connections=1, late=0.1, seed=5) as sender:
        assert sender.send_all(some_events(600)) == {202: 600}

    order = [event["data"]["number"] for _, event in endpoint.received]
    assert [name for name, _ in endpoint.received] == [f"msg_{number:04d}" for number in order]
    assert sorted(order) == list(range(600))
    late = [
        (number, order[:place]) for place, number in enumerate(order) if order[:place] and number < max(order[:place])
    ]
    overtaken = [sum(other > number for other in before) for number, before in late]
    assert 30 < len(late) < 100
    in_the_middle = [by for (number, _), by in zip(late, overtaken, strict=True) if number < 400]
    assert min(in_the_middle) > 50 * 0.8
    assert max(in_the_middle) <= 200


def test_late_events_are_the_same_for_the_same_seed_and_dropped_when_stopped(endpoint):
    """Breaks if a failed run cannot be repeated, or delayed events are still sent after Ctrl-C."""
    stop = threading.Event()

    def order(events):
        endpoint.received.clear()
        with Sender(endpoint.url, SECRET, connections=1, late=0.3, reordering=0.3, seed=3, stop=stop) as sender:
            sender.send_all(events)
        return [event["data"]["number"] for _, event in endpoint.received]

    def stopped():
        yield from some_events(20)
        stop.set()

    first = order(some_events(60))
    stop.clear()
    assert sorted(first) == list(range(60))
    assert order(some_events(60)) == first
    stop.clear()
    assert len(order(stopped())) < 20


def test_a_rate_is_not_exceeded(endpoint):
    started = time.monotonic()

    with Sender(endpoint.url, SECRET) as sender:
        sender.send_all(some_events(6), rate=20)

    assert time.monotonic() - started >= 0.25


def test_endless_events_are_consumed_only_as_they_are_sent(endpoint):
    stop = threading.Event()
    taken = []

    def events():
        for event in live_events(World(1, 1, UNTIL, 3)):
            taken.append(event)
            if len(taken) == 40:
                stop.set()
            yield event

    with Sender(endpoint.url, SECRET, connections=2, stop=stop) as sender:
        sent = sender.send_all(events()).total()

    assert sent <= len(taken) < 60


def test_run_serves_sends_what_comes_first_then_live_events_and_stops(endpoint, capsys):
    stop = threading.Event()
    options = {
        "users": 1,
        "days": 3,
        "to": endpoint.url,
        "secret": SECRET,
        "rate": 200,
        "duplicates": 1.0,
        "stop": stop,
    }
    running = threading.Thread(target=run, kwargs=options)
    running.start()
    deadline = time.monotonic() + 8
    while not any(event["event_type"].startswith("daily") for _, event in endpoint.received):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stop.set()
    running.join(5)

    assert not running.is_alive()
    kinds = {event["event_type"].split(".")[0] for _, event in endpoint.received}
    assert kinds == {"provider", "historical", "daily"}
    names = [name for name, event in endpoint.received if event["event_type"].startswith("provider")]
    assert len(names) == 2 * len(set(names))
    printed = capsys.readouterr().out
    assert "JUNCTION_BASE_URL=http://127.0.0.1:" in printed
    assert "JUNCTION_API_KEY=sk_us_simulated" in printed


def test_sending_without_a_secret_is_refused():
    with pytest.raises(ValueError, match="secret"):
        run(to="http://127.0.0.1:9")
