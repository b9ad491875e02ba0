"""Reconciliation: it finds whatever was lost, fetches exactly that, and then finds nothing."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import httpx
import msgspec
import pytest
import redis
from click.testing import CliRunner
from sqlalchemy import Engine, text

from app.broker.celery import make_celery
from app.broker.lanes import RECONCILE
from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import Unprocessable
from tests.support import apply, delivery, event, heartrate, rows, workout
from tests.support.backfills import forget_pauses
from tests.support.provider import Killed, junction_client, mock_client
from workers.backfill.fetcher import Fetcher
from workers.celery.context import WorkerContext
from workers.celery.jobs import Jobs
from workers.cli.main import main
from workers.daily.derive import Deriver
from workers.daily.priorities import set_zone
from workers.fetch.client import AggregatorClient
from workers.fetch.http import Client
from workers.fetch.rate_limits import pauses
from workers.fetch.retry import MAX_ATTEMPTS, UNAUTHORIZED_PAUSE
from workers.operate import status_view
from workers.operate.health import Status, problems
from workers.reconcile import reconciler, runs
from workers.reconcile.reconciler import JOB, MAX_RESTARTS, ReconcilePosition, Reconciler, Step
from workers.reconcile.runs import run_slice
from workers.simulator import events
from workers.simulator.conditions import Pull, State
from workers.simulator.data import World
from workers.simulator.server import API_KEY, Simulator
from workers.store.backfills import due
from workers.store.coverage import Gap
from workers.store.engine import transaction
from workers.store.jobs import ensure_job
from workers.verify import expected

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
EVENING = "2026-03-14T18:30:00+00:00"
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
PERIOD = 3600.0
PARTS = {"/v2/introspect/historical_pull": "pulls", "/v2/introspect/resources": "supplies"}


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may fetch history without a rate limit."""
    return replace(settings, broker_url=broker_url, junction_api_key=API_KEY, request_rate="1000000/second")


def today(days: float = 0) -> datetime:
    """Midnight of a day relative to today."""
    return datetime.combine(datetime.now(UTC).date(), time(), UTC) + days * DAY


# A scripted Junction API


def pulled(start: float = -20, end: float = -10, days: int = 0, status: str = "success", **more: Any) -> dict[str, Any]:
    """A pull of a range of days relative to today, as in a page."""
    edges = {"range_start": today(start).isoformat(), "range_end": today(end).isoformat()}
    timeline = {"scheduled_at": today(end).isoformat(), "started_at": today(end).isoformat()}
    return {"status": status, "days_with_data": days, "timeline": timeline, "error_details": None} | edges | more


def supplied(oldest: float, newest: float) -> dict[str, Any]:
    """The coverage of a resource, as in a page."""
    return {"oldest_data": today(oldest).isoformat(), "newest_data": today(newest).isoformat(), "sent_count": 1}


def of(
    user: str, provider: str = "garmin", not_pulled: Sequence[str] = (), **resources: dict[str, Any]
) -> dict[str, Any]:
    """One user's entry in a page of pulls or of coverage."""
    if any("status" in one for one in resources.values()) or not_pulled:
        return {"user_id": user, "provider": {provider: {"pulled": resources, "not_pulled": list(not_pulled)}}}
    return {"user_id": user, "provider": {provider: resources}}


@dataclass
class ScriptedApi:
    """An API that records its requests. The cursors are page numbers."""

    pulls: Sequence[Sequence[Any]] = ((),)
    supplies: Sequence[Sequence[Any]] = ((),)
    connections: dict[str, Any] = field(default_factory=dict)  # by user; other users are unknown
    before: list[Any] = field(default_factory=list)  # responses to the first requests; None: the usual one
    during: Callable[[httpx.Request], None] = lambda _: None
    asked: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        assert len(self.asked) < 200, "requested without end"
        self.during(request)
        return (self.before.pop(0) if self.before else None) or self.truth(request)

    def truth(self, request: httpx.Request) -> httpx.Response:
        """The page, or the connections of a user."""
        if (part := PARTS.get(request.url.path)) is None:
            user = request.url.path.rpartition("/")[2]
            known = self.connections.get(user)
            return httpx.Response(404) if known is None else httpx.Response(200, json={"providers": known})
        pages = getattr(self, part)
        number = int(request.url.params.get("next_cursor", 0))
        asked = request.url.params.get("user_id")
        data = [one for one in pages[number] if asked in (None, (one or {}).get("user_id"))]
        following = str(number + 1) if number + 1 < len(pages) else None
        return httpx.Response(200, json={"data": data, "next_cursor": following, "next": following})

    def reconciler(self, engine: Engine, settings: Settings, **more: Any) -> Reconciler:
        """A new worker that reads from this API."""
        return Reconciler(engine, settings, mock_client(self, settings), **more)

    def paths(self) -> list[str]:
        """The requests in short form: the part or the user, and the cursor."""
        names = [PARTS.get(one.url.path) or one.url.path.rpartition("/")[2] for one in self.asked]
        cursors = [one.url.params.get("next_cursor", "") for one in self.asked]
        return [f"{name} {cursor}".strip() for name, cursor in zip(names, cursors, strict=True)]


# One user: a pull of eleven days that was never announced, and three later days.
MISSING = ScriptedApi(
    pulls=[[of("u1", heartrate=pulled(-20, -10))]],
    supplies=[[of("u1", heartrate=supplied(-20, -3))]],
    connections={"u1": [{"slug": "garmin", "status": "connected"}]},
)


def missing(**changes: Any) -> ScriptedApi:
    """The API of MISSING without requests so far."""
    return replace(MISSING, asked=[], **changes)


def run_steps(
    reconciler: Reconciler, settings: Settings, since: datetime = LONG_AGO, user: str | None = None, limit: int = 120
) -> list[Step]:
    """All steps to the end. A wait ends at once."""
    at: ReconcilePosition | None = ReconcilePosition()
    steps: list[Step] = []
    while at is not None:
        steps.append(reconciler.step(at, since, user))
        at = steps[-1].to
        if steps[-1].seconds:
            forget_pauses(settings)
        assert len(steps) <= limit, "it does not come to an end"
    return steps


def found(steps: Sequence[Step]) -> list[Gap]:
    """The gaps of all steps."""
    return [gap for step in steps for gap in step.found]


def summaries(steps: Sequence[Step]) -> list[tuple[str, str, int]]:
    """The gaps in short form: resource, responsible party and number of windows."""
    return [(gap.key.resource, gap.whose, len(gap.windows)) for gap in found(steps)]


def opened(engine: Engine) -> dict[tuple[str, str, str], list[tuple[datetime, datetime]]]:
    """The windows that reconciliations opened, by user, provider and resource."""
    query = """
        SELECT b.user_id, b.provider, b.resource, c.window_start, c.window_end
        FROM headrace.backfills b JOIN headrace.chunks c ON c.backfill_id = b.id
        WHERE b.requested_by = 'reconcile' ORDER BY c.window_start"""
    by_key = defaultdict(list)
    for row in rows(engine, query):
        by_key[row["user_id"], row["provider"], row["resource"]].append((row["window_start"], row["window_end"]))
    return dict(by_key)


def execute(engine: Engine, *statements: str, **parameters: Any) -> None:
    """Updates the database directly."""
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement), parameters)


def snapshot(engine: Engine) -> dict[str, str]:
    """Every row of every table."""
    query = """
        SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'headrace' AND c.relkind IN ('r', 'p') AND NOT c.relispartition"""
    content = "SELECT coalesce(string_agg(t::text, ';' ORDER BY t::text), '') AS it FROM headrace.{} t"
    tables = [f'"{row["relname"]}"' for row in rows(engine, query)]
    return {name: rows(engine, content.format(name))[0]["it"] for name in tables}


# With the simulated API over HTTP

FEW = ("heartrate", "steps", "sleep", "activity", "weight", "menstrual_cycle", "profile", "workout_stream", "workouts")


