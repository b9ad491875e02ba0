"""How long a drill waits until its work has ended."""

import json
import os
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.support import JUNCTION_SECRET
from tests.support.patience import Clock, install
from workers.local.temporary import Stack
from workers.simulator import Simulator
from workers.store.engine import transaction
from workers.store.ledger import OutcomeRow, settle
from workers.verify.drill import run
from workers.verify.drill.plan import Options
from workers.verify.drill.run import LEASE_SECONDS, MARGIN_SECONDS, Drill

SUBSCRIBER: Any = SimpleNamespace(settle=lambda: None, ids=set())


def finish(engine: Engine, name: str) -> None:
    with transaction(engine) as connection:
        settle(connection, [OutcomeRow("junction", name, "test", "u", datetime.now(UTC), "applied")])


@pytest.mark.parametrize("finished", [3, 2])
def test_a_drill_waits_while_deliveries_finish(
    engine: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    """Breaks if a drill on a busy machine gives up while its work goes on, or waits on without progress."""
    info = {"web": "http://127.0.0.1:1", "database_url": database_url, "broker_url": "redis://127.0.0.1:1"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stack.json").write_text(json.dumps(info | {"junction_webhook_secret": JUNCTION_SECRET}))
    options = Options(seconds=1, seed=1, rate=1, visibility_seconds=15)
    simulator, stack = Simulator(users=1, days=1), Stack(tmp_path, os.getpid())
    drill = Drill(simulator, [], stack, options, show=lambda _: None, on_progress=lambda _: None)
    names = ["a", "b", "c"]
    drill._sender.taken.update({name: {} for name in names})
    step = options.visibility_seconds + LEASE_SECONDS + MARGIN_SECONDS - 10
    clock = Clock(step, [partial(finish, engine, name) for name in names[:finished]])
    install(monkeypatch, clock)
    monkeypatch.setattr(run, "time", SimpleNamespace(sleep=clock.sleep, time=lambda: 1.0))

    ended = drill._settle(SUBSCRIBER)

    drill._ledger.close()
    drill._sender.close()
    assert ended == (1.0 if finished == len(names) else None)
    assert clock.sleeps <= 5
