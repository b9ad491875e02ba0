"""Lost deliveries: a fault until a reconciliation has followed, which the report starts."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.broker.celery import make_celery
from app.broker.lanes import RECONCILE
from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import apply, delivery, message_id, rows, workout
from tests.support.broker import waiting
from tests.support.database import run
from tests.support.deliveries import received
from tests.support.provider import mock_client
from workers.aggregators.junction.events import EXHAUSTED
from workers.celery.context import WorkerContext
from workers.celery.jobs import Jobs
from workers.operate import status_view
from workers.operate.erase import Eraser
from workers.operate.health import problems
from workers.reconcile import reconciler
from workers.reconcile.comparisons import make_scheduled
from workers.reconcile.reconciler import LostDeliveryReconciler, Reconciler
from workers.reconcile.runs import run_slice
from workers.store.engine import transaction
from workers.store.jobs import ensure_job
from workers.store.user_merges import merge_user

PERIOD = 24 * 3600.0
LOST = message_id(datetime.now(UTC) - timedelta(hours=28))
EMPTY: dict[str, Any] = {"data": [], "next_cursor": None, "next": None, "providers": []}


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may compare with Junction."""
    return replace(settings, broker_url=broker_url, junction_api_key="sk_us_tests", request_rate="1000000/second")


class Api:
    """A Junction without data, which records the users that it was asked about."""

    def __init__(self, engine: Engine, settings: Settings, status: dict[str, int] | None = None) -> None:
        self._engine, self._settings, self._status = engine, settings, status or {}
        self.asked: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        user = request.url.params.get("user_id")
        self.asked.append(user)
        return httpx.Response(self._status.get(user or "", 200), json=EMPTY)

    def everybody(self) -> Reconciler:
        return Reconciler(self._engine, self._settings, mock_client(self, self._settings))

    def run(self, *, users: bool = False) -> list[str | None]:
        """Runs the job if it is due, to its end. Returns the users that Junction was asked about."""
        self.asked = []
        of_all = self.everybody()
        run_slice(self._engine, LostDeliveryReconciler(self._engine, of_all) if users else of_all, PERIOD)
        return self.asked


@pytest.fixture
def jobs(engine: Engine, settings: Settings) -> Iterator[Jobs]:
    celery = make_celery(settings, "publisher")
    work = WorkerContext(celery, settings)
    found = Jobs(work)
    found.sweep()  # creates the jobs, due in a day
    make_idle(engine)
    yield found
    work.engine.dispose()
    celery.close()


def make_idle(engine: Engine) -> None:
    """Moves the last reconciliations back by more than the pause between two of everybody."""
    run(engine, "UPDATE headrace.jobs SET done_at = now() - interval '2 hours' WHERE name LIKE 'reconcile%'")


def report(message: Any = LOST, user: str | None = None, **data: Any) -> Delivery:
    """Svix's report that all attempts failed."""
    data = {"appId": "app_1", "endpointId": "ep_1", "msgId": message, "lastAttempt": {"id": "atmpt_1"}} | data
    return delivery({"type": EXHAUSTED, "data": data} | ({"user_id": user} if user else {}), datetime.now(UTC))


def faults(engine: Engine) -> list[str]:
    return [one.what for one in problems(status_view.read(engine, [], [])) if "lost" in one.what]


def due(engine: Engine) -> set[str]:
    return {row["name"] for row in rows(engine, "SELECT name FROM headrace.jobs WHERE due_at <= now()")} & {
        reconciler.JOB,
        reconciler.LOST_JOB,
    }


def test_a_lost_delivery_is_a_fault_until_everybody_is_reconciled(
    engine: Engine, settings: Settings, jobs: Jobs
) -> None:
    """Breaks if a lost delivery is no fault, starts no reconciliation, or stays a fault after it."""
    assert (faults(engine), due(engine)) == ([], set())
    assert apply(engine, settings, report()) == {"applied": 1}
    assert faults(engine) == ["1 deliveries lost: Junction gave up after its last attempt"]
    jobs.sweep()
    assert due(engine) == {reconciler.JOB}
    assert [one["headers"]["task"] for one in waiting(settings.broker_url or "", "backfill")] == [RECONCILE]
    assert Api(engine, settings).run() == [None, None]
    assert (faults(engine), due(engine)) == ([], set())
    jobs.sweep()
    assert due(engine) == set()


