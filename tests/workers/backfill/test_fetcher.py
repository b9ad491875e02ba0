"""The stored history, for any behaviour of the API, any faults of workers and any order of notices."""

import itertools
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import msgspec
import pytest
import redis
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Engine, text

from app.broker.celery import make_celery
from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import delivery, event, heartrate, message_id, rows, workout
from tests.support.backfills import announce, backfill, fetch_history, forget_pauses, make_due, notice, settle, status
from tests.support.collector import attributes, named, span_ids
from tests.support.provider import (
    DAY,
    FIRST,
    GARMIN,
    Answer,
    Killed,
    Provider,
    daily,
    gone_streams,
    heartrates,
    hourly,
    junction_client,
    workouts,
)
from workers.backfill.fetcher import Fetcher, FollowUp
from workers.celery.context import WorkerContext
from workers.fetch.rate_limits import pauses
from workers.fetch.retry import MAX_ATTEMPTS
from workers.simulator import events
from workers.simulator.people import Query
from workers.simulator.server import Simulator
from workers.store.backfills import claim, due


def test_a_page_is_traced_without_saying_whose_it_is(
    engine: Engine, settings: Settings, exported: InMemorySpanExporter
) -> None:
    """Breaks if a trace does not show why history is slow, or contains a URL with its user."""
    sends = heartrates(daily(3), value=87.654321)
    times = itertools.count()
    provider = Provider(lambda request: sends(request) if next(times) else httpx.Response(500, json={"user": "u1"}))
    (backfill_id,) = announce(engine, settings, notice("u-secret"))
    exported.clear()
    settle(engine, provider.fetcher(engine, settings))
    pages, asked = named(exported, "page"), named(exported, "GET")
    assert len(pages) == len(asked) == len(provider.requests) > 1
    assert [one.parent.span_id for one in asked if one.parent] == [span_ids(one)[1] for one in pages]
    first, second = (attributes(one) for one in asked[:2])
    assert [one["http.response.status_code"] for one in (first, second)] == [500, 200]
    assert [one["headrace.attempt"] for one in (first, second)] == [1, 2]
    assert first["headrace.provider"] == "garmin"
    assert [attributes(one)["headrace.decision"] for one in pages[:2]] == ["retry", "use"]
    assert {attributes(one)["headrace.backfill"] for one in pages} == {backfill_id}
    assert {attributes(one)["headrace.resource"] for one in pages} == {"heartrate"}
    assert all(attributes(one)["headrace.chunk"] for one in pages)
    assert len(named(exported, "commit")) == len(pages) - 1
    everything = "".join(one.to_json() for one in exported.get_finished_spans())
    assert not any(secret in everything for secret in ("u-secret", "87.654321", "provider.test", "start_date", "/v2/"))


# With the simulated API over HTTP

END = datetime(2026, 3, 14, 12, tzinfo=UTC)


@pytest.mark.parametrize(("page_size", "days"), [(500, 3), (37, 1)])
def test_every_record_is_there_once(engine: Engine, settings: Settings, page_size: int, days: int) -> None:
    """Breaks if a resource is stored wrongly, in part, twice, or under another provider."""
    with Simulator(2, days, until=END, page_size=page_size) as simulator:
        world, user = simulator.world, simulator.world.members[0]
        connection = user.connections[0]
        resources = catalogue().of_kind("summary", "timeseries")
        notices = [delivery(events.historical(world, connection, one)) for one in resources]
        wanted = replace(settings, junction_base_url=simulator.url)
        assert len(announce(engine, wanted, *notices)) == len(resources)
        with junction_client(wanted) as client:
            settle(engine, Fetcher(engine, wanted, [client]))
    total = 0
    for resource in resources:
        query = Query(user, resource, world.start, world.until, connection.provider.slug)
        if resource.kind == "summary":
            column, expected = "id", [record["id"] for record in world.summaries(query)]
        else:
            samples = world.samples(query)
            column, expected = "ts", [datetime.fromisoformat(one.body["timestamp"]) for one in samples]
        found = rows(engine, f"SELECT {column} AS it FROM health.{resource.name} WHERE origin = 'backfill'")
        assert Counter(row["it"] for row in found) == Counter(expected), resource.name
        total += len(expected)
    (row,) = rows(
        engine,
        """SELECT count(*) AS n, sum(records) AS records FROM health.backfills
           WHERE status = 'complete' AND (chunks_done, chunks_total) = (1, 1) AND error IS NULL""",
    )
    assert (row["n"], row["records"]) == (len(resources), total)
    assert {request["status"] for request in simulator.requests} <= {200, 404}


def test_streams_are_fetched_with_their_workouts(engine: Engine, settings: Settings) -> None:
    """Breaks if streams wait for workouts that were never announced, or have no owner or source."""
    with Simulator(1, 20, until=END) as simulator:
        world, user = simulator.world, simulator.world.members[0]
        connection, resource = user.connections[0], catalogue()["workout_stream"]
        wanted = replace(settings, junction_base_url=simulator.url)
        announce(engine, wanted, delivery(events.historical(world, connection, resource)))
        with junction_client(wanted) as client:
            settle(engine, Fetcher(engine, wanted, [client]))
        query = Query(user, catalogue()["workouts"], world.start, world.until, connection.provider.slug)
        expected = {record["id"] for record in world.summaries(query)}
        streams = {one: world.stream(resource, one) for one in expected}
    assert len(expected) > 5
    for table in ("workouts", "workout_stream"):
        found = rows(engine, f"SELECT id, user_id, provider, source_type, origin FROM health.{table}")
        assert {row.pop("id") for row in found} == expected
        source = {"user_id": user.user_id, "provider": connection.provider.slug, "source_type": "watch"}
        assert found == [source | {"origin": "backfill"}] * len(expected)
    stored = rows(engine, "SELECT id, payload FROM health.workout_stream")
    assert {row["id"]: row["payload"] for row in stored} == streams
    assert status(engine, user.user_id) == [("complete", 1, 1)]