@dataclass
class Stage:
    """A simulated API and a store that reads from it."""

    engine: Engine
    settings: Settings
    simulator: Simulator
    client: AggregatorClient

    @property
    def world(self) -> World:
        """The simulated data."""
        return self.simulator.world

    def fill(self) -> None:
        """Applies every connection and the notice of every resource, and fetches the history."""
        for user in self.world.members:
            for connection in user.connections:
                api = [events.connected(self.world, connection)]
                api += [events.historical(self.world, connection, one) for one in events.supplied(connection)]
                apply(self.engine, self.settings, *(delivery(one, datetime.now(UTC)) for one in api))
        self.settle()

    def settle(self) -> None:
        """Runs all open backfills to the end."""
        fetcher = Fetcher(self.engine, self.settings, [self.client])
        for _ in range(40):
            execute(self.engine, "UPDATE headrace.backfills SET due_at = now() WHERE status IN ('pending', 'running')")
            if not (waiting := due(self.engine)):
                return
            for backfill_id in waiting:
                fetcher.run(backfill_id)
        raise AssertionError("it does not come to an end")

    def reconcile(self, since: datetime = LONG_AGO, *, dry_run: bool = False) -> list[Step]:
        """Reconciles to the end."""
        return run_steps(Reconciler(self.engine, self.settings, self.client, dry_run=dry_run), self.settings, since)

    def restore(self) -> list[Step]:
        """Reconciles and fetches the gaps."""
        steps = self.reconcile()
        self.settle()
        return steps

    def held(self) -> Counter[str]:
        """The number of stored rows by resource."""
        with self.engine.connect() as connection:
            return Counter(str(key[0]) for key, _ in expected.stored(connection))

    def differences(self) -> Counter[str]:
        """The number of rows by resource that are missing, wrong or superfluous."""
        with self.engine.connect() as connection:
            stored = list(expected.stored(connection))
        held = dict(stored)
        assert len(held) == len(stored)
        wanted = self.settings.resources
        truth = {key: one for key, one in expected.history(self.world).items() if not wanted or key[0] in wanted}
        wrong = [key for key, content in truth.items() if held.get(key) != content]
        return Counter(str(key[0]) for key in [*wrong, *(held.keys() - truth.keys())])

    def check(self) -> None:
        """All data is stored once; another reconciliation finds no gap and requests no data."""
        assert self.differences() == {}
        before, count = opened(self.engine), len(self.simulator.requests)
        assert found(self.reconcile()) == []
        assert opened(self.engine) == before
        assert len(self.simulator.requests) == count + len(self.world.members) + 2

    def asked(self) -> dict[str, list[tuple[datetime, datetime]]]:
        """The windows of the data requests so far, by the part of the path that names the resource."""
        windows = defaultdict(list)
        for request in self.simulator.requests:
            query = httpx.QueryParams(request["query"])
            if "start_date" in query:
                edges = [datetime.fromisoformat(query[name]) for name in ("start_date", "end_date")]
                path = request["path"].replace(self.world.members[0].user_id, "")
                windows[path].append((edges[0].replace(tzinfo=UTC), edges[1].replace(tzinfo=UTC)))
        return dict(windows)


@contextmanager
def stage(engine: Engine, settings: Settings, users: int = 1, days: int = 2, **more: Any) -> Iterator[Stage]:
    """A world that ended two hours ago, so that none of its events is still on its way."""
    until = datetime.now(UTC) - 2 * HOUR
    with Simulator(users, days, until=until, page_size=5000, **more) as simulator:
        wanted = replace(settings, junction_base_url=simulator.url)
        with junction_client(wanted) as client:
            yield Stage(engine, wanted, simulator, client)


def test_an_empty_store_is_filled(engine: Engine, settings: Settings) -> None:
    """Breaks if a resource is not restored where no delivery arrived, or is found missing again."""
    with stage(engine, settings, users=2) as on:
        steps = on.restore()
        assert {gap.whose for gap in found(steps)} == {"ours"}
        assert sum(step.people for step in steps) == len(on.world.members)
        truth = [
            {"user_id": user.user_id, "provider": each.provider.slug, "status": "connected", "error": None}
            for user in on.world.members
            for each in user.connections
        ]
        query = "SELECT user_id, provider, status, error FROM health.connections"
        assert sorted(map(str, rows(engine, query))) == sorted(map(str, truth))
        on.check()
    for resource in catalogue().values():
        origins = {row["origin"] for row in rows(engine, f"SELECT DISTINCT origin FROM health.{resource.name}")}
        assert origins <= {"reconcile"}, resource.name
    assert rows(engine, "SELECT DISTINCT status, error FROM health.backfills") == [
        {"status": "complete", "error": None}
    ]


def delete_data(on: Stage, start: datetime, end: datetime, resources: Sequence[str] = ()) -> None:
    """Deletes the data between two moments, of these resources or of all."""
    names = list(resources) or list(catalogue())
    of_series = "series_id IN (SELECT id FROM headrace.series WHERE resource = ANY(:names))"
    window = {"start": start, "end": end}
    execute(
        on.engine,
        f"DELETE FROM headrace.samples WHERE ts >= :start AND ts < :end AND {of_series}",
        **window,
        names=names,
    )
    for name in names:
        if column := catalogue()[name].day_field:
            days = {"start": start.date(), "end": (end - timedelta(microseconds=1)).date()}
            between = f"CAST({column} AS date) BETWEEN :start AND :end"
            execute(on.engine, f"DELETE FROM headrace.{name} WHERE {between}", **days)
    if "workout_stream" in names:
        gone = "NOT EXISTS (SELECT 1 FROM headrace.workouts w WHERE w.id = s.id)"
        execute(on.engine, f"DELETE FROM headrace.workout_stream s WHERE {gone}")


def connect_at(on: Stage, connected_at: datetime) -> None:
    """Makes users connected at this moment, and all later data webhook data."""
    on.world.connected_at = connected_at
    execute(
        on.engine,
        "UPDATE headrace.users SET first_seen = :at",
        "UPDATE headrace.backfills SET window_end = :at, created_at = :at, finished_at = :over",
        "UPDATE headrace.chunks SET window_end = :at, created_at = :at",
        at=connected_at,
        over=connected_at + HOUR,
    )


def store_deliveries(on: Stage, start: datetime, end: datetime, aggregator: str = "junction") -> None:
    """Stores deliveries in every hour between two moments."""
    execute(
        on.engine,
        """INSERT INTO headrace.deliveries (aggregator, message_id, received_at, applied_at, outcome)
           SELECT :aggregator, 'delivery-' || hour, hour, hour, 'applied'
           FROM generate_series(:start, :end, interval '30 minutes') AS hour""",
        start=start,
        end=end,
        aggregator=aggregator,
    )


def within(windows: Sequence[tuple[datetime, datetime]], first: datetime, last: datetime) -> bool:
    """Whether all windows lie between two moments."""
    return bool(windows) and all(first <= start <= end <= last for start, end in windows)


@pytest.mark.parametrize("others", ["have none either", "have deliveries"])
def test_three_lost_days_are_restored(engine: Engine, settings: Settings, others: str) -> None:
    """Breaks if an outage longer than the sender's retries leaves a gap, or costs more requests than its own days.

    An outage of all users has edges in hours, and the days of its edges are fetched whole. If deliveries of other users
    arrived meanwhile, only the silence of this user shows the loss, in whole days.
    """
    start, end, wanted = today(-5) + 5 * HOUR, today(-3) + 20 * HOUR, settings
    if others == "have deliveries":
        start, end, wanted = today(-5), today(-2), replace(settings, resources=FEW)
    with stage(engine, wanted, days=9) as on:
        on.fill()
        connect_at(on, today(-7))
        store_deliveries(on, today(-7), start - HOUR if others != "have deliveries" else datetime.now(UTC))
        if others != "have deliveries":
            store_deliveries(on, end + HOUR, datetime.now(UTC))
        whole = on.held()
        delete_data(on, start, end)
        assert {"heartrate", "steps", "sleep", "activity", "workouts", "workout_stream"} <= (whole - on.held()).keys()
        count = len(on.simulator.requests)
        steps = on.restore()
        assert {gap.whose for gap in found(steps)} == {"ours"}
        on.check()
        asked = on.simulator.requests[count:]
    assert {request["status"] for request in asked} == {200}
    spans = opened(engine)
    daily = {
        key: windows for key, windows in spans.items() if key[2] in ("heartrate", "steps", "hrv", "sleep", "activity")
    }
    assert len(daily) > 3
    for key, windows in daily.items():
        assert windows == [(today(-5), today(-2))], key
    for key, windows in spans.items():  # for rare resources also the days after the newest data (with a margin)
        assert all(today(-10) <= first < last <= today(1) for first, last in windows), (key, windows)