def test_one_user_is_reconciled_alone(engine: Engine, settings: Settings, jobs: Jobs) -> None:
    """Breaks if a report that names its user starts the comparison of all users, or none."""
    apply(engine, settings, report("m1", "u1"), report("m2", "u2"), report("m3", "u2"))
    assert faults(engine) == ["3 deliveries lost: Junction gave up after its last attempt"]
    jobs.sweep()
    assert due(engine) == {reconciler.LOST_JOB}
    assert Api(engine, settings).run(users=True) == ["u1", "u1", "u2", "u2"]
    assert (faults(engine), due(engine)) == ([], set())
    jobs.sweep()
    assert due(engine) == set()


def test_a_user_that_cannot_be_compared_does_not_stop_the_others(
    engine: Engine, settings: Settings, jobs: Jobs
) -> None:
    """Breaks if Junction's refusal for one user stops the comparison of the others, or every sweep repeats it."""
    apply(engine, settings, report("m1", "u1"), report("m2", "u2"))
    jobs.sweep()
    assert Api(engine, settings, {"u1": 422}).run(users=True) == ["u1", "u2", "u2"]
    assert faults(engine) == ["1 deliveries lost: Junction gave up after its last attempt"]
    jobs.sweep()
    assert due(engine) == set()


def test_reports_of_a_user_are_found_by_client_user_id(engine: Engine, settings: Settings, jobs: Jobs) -> None:
    """Breaks if a client_user_id is taken for a user_id, or one of several users is chosen."""
    apply(engine, settings, delivery(workout("u1")))
    apply(engine, settings, report("m1", client_user_id="member-1"), report("m2", client_user_id="unknown"))
    found = rows(engine, "SELECT user_id FROM headrace.lost_deliveries ORDER BY message_id")
    assert [row["user_id"] for row in found] == ["u1", None]
    apply(engine, settings, delivery(workout("u2")))
    apply(engine, settings, report("m3", client_user_id="member-1"))
    assert len(rows(engine, "SELECT 1 FROM headrace.lost_deliveries WHERE user_id IS NULL")) == 2
    jobs.sweep()
    assert due(engine) == {reconciler.LOST_JOB, reconciler.JOB}


def test_reports_do_not_find_users_of_another_aggregator(engine: Engine, settings: Settings) -> None:
    """Breaks if a client_user_id that is also Terra's hides the user of Junction, or is taken for Terra's user."""
    for user, owner in (("u1", "'junction'"), ("t1", "'terra'"), ("t2", "'terra'")):
        client = "other" if user == "t2" else "member-1"
        values = f"'{user}', '{client}', {owner}"
        run(engine, f"INSERT INTO headrace.users (user_id, client_user_id, aggregator) VALUES ({values})")
    apply(engine, settings, report("m1", client_user_id="member-1"), report("m2", client_user_id="other"))
    found = rows(engine, "SELECT user_id FROM headrace.lost_deliveries ORDER BY message_id")
    assert [row["user_id"] for row in found] == ["u1", None]


def test_reports_repeat(engine: Engine, settings: Settings) -> None:
    """Breaks if a report counts twice: when it is delivered again, replayed, or sent by another endpoint."""
    first = report()
    for again in (first, first, report()):
        apply(engine, settings, again)
    assert faults(engine) == ["1 deliveries lost: Junction gave up after its last attempt"]
    ensure_job(engine, reconciler.JOB, 0)
    Api(engine, settings).run()
    apply(engine, settings, first)
    assert faults(engine) == []


def test_a_delivery_that_arrived_is_not_lost(engine: Engine, settings: Settings, jobs: Jobs) -> None:
    """Breaks if a delivery that was stored although the answer was late, or that was sent again, is a fault."""
    assert apply(engine, settings, delivery(workout("u1"), name="m1"), report("m2")) == {"applied": 2}
    assert apply(engine, settings, report("m1")) == {"duplicate": 1}
    assert faults(engine) == ["1 deliveries lost: Junction gave up after its last attempt"]
    apply(engine, settings, delivery(workout("u1", "w2"), name="m2"))
    assert faults(engine) == []
    jobs.sweep()
    assert due(engine) == set()


