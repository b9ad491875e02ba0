"""Live notices of streams: each stream is fetched once and replaces its notice."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import START, delivery, event, message_id, rows
from tests.support.backfills import announce, fetch_history, forget_pauses, make_due, notice, settle
from tests.support.deliveries import bodies
from tests.support.provider import Provider, workouts
from workers.backfill.fetcher import FollowUp
from workers.operate import status_view
from workers.operate.erase import Eraser
from workers.store.backfill_admin import Backfill, Filter, listed
from workers.store.backfills import due

STREAM = {"time": [1, 2], "heartrate": [60, 61]}
NOTICE = {"user_id": "u1", "workout_id": "w1", "message": "ready", "source": {"provider": "Peloton", "type": "bike"}}
SLEEP = {"id": "s1", "user_id": "u1", "calendar_date": "2026-03-14", "source": {"provider": "oura", "type": "ring"}}


def live(suffix: str = "created", name: str | None = None, **changes: Any) -> Delivery:
    """A delivery that announces the stream of a workout."""
    body = event(f"daily.data.workout_stream.{suffix}", "u1", NOTICE | changes)
    return delivery(body, name=name or message_id(START))


def slept(suffix: str = "created", **changes: Any) -> Delivery:
    """A delivery of a sleep record."""
    return delivery(event(f"daily.data.sleep.{suffix}", "u1", SLEEP | changes), name=message_id(START))


def streams(then: Any = STREAM, *first: int) -> Provider:
    """An API with these statuses first, and then with a stream."""
    provider = Provider(lambda _: httpx.Response(500))

    def answer(_: httpx.Request) -> httpx.Response:
        position = len(provider.requests) - 1
        return httpx.Response(first[position]) if position < len(first) else httpx.Response(200, json=then)

    provider.answer = answer
    return provider


def stored(engine: Engine, view: str = "workout_stream") -> list[dict[str, Any]]:
    """The stored streams."""
    query = f"SELECT user_id, id, provider, source_type, payload, origin FROM health.{view} ORDER BY id"
    return rows(engine, query)


def items(engine: Engine) -> list[Backfill]:
    """The backfills, the oldest first."""
    return sorted(listed(engine, Filter()), key=lambda one: one.id)


FETCHED = {"user_id": "u1", "id": "w1", "provider": "peloton", "source_type": "bike"}


def test_a_notice_is_stored_and_its_stream_fetched(engine: Engine, settings: Settings) -> None:
    """Breaks if the stream of a live workout is never fetched, fetched twice, or loses its owner."""
    (number,) = announce(engine, settings, live())
    assert stored(engine) == [FETCHED | {"payload": NOTICE, "origin": "webhook"}]
    (one,) = items(engine)
    assert (one.id, one.resource, one.item, one.provider, one.status) == (
        number,
        "workout_stream",
        "w1",
        "peloton",
        "pending",
    )
    provider = streams()
    assert provider.fetcher(engine, settings).run(number) == []
    settle(engine, provider.fetcher(engine, settings))
    assert [(request.method, request.url.path) for request in provider.requests] == [
        ("GET", "/v2/timeseries/workouts/w1/stream")
    ]
    assert stored(engine) == [FETCHED | {"payload": STREAM, "origin": "backfill"}]
    (one,) = items(engine)
    assert (one.status, one.records, one.share, one.error) == ("complete", 1, 1, None)


def test_each_workout_has_a_fetch_of_its_own(engine: Engine, settings: Settings) -> None:
    """Breaks if a stream is stored under another workout, or one of several concurrent notices is lost."""
    numbers = announce(engine, settings, *(live(workout_id=f"w{n}") for n in range(3)))
    assert len(set(numbers)) == 3
    provider = Provider(workouts([]))
    settle(engine, provider.fetcher(engine, settings))
    assert sorted(one.url.path.split("/")[4] for one in provider.requests) == ["w0", "w1", "w2"]
    assert [row["payload"]["of"] for row in stored(engine)] == ["w0", "w1", "w2"]


def test_an_id_that_would_change_the_path_is_not_fetched(engine: Engine, settings: Settings) -> None:
    """Breaks if `..` as the id of a workout or a user is sent to the API, or is retried without an end."""
    announce(engine, settings, live(workout_id=".."), live(workout_id="w1", name="later"), notice("..", "sleep"))
    provider = streams()
    settle(engine, provider.fetcher(engine, settings))
    assert [request.url.path for request in provider.requests] == ["/v2/timeseries/workouts/w1/stream"]
    found = {(one.resource, one.item): (one.status, one.error) for one in items(engine)}
    reason = "the id '..' cannot be a part of a path"
    assert found["sleep", ""] == ("failed", reason)
    assert found["workout_stream", ".."][0] == "complete"
    assert found["workout_stream", "w1"] == ("complete", None)


def test_a_notice_that_comes_again_does_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a repeated delivery, before or after the fetch, causes a request or overwrites the stream."""
    given = live()
    announce(engine, settings, given)
    assert announce(engine, settings, given, given) == []
    provider = streams()
    settle(engine, provider.fetcher(engine, settings))
    assert announce(engine, settings, given) == []
    assert due(engine) == []
    settle(engine, provider.fetcher(engine, settings))
    assert len(provider.requests) == 1
    assert [row["payload"] for row in stored(engine)] == [STREAM]
    (row,) = rows(engine, "SELECT outcome, attempts FROM health.deliveries")
    assert row == {"outcome": "applied", "attempts": 4}


