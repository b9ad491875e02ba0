"""Reconciliation with Terra: failed deliveries and newer data are fetched once, through the ordinary read API."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, time, timedelta
from typing import Any

import httpx
import msgspec
import pytest
import redis
from sqlalchemy import Engine, text

from app.config.settings import Settings, load
from app.errors import Unprocessable
from tests.support import TERRA_SECRET, rows
from tests.support.backfills import settle
from tests.support.simulated import Endpoint
from workers.aggregators.terra import admin
from workers.backfill.fetcher import Fetcher
from workers.fetch.client import make_clients
from workers.fetch.http import Client
from workers.fetch.rate_limits import PREFIX, Throttle, pauses
from workers.fetch.retry import MAX_ATTEMPTS
from workers.reconcile import terra as comparison
from workers.reconcile.comparisons import make_comparisons
from workers.reconcile.runs import Step, run_slice
from workers.reconcile.terra import JOB, TerraPosition, TerraReconciler
from workers.simulator.server import Simulator
from workers.simulator.terra import events
from workers.simulator.terra.data import TerraUser
from workers.simulator.terra.sender import TerraSender
from workers.store import jobs
from workers.store.engine import transaction

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
PERIOD = 3600.0
ACCOUNT = {"terra_dev_id": "dev", "terra_api_key": "key", "terra_admin_token": "terra_at_canary"}


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may reconcile with Terra only, at any rate."""
    return replace(settings, broker_url=broker_url, request_rate="1000000/second", **ACCOUNT)


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "RATE", "1000000/second")


def run_steps(reconciler: TerraReconciler, user: str | None = None, since: datetime = LONG_AGO) -> list[Step[Any]]:
    """All steps to the end. A wait ends at once."""
    at: TerraPosition | None = TerraPosition()
    steps: list[Step[Any]] = []
    while at is not None:
        steps.append(reconciler.step(at, since, user))
        at = steps[-1].to
        # As the job does: the position must survive its storage.
        at = at and msgspec.json.decode(msgspec.json.encode(at), type=TerraPosition)
        assert len(steps) < 200, "it does not come to an end"
    return steps


def opened(engine: Engine) -> list[tuple[str, str, datetime, datetime]]:
    """The windows that reconciliations opened: user, resource and edges."""
    query = """SELECT b.user_id, b.resource, c.window_start, c.window_end FROM headrace.backfills b
               JOIN headrace.chunks c ON c.backfill_id = b.id
               WHERE (b.aggregator, b.requested_by) = ('terra', 'reconcile') ORDER BY c.id"""
    return [(row["user_id"], row["resource"], row["window_start"], row["window_end"]) for row in rows(engine, query)]


def noted(engine: Engine) -> dict[str, Any]:
    """The stored state of the token."""
    with transaction(engine) as connection:
        return dict(msgspec.json.decode(jobs.noted(connection, jobs.TERRA_TOKEN) or b"{}"))


# With the simulated Terra, over HTTP


@dataclass
class Stage:
    """The simulated Terra, and a worker's reconciler and fetcher."""

    engine: Engine
    settings: Settings
    simulator: Simulator

    def reconciler(self, **more: Any) -> TerraReconciler:
        """A new worker."""
        (found,) = make_comparisons(self.engine, self.settings, **more)
        assert isinstance(found, TerraReconciler)
        return found

    def restore(self) -> list[Step[Any]]:
        """Runs a reconciliation, and the backfills that it opens."""
        steps = run_steps(self.reconciler())
        settle(self.engine, Fetcher(self.engine, self.settings, make_clients(self.settings)))
        return steps

    def fail(self, account: TerraUser, kind: str) -> dict[str, Any]:
        """Sends an event about new data to an endpoint that is down, until the sender gives up. Returns its object."""
        (wanted,) = (one for one in self.simulator.terra.kinds(account) if one.name == kind)
        event = events.data(self.simulator.terra, account, wanted)
        with Endpoint(lambda *_: None) as endpoint:
            endpoint.answers = [503] * 2
            with TerraSender(
                endpoint.url, TERRA_SECRET, waits=(0.01,), ended=self.simulator.terra_admin.record
            ) as sender:
                assert sender.send(event) == 503
        return dict(event.event["data"][-1])

    def account(self, provider: str) -> TerraUser:
        return next(one for one in self.simulator.terra.accounts() if one.provider.slug == provider)

    def requests(self, part: str) -> list[str]:
        """The queries of the requests to a part of the Admin API."""
        return [one["query"] for one in self.simulator.requests if one["path"].endswith(f"/{part}")]