def test_a_report_during_a_reconciliation_starts_the_next(engine: Engine, settings: Settings, jobs: Jobs) -> None:
    """Breaks if a comparison that began before the report counts as the one that follows it."""
    apply(engine, settings, report("m1"))
    jobs.sweep()
    api = Api(engine, settings)
    of_all = api.everybody()
    step = of_all.step(of_all.start, datetime.now(UTC))
    apply(engine, settings, report("m2"))
    assert step.to is not None
    assert of_all.step(step.to, datetime.now(UTC)).to is None
    assert faults(engine) == ["1 deliveries lost: Junction gave up after its last attempt"]


def test_many_reports_start_a_reconciliation_an_hour(engine: Engine, settings: Settings, jobs: Jobs) -> None:
    """Breaks if everybody is compared without a pause while the reports of an outage arrive, for 28 hours."""
    for number in range(3):
        apply(engine, settings, report(f"m{number}"))
        jobs.sweep()
        asked = Api(engine, settings).run()
        assert asked == ([] if number else [None, None])
    assert faults(engine) == ["2 deliveries lost: Junction gave up after its last attempt"]
    (job,) = rows(engine, f"SELECT due_at - now() AS left FROM headrace.jobs WHERE name = '{reconciler.JOB}'")
    assert timedelta(minutes=59) < job["left"] <= timedelta(hours=1)


def test_a_dry_run_ends_no_fault(engine: Engine, settings: Settings) -> None:
    apply(engine, settings, report())
    api = Api(engine, settings)
    of_all = Reconciler(engine, settings, mock_client(api, settings), dry_run=True)
    at = of_all.start
    while (step := of_all.step(at, datetime.now(UTC))).to:
        at = step.to
    assert len(faults(engine)) == 1


def test_the_task_runs_both(engine: Engine, settings: Settings) -> None:
    """Breaks if the scheduled task does not know the comparison of users with a lost delivery."""
    assert [one.job for one in make_scheduled(engine, settings)] == [reconciler.JOB, reconciler.LOST_JOB]


def test_erasure_removes_reports(engine: Engine, settings: Settings) -> None:
    apply(engine, settings, report("m1", "u1"), report("m2", "u2"))
    assert Eraser(engine, settings).erase("u1", lambda _: None).removed["lost_deliveries"] == 1
    assert rows(engine, "SELECT user_id FROM headrace.lost_deliveries") == [{"user_id": "u2"}]
    assert apply(engine, settings, report("m3", "u1")) == {"ignored": 1}


def test_an_odd_report_is_a_lost_delivery_too(engine: Engine, settings: Settings) -> None:
    """Breaks if a report of an unknown form becomes a dead letter instead of a lost delivery."""
    found = [delivery({"type": EXHAUSTED, "data": odd}) for odd in (None, [1], {"msgId": "\0" * 3000})]
    assert apply(engine, settings, *found) == {"applied": 3}
    assert faults(engine) == ["3 deliveries lost: Junction gave up after its last attempt"]


def test_old_reports_are_forgotten(engine: Engine, settings: Settings) -> None:
    """Breaks if the table grows without a limit, or the replay of an old report is a new loss."""
    old = report("m1")
    apply(engine, settings, old)
    run(engine, "UPDATE headrace.lost_deliveries SET reconciled_at = now() - interval '31 days'")
    ensure_job(engine, reconciler.JOB, 0)
    assert Api(engine, settings).run() == [None, None]
    assert rows(engine, "SELECT 1 FROM headrace.lost_deliveries") == []
    apply(engine, settings, received(old, old.received - timedelta(days=31)))
    assert faults(engine) == []


def test_the_report_of_a_merged_user_is_kept(engine: Engine, settings: Settings) -> None:
    """Breaks if a report that names a former id is dropped, or stays under that id."""
    apply(engine, settings, report("m1", "old"))
    with transaction(engine) as connection:
        assert merge_user(connection, "old", "new")
    apply(engine, settings, report("m2", "old"))
    assert rows(engine, "SELECT DISTINCT user_id FROM headrace.lost_deliveries") == [{"user_id": "new"}]
    assert len(faults(engine)) == 1