def test_only_what_is_missing_is_fetched(engine: Engine, settings: Settings) -> None:
    """Breaks if a lost resource has others fetched too, or more of itself than was lost."""
    wanted = replace(settings, resources=("heartrate", "steps", "sleep", "activity", "weight", "profile"))
    with stage(engine, wanted, days=9) as on:
        on.fill()
        connect_at(on, today(-7))
        store_deliveries(on, today(-7), datetime.now(UTC))
        connections = on.world.members[0].connections
        slugs = {each.provider.slug for each in connections if each.provider.has(catalogue()["steps"])}
        delete_data(on, today(-5), today(-3), ["steps"])
        before = on.asked()
        assert {(gap.key.resource, gap.reason) for gap in found(on.restore())} == {("steps", "2 days without data")}
        on.check()
        after = on.asked()
    path = "/v2/timeseries//steps/grouped"
    assert {one for one in after if after[one] != before[one]} == {path}
    asked = after[path][len(before[path]) :]
    assert set(asked) == {(today(-6), today(-2))}
    assert len(asked) == len(slugs)
    assert {key[1:]: windows for key, windows in opened(engine).items()} == {
        (slug, "steps"): [(today(-5), today(-3))] for slug in slugs
    }


def test_lost_days_of_history_are_restored(engine: Engine, settings: Settings) -> None:
    """Breaks if lost rows of fetched history are never found, or are requested twice."""
    with stage(engine, replace(settings, resources=("heartrate", "steps", "sleep")), days=5) as on:
        on.fill()
        delete_data(on, today(-3), today(-2), ["heartrate"])
        assert {gap.key.resource for gap in found(on.restore())} == {"heartrate"}
        on.check()
    assert opened(engine)
    for windows in opened(engine).values():
        assert windows == [(today(-3), today(-2))]


def test_lost_data_at_the_end_is_restored(engine: Engine, settings: Settings) -> None:
    """Breaks if lost data at the end is found only after newer data arrives."""
    with stage(engine, replace(settings, resources=("heartrate", "steps", "sleep", "activity")), days=6) as on:
        on.fill()
        connect_at(on, today(-4))
        store_deliveries(on, today(-4), datetime.now(UTC))
        delete_data(on, today(-2) + 3 * HOUR, today(2), ["heartrate", "sleep"])
        on.restore()
        on.check()
    assert {key[2] for key in opened(engine)} == {"heartrate", "sleep"}
    assert all(start >= today(-3) for windows in opened(engine).values() for start, _ in windows)


def test_a_night_that_began_the_day_before_is_no_gap(engine: Engine, settings: Settings) -> None:
    """Breaks if the sleep cycle of every night is fetched again although it is stored."""
    with stage(engine, replace(settings, resources=("sleep_cycle", "heartrate")), days=6) as on:
        on.fill()
        connect_at(on, today(-4))
        store_deliveries(on, today(-4), datetime.now(UTC))
        assert found(on.reconcile(dry_run=True)) == []


def test_faults_over_http_cost_a_repetition(engine: Engine, settings: Settings) -> None:
    """Breaks if a fault of the real protocol ends a reconciliation, or skips a user."""
    kinds: list[Any] = ["truncated", "500", "503", "429", "408", "504"]
    with stage(engine, settings, users=2, days=1) as on:
        calm = Counter(summaries(on.reconcile(dry_run=True)))
        for kind in kinds:
            on.simulator.faults.add(kind, times=2, **({"retry_after": 1} if kind in ("503", "429") else {}))
        steps = on.reconcile(dry_run=True)
        faulty = [request["status"] for request in on.simulator.requests[-len(steps) :]]
    assert Counter(summaries(steps)) == calm
    assert len([step for step in steps if step.seconds]) == 2 * len(kinds)
    assert Counter(faulty)[200] == 4 + 2  # and two that were truncated


def test_short_and_empty_pages_over_http(engine: Engine, settings: Settings) -> None:
    """Breaks if a short or empty page counts as the last one."""
    with stage(engine, settings, users=7, days=1) as on:
        calm = Counter(summaries(on.reconcile(dry_run=True)))
        for records in (1, 0, 3, 0, 0, 1):
            on.simulator.faults.add("short_page", times=1, records=records)
        steps = on.reconcile(dry_run=True)
        pages = [one for one in on.simulator.requests if "introspect" in one["path"]]
    assert Counter(summaries(steps)) == calm
    assert sum(step.people for step in steps) == 7
    assert len(pages) == 2 + 2 + 6


# The responsible party


@pytest.mark.parametrize("status", ["scheduled", "in_progress", "retrying"])
def test_a_running_pull_is_not_fetched(engine: Engine, settings: Settings, status: Any) -> None:
    """Breaks if a resource that Junction is still pulling is requested in vain, as history or as later data."""
    with stage(engine, replace(settings, resources=("heartrate", "steps", "sleep", "activity"))) as on:
        on.simulator.conditions.put_pull(Pull(status=status, resource="heartrate"))
        on.simulator.conditions.put_pull(Pull(status=status, resource="sleep"))
        steps = on.reconcile()
        pulling = [gap for gap in found(steps) if gap.key.resource in ("heartrate", "sleep")]
        assert {(gap.whose, gap.is_pulling, gap.windows) for gap in pulling} == {("aggregator", True, ())}
        assert all(status in gap.reason for gap in pulling)
        assert {key[2] for key in opened(engine)}.isdisjoint({"heartrate", "sleep"})
        assert {key[2] for key in opened(engine)} == {"steps", "activity"}
        again = on.reconcile()
        assert {gap.key for gap in found(again)} == {gap.key for gap in pulling}
        on.simulator.conditions.pulls.clear()
        on.restore()
        on.check()


@pytest.mark.parametrize(
    ("status", "details"),
    [("failure", "non_retriable_error"), ("failure", "retry_quota_exhausted"), ("not_pulled", None)],
)
def test_a_failed_pull_is_reported(engine: Engine, settings: Settings, status: Any, details: str | None) -> None:
    """Breaks if a failed or missing pull counts as ours, is reported without its error, or hides later gaps."""
    api = ScriptedApi(
        pulls=[[of("u1", sleep=pulled())], [of("u1", heartrate=pulled(status="failure", error_details=details))]],
        supplies=[[of("u1", heartrate=supplied(-9, -3))]],
    )
    if status == "not_pulled":
        api.pulls = [[of("u1", not_pulled=["heartrate"], sleep=pulled())]]
    steps = run_steps(api.reconciler(engine, settings), settings)
    history, later = (gap for gap in found(steps) if gap.key.resource == "heartrate")
    assert (history.whose, history.windows, history.is_pulling) == ("provider", (), False)
    assert (details or "not pulled") in history.reason
    assert later.whose == "ours"
    spans = opened(engine)
    assert spans["u1", "garmin", "heartrate"] == [(today(-9), today(-2))]
    assert spans["u1", "garmin", "sleep"] == [(today(-20), today(-9))]


def test_data_that_the_api_does_not_return_is_requested_once(engine: Engine, settings: Settings) -> None:
    """Breaks if days that Junction counts but does not return are requested each time, or are not reported."""
    api = missing(pulls=[[of("u1", heartrate=pulled(days=9))]], supplies=[[]])
    turns = []
    for _ in range(3):
        turns.append(summaries(run_steps(api.reconciler(engine, settings), settings)))
        execute(engine, "UPDATE headrace.chunks SET status = 'done'")
        execute(engine, "UPDATE headrace.backfills SET status = 'complete', finished_at = now()")
    never, connection = ("heartrate", "ours", 1), ("connection", "ours", 0)
    assert turns == [[never, connection], [("heartrate", "aggregator", 0)], [("heartrate", "aggregator", 0)]]


def test_a_failed_backfill_is_fetched_again(engine: Engine, settings: Settings) -> None:
    """Breaks if history whose backfill failed is never fetched."""
    api = missing(supplies=[[]])
    reconciler = api.reconciler(engine, settings)
    run_steps(reconciler, settings)
    assert summaries(run_steps(reconciler, settings)) == []
    execute(engine, "UPDATE headrace.backfills SET status = 'failed', finished_at = now()")
    (gap,) = found(run_steps(reconciler, settings))
    assert gap.reason == "its backfill has failed"
    assert opened(engine)["u1", "garmin", "heartrate"] == [(today(-20), today(-9))] * 2


# Connections

ERROR = {"error_type": "token_refresh_failed", "error_message": "the refresh token was rejected"}


