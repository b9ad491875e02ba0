"""The sender, against real receivers and PostgreSQL."""

import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from random import Random

import pytest
from sqlalchemy import Engine, text
from standardwebhooks.webhooks import WebhookVerificationError

from app.config.settings import Settings
from app.observability import metrics
from app.sealing import Sealer
from tests.support import rows, until
from tests.support.database import run
from tests.support.receivers import change, commit, endpoint, make_due, refusing, subscribe, verify
from workers.fetch.webhooks import Poster
from workers.notify import sender
from workers.notify.retries import OPEN_AFTER
from workers.notify.sender import Notifier
from workers.notify.signing import new_secret, seal_secret
from workers.operate import status_view
from workers.operate.gauges import GaugeCollector
from workers.operate.health import problems
from workers.store import notifications, subscriptions
from workers.store.engine import make_writer, transaction


def notifier(engine: Engine, settings: Settings, seconds: float = 2.0, **more: float) -> Notifier:
    return Notifier(engine, settings, slice_seconds=seconds, make_poster=lambda: Poster(**more))


def test_a_change_is_sent_signed(engine: Engine, settings: Settings) -> None:
    """Breaks if a body differs from the contract, or Standard Webhooks would refuse its signature."""
    with endpoint() as app:
        secret = subscribe(engine, app.url)
        commit(engine, change("w1"))
        notifier(engine, settings).run()
    (received,) = app.received
    verify(received, secret)
    assert received.id.startswith("msg_")
    assert abs(int(received.headers["webhook-timestamp"]) - time.time()) < 10
    body = received.json
    assert sorted(body) == ["data", "timestamp", "type"]
    assert body["type"] == "workouts.changed"
    assert body["data"] == {
        "user_id": "u1",
        "client_user_id": None,
        "resource": "workouts",
        "provider": "garmin",
        "ids": ["w1"],
        "from": None,
        "to": None,
        "rows": 1,
        "position": 1,
    }
    assert rows(engine, "SELECT status, attempts FROM headrace.notifications") == [{"status": "sent", "attempts": 1}]


def test_a_refused_notification_comes_again_unchanged(engine: Engine, settings: Settings) -> None:
    """Breaks if a retry has another id or body, if a later change alters an attempted one, or if retries are slow."""
    with endpoint(refusing(2)) as app:
        secret = subscribe(engine, app.url)
        commit(engine, change("w1"))
        sending = threading.Thread(target=notifier(engine, settings, 12).run)
        sending.start()
        until(lambda: app.received, 5)
        commit(engine, change("w2"))
        sending.join()
    assert app.ids() == {"w1", "w2"}
    bodies: dict[str, set[bytes]] = {}
    for one in app.received:
        verify(one, secret)
        bodies.setdefault(one.id, set()).add(one.body)
    assert {len(found) for found in bodies.values()} == {1}
    assert {one.id for one in app.received if one.status == 500} <= {one.id for one in app.accepted}
    assert app.received[-1].at - app.received[0].at < 10


def test_nine_hanging_endpoints_do_not_delay_the_tenth(engine: Engine, settings: Settings) -> None:
    """Breaks if a request that hangs holds up other subscribers, also at the end of a time slice."""
    seconds = 3.0
    with ExitStack() as stack:
        for number in range(9):
            hanging = stack.enter_context(endpoint(lambda one: one.hang()))
            subscribe(engine, hanging.url, f"hanging-{number}")
        app = stack.enter_context(endpoint())
        subscribe(engine, app.url)
        commit(engine, change())
        sending = threading.Thread(target=notifier(engine, settings, 1.0, max_seconds=seconds).run)
        sending.start()
        delays, began = [], time.monotonic()
        while time.monotonic() - began < seconds - 1:  # the slice has ended by then
            at = time.monotonic()
            commit(engine, change(f"w{at}"))
            until(lambda at=at: f"w{at}" in app.ids(), seconds, every=0.01)
            delays.append(time.monotonic() - at)
        sending.join()
        assert len(delays) > 2
        assert max(delays) < 1
    failures = rows(engine, "SELECT failures FROM headrace.subscriptions WHERE name LIKE 'hanging%'")
    assert len([one for one in failures if one["failures"] > 0]) == 9