@pytest.mark.parametrize("kind", ["truncated", "500", "expired_cursor", "503", "429"])
def test_faults_over_http_lose_nothing(engine: Engine, settings: Settings, kind: str) -> None:
    """Breaks if a fault of the real protocol ends a backfill or leaves a gap in it."""
    with Simulator(1, 1, until=END, page_size=50) as simulator:
        world, user = simulator.world, simulator.world.members[0]
        connection, resource = user.connections[0], catalogue()["heartrate"]
        simulator.faults.add(kind, times=2, **({"retry_after": 0} if kind in ("503", "429") else {}))
        wanted = replace(settings, junction_base_url=simulator.url)
        announce(engine, wanted, delivery(events.historical(world, connection, resource)))
        with junction_client(wanted) as client:
            for _ in range(5):
                settle(engine, Fetcher(engine, wanted, [client]), 5)
                forget_pauses(settings)
        expected = sum(
            1 for _ in world.samples(Query(user, resource, world.start, world.until, connection.provider.slug))
        )
    assert expected > 200
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": expected}]
    assert status(engine, user.user_id) == [("complete", 1, 1)]


def check_complete(engine: Engine, count: int) -> None:
    """The user's one backfill is complete, and so many heart rates are stored."""
    assert status(engine) == [("complete", 1, 1)]
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": count}]


# Slices and pages


def test_slices_come_newest_first_and_leave_no_gap(engine: Engine, settings: Settings) -> None:
    """Breaks if older data is fetched before newer data, or an edge lies between two slices."""
    provider = Provider(heartrates(daily(90), 5))
    fetch_history(engine, settings, provider, notice(days=(0, 90)))
    slices = list(dict.fromkeys(zip(provider.all("start_date"), provider.all("end_date"), strict=True)))
    edges = [tuple(datetime.fromisoformat(edge or "") for edge in one) for one in slices]
    assert len(edges) > 5
    assert edges == sorted(edges, reverse=True)
    assert all(newer[0] == older[1] for newer, older in itertools.pairwise(edges))
    assert (
        edges[0][1] >= FIRST + 91 * DAY
    )  # one more day on each side: whether edges belong to a window is undocumented
    assert edges[-1][0] <= FIRST - DAY
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 90}]


def test_empty_years_are_crossed_in_long_steps(engine: Engine, settings: Settings) -> None:
    """Breaks if a decade without data costs a request per fortnight."""
    provider = Provider(heartrates(daily(5)))
    fetch_history(engine, settings, provider, notice(days=(-3650, 10)))
    assert len(provider.requests) < 30
    check_complete(engine, 5)


@pytest.mark.parametrize("days", [(5.0, 5.0), (10.0, 0.0), (0.0, 4000.0)])
def test_odd_windows_are_fetched(engine: Engine, settings: Settings, days: tuple[float, float]) -> None:
    """Breaks if an empty window, a reversed one, or one that ends in the future never completes."""
    provider = Provider(heartrates([FIRST + 5 * DAY]))
    fetch_history(engine, settings, provider, notice(days=days))
    check_complete(engine, 1)


@pytest.mark.parametrize("resource", ["heartrate", "workouts", "workout_stream", "sleep_cycle"])
def test_a_user_without_data_is_a_success(engine: Engine, settings: Settings, resource: str) -> None:
    """Breaks if a new Garmin account, whose history is empty, shows an error."""
    empty = {"groups": {}} if resource == "heartrate" else {resource.replace("workout_stream", "workouts"): []}
    provider = Provider(lambda _: httpx.Response(200, json=empty))
    fetch_history(engine, settings, provider, notice(resource=resource))
    assert status(engine) == [("complete", 1, 1)]
    assert (backfill(engine)["records"], backfill(engine)["error"]) == (0, None)


# Notices

# Chunks of ten days, each with a workout in the middle.
CHUNKS = [(FIRST + 10 * n * DAY, FIRST + (10 * n + 10) * DAY) for n in range(4)]
AMID = [start + 5 * DAY for start, _ in CHUNKS]


@dataclass(frozen=True)
class Course:
    """The notices of one user's history: their order, which one is final, and which ones are repeated."""

    sent: tuple[int, ...]
    final: int | None  # None: it is never sent
    flag: bool | None = True  # `is_final` of the final one; None: omitted, which means true

    def __str__(self) -> str:
        final = "none" if self.final is None else f"{self.final} (is_final {str(self.flag).lower()})"
        return f"notices {self.sent}, final {final}"

    def notices(self, user: str) -> list[Any]:
        """The deliveries. A repeated one has the same id."""
        given = {n: self._notice(user, n) for n in self.sent}
        return [given[n] for n in self.sent]

    def _notice(self, user: str, n: int) -> Any:
        (start, end), flag = CHUNKS[n], self.flag if n == self.final else False
        data: dict[str, Any] = {"start_date": start.isoformat(), "end_date": end.isoformat(), "provider": "garmin"}
        data |= {} if flag is None else {"is_final": flag}
        return delivery(event("historical.data.workouts.created", user, data), name=message_id(FIRST))

    def result(self, count: int) -> tuple[Any, ...]:
        """The expected state after `count` notices: status, finished, chunks, finished chunks, records."""
        seen = set(self.sent[:count])
        complete = self.final in seen
        return "complete" if complete else "running", complete, len(seen), len(seen), len(seen)