@pytest.mark.parametrize(
    ("known", "true", "stored", "is_changed"),
    [
        (None, "connected", ("connected", None), True),
        (None, "error", ("error", "token_refresh_failed: the refresh token was rejected"), True),
        ("connected", "error", ("error", "token_refresh_failed: the refresh token was rejected"), True),
        ("error", "connected", ("connected", None), True),
        ("connected", "deregistered", ("error", "deregistered"), True),
        ("error", "deregistered", ("error", "provider_error"), False),
        ("connected", "connected", ("connected", None), False),
        ("error", "error", ("error", "provider_error"), False),
        (None, "deregistered", None, False),
    ],
)
def test_connections_are_corrected(  # noqa: PLR0917
    engine: Engine,
    settings: Settings,
    known: str | None,
    true: Any,
    stored: tuple[str, str | None] | None,
    is_changed: bool,
) -> None:
    """Breaks if a missed change of a connection is not corrected."""
    with stage(engine, replace(settings, resources=("profile",)), days=1) as on:
        user = on.world.members[0]
        connection, slug = user.connections[0], user.connections[0].provider.slug
        others = [events.connected(on.world, each) for each in user.connections[1:]]
        if known:
            others.append(events.connected(on.world, connection))
        if known == "error":
            data = {"provider": slug, "error_type": "provider_error"}
            others.append(event("provider.connection.error", user.user_id, data))
        before = datetime.now(UTC) - DAY
        for number, one in enumerate(others):
            apply(engine, on.settings, delivery(one, before + number * HOUR))
        on.simulator.conditions.put_state(State(true, user.user_id, slug))
        steps = on.reconcile()
        assert [gap.key.provider for gap in found(steps) if gap.key.resource == "connection"] == [slug] * is_changed
        query = "SELECT status, error FROM health.connections WHERE provider = :slug"
        assert [tuple(row.values()) for row in rows(engine, query, slug=slug)] == ([stored] if stored else [])
        count = len(
            rows(engine, "SELECT 1 FROM health.connections WHERE status = 'connected' AND provider <> :slug", slug=slug)
        )
        assert count == len(user.connections) - 1
        assert [gap for gap in found(on.reconcile()) if gap.key.resource == "connection"] == []


def test_a_newer_webhook_goes_before_the_comparison(engine: Engine, settings: Settings) -> None:
    """Breaks if a response that was requested before a connection was restored marks it as broken again."""
    body = event("provider.connection.created", "u1", {"provider": {"slug": "garmin"}})
    api = missing(connections={"u1": [{"slug": "garmin", "status": "error"}]}, supplies=[[]])

    def mend(request: httpx.Request) -> None:
        if request.url.path not in PARTS:
            apply(engine, settings, delivery(body, datetime.now(UTC) + timedelta(seconds=30)))

    api.during = mend
    run_steps(api.reconciler(engine, settings), settings)
    assert rows(engine, "SELECT status FROM health.connections") == [{"status": "connected"}]


def test_a_connection_made_during_the_request_is_not_deregistered(engine: Engine, settings: Settings) -> None:
    """Breaks if a connection that was made after an answer without it is marked as deregistered, for good."""
    created = event("provider.connection.created", "u1", {"provider": {"slug": "garmin"}})
    apply(engine, settings, delivery(created, datetime.now(UTC) - timedelta(days=1), name="before"))
    api = missing(connections={"u1": []}, supplies=[[]])

    def connect(request: httpx.Request) -> None:
        if request.url.path not in PARTS:
            apply(engine, settings, delivery(created, datetime.now(UTC), name="during"))

    api.during = connect
    run_steps(api.reconciler(engine, settings), settings)
    assert rows(engine, "SELECT status, error FROM health.connections") == [{"status": "connected", "error": None}]


def test_the_connections_of_all_users_are_compared(engine: Engine, settings: Settings) -> None:
    """Breaks if a user without data, or one whom Junction no longer knows, ends the comparison of the others."""
    well = [{"slug": "garmin", "status": "connected"}]
    api = ScriptedApi(
        pulls=[[of("u1"), {"user_id": "u2", "provider": {}}], [], [of("u3"), of("u4")]],
        connections={"u1": well, "u3": well, "u4": []},
    )
    run_steps(api.reconciler(engine, settings), settings)
    assert api.paths() == ["pulls", "u1", "u2", "pulls 1", "pulls 2", "u3", "u4", "supplies"]
    assert [row["user_id"] for row in rows(engine, "SELECT user_id FROM health.connections ORDER BY 1")] == ["u1", "u3"]


class ZonedApi(ScriptedApi):
    """An API that knows the time zone of u1."""

    zone = "Asia/Kathmandu"

    def truth(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v2/user/u1":
            return httpx.Response(200, json={"user_id": "u1", "fallback_time_zone": {"id": self.zone}})
        return super().truth(request)


@pytest.mark.parametrize(
    "body",
    [heartrate("u1", {12 * 60: 60}), workout("u1", time_start=EVENING, timezone_offset=None)],
    ids=["samples", "records"],
)
def test_the_zone_of_a_user_without_offsets_is_fetched(engine: Engine, settings: Settings, body: Any) -> None:
    """Breaks if days of users whose provider sends no offset count by UTC, or by a zone that the user has left.

    The zone that an operator sets stays.
    """
    apply(engine, settings, delivery(body))  # 18:30 UTC
    deriver = Deriver(engine, settings)
    deriver.rebuild(None, lambda *_: None)
    zones = "SELECT DISTINCT CAST(local_date AS text) AS day, zone_source FROM health.daily"
    assert rows(engine, zones) == [{"day": "2026-03-14", "zone_source": "utc"}]
    api = ZonedApi(pulls=[[of("u1")]], connections={"u1": []})

    def reconcile() -> list[dict[str, Any]]:
        run_steps(api.reconciler(engine, settings), settings)
        while deriver.run(lambda: False):
            pass
        return rows(engine, zones)

    for zone, day in (("Asia/Kathmandu", "2026-03-15"), ("America/New_York", "2026-03-14")):
        api.zone = zone
        assert reconcile() == [{"day": day, "zone_source": "user"}]
    with transaction(engine) as connection:
        set_zone(connection, "member-1", "Asia/Kathmandu")
    assert reconcile() == [{"day": "2026-03-15", "zone_source": "user"}]


def test_the_zone_of_a_user_with_offsets_is_not_fetched(engine: Engine, settings: Settings) -> None:
    """Breaks if every reconciliation asks once more for each user."""
    apply(engine, settings, delivery(workout("u1", timezone_offset=3600)))
    Deriver(engine, settings).rebuild(None, lambda *_: None)
    api = ZonedApi(pulls=[[of("u1")]], connections={"u1": []})
    run_steps(api.reconciler(engine, settings), settings)
    assert "/v2/user/u1" not in [one.url.path for one in api.asked]


# Excluded users and resources


@pytest.mark.parametrize("amid", [False, True])
def test_an_erased_user_is_not_fetched_again(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, *, amid: bool
) -> None:
    """Breaks if a user who was erased here but not at Junction, before or during the request, is fetched again."""
    if amid:
        monkeypatch.setattr(reconciler, "erased_users", lambda *_: set())  # as before the erasure
    execute(engine, "INSERT INTO headrace.users (user_id, erased_at) VALUES ('u1', now())")
    api = ScriptedApi(
        pulls=[[of("u1", heartrate=pulled()), of("u2", heartrate=pulled())]],
        supplies=[[of("u1", sleep=supplied(-9, -3)), of("u2", sleep=supplied(-9, -3))]],
        connections={name: [{"slug": "garmin", "status": "connected"}] for name in ("u1", "u2")},
    )
    steps = run_steps(api.reconciler(engine, settings), settings)
    assert {gap.key.user_id for gap in found(steps)} == {"u2"}
    assert {key[0] for key in opened(engine)} == {"u2"}
    assert api.paths() == ["pulls", *(["u1"] if amid else []), "u2", "supplies"]
    for table in ("connections", "backfills", "gaps"):
        assert rows(engine, f"SELECT 1 FROM headrace.{table} WHERE user_id = 'u1'") == []


def test_a_user_of_terra_is_not_compared_with_junction(engine: Engine, settings: Settings) -> None:
    """Breaks if a listing of Junction that names a user of Terra writes connections or opens backfills."""
    execute(engine, "INSERT INTO headrace.users (user_id, aggregator) VALUES ('u1', 'terra')")
    api = ScriptedApi(
        pulls=[[of("u1", heartrate=pulled()), of("u2", heartrate=pulled())]],
        supplies=[[of("u1", sleep=supplied(-9, -3))]],
        connections={name: [{"slug": "garmin", "status": "connected"}] for name in ("u1", "u2")},
    )
    steps = run_steps(api.reconciler(engine, settings), settings)
    assert {gap.key.user_id for gap in found(steps)} == {"u2"}
    for table in ("connections", "backfills", "gaps"):
        assert {row["user_id"] for row in rows(engine, f"SELECT user_id FROM headrace.{table}")} == {"u2"}
    owners = rows(engine, "SELECT user_id, aggregator FROM headrace.users ORDER BY 1")
    assert [tuple(row.values()) for row in owners] == [("u1", "terra"), ("u2", "junction")]


HISTORY: dict[str, Any] = {name: pulled() for name in ("sleep", "steps", "hypnogram", "brain_waves", "device")}
LATER: dict[str, Any] = {name: supplied(-9, -3) for name in ("sleep", "steps", "sleep_stream", "new_one")}
EVERYTHING = ScriptedApi(pulls=[[of("u1", "garmin", **HISTORY)]], supplies=[[of("u1", "oura", **LATER)]])


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        ({}, {("garmin", "sleep"), ("garmin", "steps"), ("garmin", "device"), ("oura", "sleep"), ("oura", "steps")}),
        ({"resources": ("sleep",)}, {("garmin", "sleep"), ("oura", "sleep")}),
        ({"providers": ("oura",)}, {("oura", "sleep"), ("oura", "steps")}),
        ({"resources": ("steps",), "providers": ("garmin",)}, {("garmin", "steps")}),
        ({"resources": ("hypnogram", "sleep_stream")}, {("garmin", "hypnogram"), ("oura", "sleep_stream")}),
        ({"providers": ("strava",)}, set()),
    ],
)
def test_only_what_is_wanted_is_fetched(
    engine: Engine, settings: Settings, wanted: dict[str, Any], kept: set[tuple[str, str]]
) -> None:
    """Breaks if an unknown resource, or one that the settings exclude, is fetched or reported."""
    api = replace(EVERYTHING, asked=[])
    steps = run_steps(api.reconciler(engine, replace(settings, **wanted)), settings)
    assert {key[1:] for key in opened(engine)} == kept
    assert {gap.key[1:] for gap in found(steps)} == kept