@contextmanager
def stage(engine: Engine, settings: Settings, users: int = 6) -> Iterator[Stage]:
    """A world that ended last evening: its newest data is of yesterday noon, and more of that day can be measured."""
    until = datetime.combine(datetime.now(UTC).date() - DAY, time(20), UTC)
    with Simulator(users, 4, until=until) as simulator:
        given = load({name: value for name, value in simulator.environment.items() if name.startswith("TERRA")})
        names = ("terra_base_url", "terra_api_key", "terra_dev_id", "terra_admin_base_url", "terra_admin_token")
        wanted = replace(settings, history_days=5, **{name: getattr(given, name) for name in names})
        yield Stage(engine, wanted, simulator)


def test_a_failed_delivery_is_fetched_once(engine: Engine, settings: Settings) -> None:
    """Breaks if a delivery that Terra gave up is not found, its data is not fetched, or it is fetched with each run."""
    with stage(engine, settings) as on:
        on.restore()
        account = on.account("GARMIN")
        lost = on.fail(account, "daily")
        before = opened(engine)
        steps = on.restore()
        assert [gap.reason for step in steps for gap in step.found] == ["1 deliveries failed"]
        (new,) = opened(engine)[len(before) :]
        assert new[:2] == (account.user_id, "activity")
        assert new[2] < datetime.now(UTC) - DAY < new[3]
        query = (
            "SELECT payload FROM health.activity WHERE user_id = :user AND payload -> 'metadata' = CAST(:m AS jsonb)"
        )
        (stored,) = rows(engine, query, user=account.user_id, m=msgspec.json.encode(lost["metadata"]).decode())
        assert stored["payload"]["distance_data"]["steps"] == lost["distance_data"]["steps"]
        for _ in range(2):
            assert [gap for step in on.restore() for gap in step.found] == []
        assert opened(engine) == [*before, new]
        assert rows(engine, "SELECT 1 FROM headrace.gaps WHERE part = 'deliveries'") == []
        assert all("payload" not in one["path"] for one in on.simulator.requests)


def test_an_empty_store_is_filled(engine: Engine, settings: Settings) -> None:
    """Breaks if users whose events were all lost have no history, no name, or are fetched with each run."""
    with stage(engine, settings, users=2) as on:
        steps = on.restore()
        accounts = on.simulator.terra.accounts()
        assert sum(step.people for step in steps) == len(accounts)
        known = {row["user_id"]: row["client_user_id"] for row in rows(engine, "SELECT * FROM headrace.users")}
        assert known == {one.user_id: one.person.client_user_id for one in accounts}
        stored = {row["user_id"] for row in rows(engine, "SELECT user_id FROM headrace.activity")}
        assert stored == {
            one.user_id for one in accounts if "daily" in {kind.name for kind in on.simulator.terra.kinds(one)}
        }
        before = opened(engine)
        on.restore()
        assert opened(engine) == before


def test_newer_data_than_is_stored_is_fetched(engine: Engine, settings: Settings) -> None:
    """Breaks if data that Terra has is not fetched because no delivery is listed any more."""
    with stage(engine, settings, users=1) as on:
        on.restore()
        account = next(
            one
            for one in on.simulator.terra.accounts()
            if "daily" in {kind.name for kind in on.simulator.terra.kinds(one)}
        )
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM headrace.activity WHERE calendar_date > current_date - 3"))
            connection.execute(text("DELETE FROM headrace.sleep"))
            connection.execute(text("DELETE FROM headrace.workouts"))
            connection.execute(text("DELETE FROM headrace.body"))
            connection.execute(text("DELETE FROM headrace.menstrual_cycle"))
            connection.execute(text("DELETE FROM headrace.chunks"))
            connection.execute(text("DELETE FROM headrace.backfills"))
        found = [gap for step in on.restore() for gap in step.found if gap.key.user_id == account.user_id]
        assert {(gap.key.resource, gap.reason) for gap in found} == {("activity", "newer data than is stored")}
        newest = "SELECT max(calendar_date) AS day FROM headrace.activity WHERE user_id = :user"
        (row,) = rows(engine, newest, user=account.user_id)
        assert row["day"] >= datetime.now(UTC).date() - 2 * DAY