def courses(again: str, *, full: bool) -> list[Course]:
    """Every order of four notices, with each of them or none final, each sent once, or twice in a row or at the end.

    A final notice without the flag is tested only where each is sent once. Without `full`, each order has two ends.
    """
    dice = random.Random(4)
    says: tuple[bool | None, ...] = (True, None) if again == "never" else (True,)
    ends: list[tuple[int | None, bool | None]] = [*itertools.product(range(4), says), (None, True)]
    return [
        Course(_sent(order, again), *end)
        for order in itertools.permutations(range(4))
        for end in (ends if full else dice.sample(ends, 2))
    ]


def _sent(order: tuple[int, ...], again: str) -> tuple[int, ...]:
    if again == "at once":
        return tuple(n for n in order for _ in range(2))
    return order * (2 if again == "at the end" else 1)


def fetch_all(engine: Engine, fetcher: Fetcher) -> None:
    """Runs the due backfills once. Without faults, none is due afterwards."""
    for backfill_id in due(engine, limit=10_000):
        fetcher.run(backfill_id)
    assert due(engine) == []


def check(engine: Engine, given: dict[str, Course], count: int) -> None:
    """Every user has one backfill, in the expected state after `count` notices."""
    query = """
        SELECT b.user_id, b.status, b.finished_at IS NOT NULL, count(c.id),
               count(c.id) FILTER (WHERE c.status = 'done'), b.records
        FROM headrace.backfills b JOIN headrace.chunks c ON c.backfill_id = b.id GROUP BY b.id"""
    with engine.connect() as connection:
        found = [tuple(row) for row in connection.execute(text(query))]
    users = Counter(row[0] for row in found)
    assert users.keys() == given.keys()
    assert {str(given[user]): number for user, number in users.items() if number != 1} == {}
    wrong = {str(given[user]): row for user, *row in found if tuple(row) != given[user].result(count)}
    assert wrong == {}, f"after {count} notices"


def check_fetched(engine: Engine, given: dict[str, Course], provider: Provider, *, at_once: bool) -> None:
    """Every window was requested once, in the order of the notices or newest first, and its data is stored."""
    asked: dict[str, list[str]] = {user: [] for user in given}
    for request in provider.requests:
        asked[request.url.path.rpartition("/")[2]].append(request.url.params["start_date"])
    starts = [(start - DAY).isoformat() for start, _ in CHUNKS]
    for user, course in given.items():
        order = dict.fromkeys(course.sent) if at_once else (3, 2, 1, 0)
        assert asked[user] == [starts[n] for n in order], course
    stored: dict[str, set[str]] = {user: set() for user in given}
    for row in rows(engine, "SELECT user_id, id FROM health.workouts WHERE origin = 'backfill'"):
        stored[row["user_id"]].add(row["id"])
    for user, course in given.items():
        assert stored[user] == {f"{user}-{at:%m%d%H}" for at in AMID}, course


@pytest.mark.parametrize(
    ("again", "fetched"),
    [
        *itertools.product(["never", "at once", "at the end"], ["between", "at the end"]),
        ("at the end", "after one message"),
    ],
)
def test_four_chunks_end_once_and_completely(
    engine: Engine, settings: Settings, again: str, fetched: str, full: bool
) -> None:
    """Breaks if, in any order, with the final notice anywhere or absent, a chunk is lost, doubled or never ends.

    Each case is a user of its own, so that all cases are stored together. With --full there are 1,032.
    """
    given = {f"u{n}": course for n, course in enumerate(courses(again, full=full))}
    notices = [course.notices(user) for user, course in given.items()]
    provider = Provider(workouts(AMID), limit=4 * len(given))
    fetcher = provider.fetcher(engine, settings)
    messages = list(zip(*notices, strict=True))
    if fetched == "after one message":
        messages = [tuple(itertools.chain(*messages))]
    for count, message in enumerate(messages, 1):
        announce(engine, settings, *message)
        if fetched == "between":
            fetch_all(engine, fetcher)
            check(engine, given, count)
    fetch_all(engine, fetcher)
    check(engine, given, len(notices[0]))
    check_fetched(engine, given, provider, at_once=fetched == "between")


def test_the_final_notice_may_come_when_all_else_is_done(engine: Engine, settings: Settings) -> None:
    """Breaks if a notice waits for the chunks before it, or has them fetched again."""
    provider = Provider(heartrates(daily(40)))
    fetcher = provider.fetcher(engine, settings)
    announce(engine, settings, notice(days=(20, 30), final=False))
    settle(engine, fetcher)
    announce(engine, settings, notice(days=(0, 10)))
    settle(engine, fetcher)
    assert status(engine) == [("complete", 2, 2)]
    assert len(provider.requests) == 2


def test_a_late_chunk_opens_the_pull_again(engine: Engine, settings: Settings) -> None:
    """Breaks if a chunk after the final one is never fetched, or counts as a new pull."""
    provider = Provider(heartrates(daily(40)))
    fetcher = provider.fetcher(engine, settings)
    announce(engine, settings, notice(days=(20, 30)))
    settle(engine, fetcher)
    before = backfill(engine)
    (again,) = announce(engine, settings, notice(days=(0, 10), final=False))
    assert (again, backfill(engine)["status"]) == (before["id"], "running")
    assert due(engine) == [again]
    settle(engine, fetcher)
    assert status(engine) == [("complete", 2, 2)]
    assert backfill(engine)["finished_at"] > before["finished_at"]
    assert (
        len(rows(engine, "SELECT 1 FROM health.heartrate")) == 12 + 11
    )  # ten days each, and one more day on each side