@pytest.mark.parametrize(("has_any", "resources"), [(True, set()), (False, {"profile"})])
def test_a_resource_without_days_is_stored_or_not(
    engine: Engine, settings: Settings, resources: set[str], *, has_any: bool
) -> None:
    """Breaks if a profile, which has no day, is fetched with each reconciliation, or never."""
    source = {"provider": "garmin", "type": "watch"}
    beats = [{"timestamp": (today(n) + HOUR).isoformat(), "value": 60, "unit": "bpm"} for n in range(-9, 0)]
    known = [event("daily.data.heartrate.created", "u1", {"source": source, "data": beats})]
    known += [event("daily.data.profile.created", "u1", {"id": "p1", "source": source})] * has_any
    apply(engine, settings, *(delivery(one, today(-1)) for one in known))
    api = ScriptedApi(supplies=[[of("u1", heartrate=supplied(-9, -1), profile=supplied(-9, -3))]])
    assert {gap.key.resource for gap in found(run_steps(api.reconciler(engine, settings), settings))} == resources


def test_a_row_without_a_user_is_passed_over(engine: Engine, settings: Settings) -> None:
    """Breaks if an empty user_id, as in the public examples, makes a user."""
    api = ScriptedApi(pulls=[[of("", heartrate=pulled()), of("u1", heartrate=pulled())]], supplies=[[]])
    run_steps(api.reconciler(engine, settings), settings)
    assert {key[0] for key in opened(engine)} == {"u1"}
    assert api.paths() == ["pulls", "u1", "supplies"]


ODD = (None, {"user_id": None, "provider": {}}, {"user_id": "u9", "provider": None})


def test_odd_entries_cost_themselves_and_are_counted(engine: Engine, settings: Settings, caplog: Any) -> None:
    """Breaks if a null or a value that is new stops the comparison of all users, or passes without a word."""
    odd = of("u1", heartrate=pulled(), sleep=pulled(status="dreaming"))
    pages = [*ODD, odd, of("u2", heartrate=pulled())]
    statistics = [*ODD, of("u1", heartrate=supplied(-9, -3), steps={"newest_data": "soon"})]
    listed = [{"slug": "garmin"}, {"slug": None}, {"slug": "oura", "status": "thinking"}]
    api = ScriptedApi(pulls=[pages], supplies=[statistics], connections={"u1": listed, "u2": []})
    steps = run_steps(api.reconciler(engine, settings), settings)
    assert [step.unread for step in steps] == [4, 2, 0, 4]
    assert {key[:2] for key in opened(engine)} == {("u1", "garmin"), ("u2", "garmin")}
    assert caplog.text.count("entries of Junction's introspection could not be read, and are not compared") == 3


def test_a_connection_that_cannot_be_read_is_not_gone(engine: Engine, settings: Settings) -> None:
    """Breaks if a new status of a connection marks it as deregistered."""
    created = event("provider.connection.created", "u1", {"provider": {"slug": "oura"}})
    apply(engine, settings, delivery(created, datetime.now(UTC) - DAY))
    listed = [{"slug": "oura", "status": "thinking"}]
    api = ScriptedApi(pulls=[[of("u1")]], connections={"u1": listed})
    assert found(run_steps(api.reconciler(engine, settings), settings)) == []
    assert rows(engine, "SELECT status FROM health.connections") == [{"status": "connected"}]


def test_a_record_of_the_future_hides_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if one record of 2105 hides that the last month is missing, or is looked for with each run."""
    bodies = [
        event("daily.data.sleep.created", "u1", {"id": day, "calendar_date": day, "source": {"provider": "oura"}})
        for day in (f"{today(-40):%Y-%m-%d}", "2105-01-01")
    ]
    apply(engine, settings, *(delivery(body, today(-30)) for body in bodies))
    api = ScriptedApi(supplies=[[of("u1", "oura", sleep=supplied(-40, 29000))]])
    (gap,) = found(run_steps(api.reconciler(engine, settings), settings))
    assert gap.windows[-1][1] > today(-1)
    assert gap.windows[0][0] < today(-35)
    execute(engine, "UPDATE headrace.chunks SET status = 'done'", "UPDATE headrace.backfills SET status = 'complete'")
    assert found(run_steps(api.reconciler(engine, settings), settings)) == []


def test_history_since_the_year_one_is_fetched(engine: Engine, settings: Settings) -> None:
    """Breaks if a range that begins with the zero value of a date makes a backfill that cannot be fetched."""
    with stage(engine, settings, days=1) as on:
        user = on.world.members[0].user_id
        slug = on.world.members[0].connections[0].provider.slug
        api = ScriptedApi(pulls=[[of(user, slug, heartrate=pulled(range_start="0001-01-01T00:00:00"))]], supplies=[[]])
        run_steps(api.reconciler(engine, settings), settings)
        on.settle()
    assert rows(engine, "SELECT status FROM health.backfills") == [{"status": "complete"}]


def test_one_user_is_compared_alone(engine: Engine, settings: Settings) -> None:
    """Breaks if `--user` compares other users too, or a later page omits the user."""
    api = ScriptedApi(
        pulls=[[of("u1", heartrate=pulled())], [of("u2", heartrate=pulled())]],
        supplies=[[of("u1", sleep=supplied(-9, -3)), of("u2", sleep=supplied(-9, -3))]],
    )
    run_steps(api.reconciler(engine, settings), settings, user="u2")
    assert [one.url.params.get("user_id") for one in api.asked] == ["u2", "u2", None, "u2"]
    assert {key[0] for key in opened(engine)} == {"u2"}


def test_older_data_is_compared_on_demand_only(engine: Engine, settings: Settings) -> None:
    """Breaks if each reconciliation requests a decade, or none ever can."""
    api = missing(pulls=[[]], supplies=[[of("u1", heartrate=supplied(-300, -3), sleep=supplied(-300, -200))]])
    (gap,) = found(run_steps(api.reconciler(engine, settings, dry_run=True), settings, since=today(-35)))
    assert gap.windows == ((today(-35), today(-2)),)
    both = found(run_steps(api.reconciler(engine, settings, dry_run=True), settings))
    assert [one.windows[0][0] for one in both] == [today(-300), today(-300)]


# The dry run


def test_a_dry_run_writes_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a dry run fetches, corrects or stores anything, or reports less."""
    with stage(engine, settings, days=3) as on:
        connection = on.world.members[0].connections[0]
        notices = [events.historical(on.world, connection, catalogue()[name]) for name in ("heartrate", "sleep")]
        apply(engine, on.settings, *(delivery(one, datetime.now(UTC)) for one in notices))
        on.settle()
        delete_data(on, today(-2), today(-1), ["heartrate"])
        on.simulator.conditions.put_pull(Pull("retrying", resource="steps"))
        ensure_job(engine, JOB, PERIOD)
        before = snapshot(engine)
        assert {name for name, content in before.items() if content} >= {'"samples"', '"backfills"', '"jobs"'}
        dry = on.reconcile(dry_run=True)
        assert snapshot(engine) == before
        assert not any(step.opened for step in dry)
        wet = on.reconcile()
        assert summaries(dry) == summaries(wet)
        assert [(gap.key, gap.reason) for gap in found(dry)] == [(gap.key, gap.reason) for gap in found(wet)]
        assert snapshot(engine) != before
        assert len({one for step in wet for one in step.opened}) == len({gap.key for gap in found(wet) if gap.windows})