def test_only_possible_users_are_asked_for(engine: Engine, settings: Settings) -> None:
    """Breaks if every user costs a request with each run, or with one failed delivery."""
    with stage(engine, settings) as on:
        on.restore()
        assert len(on.requests("events")) == 1
        on.fail(on.account("GARMIN"), "daily")
        on.restore()
        of_users = [query for query in on.requests("events") if "user_id" in query]
        assert 1 <= len(of_users) <= sum(one.provider.slug == "GARMIN" for one in on.simulator.terra.accounts())


def test_the_previous_path_is_tried(engine: Engine, settings: Settings) -> None:
    """Breaks if an account whose Admin API has the path of September is not reconciled."""
    with stage(engine, settings) as on:
        on.simulator.terra_admin.segment = "webhook-events"
        on.restore()
        on.fail(on.account("GARMIN"), "daily")
        assert [gap.reason for step in on.restore() for gap in step.found] == ["1 deliveries failed"]


def test_one_user_is_compared_alone(engine: Engine, settings: Settings) -> None:
    """Breaks if --user fetches data of others, or misses the user's failed delivery."""
    with stage(engine, settings) as on:
        on.restore()
        account, other = on.account("GARMIN"), on.account("OURA")
        on.fail(account, "daily")
        assert [gap for step in run_steps(on.reconciler(), other.user_id) for gap in step.found] == []
        (gap,) = [gap for step in run_steps(on.reconciler(), account.user_id) for gap in step.found]
        assert gap.key == (account.user_id, "garmin", "activity")
        assert run_steps(on.reconciler(), "nobody")[-1].to is None


def test_a_dry_run_writes_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a dry run opens a backfill, stores a gap or a user, or finds other gaps than a run."""
    with stage(engine, settings) as on:
        dry = [gap for step in run_steps(on.reconciler(dry_run=True)) for gap in step.found]
        for table in ("backfills", "users", "gaps", "jobs"):
            assert rows(engine, f"SELECT 1 FROM headrace.{table}") == [], table
        real = [gap for step in run_steps(on.reconciler()) for gap in step.found]
        assert [gap.key for gap in dry] == [gap.key for gap in real]


def test_the_state_of_the_token_is_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if `headrace status` cannot show when the token expires, or the token itself is stored."""
    with stage(engine, settings, users=1) as on:
        on.restore()
        state = on.simulator.terra_admin
        assert datetime.fromisoformat(noted(engine)["expires_at"]) == state.expires_at
        assert datetime.fromisoformat(noted(engine)["approved_at"]) == state.approved_at
        assert on.settings.need_terra_admin_token() not in str(
            rows(engine, "SELECT CAST(j AS text) FROM headrace.jobs j")
        )


# With a scripted Admin API


def event_row(number: int = 1, *, ago: timedelta = HOUR, **changes: Any) -> dict[str, Any]:
    """A failed delivery of t1's daily data."""
    at = (datetime.now(UTC) - ago).isoformat()
    return {"event_id": f"e{number}", "sent_at": at, "data_type": "daily", "provider": "garmin"} | changes


def user_row(name: str = "t1", **changes: Any) -> dict[str, Any]:
    return {"user_id": name, "provider": "garmin", "active": True, "most_recent_data_at": None} | changes


@dataclass
class ScriptedAdmin:
    """An Admin API that records its requests."""

    failed: dict[str, list[Any]] = field(default_factory=dict)  # by user
    users: list[Any] = field(default_factory=lambda: [user_row()])
    token: dict[str, Any] = field(default_factory=dict)
    before: list[Any] = field(default_factory=list)  # responses to the first requests; None: the usual one
    always: Callable[[str], httpx.Response | None] = lambda _: None  # by path
    size: int = 100
    asked: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        given = self.before.pop(0) if self.before else None
        return given or self.always(request.url.path) or self.truth(request)

    def truth(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/me":
            return httpx.Response(200, json=self.token)
        user = request.url.params.get("user_id")
        if request.url.path.endswith("/users"):
            found = [one for one in self.users if user is None or (one or {}).get("user_id") == user]
        else:
            assert request.url.params["outcome"] == "failed"
            found = [row for name, some in self.failed.items() for row in some if user in (None, name)]
        begin = int(request.url.params.get("cursor", 0))
        end = begin + self.size if begin + self.size < len(found) else None
        page = {"data": found[begin : begin + self.size], "has_more": bool(end), "next_cursor": end and str(end)}
        return httpx.Response(200, json=page)

    def reconciler(self, engine: Engine, settings: Settings, **more: Any) -> TerraReconciler:
        client = Client("https://terra.test", {}, httpx.MockTransport(self))
        return TerraReconciler(engine, settings, client, Throttle(settings), **more)

    def paths(self) -> list[str]:
        """The requests in short form: the last part of the path, and the user."""
        return [f"{one.url.path.rpartition('/')[2]} {one.url.params.get('user_id', '')}".strip() for one in self.asked]


def problem(status: int, code: str, detail: str = "", **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"title": "t", "code": code, "detail": detail}, headers=headers)