@pytest.mark.parametrize("fetched", ["before", "after"])
def test_an_update_is_fetched_again(engine: Engine, settings: Settings, fetched: str) -> None:
    """Breaks if a corrected stream is not fetched, or the old one is missing meanwhile."""
    announce(engine, settings, live())
    provider = streams()
    if fetched == "before":
        settle(engine, provider.fetcher(engine, settings))
    newer = STREAM | {"heartrate": [70, 71]}
    assert len(announce(engine, settings, live("updated"))) == 1
    if fetched == "before":
        assert [row["payload"] for row in stored(engine)] == [STREAM]
    provider.answer = lambda _: httpx.Response(200, json=newer)
    settle(engine, provider.fetcher(engine, settings))
    assert len(provider.requests) == 2
    assert [row["payload"] for row in stored(engine)] == [newer]
    assert {one.status for one in items(engine)} == {"complete"}


@pytest.mark.parametrize("created_at", [START - timedelta(days=9), datetime.now(UTC) + timedelta(days=1)])
def test_no_notice_goes_over_a_stream(engine: Engine, settings: Settings, created_at: datetime) -> None:
    """Breaks if a notice that is late, or newer than the fetch, overwrites the stream."""
    fetch_history(engine, settings, streams(), live())
    announce(engine, settings, live(name=message_id(created_at), message="again"))
    assert stored(engine) == [FETCHED | {"payload": STREAM, "origin": "backfill"}]
    gone = streams({}, 404)
    settle(engine, gone.fetcher(engine, settings))
    assert len(gone.requests) == 1
    assert [row["payload"] for row in stored(engine)] == [STREAM]


def dead_letters(engine: Engine) -> list[dict[str, Any]]:
    """The dead letters."""
    return rows(engine, "SELECT aggregator, message_id, event_type, reason, sealed FROM headrace.dead_letters")


def test_a_stream_that_is_not_there_leaves_its_notice(engine: Engine, settings: Settings) -> None:
    """Breaks if a missing stream is requested repeatedly, or its notice is deleted."""
    provider = streams(STREAM, 404)
    fetch_history(engine, settings, provider, live())
    assert len(provider.requests) == 1
    assert [row["payload"] for row in stored(engine)] == [NOTICE]
    (one,) = items(engine)
    assert (one.status, one.records, one.error, dead_letters(engine)) == ("complete", 0, None, [])


def test_a_stream_that_is_refused_is_a_dead_letter(engine: Engine, settings: Settings) -> None:
    """Breaks if the reason of a missing stream is not stored, or the response is stored unencrypted."""
    body = b'{"detail": "canary of u1"}'
    provider = Provider(lambda _: httpx.Response(422, content=body))
    fetch_history(engine, settings, provider, live())
    assert len(provider.requests) == 1
    (letter,) = dead_letters(engine)
    assert (letter["event_type"], letter["reason"]) == ("fetch.workout_stream", "status 422")
    assert b"canary" not in letter["sealed"]
    assert bodies(engine, "dead_letters") == [body]
    assert [row["payload"] for row in stored(engine)] == [NOTICE]
    assert [one.status for one in items(engine)] == ["complete"]
    fetch_history(engine, settings, provider, live("updated"))
    assert len(provider.requests) == len(dead_letters(engine)) == 2


def test_a_refused_stream_is_an_error_of_the_backfill(engine: Engine, settings: Settings) -> None:
    """Breaks if a fetch without data looks like a successful one."""
    fetch_history(engine, settings, Provider(lambda _: httpx.Response(422, json={})), live())
    assert [one.error for one in items(engine)] == ["1 refused, first: status 422"]