def test_a_dry_run_finds_what_a_run_would(engine: Engine, settings: Settings) -> None:
    """Breaks if a resource whose pull has ended since the last reconciliation is missing in the report."""
    api = missing(pulls=[[of("u1", heartrate=pulled(status="in_progress"))]])
    run_steps(api.reconciler(engine, settings), settings)
    api = missing()
    dry = run_steps(api.reconciler(engine, settings, dry_run=True), settings)
    assert summaries(dry) == summaries(run_steps(api.reconciler(engine, settings), settings))


# Pages


def test_every_page_is_requested_once(engine: Engine, settings: Settings) -> None:
    """Breaks if a short or empty page ends a part, or one part's cursor is used in the other."""
    pulls = [[of("u1", heartrate=pulled())], [], [], [of("u2", heartrate=pulled()), of("u3", heartrate=pulled())]]
    supplies = [[], [of("u2", sleep=supplied(-9, -3))], [of("u1", sleep=supplied(-9, -3))]]
    api = ScriptedApi(pulls=pulls, supplies=supplies)
    steps = run_steps(api.reconciler(engine, settings), settings)
    asked = ["pulls", "u1", "pulls 1", "pulls 2", "pulls 3", "u2", "u3", "supplies", "supplies 1", "supplies 2"]
    assert api.paths() == asked
    assert [step.people for step in steps] == [1, 0, 0, 0, 2, 0, 0, 0, 0, 0]
    keys = {(user, "garmin", "heartrate") for user in ("u1", "u2", "u3")}
    assert opened(engine).keys() == keys | {("u1", "garmin", "sleep"), ("u2", "garmin", "sleep")}


def cursors(*given: str | None, part: str = "pulls") -> ScriptedApi:
    """An API whose pages of a part return these cursors, and then the last of them forever."""
    api = missing(connections={})

    def answer(request: httpx.Request) -> httpx.Response:
        assert len(api.asked) < 40, "requested without end"
        if PARTS.get(request.url.path) != part:
            return httpx.Response(200, json={"data": [], "providers": []})
        number = sum(one.url.path == request.url.path for one in api.asked) - 1
        return httpx.Response(200, json={"data": [], "next_cursor": given[min(number, len(given) - 1)]})

    api.truth = answer  # type: ignore[method-assign]
    return api


@pytest.mark.parametrize("part", ["pulls", "supplies"])
def test_a_cursor_that_repeats_ends_its_part(engine: Engine, settings: Settings, part: str) -> None:
    """Breaks if a cursor that leads to itself is followed without end, or ends the other part."""
    api = cursors("a", "b", "b", part=part)
    run_steps(api.reconciler(engine, settings), settings, limit=20)
    asked = [path for path in api.paths() if path.startswith(part)]
    assert asked == [part, f"{part} a", f"{part} b"]
    assert api.paths()[-1].startswith("supplies")


def test_cursors_that_form_a_loop_are_noticed(engine: Engine, settings: Settings) -> None:
    """Breaks if two pages whose cursors form a loop are requested without a pause and without end."""
    api = cursors(*["a", "b"] * 30)
    run_steps(api.reconciler(engine, settings), settings, limit=20)


@pytest.mark.parametrize("status", [400, 410])
def test_an_expired_cursor_begins_the_part_again(engine: Engine, settings: Settings, status: int) -> None:
    """Breaks if users on pages after an expired cursor are never compared."""
    api = ScriptedApi(pulls=[[of("u1", heartrate=pulled())], [of("u2", heartrate=pulled())]])
    api.before = [None, None, httpx.Response(status, json={"detail": "cursor_expired"})]
    run_steps(api.reconciler(engine, settings), settings)
    assert api.paths() == ["pulls", "u1", "pulls 1", "pulls", "u1", "pulls 1", "u2", "supplies"]
    assert {key[0]: len(windows) for key, windows in opened(engine).items()} == {"u1": 1, "u2": 1}


def test_cursors_that_always_expire_end_it(engine: Engine, settings: Settings) -> None:
    """Breaks if the first page is requested without end."""
    api = ScriptedApi(pulls=[[], []])
    reconciler = api.reconciler(engine, settings)
    api.during = lambda request: api.before.append(
        httpx.Response(400) if request.url.params.get("next_cursor") else None
    )
    with pytest.raises(Unprocessable, match="cursors"):
        run_steps(reconciler, settings, limit=60)
    assert api.paths() == ["pulls", "pulls 1"] * (MAX_RESTARTS + 1)


# Faults


