"""Terra's history, through the same engine: its windows, its budgets, and its answers that are none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Receipt, pack, seal
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, rows
from tests.support.backfills import hurry, settle, status
from tests.support.provider import Provider
from workers.aggregators import terra
from workers.fetch.rate_limits import pauses
from workers.fetch.retry import MAX_ATTEMPTS
from workers.ingest.apply import Applier
from workers.store.backfills import due

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
TYPES = ["activity", "athlete", "body", "daily", "menstruation", "nutrition", "sleep"]
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment with an account at Terra, and no hurry of its own making."""
    terras = {"terra_dev_id": "dev", "terra_api_key": "key-of-the-tests", "history_days": 100}
    return replace(settings, broker_url=broker_url, request_rate="1000000/second", **terras)


def connect(engine: Engine, settings: Settings, user: str = "t1") -> list[int]:
    """Somebody connects; the backfills that this opens."""
    body = {"type": "auth", "status": "success", "user": {"user_id": user, "provider": "OURA", "reference_id": "m1"}}
    sealed = seal("terra", Receipt(f"auth-{user}"), msgspec.json.encode(body), Sealer([ENCRYPTION_KEY]))
    return Applier(engine, settings).apply(pack([sealed])).backfills


def window(request: httpx.Request) -> tuple[datetime, datetime]:
    """What a request asks for; the end does not belong to it."""
    start, end = (int(request.url.params[name]) for name in ("start_date", "end_date"))
    return datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(end, UTC)


def of_type(provider: Provider, name: str) -> list[httpx.Request]:
    """The requests for one type, in their order."""
    return [request for request in provider.asked if request.url.path == f"/{name}"]


def nights(request: httpx.Request) -> httpx.Response:
    """A night at every midnight of the last hundred days, of which a window holds those that touch it."""
    user = {"user_id": request.url.params["user_id"], "provider": "OURA"}
    name = request.url.path.strip("/")
    if name == "athlete":
        return httpx.Response(200, json={"type": name, "user": user, "athlete": {"sex": "female"}})
    start, end = window(request)
    data = []
    for number in range(100):
        begin = NOW - number * DAY - DAY / 3
        if name == "sleep" and begin < end and begin + DAY / 4 >= start:
            times = {"start_time": begin.isoformat(), "end_time": (begin + DAY / 4).isoformat()}
            data.append({"metadata": {"summary_id": f"n{number}"} | times})
    return httpx.Response(200, json={"type": name, "user": user, "data": data})


@contextmanager
def from_terra(answer: Answer, limit: int = 500) -> Iterator[Provider]:
    """Terra, as far as it is asked."""
    yield Provider(answer, limit, "terra")


def only(name: str, answer: Answer) -> Answer:
    """Answers for one type in its own way, for the others as always."""
    return lambda request: answer(request) if request.url.path == f"/{name}" else nights(request)


def test_a_connection_brings_its_history(engine: Engine, settings: Settings) -> None:
    """Breaks if a type is forgotten, a window is longer than a month or leaves a hole, or Terra sends webhooks."""
    connect(engine, settings)
    with from_terra(nights) as provider:
        settle(engine, provider.fetcher(engine, settings))
    assert sorted({request.url.path.strip("/") for request in provider.asked}) == TYPES
    assert {request.url.params["to_webhook"] for request in provider.asked} == {"false"}
    assert {request.headers.get("user-agent", "").split("/")[0] for request in provider.asked} == {"python-httpx"}
    windows = [window(request) for request in of_type(provider, "sleep")]
    assert all(end - start <= timedelta(days=28, seconds=1) for start, end in windows)
    assert all(later[0] <= earlier[1] and later[1] > earlier[0] for later, earlier in pairwise(windows))
    assert windows == sorted(windows, reverse=True)
    assert windows[-1][0] <= NOW - 100 * DAY
    assert {one[0] for one in status(engine, "t1")} == {"complete"}
    found = rows(engine, "SELECT count(*) AS n, count(DISTINCT id) AS ids FROM health.sleep WHERE origin = 'backfill'")
    assert found == [{"n": 100, "ids": 100}]
    assert rows(engine, "SELECT provider, client_user_id FROM health.profile") == [
        {"provider": "oura", "client_user_id": "m1"}
    ]


