"""Pages that crash the worker: the backfill is resumed, and fails after too many crashes."""

from dataclasses import replace

import httpx
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import rows
from tests.support.backfills import announce, backfill, make_due, notice, status
from tests.support.provider import Killed, Provider, heartrates, hourly
from workers.backfill.fetcher import MAX_CRASHES
from workers.store import backfill_admin
from workers.store.backfills import due


@pytest.fixture
def reading(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may fetch history without a rate limit."""
    return replace(settings, broker_url=broker_url, junction_api_key="sk_us_tests", request_rate="1000000/second")


def killed(_: httpx.Request) -> httpx.Response:
    """A response that crashes the worker."""
    raise Killed


def crash(engine: Engine, settings: Settings, provider: Provider, backfill_id: int) -> None:
    """A worker claims a backfill and crashes; its lease expires."""
    with pytest.raises(Killed):
        provider.fetcher(engine, settings).run(backfill_id)
    make_due(engine, leases=True)


def test_a_page_that_crashes_its_workers_fails_its_backfill(engine: Engine, reading: Settings) -> None:
    """Breaks if one page crashes a worker per minute without end, or its backfill fails at the first crash."""
    provider = Provider(killed)
    (one,) = announce(engine, reading, notice(days=(0, 3)))
    for deaths in range(MAX_CRASHES):
        assert rows(engine, "SELECT crashes, status FROM headrace.backfills") == [
            {"crashes": max(deaths - 1, 0), "status": "running" if deaths else "pending"}
        ]
        crash(engine, reading, provider, one)
    assert provider.fetcher(engine, reading).run(one) == []
    assert len(provider.requests) == MAX_CRASHES
    assert status(engine) == [("failed", 0, 1)]
    assert backfill(engine)["error"] == f"the worker crashed {MAX_CRASHES} times in a row during this backfill"
    make_due(engine, leases=True)
    assert due(engine) == []


def test_a_committed_page_resets_the_crashes(engine: Engine, reading: Settings) -> None:
    """Breaks if a long backfill fails because of occasional crashes over weeks."""
    inner, met = heartrates(hourly(6), 24), dict[str, int]()

    def answer(request: httpx.Request) -> httpx.Response:
        met[str(request.url)] = met.get(str(request.url), 0) + 1
        return killed(request) if met[str(request.url)] < MAX_CRASHES else inner(request)

    provider = Provider(answer)
    (one,) = announce(engine, reading, notice(days=(0, 6)))
    for _ in range(200):
        if not due(engine):
            break
        try:
            provider.fetcher(engine, reading).run(one)
        except Killed:
            make_due(engine, leases=True)
    assert set(met.values()) == {MAX_CRASHES}
    assert len(met) > 3
    assert status(engine) == [("complete", 1, 1)]
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 24 * 6}]
    assert rows(engine, "SELECT crashes FROM headrace.backfills") == [{"crashes": 0}]


def test_a_released_backfill_has_not_crashed(engine: Engine, reading: Settings) -> None:
    """Breaks if a backfill that waits for its next attempt counts as crashed."""
    provider = Provider(lambda _: httpx.Response(500))
    (one,) = announce(engine, reading, notice(days=(0, 3)))
    for _ in range(MAX_CRASHES + 2):
        provider.fetcher(engine, reading).run(one)
        make_due(engine)
    assert rows(engine, "SELECT crashes, status FROM headrace.backfills") == [{"crashes": 0, "status": "running"}]


def test_a_resumed_backfill_runs_again(engine: Engine, reading: Settings) -> None:
    """Breaks if a resumed backfill fails at once because of its earlier crashes."""
    provider = Provider(killed)
    (one,) = announce(engine, reading, notice(days=(0, 3)))
    for _ in range(MAX_CRASHES):
        crash(engine, reading, provider, one)
    provider.fetcher(engine, reading).run(one)
    provider.answer = heartrates(hourly(3))
    assert backfill_admin.resume(engine, [one]) == [one]
    provider.fetcher(engine, reading).run(one)
    assert status(engine) == [("complete", 1, 1)]


def test_other_backfills_run_while_one_crashes(engine: Engine, reading: Settings) -> None:
    """Breaks if the slot of a crashed backfill is never free again."""
    provider, healthy = Provider(killed), Provider(heartrates(hourly(3)))
    limited = replace(reading, backfills_per_user=1)
    (one,) = announce(engine, limited, notice(days=(0, 3)))
    (other,) = announce(engine, limited, notice(resource="steps", days=(0, 3)))
    with pytest.raises(Killed):
        provider.fetcher(engine, limited).run(one)
    healthy.fetcher(engine, limited).run(other)
    assert healthy.requests == []
    make_due(engine, leases=True)
    healthy.fetcher(engine, limited).run(other)
    assert [row["status"] for row in rows(engine, "SELECT status FROM headrace.backfills ORDER BY id")] == [
        "running",
        "complete",
    ]
