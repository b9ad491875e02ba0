"""The sequencer's thread: it numbers changes, and starts the tasks that read them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psycopg
import pytest
import redis
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, Engine, event

from app.broker.celery import make_celery
from app.broker.lanes import NOTIFY
from app.config.settings import Settings
from app.errors import TryLater
from tests.support import rows
from workers.celery import sequencing
from workers.celery.sequencing import CHECK_SECONDS, EVERYTHING_SECONDS, PAUSE_SECONDS, SequencerThread
from workers.store import notifications
from workers.store.engine import transaction
from workers.store.feed import Change, IsDue, announce


@contextmanager
def sequencing_with(settings: Settings, broker_url: str, is_due: IsDue = lambda _: False) -> Iterator[SequencerThread]:
    given = replace(settings, broker_url=broker_url)
    thread = SequencerThread(make_celery(given, "publisher"), given, {NOTIFY: ("notify", is_due)})
    yield thread
    thread.engine.dispose()


def change(engine: Engine, name: str) -> None:
    with transaction(engine) as connection:
        announce(connection, [Change("put", "u1", "workouts", "garmin", "watch", name, None, None, 1, "webhook")])


def test_changes_are_numbered_in_each_step(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if a committed change is not readable after the next step."""
    with sequencing_with(settings, broker_url) as thread:
        assert thread.step(0.0) == 0
        change(engine, "w1")
        assert thread.step(1.0) == 1
        assert thread.step(2.0) == 0
    assert rows(engine, "SELECT id FROM health.changes") == [{"id": "w1"}]


def test_an_idle_step_opens_no_transaction(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if each look for changes, several in a second, is three round trips."""
    states = []

    def note(connection: Connection, *_: object) -> None:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        states.append(driver.info.transaction_status)

    with sequencing_with(settings, broker_url, notifications.is_due) as thread:
        event.listen(thread.engine, "after_cursor_execute", note)
        thread.step(0.0)
        thread.step(CHECK_SECONDS)
    assert set(states) == {TransactionStatus.IDLE}


def test_the_whole_outbox_is_read_once_a_minute(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if a change that a snapshot calls numbered, as after a restored dump, stays in the outbox for good."""
    with sequencing_with(settings, broker_url) as thread:
        thread.step(0.0)
        change(engine, "w1")
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE headrace.outbox SET transaction = '3'")
        assert thread.step(1.0) == 0
        assert thread.step(EVERYTHING_SECONDS) == 1


def test_tasks_are_sent_after_changes_and_when_work_is_due(
    engine: Engine, settings: Settings, broker_url: str, broker: "redis.Redis"
) -> None:
    """Breaks if a change or a retry that is due starts no task, or an idle stack sends tasks."""
    due = [False]
    with sequencing_with(settings, broker_url, lambda _: due[0]) as thread:
        thread.step(0.0)
        change(engine, "w1")
        thread.step(0.1)
        assert broker.llen("notify") == 0  # nothing subscribes
        due[0] = True
        thread.step(0.2)
        assert broker.llen("notify") == 0  # not yet: nothing has changed
        thread.step(CHECK_SECONDS + 0.1)
        assert broker.llen("notify") == 1
        change(engine, "w2")
        thread.step(CHECK_SECONDS + 0.2)
        assert broker.llen("notify") == 2


def test_an_outage_of_the_database_is_an_error_that_the_thread_survives(settings: Settings, broker_url: str) -> None:
    """Breaks if an outage ends the thread: the feed would stand still until a restart."""
    away = replace(settings, database_url="postgresql+psycopg://u:sesame@127.0.0.1:1/d")
    with sequencing_with(away, broker_url) as thread, pytest.raises(TryLater):
        thread.step(0.0)


def test_an_outage_of_the_broker_does_not_stop_the_feed(engine: Engine, settings: Settings) -> None:
    """Breaks if readers of the feed wait while the tasks cannot be sent, or each pass waits for the broker."""
    tries = []
    with sequencing_with(settings, "redis://127.0.0.1:1/0", lambda _: not tries.append(1)) as thread:
        for at, expected in ((0.0, 1), (0.1, 1), (PAUSE_SECONDS, 2)):
            change(engine, "w1")
            assert thread.step(at) == 1
            assert len(tries) == expected


def test_every_reader_has_its_lane() -> None:
    assert {task: lane for task, (lane, _) in sequencing.readers().items()} == {
        "headrace.notify": "notify",
        "headrace.derive": "derive",
    }