def test_notifications_in_memory_are_limited(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a worker takes more of a backlog into memory than its places for endpoints and their requests."""
    monkeypatch.setattr(sender, "MAX_ENDPOINTS", 3)
    monkeypatch.setattr(sender, "MAX_FAILING", 2)
    with ExitStack() as stack:
        hanging = [stack.enter_context(endpoint(lambda one: one.hang())) for _ in range(5)]
        for number, one in enumerate(hanging):
            subscribe(engine, one.url, f"app-{number}")
        commit(engine, *(change("w1", f"u{number}") for number in range(20)))
        is_stopping = threading.Event()
        sending = threading.Thread(target=notifier(engine, settings, 20).run, args=(is_stopping.is_set,))
        sending.start()
        started = "SELECT count(*) AS rows FROM headrace.notifications WHERE attempts > 0"
        until(lambda: rows(engine, started) == [{"rows": 3 * sender.MAX_IN_FLIGHT}], 10)
        time.sleep(4 * sender.TICK_SECONDS)
        assert rows(engine, started) == [{"rows": 3 * sender.MAX_IN_FLIGHT}]
        is_stopping.set()
        sending.join()


def test_410_pauses_and_resume_sends_all(engine: Engine, settings: Settings) -> None:
    """Breaks if a subscriber that is gone gets further requests, or a resumed one misses a change of the pause."""
    with endpoint(refusing(1, 410)) as app:
        subscribe(engine, app.url)
        commit(engine, change("w1"))
        notifier(engine, settings, 5).run()
        assert [one.status for one in app.received] == [410]
        (found,) = rows(engine, "SELECT status, reason FROM headrace.subscriptions")
        assert found == {"status": "paused", "reason": "the endpoint answered 410 Gone"}
        commit(engine, change("w2"))
        assert not notifications.is_due(engine)
        notifier(engine, settings).run()
        assert len(app.received) == 1
        with transaction(engine) as connection:
            subscriptions.resume(connection, "app", 3)
        notifier(engine, settings).run()
    assert app.ids() == {"w1", "w2"}
    assert app.received[0].id in {one.id for one in app.accepted}


def test_an_endpoint_that_keeps_failing_gets_one_request_at_a_time(engine: Engine, settings: Settings) -> None:
    """Breaks if the breaker does not open, sends more than a probe, or a success does not send the rest at once."""
    with endpoint(lambda _: 500) as app:
        subscribe(engine, app.url)
        commit(engine, *(change("w", f"u{number}") for number in range(12)))
        sender = notifier(engine, settings, 0.5)
        sender.run()
        (state,) = rows(engine, "SELECT failures, retry_at > now() AS waits FROM headrace.subscriptions")
        assert state["failures"] >= OPEN_AFTER
        assert state["waits"]
        count = len(app.received)
        sender.run()
        assert len(app.received) == count  # the pause has not ended
        make_due(engine)
        sender.run()
        assert len(app.received) == count + 1  # a probe
        app.answer = lambda _: 204
        run(
            engine,
            "UPDATE headrace.subscriptions SET retry_at = '-infinity'",
            "UPDATE headrace.notifications SET due_at = now() + interval '1 h' WHERE attempts > 0",
        )
        notifier(engine, settings, 3).run()
    assert {one.json["data"]["user_id"] for one in app.accepted} == {f"u{number}" for number in range(12)}
    assert rows(engine, "SELECT failures FROM headrace.subscriptions") == [{"failures": 0}]


def test_at_most_four_requests_to_one_endpoint(engine: Engine, settings: Settings) -> None:
    """Breaks if a long backlog is posted to a subscriber all at once."""
    lock, now, most = threading.Lock(), [0], [0]

    def slowly(_: object) -> int:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return 204

    with endpoint(slowly) as app:
        subscribe(engine, app.url)
        commit(engine, *(change("w", f"u{number}") for number in range(30)))
        notifier(engine, settings, 5).run()
        assert len(app.received) == 30
    assert 1 < most[0] <= 4


def test_a_pause_takes_effect_while_a_backlog_is_sent(engine: Engine, settings: Settings) -> None:
    """Breaks if a subscriber that an operator pauses gets the rest of a long backlog."""

    def pause(_: object) -> int:
        run(engine, "UPDATE headrace.subscriptions SET status = 'paused'")
        return 204

    with endpoint(pause) as app:
        subscribe(engine, app.url)
        commit(engine, *(change("w", f"u{number}") for number in range(30)))
        notifier(engine, settings, 3).run()
        assert 1 <= len(app.received) <= 4


def test_a_redirect_is_not_followed(engine: Engine, settings: Settings) -> None:
    """Breaks if a subscriber can send Headrace to an address that was not checked."""
    with endpoint() as elsewhere, endpoint(lambda _: 302, Location=elsewhere.url) as app:
        subscribe(engine, app.url)
        commit(engine, change())
        notifier(engine, settings, 0.5).run()
        assert elsewhere.received == []
    assert rows(engine, "SELECT last_error FROM headrace.notifications") == [{"last_error": "status 302"}]


def test_a_sender_that_dies_before_its_commit_sends_again(engine: Engine, settings: Settings) -> None:
    """Breaks if a crash between the request and the commit loses a notification, or changes its id or body."""
    with endpoint() as app:
        subscribe(engine, app.url)
        commit(engine, change("w1"))

        def crash(*_: object) -> None:
            raise SystemExit

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(notifications, "record", crash)  # the process ends at this line
            patch.setattr(notifications, "release", crash)
            with pytest.raises(SystemExit):
                notifier(engine, settings).run()
        commit(engine, change("w2"))
        notifier(engine, settings, 0.5).run()
        assert len(app.received) == 1  # the lease has not ended
        run(engine, "UPDATE headrace.subscriptions SET lease_until = now()")
        notifier(engine, settings).run()
    first, again, *_ = [one for one in app.received if one.json["data"]["ids"] == ["w1"]]
    assert (first.id, first.body) == (again.id, again.body)
    assert app.ids() == {"w1", "w2"}


def test_both_secrets_sign_for_a_day_after_a_rotation(engine: Engine, settings: Settings) -> None:
    """Breaks if a rotation interrupts a subscriber that still has the old secret, or never ends it."""
    with endpoint() as app:
        old, new = subscribe(engine, app.url), new_secret()
        with transaction(engine) as connection:
            subscriptions.rotate(connection, "app", seal_secret(Sealer(settings.encryption_keys), "app", new))
        commit(engine, change("w1"))
        notifier(engine, settings).run()
        run(engine, "UPDATE headrace.subscriptions SET old_secret_until = now() - interval '1 second'")
        commit(engine, change("w2"))
        notifier(engine, settings).run()
    for secret in (old, new):
        verify(app.received[0], secret)
    verify(app.received[1], new)
    with pytest.raises(WebhookVerificationError):
        verify(app.received[1], old)


def test_a_missing_key_is_reported_and_stops_no_other(engine: Engine, settings: Settings) -> None:
    """Breaks if a secret that cannot be opened ends the run, or sends an unsigned notification."""
    with endpoint() as broken, endpoint() as app:
        subscribe(engine, broken.url, "broken")
        run(engine, "UPDATE headrace.subscriptions SET secret = overlay(secret placing 'x' from 3)")
        subscribe(engine, app.url)
        commit(engine, change())
        notifier(engine, settings, 0.5).run()
        assert (len(broken.received), len(app.received)) == (0, 1)
    (found,) = rows(engine, "SELECT last_error FROM headrace.subscriptions WHERE name = 'broken'")
    assert found["last_error"] == "the signing secret cannot be opened; check HEADRACE_ENCRYPTION_KEY"


def test_a_notification_is_dead_after_three_days(engine: Engine, settings: Settings) -> None:
    """Breaks if retries never end, or a dead notification cannot be sent again under its id."""
    with endpoint(refusing(2)) as app:
        subscribe(engine, app.url)
        commit(engine, change("w1"))
        sender = notifier(engine, settings, 0.3)
        sender.run()
        run(engine, "UPDATE headrace.notifications SET expires_at = now(), due_at = now()")
        sender.run()
        assert rows(engine, "SELECT status FROM headrace.notifications") == [{"status": "dead"}]
        sender.run()
        assert len(app.received) == 2
        with transaction(engine) as connection:
            since = rows(engine, "SELECT created_at FROM headrace.notifications")[0]["created_at"]
            assert notifications.resend(connection, "app", since, ["dead"], 3) == 1
        sender.run()
    assert {one.id for one in app.received} == {app.accepted[0].id}
    assert app.ids() == {"w1"}


@pytest.mark.parametrize(("feed_days", "kept"), [(5, False), (30, True)])
def test_notifications_are_kept_as_long_as_the_feed(
    engine: Engine, settings: Settings, *, feed_days: int, kept: bool
) -> None:
    """Breaks if `resend` misses notifications of changes that the feed still has."""
    with endpoint() as app:
        subscribe(engine, app.url)
        commit(engine, change("w1"))
        here = replace(settings, feed_days=feed_days)
        notifier(engine, here, 0.5).run()
        run(engine, "UPDATE headrace.notifications SET created_at = now() - interval '20 days'")
        notifier(engine, here, 0.5).run()
    assert len(app.received) == 1
    assert bool(rows(engine, "SELECT 1 FROM headrace.notifications")) == kept


def test_a_stopping_worker_ends_at_once(engine: Engine, settings: Settings) -> None:
    """Breaks if SIGTERM waits for requests that hang, or their notifications are lost."""
    with endpoint(lambda one: one.hang()) as app:
        subscribe(engine, app.url)
        commit(engine, change("w1"))
        began = time.monotonic()
        notifier(engine, settings, 10).run(lambda: time.monotonic() > began + 1)
        assert time.monotonic() - began < 3
        app.hung.set()
        app.answer = lambda _: 204
        notifier(engine, settings).run()
    assert app.ids() == {"w1"}


def test_status_names_subscriptions_that_need_a_person(engine: Engine, settings: Settings) -> None:
    """Breaks if `headrace status` is healthy while a subscriber gets nothing."""

    def what() -> list[str]:
        return [one.what for one in problems(status_view.read(engine, [], []))]

    with endpoint(lambda _: 500) as app:
        subscribe(engine, app.url)
        commit(engine, change("w1"))
        run(engine, "INSERT INTO headrace.daily_feed (position) VALUES (1)")
        assert what() == []
        run(engine, "UPDATE headrace.changes SET changed_at = now() - interval '10 minutes'")
        assert what() == ["notifications of subscription app are 10 min late"]
        notifier(engine, settings, 0.3).run()
        assert what() == []  # a few failures are routine
        run(engine, f"UPDATE headrace.subscriptions SET failures = {OPEN_AFTER}")
        assert what() == ["subscription app fails for 0 s: status 500"]
        run(engine, "UPDATE headrace.subscriptions SET status = 'paused', reason = 'gone'")
        assert what() == ["subscription app is paused: gone"]


def test_at_most_one_run_is_requested(engine: Engine, settings: Settings) -> None:
    """Breaks if messages pile up in the lane while no worker runs, or a run is not requested for due work."""
    with endpoint() as app:
        assert not notifications.is_due(engine)
        subscribe(engine, app.url)
        assert not notifications.is_due(engine)
        commit(engine, change())
        assert [notifications.is_due(engine) for _ in range(3)] == [True, False, False]
        run(engine, "UPDATE headrace.jobs SET lease_until = now() - interval '1 second'")
        assert notifications.is_due(engine)
        notifier(engine, settings).run()
        assert not notifications.is_due(engine)


def test_an_unencrypted_deployment_signs_too(engine: Engine, settings: Settings) -> None:
    """Breaks if notifications need HEADRACE_ENCRYPTION_KEY."""
    plain = replace(settings, encryption_keys=())
    with endpoint() as app:
        secret = subscribe(engine, app.url)
        with engine.begin() as connection:
            sealed = seal_secret(Sealer(()), "app", secret)
            connection.execute(text("UPDATE headrace.subscriptions SET secret = :s"), {"s": sealed})
        commit(engine, change())
        notifier(engine, plain).run()
    verify(app.received[0], secret)


def test_two_workers_and_refusals_lose_nothing_and_count_nothing_twice(engine: Engine, settings: Settings) -> None:
    """Breaks if two workers plan a change twice or skip it, or if a refusal loses a notification."""
    rng, total = Random(7), 240
    with ExitStack() as stack:
        apps = [stack.enter_context(endpoint(lambda _: rng.choice((204, 204, 204, 500)))) for _ in range(3)]
        for number, app in enumerate(apps):
            subscribe(engine, app.url, f"app-{number}")
        engines = [make_writer(settings) for _ in range(2)]
        workers = [threading.Thread(target=notifier(one, settings, 6).run) for one in engines]
        for number in range(total):
            commit(engine, change(f"w{number}", f"u{number % 7}", rng.choice(("workouts", "sleep"))))
            if number == 20:
                for worker in workers:
                    worker.start()
        for worker in workers:
            worker.join()
        for one in engines:
            one.dispose()
        for app in apps:
            app.answer = lambda _: 204
        while rows(engine, "SELECT 1 FROM headrace.notifications WHERE status <> 'sent'"):
            make_due(engine)
            notifier(engine, settings, 1).run()
        for app in apps:
            told = {one.id: one for one in app.accepted}
            assert {(one.id, one.body) for one in app.received} == {(one.id, one.body) for one in told.values()}
            assert app.ids() == {f"w{number}" for number in range(total)}
            assert sum(one.json["data"]["rows"] for one in told.values()) == total


def test_the_backlog_and_the_outcomes_are_exported(engine: Engine, settings: Settings) -> None:
    """Breaks if an alert cannot see a subscriber that gets nothing, or a user_id becomes a label."""

    def exported() -> dict[str, float]:
        lines = metrics.exposition().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    failed, sent = (f'headrace_notifications_total{{outcome="{name}"}}' for name in ("failed", "sent"))
    before = exported()
    with endpoint(refusing(1)) as app:
        subscribe(engine, app.url, "gauged")
        commit(engine, change("w1", "user-of-the-gauge"))
        notifier(engine, settings, 0.3).run()
        run(engine, "UPDATE headrace.notifications SET created_at = now() - interval '1 hour'")
        GaugeCollector(engine, settings).poll([])
        found = exported()
        assert found['headrace_notifications_pending{subscription="gauged"}'] == 1
        assert found['headrace_notifications_oldest_seconds{subscription="gauged"}'] >= 3600
        assert found['headrace_subscriptions{status="active"}'] == 1
        assert (found[failed] - before[failed], found[sent] - before[sent]) == (1, 0)
        make_due(engine)
        notifier(engine, settings, 0.3).run()
        GaugeCollector(engine, settings).poll([])
        found = exported()
        assert found['headrace_notifications_pending{subscription="gauged"}'] == 0
        assert found['headrace_notifications_oldest_seconds{subscription="gauged"}'] == 0
        assert found[sent] - before[sent] == 1
    assert not any("user-of-the-gauge" in name for name in found)