def found_by(api: ScriptedAdmin, engine: Engine, settings: Settings) -> list[tuple[str, str]]:
    """The gaps of a run: user and resource."""
    steps = run_steps(api.reconciler(engine, settings))
    return [(gap.key.user_id, gap.key.resource) for step in steps for gap in step.found]


def test_failed_deliveries_of_many_pages_and_types(engine: Engine, settings: Settings) -> None:
    """Breaks if a page or a type is left out, or each delivery opens a backfill of its own."""
    types = ("daily", "sleep", "activity", "body", "athlete", "menstruation", "nutrition")
    failed = [event_row(n, data_type=types[n % 7], ago=n * HOUR) for n in range(70)]
    api = ScriptedAdmin({"t1": failed, "t2": [event_row(100)]}, [user_row("t1"), user_row("t2")], size=7)
    assert set(found_by(api, engine, settings)) == {
        *(("t1", name) for name in ("activity", "sleep", "workouts", "body", "profile", "menstrual_cycle", "meal")),
        ("t2", "activity"),
    }
    assert len(rows(engine, "SELECT 1 FROM headrace.backfills")) == 8
    before = opened(engine)
    assert found_by(replace(api, asked=[]), engine, settings) == []
    assert opened(engine) == before


def test_later_attempts_open_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if each attempt that fails after a run opens the backfill of its delivery again."""
    first = event_row(ago=2 * HOUR)
    api = ScriptedAdmin({"t1": [first]})
    assert found_by(api, engine, settings) == [("t1", "activity")]
    for rows_of_one in ([first, event_row(ago=-HOUR)], [event_row(ago=-HOUR), first]):
        assert found_by(replace(api, failed={"t1": rows_of_one}), engine, settings) == []
    assert found_by(replace(api, failed={"t1": [event_row(2, ago=-HOUR)]}), engine, settings) == [("t1", "activity")]


def test_the_window_of_a_failed_delivery_reaches_back_to_the_stored_data(engine: Engine, settings: Settings) -> None:
    """Breaks if a delivery after a week without a phone is fetched for two days only, or without limit."""
    api = ScriptedAdmin({"t1": [event_row()]})
    assert found_by(api, engine, settings) == [("t1", "activity")]
    ((_, _, start, end),) = opened(engine)
    now = datetime.now(UTC)
    assert now - 30 * DAY < start < now - 27 * DAY
    assert now - HOUR <= end <= now + DAY


def test_a_delivery_of_another_form_is_counted(engine: Engine, settings: Settings) -> None:
    """Breaks if a row that cannot be read stops the comparison, or passes without a word."""
    api = ScriptedAdmin({"t1": [None, event_row(), {"event_id": 7}]}, [None, user_row(), {"user_id": "t2"}])
    steps = run_steps(api.reconciler(engine, settings))
    assert [gap.key.user_id for step in steps for gap in step.found] == ["t1"]
    assert sum(step.unread for step in steps) == 2 + 2 + 2  # of all users, of t1, and two users


def test_what_cannot_be_fetched_is_reported(engine: Engine, settings: Settings) -> None:
    """Breaks if a failed delivery that no backfill can restore, or whose user is unknown, passes without a word."""
    api = ScriptedAdmin(
        {"t1": [event_row(data_type="hormone"), event_row(3, data_type="healthcheck")], "gone": [event_row(2)]}
    )
    unmatched, unavailable = run_steps(api.reconciler(engine, settings))[-1].notes
    assert unmatched.startswith("1 failed deliveries could not be matched with any of 1 users")
    assert unavailable.startswith("1 failed deliveries have a type that the read API does not return")


def test_the_number_of_requests_is_limited(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if one failed delivery costs a request for each of a million users."""
    monkeypatch.setattr(comparison, "MAX_ASKED", 3)
    api = ScriptedAdmin({"u7": [event_row()]}, [user_row(f"u{n}") for n in range(8)], size=2)
    assert found_by(api, engine, settings) == []
    assert [path for path in api.paths() if path.startswith("events u")] == ["events u0", "events u1", "events u2"]


