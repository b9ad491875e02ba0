"""The Celery application of a worker."""

import pytest
from celery import Celery

from app.broker.envelope import TASKS
from app.broker.lanes import APPLY, LANES, SWEEP
from app.broker.redis_celery import _restore_seconds
from app.config.settings import Settings
from workers.celery.app import make_app
from workers.celery.retries import MAX_RETRY_SECONDS

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


@pytest.fixture(scope="module")
def on_redis() -> Celery:
    """The application on Redis, which need not run."""
    return make_app(Settings(broker_url="redis://127.0.0.1:1/0", visibility_timeout_seconds=77))


def test_it_has_every_task(on_redis: Celery) -> None:
    """Breaks if a task that other processes send is unknown to workers."""
    assert set(on_redis.tasks) >= {name for lane in LANES for name in TASKS[lane]}


def test_no_setting_loses_messages(on_redis: Celery) -> None:
    """Breaks if a message is acknowledged before its work is done, or a worker stops reconnecting to its broker."""
    assert {name: getattr(on_redis.conf, name) for name in SAFE} == SAFE
    assert on_redis.tasks[APPLY].max_retries is None


def test_a_killed_workers_message_comes_back_soon(on_redis: Celery) -> None:
    """Breaks if the visibility timeout is not the setting's, or is checked only every few minutes."""
    options = on_redis.conf.broker_transport_options
    assert options["visibility_timeout"] == 77
    assert options["visibility_timeout"] > MAX_RETRY_SECONDS
    assert options["unacked_restore_interval"] == 5
    assert [_restore_seconds(timeout) for timeout in (5, 24, 3600)] == [1, 2, 5]


def test_beat_only_sends_known_tasks_to_known_lanes(on_redis: Celery) -> None:
    """Breaks if beat sends a task that workers do not know, or ticks pile up while no worker runs."""
    assert on_redis.conf.beat_schedule
    for entry in on_redis.conf.beat_schedule.values():
        assert entry["task"] in on_redis.tasks
        assert entry["options"]["queue"] in LANES
        assert 0 < entry["schedule"] <= 3600
        assert entry["options"]["expires"] > entry["schedule"]


def test_a_sweep_during_an_outage_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Breaks if Celery logs an outage of the broker as an unexpected error with a traceback, every five seconds."""
    nowhere = Settings(database_url="postgresql+psycopg://u:p@127.0.0.1:1/d", broker_url="redis://127.0.0.1:1/0")
    assert make_app(nowhere).tasks[SWEEP].apply().state == "SUCCESS"
    (line,) = caplog.messages
    assert line.startswith("the sweep stopped (BROKER_URL: the broker cannot be reached")
