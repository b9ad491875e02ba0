"""A delivery that PostgreSQL does not execute, in a real worker on a real broker."""

from pathlib import Path

import pytest
import redis
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import rows, until, worker
from tests.support.poison import BAD, RAISE, eleven, fault
from tests.support.workers import messages, publish
from workers.broker_admin import lanes
from workers.ingest.apply import Applier
from workers.ingest.replay import replay_dead_letters
from workers.store import dead_letters

pytestmark = pytest.mark.processes


def test_a_poisonous_delivery_is_set_aside(
    engine: Engine, settings: Settings, broker: "redis.Redis", tmp_path: Path
) -> None:
    """Breaks if its neighbours wait for it, `status` hides it, or its message stays in the broker for ever."""
    log = tmp_path / "log"
    # Longer than the delays of retries, as it must be: a delayed message would be redelivered meanwhile.
    timeout = {"HEADRACE_VISIBILITY_TIMEOUT_SECONDS": "60"}
    with fault(engine, RAISE.format("XX001")), worker(settings, log, **timeout):
        publish(settings, eleven())
        until(lambda: len(rows(engine, "SELECT 1 FROM health.workouts")) == 10)
        assert dead_letters.listed(engine) == []
        (live, *others) = until(lambda: found if (found := lanes(settings))[0].retries >= 2 else None)
        assert (live.messages, live.unacked, live.retrying) == (0, 1, 1)
        assert live.retry_reason == "PostgreSQL: DataCorrupted (XX001)"
        assert live.retrying_for is not None
        assert 0 < live.retrying_for.total_seconds() < 60
        assert [(one.unacked, one.retrying) for one in others] == [(0, 0)] * len(others)
        (message,) = messages(broker)
        assert message["headers"]["argsrepr"] == "(1 deliveries)"
        until(lambda: dead_letters.listed(engine))
        until(lambda: not messages(broker))
    assert BAD not in log.read_text()
    assert replay_dead_letters(engine, Applier(engine, settings), dead_letters.listed(engine)) == {"applied": 1}
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 11