def test_the_search_ends_with_the_last_failed_delivery(engine: Engine, settings: Settings) -> None:
    """Breaks if users are asked for although every failed delivery is matched, or a provider's users are left out."""
    users = [user_row(f"u{n}", provider="oura" if n % 2 else "garmin") for n in range(8)]
    api = ScriptedAdmin({"u2": [event_row(), event_row(2)]}, users, size=4)
    assert found_by(api, engine, settings) == [("u2", "activity")]
    assert [path for path in api.paths() if path.startswith("events u")] == ["events u0", "events u2"]
    nameless = [event_row(3, provider=None)]
    api = ScriptedAdmin({"u3": nameless}, users, size=4)
    assert found_by(api, engine, settings) == [("u3", "activity")]
    assert rows(engine, "SELECT provider FROM headrace.backfills WHERE user_id = 'u3'") == [{"provider": "oura"}]


def test_inactive_users_and_excluded_data_are_not_fetched(engine: Engine, settings: Settings) -> None:
    """Breaks if data is fetched that the settings exclude, or of a user that the read API does not know any more."""
    now = datetime.now(UTC)
    api = ScriptedAdmin({"t1": [event_row()]}, [user_row(active=False, most_recent_data_at=(now - DAY).isoformat())])
    assert found_by(api, engine, settings) == []
    active = replace(api, users=[user_row()])
    assert found_by(active, engine, replace(settings, resources=("sleep",))) == []
    assert found_by(active, engine, replace(settings, providers=("oura",))) == []
    assert opened(engine) == []


def test_data_of_the_future_hides_no_gap(engine: Engine, settings: Settings) -> None:
    """Breaks if a wrong clock hides that data is missing, or opens a gap with each run."""
    api = ScriptedAdmin(users=[user_row(most_recent_data_at="2105-01-01T00:00:00Z")])
    assert ("t1", "activity") in found_by(api, engine, settings)
    found = {(user, resource): (start.date(), end.date()) for user, resource, start, end in opened(engine)}
    today = datetime.now(UTC).date()
    assert found["t1", "activity"] == (today - timedelta(days=settings.history_days), today)
    assert found_by(api, engine, settings) == []


def test_a_user_without_data_has_no_gap(engine: Engine, settings: Settings) -> None:
    """Breaks if a user of whom Terra has no data is fetched with each run."""
    assert found_by(ScriptedAdmin(users=[user_row(most_recent_data_at=None)]), engine, settings) == []


def test_an_erased_user_is_not_fetched_again(engine: Engine, settings: Settings) -> None:
    """Breaks if a reconciliation restores the data of an erased user."""
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO headrace.users (user_id, erased_at) VALUES ('t1', now())"))
    recent = (datetime.now(UTC) - DAY).isoformat()
    api = ScriptedAdmin({"t1": [event_row()]}, [user_row(most_recent_data_at=recent)])
    assert found_by(api, engine, settings) == []
    assert opened(engine) == []


def test_a_user_of_junction_is_not_compared_with_terra(engine: Engine, settings: Settings) -> None:
    """Breaks if a listing of Terra that names a user of Junction opens backfills or names their client_user_id."""
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO headrace.users (user_id, aggregator) VALUES ('t1', 'junction')"))
    recent = (datetime.now(UTC) - DAY).isoformat()
    api = ScriptedAdmin({"t1": [event_row()]}, [user_row(most_recent_data_at=recent, reference_id="another")])
    assert found_by(api, engine, settings) == []
    assert opened(engine) == []
    assert rows(engine, "SELECT aggregator, client_user_id FROM headrace.users") == [
        {"aggregator": "junction", "client_user_id": None}
    ]


# What Terra refuses


