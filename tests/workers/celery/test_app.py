"""The Celery application of a worker, loaded in a process of its own: it reads its settings on import."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from app.broker.lanes import APPLY, LANES, SWEEP
from tests.support import ROOT
from workers.celery.tasks import MAX_RETRY_SECONDS

LOOK = """
import json, sys
from workers.celery.app import celery
conf = celery.conf
print(json.dumps({
    "tasks": sorted(name for name in celery.tasks if not name.startswith("celery.")),
    "queues": [queue.name for queue in conf.task_queues],
    "arguments": [queue.queue_arguments for queue in conf.task_queues],
    "beat": {name: [one["task"], one["schedule"], one["options"]] for name, one in conf.beat_schedule.items()},
    "flags": {name: getattr(conf, name) for name in sys.argv[1].split(",")},
    "transport": conf.broker_transport_options,
    "retries": {name: celery.tasks[name].max_retries for name in celery.tasks if not name.startswith("celery.")},
}))
"""
SAFE = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_ignore_result": True,
    "task_create_missing_queues": False,
    "worker_prefetch_multiplier": 1,
    "worker_hijack_root_logger": False,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "enable_utc": True,
}


def load(broker_url: str, **more: str) -> dict[str, Any]:
    """What the application is made of."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "BROKER_URL": broker_url} | more
    command = (sys.executable, "-c", LOOK, ",".join(SAFE))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def on_redis() -> dict[str, Any]:
    """The application beside Redis, which need not run for this."""
    return load("redis://127.0.0.1:1/0", HEADRACE_VISIBILITY_TIMEOUT_SECONDS="77")


def test_it_has_our_tasks_and_lanes(on_redis: dict[str, Any]) -> None:
    """Breaks if a task that others send is not known to a worker, or a lane has no queue."""
    assert set(on_redis["tasks"]) >= {APPLY, SWEEP}
    assert on_redis["queues"] == list(LANES)


def test_no_setting_loses_messages(on_redis: dict[str, Any]) -> None:
    """Breaks if a message is acknowledged before its work is done, or a worker gives up on its broker."""
    assert on_redis["flags"] == SAFE
    assert on_redis["retries"][APPLY] is None


def test_a_killed_workers_message_comes_back_soon(on_redis: dict[str, Any]) -> None:
    """Breaks if the visibility timeout is not the operator's, or is checked so seldom that it means minutes."""
    assert on_redis["transport"]["visibility_timeout"] == 77
    assert on_redis["transport"]["visibility_timeout"] > MAX_RETRY_SECONDS
    assert on_redis["transport"]["unacked_restore_interval"] == 1


def test_beat_only_sends_known_tasks_to_known_lanes(on_redis: dict[str, Any]) -> None:
    """Breaks if the clock sends what nobody takes, or ticks pile up while no worker runs."""
    assert on_redis["beat"]
    for task, schedule, options in on_redis["beat"].values():
        assert task in on_redis["tasks"]
        assert options["queue"] in LANES
        assert 0 < schedule <= 3600
        assert options["expires"] > schedule


def test_rabbitmq_gets_quorum_queues_and_confirms() -> None:
    """Breaks if a 202 beside RabbitMQ means that one node had it in memory."""
    found = load("amqp://127.0.0.1:1//")
    assert found["arguments"] == [{"x-queue-type": "quorum"}] * len(LANES)
    assert found["transport"]["confirm_publish"] is True


def test_a_wrong_setting_stops_it_without_telling_the_value() -> None:
    """Breaks if `celery -A workers.celery.app` prints a secret while it fails."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        load("redis://127.0.0.1:1/0", HEADRACE_ENCRYPTION_KEY="sesame!")
    assert "HEADRACE_ENCRYPTION_KEY: not usable" in caught.value.stderr
    assert "sesame" not in caught.value.stderr
