"""The status of the installation that the overview shows: read at most every few seconds, and never old."""

import threading
from collections.abc import Iterator

import pytest

from workers.console import context
from workers.console.context import StatusCache
from workers.operate.health import Status


@pytest.fixture
def gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


@pytest.fixture
def cache(gate: threading.Event) -> Iterator[StatusCache]:
    """Each status that is read has a further crashed delivery; reading waits for the gate."""
    counts = iter(range(100))

    def read() -> Status:
        gate.wait(20)
        return Status(crashed_deliveries=next(counts))

    one = StatusCache(read)
    yield one
    gate.set()
    one.close()


def shown(cache: StatusCache) -> int | None:
    return None if (found := cache.status()) is None else found.crashed_deliveries


def test_a_recent_status_is_shown_while_the_next_is_read(cache: StatusCache, gate: threading.Event) -> None:
    assert [shown(cache), shown(cache)] == [0, 0]
    gate.clear()
    cache._read_at -= context.FRESH_SECONDS
    assert shown(cache) == 0


def test_an_old_status_is_not_shown(cache: StatusCache, gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the first look of the morning says "healthy" as of yesterday."""
    assert shown(cache) == 0
    cache._read_at -= 3600
    assert shown(cache) == 1
    cache._read_at -= 3600
    gate.clear()
    monkeypatch.setattr(context, "MAX_WAIT_SECONDS", 0.1)
    assert shown(cache) is None