def test_the_same_notice_under_a_new_id_is_a_new_pull(engine: Engine, settings: Settings) -> None:
    """Breaks if history is not fetched again after a re-authorisation, or is fetched twice for a repeated delivery."""
    provider = Provider(heartrates(daily(5), value=60))
    fetcher = provider.fetcher(engine, settings)
    first = notice()
    announce(engine, settings, first)
    settle(engine, fetcher)
    assert announce(engine, settings, first) == []
    settle(engine, fetcher)
    assert len(provider.requests) == 1
    provider.answer = heartrates(daily(8), value=61)
    assert announce(engine, settings, notice())
    settle(engine, fetcher)
    assert status(engine) == [("complete", 1, 1)] * 2
    assert len(provider.requests) == 2
    assert rows(engine, "SELECT value, count(*) AS n FROM health.heartrate GROUP BY 1") == [{"value": 61, "n": 8}]


def test_a_notice_that_comes_amid_the_fetching_is_fetched_too(engine: Engine, settings: Settings) -> None:
    """Breaks if a notice that arrives during the last request is ignored."""
    inner = heartrates(daily(40))

    def answer(request: httpx.Request) -> httpx.Response:
        if len(provider.requests) == 1:
            announce(engine, settings, notice(days=(20, 30)))
        return inner(request)

    provider = Provider(answer)
    (one,) = announce(engine, settings, notice(days=(0, 10)))
    provider.fetcher(engine, settings).run(one)
    assert status(engine) == [("complete", 2, 2)]
    assert len(provider.requests) == 2


# Killed and concurrent workers


@pytest.mark.parametrize("resource", ["heartrate", "workouts", "workout_stream"])
def test_a_killed_worker_costs_one_request(engine: Engine, settings: Settings, resource: str) -> None:
    """Breaks if the position is not committed with its page: pages would be skipped, or all requested again."""
    count = {"heartrate": 24 * 60, "workouts": 100, "workout_stream": 30}[resource]
    inner = heartrates(hourly(60), 100) if resource == "heartrate" else workouts(daily(count))
    killed: set[str] = set()

    def answer(request: httpx.Request) -> httpx.Response:
        if str(request.url) not in killed:
            killed.add(str(request.url))
            raise Killed
        return inner(request)

    provider = Provider(answer)
    (one,) = announce(engine, settings, notice(resource=resource, days=(0, 100)))
    kills = 0
    while due(engine):
        try:
            provider.fetcher(engine, settings).run(one)
        except Killed:
            kills += 1
            assert due(engine) == []  # the lease is still held
            make_due(engine, leases=True)
    asked = Counter(str(request.url) for request in provider.requests)
    pages = [count for url, count in asked.items() if "/summary/" not in url or resource == "workouts"]
    assert set(pages) == {2}
    assert kills == len(killed) > 1
    assert status(engine) == [("complete", 1, 1)]
    assert rows(engine, f"SELECT count(*) AS n FROM health.{resource}") == [{"n": count}]
    assert backfill(engine)["records"] >= count


def test_a_page_that_was_not_committed_is_requested_again(engine: Engine, settings: Settings) -> None:
    """Breaks if the position moves before the page is committed."""
    inner = heartrates(hourly(20), 100)

    def answer(request: httpx.Request) -> httpx.Response:
        if len(provider.requests) == 3:
            with engine.begin() as connection:
                connection.execute(text("ALTER TABLE headrace.chunks RENAME TO away"))
        return inner(request)

    provider = Provider(answer)
    (one,) = announce(engine, settings, notice(days=(0, 20)))
    with pytest.raises(Exception, match="UndefinedTable"):
        provider.fetcher(engine, settings, pages=2).run(one)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE headrace.away RENAME TO chunks"))
    stored = len(rows(engine, "SELECT 1 FROM health.heartrate"))
    assert stored == backfill(engine)["records"] == 200
    make_due(engine, leases=True)
    settle(engine, provider.fetcher(engine, settings))
    assert max(Counter(str(request.url) for request in provider.requests).values()) == 2
    check_complete(engine, 480)


def test_workers_at_once_do_not_double_or_lose(engine: Engine, settings: Settings) -> None:
    """Breaks if two workers hold one lease: pages would be requested twice, or skipped."""
    provider = Provider(heartrates(hourly(60), 50))
    (one,) = announce(engine, settings, notice(days=(0, 60)))
    fetchers = [provider.fetcher(engine, settings) for _ in range(3)]

    def work(fetcher: Fetcher) -> None:
        for _ in range(200):
            fetcher.run(one)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, fetchers))
    assert max(Counter(str(request.url) for request in provider.requests).values()) == 1
    check_complete(engine, 24 * 60)


def overtaken(engine: Engine, settings: Settings, late: httpx.Response | None = None, **limits: float) -> Provider:
    """The requests of a worker whose lease expired during its second request, while another worker finished."""
    inner = heartrates(hourly(3), 10)
    provider = Provider(inner)

    def answer(request: httpx.Request) -> httpx.Response:
        if len(provider.requests) == 2:
            make_due(engine, leases=True)
            Provider(inner).fetcher(engine, settings).run(one)
            return late or inner(request)
        return inner(request)

    provider.answer = answer
    (one,) = announce(engine, settings, notice(days=(0, 3)))
    assert provider.fetcher(engine, settings, **limits).run(one) == []
    return provider