def in_half_a_minute() -> httpx.Response:
    """A 429 with a date."""
    when = (datetime.now(UTC) + timedelta(seconds=30)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    return httpx.Response(429, headers={"Retry-After": when})


FAULTS: dict[str, tuple[Callable[[], httpx.Response], float, float, bool, bool]] = {
    "429 in 30 s": (lambda: httpx.Response(429, headers={"Retry-After": "30"}), 30, 30.2, True, False),
    "429 at a date": (in_half_a_minute, 28, 30.2, True, False),
    "429": (lambda: httpx.Response(429), 0.5, 1, True, True),
    "503": (lambda: httpx.Response(503), 0.5, 1, True, True),
    "401": (lambda: httpx.Response(401), UNAUTHORIZED_PAUSE, UNAUTHORIZED_PAUSE, True, False),
    "403": (lambda: httpx.Response(403), UNAUTHORIZED_PAUSE, UNAUTHORIZED_PAUSE, True, False),
    "500": (lambda: httpx.Response(500), 0.5, 1, False, True),
    "504": (lambda: httpx.Response(504), 0.5, 1, False, True),
    "413": (lambda: httpx.Response(413), 0.5, 1, False, True),
    "half a page": (lambda: httpx.Response(200, content=b'{"data": [{"user_id": "u1"'), 0.5, 1, False, True),
    "a proxy's page": (lambda: httpx.Response(200, content=b"<html>"), 0.5, 1, False, True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_a_repetition(engine: Engine, settings: Settings, name: str) -> None:
    """Breaks if the wait after a fault is wrong, or the fault moves the position or loses later results."""
    answer, least, limit, pauses_all, counts = FAULTS[name]
    for place in range(3):  # the pulls, a user's connections, the coverage
        api = missing(before=[*[None] * place, answer()])
        reconciler, position = api.reconciler(engine, settings), ReconcilePosition()
        for _ in range(place):
            position = reconciler.step(position, LONG_AGO).to or position
        step = reconciler.step(position, LONG_AGO)
        assert least <= step.seconds <= limit
        assert step.to == msgspec.structs.replace(position, attempts=int(counts))
        assert (step.found, step.opened, step.people) == ((), (), 0)
        assert step.reason
        assert bool(pauses(settings)) is pauses_all
        again = reconciler.step(step.to, LONG_AGO)
        if pauses_all:
            assert again.to == step.to
            assert again.seconds > least - 1
            assert len(api.asked) == place + 1
            forget_pauses(settings)
            again = reconciler.step(step.to, LONG_AGO)
        assert again.seconds == 0
        assert again.to is None or again.to.attempts == 0
        assert api.asked[place].url == api.asked[place + 1].url


def test_the_network_may_be_away(engine: Engine, settings: Settings) -> None:
    """Breaks if a missing response ends a reconciliation."""

    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no", request=request)

    step = Reconciler(engine, settings, mock_client(away, settings)).step(ReconcilePosition(), LONG_AGO)
    assert (step.to, step.reason) == (ReconcilePosition(attempts=1), "no answer")


@pytest.mark.parametrize("status", [404, 422, 402])
@pytest.mark.parametrize("place", [0, 2])
def test_a_refusal_ends_it(engine: Engine, settings: Settings, status: int, place: int) -> None:
    """Breaks if a request that is refused permanently is repeated forever."""
    api = missing(before=[*[None] * place, httpx.Response(status)])
    with pytest.raises(Unprocessable, match=f"status {status}"):
        run_steps(api.reconciler(engine, settings), settings)
    assert len(api.asked) == place + 1


@pytest.mark.parametrize("status", [404, 422, 402])
def test_a_refusal_about_one_user_is_skipped(engine: Engine, settings: Settings, status: int) -> None:
    """Breaks if one user whom Junction no longer knows ends the whole reconciliation."""
    api = missing(before=[None, httpx.Response(status)])
    run_steps(api.reconciler(engine, settings), settings)
    assert api.paths() == ["pulls", "u1", "supplies"]


def test_a_lasting_error_ends_the_reconciliation(engine: Engine, settings: Settings) -> None:
    """Breaks if a permanent error is retried forever, or not at all."""
    api = missing(before=[httpx.Response(500) for _ in range(MAX_ATTEMPTS)])
    with pytest.raises(Unprocessable, match=f"{MAX_ATTEMPTS} times"):
        run_steps(api.reconciler(engine, settings), settings)
    assert len(api.asked) == MAX_ATTEMPTS


def test_failures_are_counted_by_request(engine: Engine, settings: Settings) -> None:
    """Breaks if errors of different requests add up and end a long reconciliation."""
    api = missing(before=[*[httpx.Response(500)] * (MAX_ATTEMPTS - 1), None] * 3)
    run_steps(api.reconciler(engine, settings), settings)
    assert len(api.asked) == 3 * MAX_ATTEMPTS


# Stored gaps


def stored_gaps(engine: Engine) -> dict[tuple[str, str], tuple[Any, ...]]:
    """The stored gaps: responsible party and age in days, by resource and part."""
    return {
        (row.pop("resource"), row.pop("part")): (row["whose"], (row["since"].date() - date.today()).days)  # noqa: DTZ011
        for row in rows(engine, "SELECT resource, part, whose, since FROM headrace.gaps")
    }


def test_stored_gaps_are_replaced_and_keep_their_age(engine: Engine, settings: Settings) -> None:
    """Breaks if a closed gap is still shown, its age is lost, or one part overwrites the other."""

    def compare(pulls: Sequence[Any], supplies: Sequence[Any] = ()) -> dict[tuple[str, str], tuple[Any, ...]]:
        execute(engine, "DELETE FROM headrace.backfills")
        execute(
            engine, "UPDATE headrace.gaps SET since = since - interval '2 days', seen_at = seen_at - interval '2 days'"
        )
        api = ScriptedApi(pulls=[pulls], supplies=[supplies])
        run_steps(api.reconciler(engine, settings), settings)
        return stored_gaps(engine)

    failed, later = pulled(status="failure"), of("u1", heartrate=supplied(-9, -3))
    ours, theirs = ("ours", 0), ("provider", 0)
    first = compare([of("u1", sleep=failed, heartrate=pulled(), steps=failed)], [later])
    assert first == {
        ("sleep", "pulls"): theirs,
        ("heartrate", "pulls"): ours,
        ("steps", "pulls"): theirs,
        ("heartrate", "supplies"): ours,
    }
    second = compare([of("u1", sleep=failed, heartrate=failed), of("u2", hrv=pulled())], [later])
    assert second == {
        ("sleep", "pulls"): ("provider", -2),
        ("heartrate", "pulls"): theirs,  # another party is responsible now
        ("heartrate", "supplies"): ("ours", -2),
        ("hrv", "pulls"): ours,
    }
    third = compare([of("u1", sleep=failed)], [of("u1")])
    assert third == {("sleep", "pulls"): ("provider", -4), ("hrv", "pulls"): ("ours", -2)}  # u2 was not on that page


def test_stored_gaps_have_their_edges(engine: Engine, settings: Settings) -> None:
    """Breaks if the edges of a gap, or its reason, are not stored."""
    apart = missing(supplies=[[]])
    run_steps(apart.reconciler(engine, settings), settings)
    (row,) = rows(engine, "SELECT user_id, provider, reason, is_pulling, window_start, window_end FROM headrace.gaps")
    assert row == {
        "user_id": "u1",
        "provider": "garmin",
        "reason": "pulled by the aggregator, but no event announced it",
        "is_pulling": False,
        "window_start": today(-20),
        "window_end": today(-9),
    }


# Time slices


def make_due(engine: Engine, *, leases: bool = False) -> None:
    """Makes the job due; with `leases`, also expires the leases of killed workers."""
    execute(engine, "UPDATE headrace.jobs SET due_at = now()")
    if leases:
        execute(engine, "UPDATE headrace.jobs SET lease_until = now() - interval '1 second'")


def job_state(engine: Engine) -> dict[str, Any]:
    """The position of the job, and the seconds until it is due."""
    query = """SELECT position, extract(epoch FROM due_at - now())::float8 AS seconds, lease_until > now() AS held
               FROM headrace.jobs WHERE name = :name"""
    (row,) = rows(engine, query, name=JOB)
    return row


LONG = ScriptedApi(
    pulls=[[of("u1", heartrate=pulled())], [of("u2", heartrate=pulled())], [of("u3", heartrate=pulled())]]
)
ALL = ["pulls", "u1", "pulls 1", "u2", "pulls 2", "u3", "supplies"]


def test_a_time_slice_runs_to_the_end(engine: Engine, settings: Settings) -> None:
    """Breaks if a reconciliation runs before it is due, or the next one is not one period later."""
    api = replace(LONG, asked=[])
    reconciler = api.reconciler(engine, settings)
    assert run_slice(engine, reconciler, PERIOD) is None
    assert not ensure_job(engine, JOB, PERIOD)
    assert run_slice(engine, reconciler, PERIOD) is None
    assert api.asked == []
    make_due(engine)
    assert ensure_job(engine, JOB, PERIOD)
    assert run_slice(engine, reconciler, PERIOD) is None
    assert api.paths() == ALL
    assert {key[0] for key in opened(engine)} == {"u1", "u2", "u3"}
    after = job_state(engine)
    assert (after["position"], after["held"]) == (None, False)
    assert PERIOD - 60 < after["seconds"] <= PERIOD


def test_a_time_slice_that_waits_continues_at_its_position(engine: Engine, settings: Settings) -> None:
    """Breaks if a reconciliation that has to wait begins again, continues too early, or blocks other workers."""
    api = replace(LONG, asked=[], before=[None, None, httpx.Response(429, headers={"Retry-After": "30"})])
    ensure_job(engine, JOB, 0)
    make_due(engine)
    assert 30 <= (run_slice(engine, api.reconciler(engine, settings), PERIOD) or 0) <= 30.2
    after = job_state(engine)
    assert after["position"].pop("began")
    at = {"part": "pulls", "cursor": "1", "people": [], "attempts": 0, "restarts": 0, "pages": 1, "seen": ["1"]}
    assert after["position"].items() >= at.items()
    assert not after["held"]
    assert 28 < after["seconds"] < 31
    assert run_slice(engine, api.reconciler(engine, settings), PERIOD) is None
    assert not ensure_job(engine, JOB, PERIOD)
    assert len(api.asked) == 3
    make_due(engine)
    forget_pauses(settings)
    assert run_slice(engine, api.reconciler(engine, settings), PERIOD) is None
    assert api.paths() == [*ALL[:3], *ALL[2:]]


def test_a_killed_time_slice_continues_after_its_lease(engine: Engine, settings: Settings) -> None:
    """Breaks if a killed worker costs more than one request, or another takes over too early."""
    api = replace(LONG, asked=[])
    ensure_job(engine, JOB, 0)
    make_due(engine)
    for number in range(len(ALL)):
        api.during = lambda _, number=number: kill(number, api)  # type: ignore[misc]
        with pytest.raises(Killed):
            run_slice(engine, api.reconciler(engine, settings), PERIOD)
        assert job_state(engine)["held"]
        assert run_slice(engine, api.reconciler(engine, settings), PERIOD) is None
        assert not ensure_job(engine, JOB, PERIOD)
        make_due(engine, leases=True)
    api.during = lambda _: None
    run_slice(engine, api.reconciler(engine, settings), PERIOD)
    assert api.paths() == [path for path in ALL for _ in range(2)]
    assert {key[0]: len(windows) for key, windows in opened(engine).items()} == {"u1": 1, "u2": 1, "u3": 1}


def kill(number: int, api: ScriptedApi) -> None:
    """Ends a worker with its next request after `number` requests were sent twice."""
    if len(api.asked) == 2 * number + 1:
        raise Killed


def test_a_time_slice_is_limited(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a long reconciliation blocks the lane, or repeats its work."""
    clock = iter(range(1000))
    monkeypatch.setattr("workers.reconcile.runs.time.monotonic", lambda: 10.0 * next(clock))
    api = replace(LONG, asked=[])
    ensure_job(engine, JOB, 0)
    turns = 0
    while job_state(engine)["position"] or not turns:
        make_due(engine)
        seconds = run_slice(engine, api.reconciler(engine, settings), PERIOD)
        assert seconds == (None if len(api.asked) == len(ALL) else 0.0)
        assert not job_state(engine)["held"]
        turns += 1
        assert turns < 20
    assert turns > 2
    assert api.paths() == ALL


def test_only_one_worker_runs_the_reconciliation(engine: Engine, settings: Settings) -> None:
    """Breaks if two workers run one reconciliation: every request would be sent twice."""
    api, other = replace(LONG, asked=[]), replace(LONG, asked=[])
    ensure_job(engine, JOB, 0)
    make_due(engine)
    second = other.reconciler(engine, settings)
    given: list[float | None] = []
    api.during = lambda _: given.append(run_slice(engine, second, PERIOD))
    run_slice(engine, api.reconciler(engine, settings), PERIOD)
    assert given == [None] * len(ALL)
    assert (api.paths(), other.paths()) == (ALL, [])


@contextmanager
def gaps_that_time_out(engine: Engine, condition: str) -> Iterator[None]:
    """PostgreSQL does not execute a statement that stores a gap for which the condition is true."""
    execute(
        engine,
        f"""CREATE FUNCTION headrace.time_out() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF {condition} THEN RAISE EXCEPTION 'cancelled' USING ERRCODE = '57014'; END IF; RETURN NEW; END $$""",
    )
    trigger = "BEFORE INSERT OR UPDATE ON headrace.gaps FOR EACH ROW EXECUTE FUNCTION headrace.time_out()"
    execute(engine, f"CREATE TRIGGER time_out {trigger}")
    try:
        yield
    finally:
        execute(engine, "DROP FUNCTION headrace.time_out CASCADE")


def run_to_the_end(engine: Engine, settings: Settings, api: ScriptedApi) -> Status:
    """Runs slices until the job has ended, and returns what `headrace status` shows."""
    ensure_job(engine, JOB, 0)
    for _ in range(100):
        make_due(engine)
        if run_slice(engine, api.reconciler(engine, settings), PERIOD) is None:
            return status_view.read(engine, [], ())
    raise AssertionError("the run does not end")


def test_a_user_who_cannot_be_compared_is_skipped(engine: Engine, settings: Settings) -> None:
    """Breaks if a step that always times out is tried without end, unseen, or costs other users their comparison."""
    page = [of(user, heartrate=pulled()) for user in ("u1", "bad", "u3")]
    api = ScriptedApi(pulls=[page, [of("u4", heartrate=pulled())]])
    with gaps_that_time_out(engine, "NEW.user_id = 'bad'"):
        found = run_to_the_end(engine, settings, api)
    error = "1 users could not be compared: PostgreSQL: QueryCanceled (57014) after 45s"
    assert found.failed_jobs == {JOB: error}
    assert f"job {JOB}: {error}" in [one.what for one in problems(found)]
    assert {key[0] for key in opened(engine)} == {"u1", "u3", "u4"}
    api.asked.clear()
    assert run_to_the_end(engine, settings, api).failed_jobs == {}
    assert {key[0] for key in opened(engine)} == {"u1", "bad", "u3", "u4"}


def test_a_run_in_which_nobody_can_be_compared_ends(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a reconciliation takes hours because PostgreSQL executes none of its steps."""
    monkeypatch.setattr(runs, "MAX_SKIPPED", 1)
    api = ScriptedApi(pulls=[[of(user, heartrate=pulled()) for user in ("u1", "u2", "u3")]])
    with gaps_that_time_out(engine, "true"):
        found = run_to_the_end(engine, settings, api)
    assert found.failed_jobs[JOB].startswith("more than 1 users could not be compared: PostgreSQL")
    assert job_state(engine)["position"] is None


def test_a_refused_reconciliation_ends_until_the_next_period(engine: Engine, settings: Settings, caplog: Any) -> None:
    """Breaks if a refused reconciliation is repeated at once without end, or ends without a log line."""
    api = replace(LONG, asked=[], before=[None, None, httpx.Response(422)])
    ensure_job(engine, JOB, 0)
    make_due(engine)
    assert run_slice(engine, api.reconciler(engine, settings), PERIOD) is None
    after = job_state(engine)
    assert (after["position"], after["held"]) == (None, False)
    assert after["seconds"] > PERIOD - 60
    assert "status 422" in caplog.text
    assert {key[0] for key in opened(engine)} == {"u1"}


@pytest.mark.parametrize(
    ("changes", "messages"),
    [({}, 1), ({"reconcile_hours": 0}, 0), ({"fetch_history": False}, 0), ({"junction_api_key": None}, 0)],
)
def test_the_sweep_begins_what_is_due(
    engine: Engine, settings: Settings, changes: dict[str, Any], messages: int
) -> None:
    """Breaks if no reconciliation starts automatically, or a disabled one does."""
    celery = make_celery(settings, "publisher")
    work = WorkerContext(celery, replace(settings, **changes))
    jobs = Jobs(work)
    with redis.Redis.from_url(settings.need_broker()) as client:
        jobs.sweep()
        assert client.llen("backfill") == 0  # the first one runs a period after the installation
        make_due(engine)
        jobs.sweep()
        sent = [json.loads(raw) for raw in client.lrange("backfill", 0, -1)]
    assert [one["headers"]["task"] for one in sent] == [RECONCILE] * messages
    work.engine.dispose()
    celery.close()


# The command

Run = Callable[..., Any]


@pytest.fixture
def run(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`headrace reconcile` in this process, on the test's connections."""
    for name in (one.metadata["name"] for one in Settings.__dataclass_fields__.values()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("workers.cli.deployment.Deployment.engine", engine)
    environment = {
        "DATABASE_URL": settings.need_database().replace("+psycopg", ""),
        "BROKER_URL": settings.need_broker(),
        "JUNCTION_API_KEY": API_KEY,
    }

    def invoke(api: ScriptedApi, *words: str) -> Any:
        client = Client("https://provider.test", {}, httpx.MockTransport(api))
        monkeypatch.setattr("workers.fetch.client.Client", lambda *_: client)
        return CliRunner().invoke(main, ["reconcile", *words], env=environment)

    return invoke


@pytest.mark.parametrize("words", [(), ("--dry-run",), ("--since", "2020-01-01"), ("--user", "u1", "--dry-run")])
def test_the_command_lists_the_gaps(engine: Engine, run: Run, words: tuple[str, ...]) -> None:
    """Breaks if a dry run changes something, or reports other gaps than are fetched."""
    execute(engine, "INSERT INTO headrace.users (user_id) VALUES ('u1')")
    before = snapshot(engine)
    done = run(missing(), *words, "--json")
    assert done.exit_code == 0, done.output
    pulls, connection, later = json.loads(done.stdout)
    days = {"user_id": "u1", "provider": "garmin", "resource": "heartrate", "whose": "ours"}
    assert pulls.items() >= (days | {"from": today(-20).isoformat(), "to": today(-9).isoformat()}).items()
    assert later.items() >= (days | {"from": today(-8).isoformat(), "to": today(-2).isoformat()}).items()
    assert connection["why"] == "the aggregator reports connected, which is not stored"
    assert pulls["requests"] > 0
    assert (snapshot(engine) == before) is ("--dry-run" in words)
    if "--dry-run" not in words:
        assert opened(engine) == {("u1", "garmin", "heartrate"): [(today(-20), today(-9)), (today(-8), today(-2))]}


def test_the_command_prints_a_summary(engine: Engine, run: Run) -> None:
    """Breaks if the output does not distinguish between a dry run and a real one."""
    line = "3 gaps: 3 ours. Would fetch them with about 2 requests. Would correct 1 connections."
    assert run(missing(), "--dry-run").stdout.splitlines()[-1] == line
    line = line.replace("Would fetch", "Fetching").replace("Would correct", "Corrected")
    assert run(missing()).stdout.splitlines()[-1] == line
    failed = missing(pulls=[[of("u1", sleep=pulled(status="failure"), heartrate=pulled(status="retrying"))]])
    assert run(failed).stdout.splitlines()[-1] == "2 gaps: 1 Junction's, 1 the provider's."
    assert "nothing is missing" in run(missing(pulls=[[of("u1")]], supplies=[[]])).stdout


def test_the_command_prints_the_number_of_users(run: Run) -> None:
    """Breaks if users are counted once per part."""
    shown = run(ScriptedApi(pulls=[[of("u1")]], supplies=[[of("u1")]], connections={"u1": []})).stdout
    assert shown.strip() == "1 users compared: nothing is missing"


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (httpx.Response(401), "Junction is paused for 300 s: status 401: the API key is refused"),
        (httpx.Response(429, headers={"Retry-After": "600"}), "Junction is paused for 600 s: status 429"),
        (httpx.Response(422), "Junction answers /v2/introspect/historical_pull with status 422"),
    ],
)
def test_the_command_prints_why_it_ends(run: Run, answer: httpx.Response, line: str) -> None:
    """Breaks if the command waits for ten minutes, or prints a traceback."""
    done = run(missing(before=[answer]))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].endswith(line)