def test_a_refused_token_ends_the_run(engine: Engine, settings: Settings) -> None:
    """Breaks if a refused token is tried again and again, or `headrace status` does not show it."""
    api = ScriptedAdmin(token={"expires_at": "2026-12-01T00:00:00Z"})
    run_steps(api.reconciler(engine, settings))
    refused = replace(api, asked=[], before=[problem(401, "unauthorized", "token expired")])
    with pytest.raises(Unprocessable, match="TERRA_ADMIN_TOKEN"):
        run_steps(refused.reconciler(engine, settings))
    assert refused.paths() == ["me"]
    assert noted(engine)["fault"].endswith("(status 401, unauthorized: token expired)")
    assert noted(engine)["do"] == "set TERRA_ADMIN_TOKEN"
    assert noted(engine)["expires_at"] == "2026-12-01T00:00:00Z"
    assert pauses(settings) == []
    run_steps(replace(api, asked=[]).reconciler(engine, settings))
    assert noted(engine)["fault"] == ""


def test_a_wrong_token_in_a_shell_is_no_fault_of_the_deployment(engine: Engine, settings: Settings) -> None:
    """Breaks if a command with another token changes the state of the workers' token in `headrace status`."""
    api = ScriptedAdmin(token={"expires_at": "2026-12-01T00:00:00Z"})
    other = replace(settings, terra_admin_token="terra_at_other")

    def run(of: Settings, *, is_refused: bool, is_command: bool) -> dict[str, Any]:
        here = replace(api, asked=[], before=[problem(401, "unauthorized", "unknown token")] if is_refused else [])
        reconciler = here.reconciler(engine, of, is_command=is_command)
        with pytest.raises(Unprocessable) if is_refused else nullcontext():
            run_steps(reconciler)
        return noted(engine)

    assert run(other, is_refused=True, is_command=True) == {}
    known = run(settings, is_refused=False, is_command=True)  # the first command shows when the token expires
    assert (known["fault"], known["expires_at"]) == ("", "2026-12-01T00:00:00Z")
    assert run(other, is_refused=True, is_command=True) == run(other, is_refused=False, is_command=True) == known
    assert run(settings, is_refused=True, is_command=True)["fault"]
    assert run(other, is_refused=False, is_command=True)["fault"]
    assert run(other, is_refused=False, is_command=False)["fault"] == ""  # the workers have a new token
    assert run(other, is_refused=True, is_command=False)["fault"]
    assert "other" not in str(noted(engine))


def test_a_missing_scope_is_named_and_costs_its_part(engine: Engine, settings: Settings) -> None:
    """Breaks if a token without events:read compares nothing, or passes as complete."""
    recent = (datetime.now(UTC) - DAY).isoformat()
    api = ScriptedAdmin({"t1": [event_row()]}, [user_row(most_recent_data_at=recent)])
    api.always = lambda path: problem(403, "scope_missing", "needs events:read") if "/events" in path else None
    with pytest.raises(Unprocessable, match="needs events:read"):
        run_steps(api.reconciler(engine, settings))
    assert {one[0] for one in opened(engine)} == {"t1"}
    assert "scope_missing: needs events:read" in noted(engine)["fault"]


@pytest.mark.parametrize(
    ("status", "code", "hint", "paths"),
    [
        (404, "dev_id_not_found", "check TERRA_DEV_ID", ["me", "events"]),
        (404, "not_found", "check TERRA_DEV_ID", ["me", "events", "webhook-events"]),
        (400, "validation_failed", "update Headrace", ["me", "events", "webhook-events"]),
    ],
)
def test_an_unknown_environment_or_parameter_ends_the_run(  # noqa: PLR0917
    engine: Engine, settings: Settings, status: int, code: str, hint: str, paths: list[str]
) -> None:
    """Breaks if a wrong TERRA_DEV_ID, or an API that has changed, looks like an account without failed deliveries."""
    api = ScriptedAdmin(always=lambda path: None if path == "/me" else problem(status, code))
    with pytest.raises(Unprocessable, match=hint):
        run_steps(api.reconciler(engine, settings))
    assert api.paths() == paths
    assert noted(engine)["do"].startswith(hint)


def test_a_user_whom_terra_no_longer_knows_is_skipped(engine: Engine, settings: Settings) -> None:
    """Breaks if one user who left during the run ends it."""
    api = ScriptedAdmin({"t2": [event_row()]}, [user_row("t1"), user_row("t2")])
    api.before = [None, None, None, problem(404, "not_found")]
    assert found_by(api, engine, settings) == [("t2", "activity")]