@pytest.mark.parametrize("pages", [1, 4])
def test_a_worker_that_lost_its_lease_stops(engine: Engine, settings: Settings, pages: int) -> None:
    """Breaks if a worker without the lease moves the position back, continues, counts its page, or takes a slot."""
    provider = overtaken(engine, settings, pages=pages, seconds=60)
    assert backfill(engine)["records"] == 72
    assert rows(engine, "SELECT 1 FROM headrace.backfills WHERE lease_until > now()") == []
    assert len(provider.requests) == max(pages, 2)
    check_complete(engine, 72)


def test_a_lost_lease_fails_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a late response fails a completed backfill."""
    overtaken(engine, settings, httpx.Response(422))
    assert status(engine) == [("complete", 1, 1)]


# Responses of the API


def failing(*answers: httpx.Response | None, then: Answer | None = None) -> Provider:
    """An API with these responses first; None is a good one."""
    good = then or heartrates(hourly(3), 40)
    provider = Provider(good)

    def answer(request: httpx.Request) -> httpx.Response:
        position = len(provider.requests) - 1
        given = answers[position] if position < len(answers) else None
        return given or good(request)

    provider.answer = answer
    return provider


def in_two_minutes() -> str:
    """An HTTP date in two minutes."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=120), usegmt=True)


@pytest.mark.parametrize("status_code", [429, 503])
@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_pauses_all_workers(engine: Engine, settings: Settings, status_code: int, *, as_date: bool) -> None:
    """Breaks if other workers send requests, the pause is too short, or a Retry-After counts as a failed attempt."""
    headers = {"Retry-After": in_two_minutes() if as_date else "120"}
    provider = failing(None, httpx.Response(status_code, headers=headers))
    one, other = announce(engine, settings, notice(days=(0, 3)), notice("u2", days=(0, 3)))
    (again,) = provider.fetcher(engine, settings).run(one)
    assert 115 < again.seconds <= 120.2
    (pause,) = pauses(settings)
    assert (pause.account, pause.reason, pause.kind) == ("junction", f"status {status_code}", "asked")
    assert due(engine) == [other]
    make_due(engine)
    for each in (one, other):
        assert provider.fetcher(engine, settings).run(each)[0].seconds > 100
    assert len(provider.requests) == 2
    assert {row["attempts"] for row in rows(engine, "SELECT attempts FROM headrace.backfills")} == {0}
    forget_pauses(settings)
    settle(engine, provider.fetcher(engine, settings))
    assert status(engine) == status(engine, "u2") == [("complete", 1, 1)]
    assert len(rows(engine, "SELECT 1 FROM health.heartrate")) == 144


@pytest.mark.parametrize("status_code", [401, 403])
def test_a_refused_key_burns_no_attempt(engine: Engine, settings: Settings, status_code: int) -> None:
    """Breaks if backfills fail because a key was wrong for a day, or no message names the key."""
    provider = failing(*[httpx.Response(status_code)] * 30)
    (one,) = announce(engine, settings, notice(days=(0, 3)))
    for _ in range(30):
        assert provider.fetcher(engine, settings).run(one) == [FollowUp(one, 300.0)]
        (pause,) = pauses(settings)
        assert pause.seconds > 290
        assert (pause.kind, "key" in pause.reason) == ("key_refused", True)
        make_due(engine)
        forget_pauses(settings)
    assert (backfill(engine)["status"], backfill(engine)["attempts"]) == ("running", 0)
    settle(engine, provider.fetcher(engine, settings))
    assert status(engine) == [("complete", 1, 1)]


@pytest.mark.parametrize("resource", ["heartrate", "workouts", "sleep_cycle", "workout_stream"])
def test_a_deleted_user_fails(engine: Engine, settings: Settings, resource: str) -> None:
    """Breaks if requests about a user whom the aggregator has deleted are repeated, or are reported as complete."""
    provider = Provider(lambda _: httpx.Response(404, json={"detail": "Not found"}))
    (one,) = announce(engine, settings, notice(resource=resource))
    assert provider.fetcher(engine, settings).run(one) == []
    row = backfill(engine)
    assert (row["status"], row["error"], row["finished_at"] is None) == ("failed", "status 404", False)
    assert due(engine) == []
    assert len(provider.requests) == 1


def test_a_missing_profile_is_a_success(engine: Engine, settings: Settings) -> None:
    """Breaks if the one optional resource shows an error for every user without it."""
    provider = Provider(lambda _: httpx.Response(404))
    fetch_history(engine, settings, provider, notice(resource="profile"))
    assert status(engine) == [("complete", 1, 1)]
    assert (backfill(engine)["records"], len(provider.requests)) == (0, 1)


@pytest.mark.parametrize("status_code", [400, 405, 422, 451])
def test_a_request_that_is_wrong_fails_at_once(engine: Engine, settings: Settings, status_code: int) -> None:
    """Breaks if a request that cannot succeed is repeated, or fails without a reason."""
    provider = failing(*[httpx.Response(status_code)] * 9)
    fetch_history(engine, settings, provider, notice())
    assert status(engine) == [("failed", 0, 1)]
    assert (backfill(engine)["error"], len(provider.requests)) == (f"status {status_code}", 1)


