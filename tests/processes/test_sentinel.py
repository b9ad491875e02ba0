"""A worker process with a broker behind Sentinel."""

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import delivery, program, rows, status, worker, workout
from tests.support import until as eventually
from tests.support.sentinels import DOWN_AFTER_MILLISECONDS, running_group, until
from tests.support.workers import is_ready, publish
from workers.local.ports import free_port

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("fault", ["killed", "frozen", "replaced"])
def test_a_worker_follows_a_failover(engine: Engine, settings: Settings, tmp_path: Path, fault: str) -> None:
    """Breaks if a worker stays with an old primary that is lost, is silent, or still serves its clients."""
    with running_group(tmp_path, replicas=2) as group:
        mine = replace(settings, broker_url=group.url, broker_replicas=1)
        with worker(mine, tmp_path / "worker.log", HEADRACE_BROKER_REPLICAS="1") as process:
            eventually(lambda: is_ready(tmp_path / "worker.log"))
            publish(mine, [delivery(workout("before"))])
            eventually(lambda: rows(engine, "SELECT 1 FROM health.workouts WHERE user_id = 'before'"))
            if fault == "replaced":
                group.replace_primary()
            else:
                group.nodes[0].signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
            time.sleep(DOWN_AFTER_MILLISECONDS / 1000)
            group.promoted()
            publish(mine, [delivery(workout("after"))])
            until(lambda: rows(engine, "SELECT 1 FROM health.workouts WHERE user_id = 'after'"))
            assert process.poll() is None


def test_beat_and_flower_use_the_primary(settings: Settings, tmp_path: Path) -> None:
    """Breaks if the scheduler stops with a failover, or Flower cannot count messages behind Sentinel."""
    with running_group(tmp_path, replicas=2) as group:
        port, login = free_port(), ("tests", "sesame-open-the-door")
        known = {"BROKER_URL": group.url, "HEADRACE_BROKER_REPLICAS": "1"}
        known |= {"HEADRACE_FLOWER_PORT": str(port), "HEADRACE_FLOWER_AUTH": ":".join(login)}
        with (
            program("workers.cli", "beat", log=tmp_path / "beat.log", **known),
            program("workers.cli", "flower", log=tmp_path / "flower.log", **known),
        ):
            eventually(lambda: "sweep" in (tmp_path / "beat.log").read_text())
            group.nodes[0].signal(signal.SIGKILL)
            with group.promoted().client as client:
                before = client.llen("maintenance")
                until(lambda: client.llen("maintenance") > before)
            url = f"http://127.0.0.1:{port}/broker"
            until(lambda: status(url, auth=login) == 200)