def test_a_rate_limit_is_respected(engine: Engine, settings: Settings) -> None:
    """Breaks if Retry-After is ignored, or a second process asks during the pause."""
    api = ScriptedAdmin(before=[None, problem(429, "rate_limited", **{"Retry-After": "30"})])
    reconciler = api.reconciler(engine, settings)
    first = reconciler.step(TerraPosition(), LONG_AGO)
    assert first.to is not None
    limited = reconciler.step(first.to, LONG_AGO)
    assert limited.to == first.to
    assert 30 <= limited.seconds <= 30.2
    again = api.reconciler(engine, settings).step(first.to, LONG_AGO)
    assert 29 < again.seconds <= 30.2
    assert len(api.asked) == 2
    with redis.Redis.from_url(settings.need_broker()) as client:
        assert client.delete(f"{PREFIX}terra-admin") == 1


def test_requests_are_paced(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a reconciliation uses up the token's rate limit."""
    monkeypatch.setattr(comparison, "RATE", "2/minute")
    api = ScriptedAdmin()
    reconciler = api.reconciler(engine, settings)
    at: TerraPosition | None = TerraPosition()
    for _ in range(2):
        assert at is not None
        at = reconciler.step(at, LONG_AGO).to
    assert at is not None
    paced = reconciler.step(at, LONG_AGO)
    assert 0 < paced.seconds <= 60
    assert (paced.to, len(api.asked)) == (at, 2)


@pytest.mark.parametrize("failure", [httpx.Response(500), httpx.Response(200, content=b'{"data": [')])
def test_a_failure_costs_a_repetition(engine: Engine, settings: Settings, failure: httpx.Response) -> None:
    """Breaks if a server error or half an answer ends the run."""
    api = ScriptedAdmin({"t1": [event_row()]}, before=[None, failure, None, failure])
    assert found_by(api, engine, settings) == [("t1", "activity")]


def test_a_page_of_another_form_is_named(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator reads that JSON is no JSON, and not which field has another form."""
    api = ScriptedAdmin({}, before=[None, *[httpx.Response(200, json={"data": {"canary": 1}})] * MAX_ATTEMPTS])
    with pytest.raises(Unprocessable, match="cannot be read: events: Expected a list"):
        found_by(api, engine, settings)


# The job


def make_due(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.jobs SET due_at = now() WHERE name = 'reconcile-terra'"))


def done_at(engine: Engine) -> datetime | None:
    (row,) = rows(engine, "SELECT done_at FROM headrace.jobs WHERE name = 'reconcile-terra'")
    return row["done_at"]  # type: ignore[no-any-return]


def test_the_next_run_continues_after_the_last_complete_one(engine: Engine, settings: Settings) -> None:
    """Breaks if deliveries that failed while the token was refused are never listed, or all are with each run."""
    jobs.ensure_job(engine, JOB, 0)
    refused = ScriptedAdmin(always=lambda _: problem(401, "unauthorized"))
    assert run_slice(engine, refused.reconciler(engine, settings), PERIOD) is None
    assert len(refused.asked) == 1
    assert done_at(engine) is None
    starts = []
    for _ in range(2):
        make_due(engine)
        api = ScriptedAdmin({"t1": [event_row()]})
        assert run_slice(engine, api.reconciler(engine, settings), PERIOD) is None
        starts.append(datetime.fromisoformat(api.asked[1].url.params["since"]))
    now = datetime.now(UTC)
    assert abs(starts[0] - (now - admin.RETENTION)) < HOUR
    assert abs(starts[1] - (now - comparison.OVERLAP)) < HOUR
    assert len(opened(engine)) == 1


def test_only_one_process_scans(engine: Engine, settings: Settings) -> None:
    """Breaks if a worker and a command scan with one token at the same time."""
    jobs.ensure_job(engine, JOB, 0)
    make_due(engine)
    assert jobs.hold(engine, JOB)
    assert not jobs.hold(engine, JOB)
    assert jobs.hold(engine, JOB, 5.0, renew=True)
    api = ScriptedAdmin()
    assert run_slice(engine, api.reconciler(engine, settings), PERIOD) is None
    assert api.asked == []
    jobs.release(engine, JOB)
    run_slice(engine, api.reconciler(engine, settings), PERIOD)
    assert api.asked != []