def test_a_history_that_failed_is_pulled_by_the_next_notice(engine: Engine, settings: Settings) -> None:
    """Breaks if a failed backfill blocks later ones."""
    provider = failing(httpx.Response(422))
    fetch_history(engine, settings, provider, notice(days=(0, 3)))
    fetch_history(engine, settings, provider, notice(days=(0, 3)))
    assert status(engine) == [("failed", 0, 1), ("complete", 1, 1)]
    assert len(rows(engine, "SELECT 1 FROM health.heartrate")) == 72


PASSING = {
    "500": httpx.Response(500),
    "502": httpx.Response(502),
    "408": httpx.Response(408),
    "redirect": httpx.Response(302, headers={"Location": "https://elsewhere.test/"}),
    "503 without Retry-After": httpx.Response(503),
    "429 without Retry-After": httpx.Response(429),
    "cut short": httpx.Response(200, content=b'{"groups":{"garmin":[{"source":'),
    "no JSON": httpx.Response(200, content=b"<html>"),
    "empty": httpx.Response(200),
    "another form": httpx.Response(200, json={"groups": []}),
}


@pytest.mark.parametrize(("kind", "position"), [*((kind, 0) for kind in PASSING), ("500", 1), ("cut short", 1)])
def test_a_temporary_error_is_retried(engine: Engine, settings: Settings, kind: str, position: int) -> None:
    """Breaks if a short outage of the API ends a backfill, leaves a gap, or is retried without a pause."""
    provider = failing(*[None] * position, PASSING[kind], PASSING[kind])
    (one,) = announce(engine, settings, notice(days=(0, 3)))
    (again,) = provider.fetcher(engine, settings).run(one)
    assert 0.4 < again.seconds <= 1
    assert (len(provider.requests), due(engine), backfill(engine)["attempts"]) == (position + 1, [], 1)
    forget_pauses(settings)
    make_due(engine)
    (again,) = provider.fetcher(engine, settings).run(one)
    assert 0.9 < again.seconds <= 2
    assert backfill(engine)["attempts"] == 2
    forget_pauses(settings)
    settle(engine, provider.fetcher(engine, settings))
    assert (status(engine), backfill(engine)["attempts"]) == ([("complete", 1, 1)], 0)
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 72}]


@pytest.mark.parametrize("kind", ["500", "cut short", "redirect"])
def test_a_lasting_error_fails_in_the_end(engine: Engine, settings: Settings, kind: str) -> None:
    """Breaks if a history that cannot be read is requested forever."""
    provider = Provider(lambda _: PASSING[kind])
    fetch_history(engine, settings, provider, notice())
    assert status(engine) == [("failed", 0, 1)]
    assert len(provider.requests) == MAX_ATTEMPTS
    assert str(MAX_ATTEMPTS) in backfill(engine)["error"]