def test_a_persons_budget_is_kept(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if Terra has to say that 6,000 days an hour are used up, or if one person's decade holds up another."""
    monkeypatch.setattr(terra, "API_LIMITS", replace(terra.API_LIMITS, user_rate="9/hour"))
    connect(engine, settings)
    with from_terra(nights) as provider:
        settle(engine, provider.fetcher(engine, settings), 30)
        assert len(provider.asked) == 9
        connect(engine, settings, "t2")
        settle(engine, provider.fetcher(engine, settings), 30)
    asked = [request.url.params["user_id"] for request in provider.asked]
    assert (asked.count("t1"), asked.count("t2")) == (9, 9)
    waiting = rows(engine, "SELECT status FROM health.backfills WHERE status IN ('pending', 'running')")
    assert len(waiting) > 7
    assert rows(engine, "SELECT 1 FROM headrace.backfills WHERE attempts > 0") == []


def test_the_budget_is_less_than_terras() -> None:
    """Breaks if the budget allows more than 6,000 days an hour, were every request as long as one may be."""
    assert terra.API_LIMITS.user_rate is not None
    requests, _, period = terra.API_LIMITS.user_rate.partition("/")
    assert (int(requests) * (terra.API_LIMITS.max_slice_days + 1) <= 6000, period) == (True, "hour")


def limited(rule: str, **headers: str) -> httpx.Response:
    """Terra refuses, and says why."""
    return httpx.Response(
        429, headers={"X-Terra-RateLimit-Rule": rule} | headers, json={"detail": "rate limit exceeded"}
    )


@pytest.mark.parametrize("refusal", [limited("r1"), httpx.Response(413), httpx.Response(504), httpx.Response(500)])
def test_what_is_too_much_is_asked_for_in_halves(engine: Engine, settings: Settings, refusal: httpx.Response) -> None:
    """Breaks if a window that Terra will never answer is asked for again, or its days are left out."""

    def answer(request: httpx.Request) -> httpx.Response:
        start, end = window(request)
        if end - start > timedelta(days=8):
            return httpx.Response(refusal.status_code, headers=refusal.headers, content=refusal.content)
        return nights(request)

    connect(engine, settings)
    with from_terra(only("sleep", answer)) as provider:
        settle(engine, provider.fetcher(engine, settings), 60)
    windows = [window(request) for request in of_type(provider, "sleep")]
    assert len(windows) == len(set(windows)), "the same window twice"
    assert rows(engine, "SELECT count(*) AS n FROM health.sleep") == [{"n": 100}]
    assert pauses(settings) == []


def test_a_person_may_be_told_to_wait_alone(engine: Engine, settings: Settings) -> None:
    """Breaks if one person's used-up budget pauses the account, or they are asked about before the time is over."""

    def answer(request: httpx.Request) -> httpx.Response:
        return limited("r2", **{"Retry-After": "1800"}) if request.url.params["user_id"] == "t1" else nights(request)

    for user in ("t1", "t2"):
        connect(engine, settings, user)
    with from_terra(answer) as provider:
        settle(engine, provider.fetcher(engine, settings), 20)
    assert [request.url.params["user_id"] for request in provider.asked].count("t1") == 1
    assert {one[0] for one in status(engine, "t2")} == {"complete"}
    assert {one[0] for one in status(engine, "t1")} <= {"pending", "running"}
    (pause,) = pauses(settings)
    assert (pause.account, pause.seconds > 1700) == ("terra/t1", True)


@pytest.mark.parametrize(
    ("said", "least"),
    [
        ({"type": "processing", "status": "success", "retry_after_seconds": 30}, 30),
        ({"status": "processing", "retry_after_seconds": 120}, 120),
        ({"type": "no_data", "message": "there is none"}, 60),
        ({"type": "rate_limit", "message": "too many"}, 60),
        ({"status": "success", "type": "sleep", "reference": "r", "trace_id": "t"}, 60),
        ({"type": "large_request_processing", "reference": "r"}, 60),
    ],
)
def test_an_answer_that_is_no_data_closes_no_window(
    engine: Engine, settings: Settings, said: dict[str, Any], least: float
) -> None:
    """Breaks if a word about the data is taken for an empty window, so that history is complete without it."""
    calls = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        return httpx.Response(200, json=said) if calls == 1 else nights(request)

    numbers = connect(engine, settings)
    with from_terra(only("sleep", answer)) as provider:
        fetcher = provider.fetcher(engine, settings)
        for number in numbers:
            fetcher.run(number)
        left = "extract(epoch FROM due_at - now())"
        (waits,) = rows(engine, f"SELECT status, {left} AS left FROM headrace.backfills WHERE resource = 'sleep'")
        assert waits["status"] == "running"
        assert least - 20 < waits["left"]
        settle(engine, fetcher)
    windows = [window(request) for request in of_type(provider, "sleep")]
    assert windows[0] == windows[1]
    assert rows(engine, "SELECT count(*) AS n FROM health.sleep") == [{"n": 100}]


def test_no_data_is_believed_in_the_end(engine: Engine, settings: Settings) -> None:
    """Breaks if an empty window is asked about for ever, or believed at once."""
    connect(engine, settings)
    with from_terra(only("sleep", lambda _: httpx.Response(200, json={"type": "no_data"}))) as provider:
        settle(engine, provider.fetcher(engine, settings))
    windows = [window(request) for request in of_type(provider, "sleep")]
    assert {windows.count(one) for one in windows} == {3}
    assert {one[0] for one in status(engine, "t1")} == {"complete"}


def test_who_is_always_about_to_answer_is_given_up(engine: Engine, settings: Settings) -> None:
    """Breaks if a provider that is never done keeps a backfill open for good, with nobody told."""
    connect(engine, settings)
    with from_terra(only("sleep", lambda _: httpx.Response(200, json={"type": "processing"}))) as provider:
        settle(engine, provider.fetcher(engine, settings))
    assert len(of_type(provider, "sleep")) == MAX_ATTEMPTS
    (end,) = rows(engine, "SELECT status, error FROM health.backfills WHERE resource = 'sleep'")
    assert end == {"status": "failed", "error": "not yet: processing"}


def test_who_is_unknown_to_terra_is_gone(engine: Engine, settings: Settings) -> None:
    """Breaks if a dead connection is asked about for ever. A profile is what not everybody has."""
    connect(engine, settings)
    with from_terra(lambda _: httpx.Response(404, json={"title": "Not Found"}), 30) as provider:
        settle(engine, provider.fetcher(engine, settings))
    ends = rows(engine, "SELECT status, count(*) AS n FROM health.backfills GROUP BY status ORDER BY status")
    assert ends == [{"status": "complete", "n": 1}, {"status": "failed", "n": 6}]


def test_without_a_key_history_waits(engine: Engine, settings: Settings) -> None:
    """Breaks if a worker with a key for Junction alone fails at Terra's backfills, or asks Junction for them."""
    connect(engine, settings)
    provider = Provider(lambda _: httpx.Response(500), 0)
    fetcher = provider.fetcher(engine, settings)
    hurry(engine)
    assert due(engine, of=["junction"]) == []
    for number in due(engine):
        assert fetcher.run(number) == []
    assert {one[0] for one in status(engine, "t1")} == {"pending"}
