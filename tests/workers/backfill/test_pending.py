"""Pages that are committed together."""

from collections import Counter

import httpx
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import rows
from tests.support.backfills import announce, make_due, notice, status
from tests.support.provider import Killed, Provider, heartrates, hourly


def commits(engine: Engine) -> int:
    """The number of transactions that stored samples."""
    return len(rows(engine, "SELECT DISTINCT stored_at FROM headrace.samples"))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({}, 2), ({"pages": 1}, 10), ({"pages": 3}, 4), ({"rows": 50}, 5), ({"seconds": 0}, 10)],
    ids=["as it is", "each alone", "three pages", "fifty rows", "at once"],
)
def test_pages_are_committed_together(
    engine: Engine, settings: Settings, limits: dict[str, float], expected: int
) -> None:
    """Breaks if each page costs a commit, or slow or large pages are committed late."""
    provider = Provider(heartrates(hourly(10), 25))
    (one,) = announce(engine, settings, notice(days=(0, 9.9)))
    provider.fetcher(engine, settings, **limits).run(one)
    assert commits(engine) == expected
    assert status(engine) == [("complete", 1, 1)]
    counted = {"records": 240, "pages": len(provider.requests)}
    assert rows(engine, "SELECT records, pages FROM headrace.backfills") == [counted]


def test_pending_pages_are_committed_before_a_wait(engine: Engine, settings: Settings) -> None:
    """Breaks if pending pages are requested again because the page after them has to wait."""
    inner = heartrates(hourly(10), 25)
    answers: list[httpx.Response | None] = [None, None, httpx.Response(500)]
    provider = Provider(lambda request: (answers.pop(0) if answers else None) or inner(request))
    (one,) = announce(engine, settings, notice(days=(0, 9.9)))
    fetcher = provider.fetcher(engine, settings)
    assert [again.backfill_id for again in fetcher.run(one)] == [one]
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 50}]
    make_due(engine)
    fetcher.run(one)
    assert sorted(Counter(str(request.url) for request in provider.requests).values())[-2:] == [1, 2]
    assert status(engine) == [("complete", 1, 1)]


def test_a_killed_worker_costs_the_pages_of_one_commit(engine: Engine, settings: Settings) -> None:
    """Breaks if more is lost, or pages are committed together again before the page that crashes is known."""
    inner, kills = heartrates(hourly(10), 25), [7]

    def answer(request: httpx.Request) -> httpx.Response:
        if len(provider.requests) in kills:
            raise Killed
        return inner(request)

    provider = Provider(answer)
    (one,) = announce(engine, settings, notice(days=(0, 9.9)))
    with pytest.raises(Killed):
        provider.fetcher(engine, settings, pages=4).run(one)
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 100}]
    make_due(engine, leases=True)
    provider.fetcher(engine, settings, pages=4).run(one)
    assert Counter(Counter(str(request.url) for request in provider.requests).values())[2] == 3
    assert commits(engine) == 1 + 6
    assert status(engine) == [("complete", 1, 1)]