def test_an_odd_stream_costs_only_itself(engine: Engine, settings: Settings) -> None:
    """Breaks if one stream with a repeated name ends the history of all others, or one with U+0000 is not stored."""
    bodies = {"w1": b'{"time": [{"a": 1, "a": 2}]}', "w2": b'{"time": [1], "note": "\\u0000"}'}
    provider = Provider(lambda _: httpx.Response(500))

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=bodies[request.url.path.split("/")[-2]])

    provider.answer = answer
    fetch_history(engine, settings, provider, live(workout_id="w1"), live(workout_id="w2", name=message_id(START, 2)))
    fetched = [row for row in stored(engine) if row["origin"] == "backfill"]
    assert [(row["id"], row["payload"]) for row in fetched] == [("w2", {"time": [1], "note": "\ufffd"})]
    assert [row["event_type"] for row in dead_letters(engine)] == ["fetch.workout_stream"]
    assert [one.status for one in items(engine)] == ["complete", "complete"]


@pytest.mark.parametrize("status_code", [500, 502, 504, 408, 413])
def test_a_temporary_error_is_retried(engine: Engine, settings: Settings, status_code: int) -> None:
    """Breaks if a short outage of the API loses a stream."""
    (number,) = announce(engine, settings, live())
    provider = streams(STREAM, status_code, status_code)
    (again,) = provider.fetcher(engine, settings).run(number)
    assert (again.backfill_id, 0 < again.seconds <= 1) == (number, True)
    (one,) = items(engine)
    assert (one.status, one.attempts) == ("running", 1)
    settle(engine, provider.fetcher(engine, settings))
    assert len(provider.requests) == 3
    assert [row["payload"] for row in stored(engine)] == [STREAM]


def test_what_is_no_stream_is_tried_again(engine: Engine, settings: Settings) -> None:
    """Breaks if a truncated response is stored, or ends the backfill."""
    announce(engine, settings, live())
    provider = streams()
    inner = provider.answer
    provider.answer = lambda request: (
        inner(request) if len(provider.requests) > 1 else httpx.Response(200, content=b'{"t')
    )
    settle(engine, provider.fetcher(engine, settings))
    assert [row["payload"] for row in stored(engine)] == [STREAM]
    assert len(provider.requests) == 2


def test_a_stream_waits_for_a_new_key(engine: Engine, settings: Settings) -> None:
    """Breaks if every stream of a day is lost because a key was wrong."""
    (number,) = announce(engine, settings, live())
    provider = streams(STREAM, 401)
    assert provider.fetcher(engine, settings).run(number) == [FollowUp(number, 300.0)]
    make_due(engine)
    assert provider.fetcher(engine, settings).run(number)[0].seconds > 290
    assert len(provider.requests) == 1
    forget_pauses(settings)
    settle(engine, provider.fetcher(engine, settings))
    assert [row["payload"] for row in stored(engine)] == [STREAM]


def test_a_fetch_of_one_stream_is_no_history(engine: Engine, settings: Settings) -> None:
    """Breaks if a thousand live workouts hide the backfills that a user or an operator looks for."""
    announce(engine, settings, live(), notice(resource="workout_stream"))
    (history,) = rows(engine, "SELECT provider, chunks_total FROM health.backfills")
    assert history == {"provider": "garmin", "chunks_total": 1}
    assert [row["backfills"] for row in status_view.read(engine, [], []).backfills] == [1]
    assert sorted(one.item for one in items(engine)) == ["", "w1"]


def test_a_history_and_a_live_stream_do_not_extend_each_other(engine: Engine, settings: Settings) -> None:
    """Breaks if a live workout keeps a pull open, or is lost in a pull."""
    history = notice(resource="workout_stream", final=False)
    numbers = announce(engine, settings, history, live(source={"provider": "garmin", "type": "watch"}))
    assert len(set(numbers)) == 2
    provider = Provider(workouts([]))
    settle(engine, provider.fetcher(engine, settings))
    assert [(one.item, one.status) for one in items(engine)] == [("", "running"), ("w1", "complete")]
    assert [one.url.path for one in provider.requests].count("/v2/timeseries/workouts/w1/stream") == 1


def test_no_request_is_sent_about_an_erased_user(engine: Engine, settings: Settings) -> None:
    """Breaks if data of a user who was erased while a fetch waited is stored again."""
    announce(engine, settings, live())
    Eraser(engine, settings).erase("u1", lambda _: None)
    provider = streams()
    settle(engine, provider.fetcher(engine, settings))
    assert provider.requests == []
    assert stored(engine) == []
    assert items(engine) == []