def test_a_page_of_another_form_is_named(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator reads that JSON is no JSON, and not which field has another form."""
    provider = failing(*[httpx.Response(200, json={"workouts": {"canary": 1}})] * MAX_ATTEMPTS)
    fetch_history(engine, settings, provider, notice(resource="workouts"))
    error = backfill(engine)["error"]
    assert error.startswith("a response that cannot be read: workouts: a page: Expected a list")
    assert "canary" not in error


def test_a_page_resets_the_failures_before_it(engine: Engine, settings: Settings) -> None:
    """Breaks if failures that are far apart end a long backfill."""
    bad = httpx.Response(500)
    provider = failing(*[answer for _ in range(5) for answer in [*[bad] * (MAX_ATTEMPTS - 2), None]])
    fetch_history(engine, settings, provider, notice(days=(0, 90)), rounds=100)
    assert status(engine) == [("complete", 1, 1)]


def test_a_page_resets_the_failures_within_a_run(engine: Engine, settings: Settings) -> None:
    """Breaks if the first failure after a page counts as the twelfth and ends the backfill."""
    provider = failing(*[httpx.Response(500)] * (MAX_ATTEMPTS - 1), None, httpx.Response(500))
    fetch_history(engine, settings, provider, notice(days=(0, 3)))
    assert status(engine) == [("complete", 1, 1)]


def windows(provider: Provider) -> list[timedelta]:
    """The length of the window of every request so far."""
    edges = zip(provider.all("start_date"), provider.all("end_date"), strict=True)
    return [datetime.fromisoformat(end or "") - datetime.fromisoformat(start or "") for start, end in edges]


@pytest.mark.parametrize("status_code", [413, 504])
def test_a_slice_that_is_too_large_is_halved(engine: Engine, settings: Settings, status_code: int) -> None:
    """Breaks if a window that the API cannot answer is repeated unchanged, or one half is never fetched."""
    provider = Provider(heartrates(daily(60)))
    inner = provider.answer

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status_code) if windows(provider)[-1] > 4 * DAY else inner(request)

    provider.answer = answer
    fetch_history(engine, settings, provider, notice(days=(0, 60)))
    assert windows(provider)[:3] == [14 * DAY, 7 * DAY, 3 * DAY]
    check_complete(engine, 60)


@pytest.mark.parametrize("status_code", [400, 410])
def test_an_expired_cursor_begins_the_slice_again(engine: Engine, settings: Settings, status_code: int) -> None:
    """Breaks if a cursor that expired during a pause ends a backfill or leaves a gap."""
    provider = failing(None, httpx.Response(status_code, json={"detail": "cursor_expired"}))
    fetch_history(engine, settings, provider, notice(days=(0, 3)))
    assert provider.all("next_cursor") == [None, "40", None, "40"]
    assert len(set(provider.all("start_date"))) == 1
    check_complete(engine, 72)


def paged(*cursors: str | None, then: str | None = None) -> Provider:
    """An API whose pages return these cursors, and then always `then`."""
    provider = Provider(lambda _: httpx.Response(200), limit=300)

    def answer(request: httpx.Request) -> httpx.Response:
        position = len(provider.requests) - 1
        first = httpx.Request("GET", request.url.copy_remove_param("next_cursor"))
        page = heartrates(hourly(3))(first).json()
        return httpx.Response(200, json=page | {"next_cursor": cursors[position] if position < len(cursors) else then})

    provider.answer = answer
    return provider


def test_a_cursor_that_repeats_begins_the_slice_again(engine: Engine, settings: Settings) -> None:
    """Breaks if a cursor that leads to itself is followed without end."""
    provider = paged("a", "a")
    (one,) = announce(engine, settings, notice(days=(0, 3)))
    (again,) = provider.fetcher(engine, settings).run(one)
    assert again.seconds == 1.0
    assert provider.all("next_cursor") == [None, "a"]
    settle(engine, provider.fetcher(engine, settings))
    assert provider.all("next_cursor") == [None, "a", None]
    assert status(engine) == [("complete", 1, 1)]


@pytest.mark.parametrize(
    "provider",
    [
        Provider(lambda _: httpx.Response(413)),
        Provider(lambda _: httpx.Response(504)),
        paged(then="a"),
        paged(*["a", "b"] * 200),
    ],
    ids=["413", "504", "repeated cursor", "loop of cursors"],
)
def test_a_slice_that_never_ends_fails_in_the_end(engine: Engine, settings: Settings, provider: Provider) -> None:
    """Breaks if one day that the API cannot answer, or the pages of a loop of cursors, are requested without end."""
    fetch_history(engine, settings, provider, notice(days=(0, 3)), rounds=40)
    assert status(engine) == [("failed", 0, 1)]


# Bad data


def test_one_bad_record_is_named_and_the_rest_is_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if an invalid record ends a backfill, is dropped without an error, or counts in `records`."""
    good = {"id": "w1", "source": GARMIN}
    page = {"workouts": [good, {"source": GARMIN}, good | {"id": ["w2"]}, good | {"id": "w3", "title": "a\u0000b"}]}
    provider = Provider(lambda _: httpx.Response(200, json=page))
    fetch_history(engine, settings, provider, notice(resource="workouts"))
    assert [row["id"] for row in rows(engine, "SELECT id FROM health.workouts ORDER BY 1")] == ["w1", "w3"]
    assert status(engine) == [("complete", 1, 1)]
    assert (backfill(engine)["records"], "2 refused" in backfill(engine)["error"]) == (2, True)


# Streams


def test_a_stream_that_is_not_there_is_passed_over(engine: Engine, settings: Settings) -> None:
    """Breaks if a workout without a stream ends the backfill of the others."""
    provider = gone_streams(404)
    fetch_history(engine, settings, provider, notice(resource="workout_stream"))
    assert status(engine) == [("complete", 1, 1)]
    assert len(rows(engine, "SELECT 1 FROM health.workouts WHERE origin = 'backfill'")) == 10
    assert len(rows(engine, "SELECT 1 FROM health.workout_stream WHERE origin = 'backfill'")) == 9
    assert (backfill(engine)["records"], len(provider.requests)) == (9, 11)


@pytest.mark.parametrize("status_code", [400, 410])
def test_a_stream_that_is_refused_comes_to_an_end(engine: Engine, settings: Settings, status_code: int) -> None:
    """Breaks if one stream restarts the slice without end."""
    provider = gone_streams(status_code)
    fetch_history(engine, settings, provider, notice(resource="workout_stream"), rounds=30)
    assert status(engine)[0][0] in ("complete", "failed")


def test_a_workout_that_cannot_be_stored_does_not_stop_the_streams(engine: Engine, settings: Settings) -> None:
    """Breaks if one workout that PostgreSQL refuses has its list fetched without end."""
    provider = Provider(workouts(daily(3), title="a\u0000b"))
    fetch_history(engine, settings, provider, notice(resource="workout_stream"))
    assert status(engine) == [("complete", 1, 1)]


# Newest wins


@pytest.mark.parametrize(("ahead", "value", "origin"), [(60, 99.0, "webhook"), (-3600, 60.0, "backfill")])
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_page_is_as_old_as_its_request(  # noqa: PLR0917
    engine: Engine, settings: Settings, ahead: int, value: float, origin: str, when: str
) -> None:
    """Breaks if a page that was requested before an update overwrites it, or a late retry overwrites the page."""
    body = heartrate("u1", {0: 99})
    ts = datetime.fromisoformat(body["data"]["data"][0]["timestamp"])
    inner = heartrates([ts])

    def webhook() -> None:
        announce(engine, settings, delivery(body, datetime.now(UTC) + timedelta(seconds=ahead)))

    def answer(request: httpx.Request) -> httpx.Response:
        if when == "during":
            webhook()
        return inner(request)

    provider = Provider(answer)
    announce(engine, settings, notice(days=(60, 80)))
    if when == "before":
        webhook()
    settle(engine, provider.fetcher(engine, settings))
    if when == "after":
        webhook()
    assert rows(engine, "SELECT value, origin FROM health.heartrate") == [{"value": value, "origin": origin}]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("webhooks", "pages", "calories", "origin"),
    [
        ("2026-03-13T00:00:00Z", "2026-03-12T00:00:00Z", 1, "webhook"),
        ("2026-03-13T00:00:00Z", "2026-03-14T00:00:00Z", 2, "backfill"),
        ("2026-03-13T00:00:00Z", None, 2, "backfill"),  # as new as the request
    ],
)
def test_a_record_is_as_old_as_it_says(  # noqa: PLR0917
    engine: Engine, settings: Settings, webhooks: str, pages: str | None, calories: float, origin: str, when: str
) -> None:
    """Breaks if history overwrites a workout that was edited later, or an older version overwrites history."""
    body = workout("u1", "w1", calories=1, updated_at=webhooks)
    page = {"workouts": [{"id": "w1", "source": GARMIN, "calories": 2, "updated_at": pages}]}
    provider = Provider(lambda _: httpx.Response(200, json=page))
    announce(engine, settings, notice(resource="workouts"))
    if when == "before":
        announce(engine, settings, delivery(body))
    settle(engine, provider.fetcher(engine, settings))
    if when == "after":
        announce(engine, settings, delivery(body))
    assert rows(engine, "SELECT calories, origin FROM health.workouts") == [{"calories": calories, "origin": origin}]


