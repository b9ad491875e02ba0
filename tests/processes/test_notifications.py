"""A worker of the lane `notify` and the real broker: notifications, and a kill between request and commit."""

import signal
import subprocess
from pathlib import Path

from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, of_worker, program, rows, until, workout
from tests.support.database import run
from tests.support.receivers import Endpoint, endpoint, subscribe, verify

COMMAND = ("workers.cli", "worker", "--lane", "notify")


def test_a_killed_worker_loses_no_notification(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if the lane sends nothing, or if a notification is lost or changed when its worker dies."""
    del broker_url  # which empties the broker
    workers: list[subprocess.Popen[bytes]] = []

    def kill(app: Endpoint) -> int:
        """Accepts each notification, and kills the worker before it learns of the first."""
        if not app.received:
            workers[0].send_signal(signal.SIGKILL)
            workers[0].wait(10)
        return 204

    with endpoint(kill) as app:
        secret = subscribe(engine, app.url)
        apply(engine, settings, delivery(workout("u1")))
        with program(*COMMAND, log=tmp_path / "log", **of_worker(settings)) as process:
            workers.append(process)
            until(lambda: app.received, 60)
        count = len(app.received)
        run(engine, "UPDATE headrace.subscriptions SET lease_until = now()")  # 30 s later
        with program(*COMMAND, log=tmp_path / "log", **of_worker(settings)):
            until(lambda: rows(engine, "SELECT 1 FROM headrace.notifications") and not pending(engine), 60)
    assert len(app.received) > count
    for one in app.received:
        verify(one, secret)
    bodies = {(one.id, one.body) for one in app.received}
    assert len(bodies) == len({one.id for one in app.received}) < len(app.received)
    assert "w1" in app.ids()


def pending(engine: Engine) -> bool:
    return bool(rows(engine, "SELECT 1 FROM headrace.notifications WHERE status <> 'sent'"))


def test_a_worker_ends_while_a_subscriber_hangs(
    engine: Engine, settings: Settings, broker_url: str, tmp_path: Path
) -> None:
    """Breaks if SIGTERM waits for a subscriber, so that a deployment kills the worker after its grace period."""
    del broker_url
    with endpoint(lambda one: one.hang()) as app:
        subscribe(engine, app.url)
        apply(engine, settings, delivery(workout("u1")))
        with program(*COMMAND, log=tmp_path / "log", **of_worker(settings)) as process:
            attempted = "SELECT 1 FROM headrace.notifications WHERE attempts > 0"
            until(lambda: rows(engine, attempted), 60)
            process.send_signal(signal.SIGTERM)
            process.wait(10)
    assert rows(engine, "SELECT status FROM headrace.notifications WHERE attempts > 0") != []
    assert rows(engine, "SELECT 1 FROM headrace.subscriptions WHERE lease_until > now()") == []
