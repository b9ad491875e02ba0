"""Terra's history: its windows, its rate limits, and its responses without data."""

from collections.abc import Callable
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
from app.observability import metrics
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, rows
from tests.support.backfills import make_due, settle, status
from tests.support.provider import Provider
from workers.aggregators import terra
from workers.fetch.rate_limits import pauses
from workers.fetch.retry import MAX_ATTEMPTS
from workers.ingest.apply import Applier
from workers.store import dead_letters
from workers.store.backfills import due

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
TYPES = ["activity", "athlete", "body", "daily", "menstruation", "nutrition", "sleep"]
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment with a Terra account and without a rate limit of its own."""
    terras = {"terra_dev_id": "dev", "terra_api_key": "key-of-the-tests", "history_days": 100}
    return replace(settings, broker_url=broker_url, request_rate="1000000/second", **terras)


def connect(engine: Engine, settings: Settings, user: str = "t1") -> list[int]:
    """Connects a user. Returns the backfills that this opens."""
    body = {"type": "auth", "status": "success", "user": {"user_id": user, "provider": "OURA", "reference_id": "m1"}}
    sealed = seal("terra", Receipt(f"auth-{user}"), msgspec.json.encode(body), Sealer([ENCRYPTION_KEY]))
    return Applier(engine, settings).apply(pack([sealed])).backfills


def window(request: httpx.Request) -> tuple[datetime, datetime]:
    """The window of a request. The end is exclusive."""
    start, end = (int(request.url.params[name]) for name in ("start_date", "end_date"))
    return datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(end, UTC)


def of_type(provider: Provider, name: str) -> list[httpx.Request]:
    """The requests for one type, in order."""
    return [request for request in provider.requests if request.url.path == f"/{name}"]


def nights(request: httpx.Request) -> httpx.Response:
    """A sleep record at every midnight of the last hundred days; a response holds those that overlap the window."""
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


def from_terra(
    engine: Engine, settings: Settings, answer: Answer, *users: str, limit: int = 500, rounds: int = 60
) -> Provider:
    """Connects the users and fetches their history from a Terra API that answers with this function."""
    provider = Provider(answer, limit, "terra")
    for user in users or ("t1",):
        connect(engine, settings, user)
    settle(engine, provider.fetcher(engine, settings), rounds)
    return provider


def only(name: str, answer: Answer) -> Answer:
    """Answers one type with this function, and the others as usual."""
    return lambda request: answer(request) if request.url.path == f"/{name}" else nights(request)


def test_a_connection_brings_its_history(engine: Engine, settings: Settings) -> None:
    """Breaks if a type is missing, a window is longer than a month or leaves a gap, or Terra sends webhooks."""
    provider = from_terra(engine, settings, nights)
    assert sorted({request.url.path.strip("/") for request in provider.requests}) == TYPES
    assert {request.url.params["to_webhook"] for request in provider.requests} == {"false"}
    assert {request.headers.get("user-agent", "").split("/")[0] for request in provider.requests} == {"python-httpx"}
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


def test_the_rate_limit_of_a_user_is_kept(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if Terra has to enforce its 6,000 days an hour, or one user's decade delays another user."""
    monkeypatch.setattr(terra, "API_LIMITS", replace(terra.API_LIMITS, user_rate="9/hour"))
    provider = from_terra(engine, settings, nights, rounds=30)
    assert len(provider.requests) == 9
    connect(engine, settings, "t2")
    settle(engine, provider.fetcher(engine, settings), 30)
    asked = [request.url.params["user_id"] for request in provider.requests]
    assert (asked.count("t1"), asked.count("t2")) == (9, 9)
    waiting = rows(engine, "SELECT status FROM health.backfills WHERE status IN ('pending', 'running')")
    assert len(waiting) > 7
    assert rows(engine, "SELECT 1 FROM headrace.backfills WHERE attempts > 0") == []


def test_the_rate_limit_is_below_that_of_terra() -> None:
    """Breaks if requests of maximal length could exceed 6,000 days an hour."""
    assert terra.API_LIMITS.user_rate is not None
    requests, _, period = terra.API_LIMITS.user_rate.partition("/")
    assert (int(requests) * (terra.API_LIMITS.max_slice_days + 1) <= 6000, period) == (True, "hour")


def limited(rule: str, **headers: str) -> httpx.Response:
    """A 429 from Terra that names the rule."""
    return httpx.Response(
        429, headers={"X-Terra-RateLimit-Rule": rule} | headers, json={"detail": "rate limit exceeded"}
    )


@pytest.mark.parametrize("refusal", [limited("r1"), httpx.Response(413), httpx.Response(504), httpx.Response(500)])
def test_a_window_that_is_too_large_is_halved(engine: Engine, settings: Settings, refusal: httpx.Response) -> None:
    """Breaks if a window that Terra cannot answer is requested again, or its days are skipped."""

    def answer(request: httpx.Request) -> httpx.Response:
        start, end = window(request)
        if end - start > timedelta(days=8):
            return httpx.Response(refusal.status_code, headers=refusal.headers, content=refusal.content)
        return nights(request)

    provider = from_terra(engine, settings, only("sleep", answer))
    windows = [window(request) for request in of_type(provider, "sleep")]
    assert len(windows) == len(set(windows)), "the same window twice"
    assert rows(engine, "SELECT count(*) AS n FROM health.sleep") == [{"n": 100}]
    assert pauses(settings) == []


