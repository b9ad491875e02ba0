"""The thread that sends heartbeats during a task, with a consumer that records them."""

import functools
import threading
import time
from types import SimpleNamespace

import pytest

from tests.support import until
from workers.celery import heartbeats
from workers.celery.heartbeats import TaskHeartbeats


@pytest.fixture
def sent() -> list[str]:
    return []


@pytest.fixture
def thread(sent: list[str], monkeypatch: pytest.MonkeyPatch) -> TaskHeartbeats:
    """Started, and not connected to Celery's signals."""
    monkeypatch.setattr(heartbeats, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(heartbeats.signals, "task_prerun", SimpleNamespace(connect=lambda *_, **__: None))
    monkeypatch.setattr(heartbeats.signals, "task_postrun", SimpleNamespace(connect=lambda *_, **__: None))
    channel = SimpleNamespace(connection=None)
    dispatcher = SimpleNamespace(send=lambda kind, **_: sent.append(kind))
    consumer = SimpleNamespace(
        task_consumer=SimpleNamespace(channel=channel),
        event_dispatcher=dispatcher,
        connection_errors=(),
        channel_errors=(),
    )
    made = TaskHeartbeats(consumer)
    made.start()
    return made


def test_heartbeats_are_sent_during_each_task(thread: TaskHeartbeats, sent: list[str]) -> None:
    """Breaks if the thread misses a task that begins while it falls asleep."""

    def has_more(before: int) -> bool:
        return len(sent) > before

    for _ in range(200):
        before = len(sent)
        thread._begin()
        until(functools.partial(has_more, before), seconds=10, every=0.001)
        thread._end()


def test_the_thread_sleeps_between_tasks(
    thread: TaskHeartbeats, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if each worker of an idle stack wakes up for nothing."""
    thread._begin()
    until(lambda: bool(sent))
    thread._end()
    time.sleep(0.1)
    woken = threading.Event()
    monkeypatch.setattr(heartbeats.time, "sleep", lambda _: woken.set())
    assert not woken.wait(0.3)