def test_no_request_is_sent_about_a_user_erased_between_two_attempts(engine: Engine, settings: Settings) -> None:
    """Breaks if data of a user who was erased between two attempts is stored again."""
    (number,) = announce(engine, settings, live())
    provider = streams(STREAM, 500)
    fetcher = provider.fetcher(engine, settings)
    fetcher.run(number)
    Eraser(engine, settings).erase("u1", lambda _: None)
    settle(engine, fetcher)
    assert len(provider.requests) == 1
    assert stored(engine) == []


@pytest.mark.parametrize(
    ("kept", "opened"),
    [
        ({}, 1),
        ({"resources": ("workout_stream",)}, 1),
        ({"resources": ("workouts",)}, 0),
        ({"providers": ("peloton",)}, 1),
        ({"providers": ("garmin",)}, 0),
    ],
)
def test_excluded_streams_are_not_fetched(
    engine: Engine, settings: Settings, kept: dict[str, Any], opened: int
) -> None:
    """Breaks if streams that the settings exclude cost a request each."""
    assert len(announce(engine, replace(settings, **kept), live())) == opened
    assert len(stored(engine)) == opened


# The streams of nights, for which there are no notices


@pytest.mark.parametrize(
    ("resources", "fetched"),
    [
        ((), 0),
        (("sleep",), 0),
        (("workout_stream", "sleep"), 0),
        (("sleep", "sleep_stream"), 1),
    ],
)
@pytest.mark.parametrize("suffix", ["created", "updated"])
def test_a_nights_stream_is_fetched_where_it_is_named(
    engine: Engine, settings: Settings, resources: tuple[str, ...], fetched: int, suffix: str
) -> None:
    """Breaks if the stream of a listed resource is never fetched, or one that is not listed costs requests."""
    wanted = replace(settings, resources=resources)
    announce(engine, wanted, slept(suffix))
    provider = streams()
    settle(engine, provider.fetcher(engine, wanted))
    assert [one.url.path for one in provider.requests] == ["/v2/timeseries/sleep/s1/stream"] * fetched
    expected = {"user_id": "u1", "id": "s1", "provider": "oura", "payload": STREAM, "origin": "backfill"}
    found = stored(engine, "sleep_stream")
    assert [{name: row[name] for name in expected} for row in found] == [expected] * fetched
    if "sleep" in resources:
        assert [row["source_type"] for row in found] == ["ring"] * fetched
    assert len(stored(engine, "sleep")) == (not resources or "sleep" in resources)


def test_a_repeated_night_is_not_fetched_again(engine: Engine, settings: Settings) -> None:
    """Breaks if a repeated delivery costs a request, or a corrected night keeps its old stream."""
    wanted = replace(settings, resources=("sleep", "sleep_stream"))
    given, provider = slept(), streams()
    for one in (given, given, slept("updated", updated_at="2026-03-15T00:00:00Z")):
        announce(engine, wanted, one)
        settle(engine, provider.fetcher(engine, wanted))
    assert len(provider.requests) == 2


@pytest.mark.parametrize(
    ("resources", "found"),
    [
        ((), {"sleep"}),
        (("sleep",), {"sleep"}),
        (("sleep", "sleep_stream"), {"sleep", "sleep_stream"}),
        (("sleep_stream",), {"sleep_stream"}),
        (("workouts",), set()),
    ],
)
def test_the_history_of_nights_brings_their_streams(
    engine: Engine, settings: Settings, resources: tuple[str, ...], found: set[str]
) -> None:
    """Breaks if the streams of old nights are never fetched, or are fetched though not listed."""
    wanted = replace(settings, resources=resources)
    announce(engine, wanted, notice(resource="sleep"))
    assert {one.resource for one in items(engine)} == found
    assert {one.item for one in items(engine)} <= {""}

    def answer(request: httpx.Request) -> httpx.Response:
        is_list = "/summary/" in request.url.path
        return httpx.Response(200, json={"sleep": [SLEEP]} if is_list else STREAM)

    provider = Provider(answer)
    settle(engine, provider.fetcher(engine, wanted))
    paths = [one.url.path for one in provider.requests]
    assert paths.count("/v2/timeseries/sleep/s1/stream") == ("sleep_stream" in found)
    assert [row["payload"] for row in stored(engine, "sleep_stream")] == [STREAM] * ("sleep_stream" in found)
    assert {one.status for one in items(engine)} <= {"complete"}
