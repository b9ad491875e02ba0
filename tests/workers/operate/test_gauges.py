"""The gauges of the sweep."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from app.observability import metrics
from tests.support import apply, delivery, event, rows, workout
from tests.support.database import run
from tests.support.refused import Refused, add_refused
from workers.broker_admin import Lane
from workers.fetch.rate_limits import Throttle
from workers.operate import gauges
from workers.operate.gauges import GaugeCollector


def lines() -> set[str]:
    return set(metrics.exposition().decode().splitlines())


@pytest.fixture
def observer(engine: Engine, settings: Settings, broker_url: str) -> Iterator[GaugeCollector]:
    del broker_url
    return GaugeCollector(engine, settings)


def test_queue_depths_are_exported(observer: GaugeCollector) -> None:
    """Autoscalers use these names; an empty lane must go back to 0."""
    observer.poll([Lane("live", 3, timedelta(seconds=61.5)), Lane("backfill", 0, None), Lane("unseen", 2, None)])
    assert 'headrace_lane_messages{lane="live"} 3.0' in lines()
    assert 'headrace_lane_oldest_seconds{lane="live"} 61.5' in lines()
    assert 'headrace_lane_oldest_seconds{lane="backfill"} 0.0' in lines()
    assert not any(line.startswith('headrace_lane_oldest_seconds{lane="unseen"}') for line in lines())
    observer.poll([Lane("live", 0, None, unacked=3, unacked_for=timedelta(seconds=9), retrying=2)])
    for line in ('unacked{lane="live"} 3.0', 'unacked_seconds{lane="live"} 9.0', 'retrying{lane="live"} 2.0'):
        assert f"headrace_lane_{line}" in lines()
    observer.poll([Lane("live", 0, None)])
    assert 'headrace_lane_unacked_seconds{lane="live"} 0.0' in lines()
    assert {'headrace_lane_messages{lane="live"} 0.0', 'headrace_lane_oldest_seconds{lane="live"} 0.0'} <= lines()
    observer.poll([Lane("live", 0, None, unacked=None)])  # NaN raises no alert, and 0 would be wrong
    assert {'headrace_lane_unacked{lane="live"} NaN', 'headrace_lane_unacked_seconds{lane="live"} NaN'} <= lines()
    (swept,) = [line for line in lines() if line.startswith("headrace_last_sweep_timestamp_seconds ")]
    assert float(swept.split()[1]) > 1.7e9


def test_tables_are_counted(observer: GaugeCollector, engine: Engine, settings: Settings) -> None:
    """Labels must not contain a user_id."""
    broken = event("provider.connection.error", "u1", {"provider": "oura", "error_type": "expired"})
    notice = event("historical.data.sleep.created", "u1", {"user_id": "u1", "provider": "oura", "is_final": True})
    apply(engine, settings, *map(delivery, (broken, notice, b"half", b"half too")))
    add_refused(engine, Refused("msg_1", "no value", 900), Refused("history", "no value"))  # are no dead deliveries
    Throttle(settings).pause("junction", 300, "status 401")
    Throttle(settings).pause("terra", 300, "status 429", user_id="somebody")
    observer.poll([])
    shown = lines()
    assert 'headrace_dead_letters{aggregator="junction"} 2.0' in shown
    assert 'headrace_connections{status="error"} 1.0' in shown
    assert 'headrace_backfills{status="pending"} 1.0' in shown
    (paused,) = [line for line in shown if line.startswith('headrace_account_paused_seconds{aggregator="junction"}')]
    assert 290 < float(paused.split()[1]) <= 300
    assert "somebody" not in "".join(shown)


def test_days_to_compute_are_counted(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Autoscalers and alerts use these names. Dates without a bound, whose number is not known, count as one day."""
    settings = replace(settings, broker_url=broker_url)
    run(
        engine,
        "INSERT INTO headrace.daily_queue (person, resource, dates, origin, since, failures) VALUES"
        " ('u1', 'steps', '{[2026-03-01,2026-03-08),[2026-03-14,2026-03-15)}', 'x', now() - interval '1 minute', 0),"
        " ('u2', 'sleep', '{(,)}', 'x', now() - interval '2 minutes', 3)",
    )
    GaugeCollector(engine, settings).poll([])
    shown = dict(line.split() for line in lines() if line.startswith("headrace_days_"))
    assert float(shown["headrace_days_pending"]) == 9
    assert 120 <= float(shown["headrace_days_oldest_seconds"]) < 150
    assert float(shown["headrace_days_failed"]) == 1
    run(engine, "DELETE FROM headrace.daily_queue")
    GaugeCollector(engine, settings).poll([])
    assert {"headrace_days_pending 0.0", "headrace_days_oldest_seconds 0.0"} <= lines()


def test_tables_are_not_counted_at_every_sweep(
    observer: GaugeCollector, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(gauges.time, "monotonic", lambda: clock[0])
    observer.poll([])
    apply(engine, settings, delivery(b"half"))
    clock[0] += gauges.MIN_INTERVAL_SECONDS - 1
    observer.poll([])
    assert 'headrace_dead_letters{aggregator="junction"} 1.0' not in lines()
    clock[0] += 2
    observer.poll([])
    assert 'headrace_dead_letters{aggregator="junction"} 1.0' in lines()


def test_without_redis_the_other_gauges_are_set(engine: Engine, settings: Settings) -> None:
    GaugeCollector(engine, replace(settings, broker_url="amqp://127.0.0.1:1//", redis_url=None)).poll([])


def test_rows_and_times_are_counted_once_committed(engine: Engine, settings: Settings) -> None:
    record = 'headrace_rows_total{kind="record",origin="webhook"}'
    timed = 'headrace_delivery_seconds_count{aggregator="junction"}'

    def value(name: str) -> float:
        return sum(float(line.split()[-1]) for line in lines() if line.startswith(name))

    before, times = value(record), value(timed)
    apply(engine, settings, delivery(workout("u1")), delivery(workout("u2", "w2")), delivery(b"half"))
    assert rows(engine, "SELECT count(*) AS n FROM health.workouts")[0]["n"] == 2
    assert (value(record) - before, value(timed) - times) == (2, 3)


def test_a_pause_of_another_key_is_not_the_deployments(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if a wrong key in an operator's shell raises the alert about paused accounts."""
    workers = replace(settings, broker_url=broker_url, junction_api_key="sk_us_right")
    Throttle(replace(workers, junction_api_key="sk_us_wrong")).pause("junction", 300, "status 401")
    Throttle(replace(workers, terra_dev_id="dev", terra_api_key="other")).pause("terra", 300, "status 429")
    GaugeCollector(engine, workers).poll([])
    found = {line.split()[0]: float(line.split()[1]) for line in lines() if line.startswith("headrace_account_paused")}
    assert found.get('headrace_account_paused_seconds{aggregator="junction"}', 0) == 0
    assert found['headrace_account_paused_seconds{aggregator="terra"}'] > 290  # this worker has no key of Terra