def test_a_rate_limit_may_apply_to_one_user(engine: Engine, settings: Settings) -> None:
    """Breaks if one user's rate limit pauses the account, or requests about the user are sent during the pause."""

    def answer(request: httpx.Request) -> httpx.Response:
        return limited("r2", **{"Retry-After": "1800"}) if request.url.params["user_id"] == "t1" else nights(request)

    provider = from_terra(engine, settings, answer, "t1", "t2", rounds=20)
    assert [request.url.params["user_id"] for request in provider.requests].count("t1") == 1
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
    """Breaks if a response without data counts as an empty window, so that the history is complete without it."""
    calls = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        return httpx.Response(200, json=said) if calls == 1 else nights(request)

    numbers = connect(engine, settings)
    provider = Provider(only("sleep", answer), limit=500, name="terra")
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
    """Breaks if an empty window is requested forever, or `no_data` is believed at once."""
    provider = from_terra(engine, settings, only("sleep", lambda _: httpx.Response(200, json={"type": "no_data"})))
    windows = [window(request) for request in of_type(provider, "sleep")]
    assert {windows.count(one) for one in windows} == {3}
    assert {one[0] for one in status(engine, "t1")} == {"complete"}


def test_endless_processing_fails(engine: Engine, settings: Settings) -> None:
    """Breaks if a provider that is always `processing` keeps a backfill open forever without an error."""
    provider = from_terra(engine, settings, only("sleep", lambda _: httpx.Response(200, json={"type": "processing"})))
    assert len(of_type(provider, "sleep")) == MAX_ATTEMPTS
    (end,) = rows(engine, "SELECT status, error FROM health.backfills WHERE resource = 'sleep'")
    assert end == {"status": "failed", "error": "not yet: processing"}


def test_a_user_unknown_to_terra_fails(engine: Engine, settings: Settings) -> None:
    """Breaks if a deleted connection is requested forever. Its profile completes, because a profile is optional."""
    from_terra(engine, settings, lambda _: httpx.Response(404, json={"title": "Not Found"}), limit=30)
    ends = rows(engine, "SELECT status, count(*) AS n FROM health.backfills GROUP BY status ORDER BY status")
    assert ends == [{"status": "complete", "n": 1}, {"status": "failed", "n": 6}]


def test_without_a_key_history_waits(engine: Engine, settings: Settings) -> None:
    """Breaks if a worker with only a Junction key fails on Terra's backfills, or sends their requests to Junction."""
    connect(engine, settings)
    provider = Provider(lambda _: httpx.Response(500), 0)
    fetcher = provider.fetcher(engine, settings)
    make_due(engine)
    assert due(engine, of=["junction"]) == []
    for number in due(engine):
        assert fetcher.run(number) == []
    assert {one[0] for one in status(engine, "t1")} == {"pending"}


def beats_of(hr_samples: Any) -> Answer:
    """Answers for activities with one walk, which has this array of heart rates."""
    times = {"start_time": (NOW - 5 * DAY).isoformat(), "end_time": (NOW - 4.9 * DAY).isoformat()}
    walk = {
        "metadata": {"summary_id": "walk"} | times,
        "heart_rate_data": {"detailed": {"hr_samples": hr_samples}},
    }
    user = {"user_id": "t1", "provider": "OURA"}
    return only("activity", lambda _: httpx.Response(200, json={"type": "activity", "user": user, "data": [walk]}))


def of_workouts(engine: Engine) -> dict[str, Any]:
    (row,) = rows(engine, "SELECT status, error, refused FROM headrace.backfills WHERE resource = 'workouts'")
    return row


@pytest.mark.parametrize("odd", ["x", {"a": 1}, 7])
def test_an_array_of_another_form_is_refused(engine: Engine, settings: Settings, odd: Any) -> None:
    """Breaks if history loses all samples of a workout silently."""
    from_terra(engine, replace(settings, history_days=20), beats_of(odd))
    reason = "activity: heart_rate_data.detailed.hr_samples: expected an array"
    assert of_workouts(engine) == {"status": "complete", "error": f"1 refused, first: {reason}", "refused": 1}
    (entry,) = dead_letters.listed(engine)
    assert (entry.event_type, entry.user_id, entry.reason) == ("fetch.workouts", "t1", reason)
    assert rows(engine, "SELECT id FROM health.workouts") == [{"id": "walk"}]


def test_values_without_a_time_are_noted(engine: Engine, settings: Settings) -> None:
    """Breaks if history loses values without a time silently: neither in the backfill nor in the metric."""
    name = "headrace_samples_without_timestamp_total"

    def counted() -> float:
        (line,) = [one for one in metrics.exposition().decode().splitlines() if one.startswith(name)]
        return float(line.split()[1])

    before = counted()
    times = (None, "0001-01-01T00:00:00Z")
    odd = [{"timestamp": time, "bpm": 60} for time in times]
    from_terra(engine, replace(settings, history_days=20), beats_of(odd))
    note = "values without a time, which are in the payload only: 2"
    assert of_workouts(engine) == {"status": "complete", "error": note, "refused": 0}
    assert counted() - before == 2