# Limits and leases


def test_a_user_has_a_limit_of_running_backfills(engine: Engine, settings: Settings) -> None:
    """Breaks if one user's decade delays all others, or a backfill that found no free slot is never enqueued again."""
    limited = replace(settings, backfills_per_user=2)
    names = ("workouts", "sleep", "activity", "body")
    provider = Provider(lambda _: httpx.Response(200, json={name: [] for name in names}))
    first, second, third, fourth = announce(engine, limited, *(notice(resource=name) for name in names))
    (other,) = announce(engine, limited, notice("u2", "workouts"))
    fetcher = provider.fetcher(engine, limited)
    pending = [claim(engine, one, 2, 9) for one in (first, second)]
    assert None not in pending
    assert fetcher.run(third) == []
    assert provider.requests == []
    fetcher.run(other)
    assert len(provider.requests) == 1
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE headrace.backfills SET lease_until = '-infinity' WHERE id = :id"), {"id": first}
        )
    assert {one.backfill_id for one in fetcher.run(third)} == {first, fourth}
    assert len(provider.requests) == 2


def test_a_backfill_without_a_message_is_due(engine: Engine, settings: Settings) -> None:
    """Breaks if a backfill whose message was lost waits forever, or one that waits or is claimed counts as due."""
    resources = ["workouts", "sleep", "activity", "body", "meal"]
    free, pending, waiting, over, done = announce(engine, settings, *(notice(resource=name) for name in resources))
    claim(engine, pending, 9, 9)
    with engine.begin() as connection:
        for change, one in [
            ("due_at = now() + interval '1 minute'", waiting),
            ("status = 'failed'", over),
            ("status = 'complete'", done),
        ]:
            connection.execute(text(f"UPDATE headrace.backfills SET {change} WHERE id = :id"), {"id": one})
    assert due(engine) == [free]
    assert due(engine, user_id="u1") == [free]
    assert due(engine, user_id="u2") == []
    make_due(engine, leases=True)
    assert set(due(engine)) == {free, pending, waiting}
    assert len(due(engine, limit=2)) == 2


@pytest.mark.parametrize("lease", ["held", "over"])
def test_a_lease_that_ran_out_is_taken_over(engine: Engine, settings: Settings, lease: str) -> None:
    """Breaks if the backfill of a killed worker is never resumed, or is claimed during a valid lease."""
    provider = Provider(heartrates(hourly(3)))
    (one,) = announce(engine, settings, notice(days=(0, 3)))
    claim(engine, one, 4, 9)
    if lease == "over":
        make_due(engine, leases=True)
    provider.fetcher(engine, settings).run(one)
    assert len(provider.requests) == (1 if lease == "over" else 0)
    assert status(engine)[0][0] == ("complete" if lease == "over" else "running")


def test_a_backfill_that_is_not_there_is_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a message about an unknown backfill stops a worker."""
    assert Provider(heartrates([])).fetcher(engine, settings).run(404) == []


@pytest.mark.parametrize(
    ("seconds", "fetches", "messages"), [(0.0, True, 1), (30.0, True, 1), (120.0, True, 0), (0.0, False, 0)]
)
def test_only_short_waits_are_enqueued(settings: Settings, seconds: float, messages: int, *, fetches: bool) -> None:
    """Breaks if a long wait stays in the broker under its visibility timeout, or history is fetched while disabled."""
    celery = make_celery(settings, "publisher")
    work = WorkerContext(celery, replace(settings, fetch_history=fetches))
    work.enqueue([FollowUp(7, seconds)])
    with redis.Redis.from_url(settings.need_broker()) as client:
        sent = [msgspec.json.decode(raw) for raw in client.lrange("backfill", 0, -1)]
    assert [message["headers"]["argsrepr"] for message in sent] == ["(7,)"] * messages
    work.engine.dispose()
    celery.close()


def test_without_a_broker_the_row_stays(engine: Engine, settings: Settings) -> None:
    """Breaks if a message that cannot be published raises, or loses the backfill that the sweep would find."""
    (one,) = announce(engine, settings, notice())
    away = replace(settings, broker_url="redis://127.0.0.1:1/0")
    celery = make_celery(away, "publisher")
    work = WorkerContext(celery, away)
    work.enqueue([FollowUp(one, 0)])
    assert due(engine) == [one]
    work.engine.dispose()
    celery.close()
