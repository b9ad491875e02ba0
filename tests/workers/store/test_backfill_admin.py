"""Operator commands for backfills: progress, stopping, resuming, and planning."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import apply, delivery, event, rows
from tests.support.backfills import STATES, announce, change, make_due, notice, planned, put, settle
from tests.support.cases import Failures
from tests.support.database import emptied
from tests.support.deliveries import bodies
from tests.support.provider import DAY, FIRST, Answer, Killed, Provider, daily, heartrates, hourly, workouts
from workers.backfill.pending import CommitLimits
from workers.simulator.server import API_KEY
from workers.store import backfill_admin, backfills
from workers.store.backfill_admin import Backfill, BackfillPlan, Filter, cancel, chunks_of, listed, pause, resume
from workers.store.backfills import claim, due, release
from workers.store.engine import make_writer, transaction

Do = Callable[[Engine, Sequence[int]], list[int]]


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may fetch history, without a rate limit."""
    return replace(settings, broker_url=broker_url, junction_api_key=API_KEY, request_rate="1000000/second")


def only(engine: Engine) -> Backfill:
    (one,) = listed(engine, Filter())
    return one


def killed_at(answer: Answer, number: int) -> Provider:
    """A provider whose request of this number kills the worker."""
    provider = Provider(answer)

    def deadly(request: httpx.Request) -> httpx.Response:
        if len(provider.requests) == number:
            raise Killed
        return answer(request)

    provider.answer = deadly
    return provider


def walked(engine: Engine, settings: Settings, provider: Provider, number: int) -> Backfill:
    """The backfill after a worker has fetched until it was killed."""
    with pytest.raises(Killed):
        provider.fetcher(engine, settings, pages=1).run(number)
    return only(engine)


def operated(engine: Engine, resource: str = "heartrate", days: tuple[float, float] = (0, 10), user: str = "u1") -> int:
    """A backfill that an operator has started."""
    start, end = (FIRST + number * DAY for number in days)
    with transaction(engine) as connection:
        return backfill_admin.start(
            connection, BackfillPlan("junction", user, "garmin", resource, start, end, 1, is_measured=False)
        )


# Progress


def test_a_pending_backfill_has_no_progress(engine: Engine, settings: Settings) -> None:
    """Breaks if a pending backfill shows progress, a rate, or a time left."""
    announce(engine, settings, notice(days=(0, 54)))
    one = only(engine)
    assert (one.status, one.share, one.seconds, one.rate, one.left) == ("pending", 0, None, None, None)
    assert (one.chunks, one.chunks_done, one.records, one.pages) == (1, 0, 0, 0)


def test_the_share_is_the_fetched_part(engine: Engine, settings: Settings) -> None:
    """Breaks if the share includes days that were not fetched, or a slice before its last page."""
    failures = Failures()
    for size, request_number, share, amid in (
        (100, 1, 0, None),
        (100, 2, 0.25, None),
        (100, 4, 0.75, None),
        (5, 2, 0, 1),
        (5, 5, 0.25, 1),
        (5, 6, 0.25, 2),
    ):
        with failures.of(size, request_number, share, amid), emptied(engine):
            (number,) = announce(engine, settings, notice(days=(0, 54)))  # four slices of 14 days, with margins
            one = walked(engine, settings, killed_at(heartrates(daily(60), size), request_number), number)
            assert one.status == "running"
            assert one.share == pytest.approx(share)
            (chunk,) = chunks_of(engine, number)
            assert (chunk.amid, chunk.pages) == (amid is not None, amid or 0)
            assert (chunk.window_end + DAY - chunk.slice_end) / (56 * DAY) == pytest.approx(share)
            assert one.pages == request_number - 1
    assert failures == {}


@pytest.mark.parametrize(("request_number", "share", "done"), [(1, 0, 0), (2, 0.25, 0), (3, 0.5, 1), (4, 0.75, 1)])
def test_the_share_covers_all_chunks(
    engine: Engine, settings: Settings, request_number: int, share: float, done: int
) -> None:
    """Breaks if one of two chunks counts as the whole, or progress falls between them."""
    notices = (notice(days=(0, 26), final=False), notice(days=(30, 56)))
    number, again = announce(engine, settings, *notices)
    assert number == again
    one = walked(engine, settings, killed_at(heartrates(daily(60)), request_number), number)
    assert one.share == pytest.approx(share)
    assert (one.chunks, one.chunks_done) == (2, done)
    assert [chunk.window_end for chunk in chunks_of(engine, number)] == [FIRST + 56 * DAY, FIRST + 26 * DAY]
    settle(engine, Provider(heartrates(daily(60))).fetcher(engine, settings), 1)
    make_due(engine, leases=True)
    settle(engine, Provider(heartrates(daily(60))).fetcher(engine, settings))
    one = only(engine)
    assert (one.status, one.share, one.chunks_done, one.left) == ("complete", 1, 2, None)
    assert {chunk.status for chunk in chunks_of(engine, number)} == {"done"}


def test_the_time_left_follows_from_the_rate(engine: Engine, settings: Settings) -> None:
    """Breaks if the time left or the rate is wrong."""
    (number,) = announce(engine, settings, notice(days=(0, 54)))
    walked(engine, settings, killed_at(heartrates(daily(60)), 2), number)
    change(engine, number, "started_at = now() - interval '100 seconds', records = 500")
    one = only(engine)
    assert one.left is not None
    assert one.left.total_seconds() == pytest.approx(300, abs=5)
    assert one.rate == pytest.approx(5, abs=0.2)
    pause(engine, [number])
    assert only(engine).left is None
    change(engine, number, "status = 'complete', finished_at = started_at + interval '50 seconds'")
    one = only(engine)
    assert (one.seconds, one.rate, one.left) == (50, 10, None)


def test_the_time_left_without_progress() -> None:
    """Breaks if a backfill without progress divides by zero, or one that is not running has a time left."""
    failures = Failures()
    for changes, rate, left in (
        ({}, 5.0, timedelta(seconds=100)),
        ({"share": 0.0}, 5.0, None),
        ({"share": 1.0}, 5.0, timedelta(0)),
        ({"seconds": None}, None, None),
        ({"seconds": 0.0}, None, None),
        *(({"status": state}, 5.0, None) for state in STATES if state != "running"),
    ):
        with failures.of(changes, rate, left):
            given: dict[str, Any] = dict.fromkeys(Backfill.__dataclass_fields__)
            one = Backfill(**given | {"status": "running", "share": 0.5, "seconds": 100.0, "records": 500} | changes)
            assert (one.rate, one.left) == (rate, left)
    assert failures == {}


def test_the_list_has_open_backfills_first(engine: Engine, settings: Settings) -> None:
    """Breaks if running backfills come after ended ones, or older ones of a status first."""
    names = ("workouts", "sleep", "activity", "body", "meal", "heartrate", "steps", "weight", "glucose", "hrv")
    numbers = announce(engine, settings, *(notice(resource=name) for name in names))
    states = ["failed", "running", "pending", "complete", "paused", "cancelled"]
    states += ["running", "pending", "paused", "failed"]
    for number, state in zip(numbers, states, strict=True):
        put(engine, number, state)
    found = [(one.status, one.id) for one in listed(engine, Filter())]
    ordered = [state for state in ("running", "paused", "pending") for _ in range(2)]
    assert [state for state, _ in found] == [*ordered, "failed", "cancelled", "complete", "failed"]
    for first in range(0, 6, 2):
        assert found[first][1] > found[first + 1][1]
    assert [number for _, number in found[6:]] == [numbers[n] for n in (9, 5, 3, 0)]
    assert [one.id for one in listed(engine, Filter(), 3)] == [number for _, number in found[:3]]


FILTERS: list[tuple[dict[str, Any], set[int]]] = [
    ({}, {0, 1, 2, 3}),
    ({"user_ids": ("u1",)}, {0, 1}),
    ({"user_ids": ("u1", "u2")}, {0, 1, 2, 3}),
    ({"user_ids": ("nobody",)}, set()),
    ({"provider": "garmin"}, {0, 1, 2, 3}),
    ({"provider": "oura"}, set()),
    ({"resource": "sleep"}, {1, 3}),
    ({"states": ("paused", "failed")}, {1, 2}),
    ({"states": ("complete",)}, set()),
    ({"user_ids": ("u2",), "resource": "sleep", "states": ("pending",)}, {3}),
    ({"user_ids": ("u2",), "states": ("running",)}, set()),
]


def test_a_filter_selects(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator sees, or stops, another backfill."""
    notices = [notice(user, name) for user in ("u1", "u2") for name in ("workouts", "sleep")]
    numbers = announce(engine, settings, *notices)
    pause(engine, [numbers[1]])
    put(engine, numbers[2], "failed")
    for wanted, found in FILTERS:
        assert {numbers.index(one.id) for one in listed(engine, Filter(**wanted))} == found, wanted
        picked = Filter(ids=(numbers[0], numbers[3], 404), **wanted)
        assert {numbers.index(one.id) for one in listed(engine, picked)} == found & {0, 3}, wanted


# Stopping and resuming


@pytest.mark.parametrize(
    ("do", "changes"),
    [
        (pause, {"pending": "paused", "running": "paused"}),
        (cancel, {"pending": "cancelled", "running": "cancelled", "paused": "cancelled"}),
        (resume, {"paused": "", "failed": "", "cancelled": ""}),
    ],
)
def test_each_command_in_each_state(engine: Engine, settings: Settings, do: Do, changes: dict[str, str]) -> None:
    """Breaks if a pause restarts an ended backfill, or a stopped one cannot be resumed."""
    cases = list(itertools.product(STATES, (False, True)))
    *numbers, other = announce(engine, settings, *(notice(f"u{n}") for n in range(len(cases) + 1)))
    for number, (state, started) in zip(numbers, cases, strict=True):
        put(engine, number, state, started=started)
        change(engine, number, "lease_until = now() + interval '1 minute', attempts = 7, error = 'status 500'")
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.chunks SET restarts = 3"))
    expected = [number for number, (state, _) in zip(numbers, cases, strict=True) if state in changes]
    assert sorted(do(engine, [*numbers, 404])) == expected
    found = {one.id: one for one in listed(engine, Filter())}
    for number, (state, started) in zip(numbers, cases, strict=True):
        one, changed = found[number], state in changes
        after = changes.get(state, state) or ("running" if started else "pending")
        assert (one.status, one.finished_at is not None) == (after, after in STATES[3:]), (state, started)
        resumed = changed and do is resume
        assert (one.attempts, one.error) == ((0, None) if resumed else (7, "status 500")), (state, started)
        assert [chunk.restarts for chunk in chunks_of(engine, number)] == [0 if resumed else 3], (state, started)
    held = rows(engine, "SELECT id FROM headrace.backfills WHERE lease_until > now()")
    if do is not resume:
        assert {row["id"] for row in held} == set(numbers) - set(expected)
    assert (found[other].status, chunks_of(engine, other)[0].restarts) == ("pending", 3)
    assert do(engine, numbers) == []


def test_a_resumed_backfill_is_due_at_once(engine: Engine, settings: Settings) -> None:
    """Breaks if a resumed backfill waits for the retry delay of the failure before."""
    (number,) = announce(engine, settings, notice())
    pause(engine, [number])
    change(engine, number, "due_at = now() + interval '1 hour'")
    assert due(engine) == []
    assert resume(engine, [number]) == [number]
    assert due(engine) == [number]


@pytest.mark.parametrize("do", [pause, cancel, resume])
def test_an_unknown_id_is_ignored(engine: Engine, settings: Settings, do: Do) -> None:
    """Breaks if an unknown id fails the command, or affects another backfill."""
    announce(engine, settings, notice())
    assert do(engine, []) == []
    assert do(engine, [404, -1, 2**62]) == []
    assert only(engine).status == "pending"
    assert listed(engine, Filter(ids=(404,))) == []
    assert chunks_of(engine, 404) == []


ANSWERS: dict[str, tuple[Answer, tuple[int, int], int]] = {
    "heartrate": (heartrates(hourly(3), 10), (0, 3), 72),
    "workouts": (workouts(daily(200)), (0, 200), 200),
    "workout_stream": (workouts(daily(5)), (0, 5), 5),
}


def stopping(engine: Engine, answer: Answer, at: int, *does: Do) -> Provider:
    """A provider at whose request of this number an operator applies commands to every backfill."""
    provider = Provider(answer)

    def stop(request: httpx.Request) -> httpx.Response:
        if len(provider.requests) == at:
            for do in does:
                assert do(engine, [one.id for one in listed(engine, Filter())])
        return answer(request)

    provider.answer = stop
    return provider


def test_a_stop_during_a_page_loses_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a page in flight is lost or requested twice, or requests continue after the stop."""
    failures = Failures()
    for stop in (pause, cancel):
        for resource, at in (
            ("heartrate", 1),
            ("heartrate", 4),
            ("heartrate", 7),
            ("heartrate", 8),
            ("workouts", 1),
            ("workouts", 2),
            ("workouts", 4),
            ("workout_stream", 2),
            ("workout_stream", 5),
        ):
            with failures.of(stop, resource, at), emptied(engine):
                answer, days, records = ANSWERS[resource]
                (number,) = announce(engine, settings, notice(resource=resource, days=days))
                provider = stopping(engine, answer, at, stop)
                assert provider.fetcher(engine, settings, pages=1).run(number) == []
                assert len(provider.requests) == at
                stored = rows(engine, f"SELECT count(*) AS n FROM health.{resource}")[0]["n"]
                one = only(engine)
                assert one.status == ("paused" if stop is pause else "cancelled")
                assert one.records == stored > 0
                settle(engine, provider.fetcher(engine, settings))
                assert len(provider.requests) == at
                assert resume(engine, [number]) == [number]
                settle(engine, provider.fetcher(engine, settings))
                pages = Counter(
                    str(one.url) for one in provider.requests if resource == "workouts" or "summary" not in one.url.path
                )
                assert set(pages.values()) == {1}
                assert rows(engine, f"SELECT count(*) AS n FROM health.{resource}") == [{"n": records}]
                one = only(engine)
                assert (one.status, one.records, one.share, one.error) == ("complete", records, 1, None)
    assert failures == {}


def test_a_stop_loses_nothing_where_pages_are_committed_together(engine: Engine, settings: Settings) -> None:
    """Breaks if pages read around the stop are lost or requested twice, or the stop has no effect."""
    (number,) = announce(engine, settings, notice(days=(0, 20)))
    provider = stopping(engine, heartrates(hourly(20), 20), 3, pause)
    assert provider.fetcher(engine, settings).run(number) == []
    one = only(engine)
    assert len(provider.requests) == CommitLimits().pages
    assert (one.status, one.records) == ("paused", CommitLimits().pages * 20)
    assert resume(engine, [number]) == [number]
    settle(engine, provider.fetcher(engine, settings))
    assert set(Counter(str(one.url) for one in provider.requests).values()) == {1}
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 480}]
    assert only(engine).status == "complete"


@pytest.mark.parametrize(
    ("status_code", "stop"), [(500, pause), (404, pause), (422, cancel), (413, pause), (429, cancel)]
)
def test_a_stop_during_a_failure_stays(engine: Engine, settings: Settings, status_code: int, stop: Do) -> None:
    """Breaks if a stopped backfill fails or continues because of the response in flight."""
    refused = httpx.Response(status_code, headers={"retry-after": "0"})
    provider = stopping(engine, lambda _: refused, 1, stop)
    (number,) = announce(engine, settings, notice(days=(0, 3)))
    provider.fetcher(engine, settings).run(number)
    settle(engine, provider.fetcher(engine, settings), 3)
    assert only(engine).status == ("paused" if stop is pause else "cancelled")
    assert len(provider.requests) == 1
    assert resume(engine, [number])
    provider.answer = heartrates(hourly(3))
    settle(engine, provider.fetcher(engine, settings), 80)
    assert (only(engine).status, only(engine).records) == ("complete", 72)


def test_a_stop_and_a_resume_during_one_page(engine: Engine, settings: Settings) -> None:
    """Breaks if the former and the new worker both continue, and a page counts twice."""
    inner = heartrates(hourly(3), 10)

    def finish(engine: Engine, ids: Sequence[int]) -> list[int]:
        for number in ids:
            Provider(inner).fetcher(engine, settings).run(number)
        return list(ids)

    provider = stopping(engine, inner, 3, pause, resume, finish)
    (number,) = announce(engine, settings, notice(days=(0, 3)))
    assert provider.fetcher(engine, settings, pages=1).run(number) == []
    assert len(provider.requests) == 3
    assert (only(engine).status, only(engine).records, only(engine).pages) == ("complete", 72, 8)


def test_a_worker_that_crashes_after_the_last_page(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a fully stored backfill stays running for ever."""

    def die(*_: object) -> None:
        raise Killed

    provider = Provider(heartrates(hourly(3)))
    (number,) = announce(engine, settings, notice(days=(0, 3)))
    with monkeypatch.context() as patched:
        patched.setattr(backfills, "next_chunk", die)
        with pytest.raises(Killed):
            provider.fetcher(engine, settings).run(number)
    make_due(engine, leases=True)
    settle(engine, provider.fetcher(engine, settings))
    assert len(provider.requests) == 1
    assert (only(engine).status, only(engine).chunks_done) == ("complete", 1)


def test_a_notice_of_a_paused_backfill_waits(engine: Engine, settings: Settings) -> None:
    """Breaks if a notice resumes a paused backfill, or is lost."""
    provider = Provider(heartrates(daily(40)))
    (number,) = announce(engine, settings, notice(days=(20, 30), final=False))
    pause(engine, [number])
    assert announce(engine, settings, notice(days=(0, 10))) == [number]
    settle(engine, provider.fetcher(engine, settings))
    provider.fetcher(engine, settings).run(number)
    one = only(engine)
    assert (one.status, one.chunks, one.is_final_seen, provider.requests) == ("paused", 2, True, [])
    assert (one.window_start, one.window_end) == (FIRST, FIRST + 30 * DAY)
    resume(engine, [number])
    settle(engine, provider.fetcher(engine, settings))
    assert (only(engine).status, only(engine).chunks_done, len(provider.requests)) == ("complete", 2, 2)


def test_one_history_has_one_open_backfill(engine: Engine, settings: Settings) -> None:
    """Breaks if an old backfill is resumed while a new one of the same history is open, or can never be resumed."""
    for state, other in itertools.product(("failed", "cancelled"), ("pending", "running", "paused")):
        user = f"{state} {other}"
        (old,) = announce(engine, settings, notice(user))
        put(engine, old, state)
        (new,) = announce(engine, settings, notice(user))
        put(engine, new, other)
        assert old != new
        assert resume(engine, [old]) == []
        assert {one.id: one.status for one in listed(engine, Filter(user_ids=(user,)))} == {old: state, new: other}
        put(engine, new, "complete")
        assert resume(engine, [old]) == [old]


def test_of_two_backfills_of_one_history_one_is_resumed(engine: Engine, settings: Settings) -> None:
    """Breaks if a resume of all backfills fails because two have the same history."""
    numbers = []
    for _ in range(3):
        numbers += announce(engine, settings, notice())
        put(engine, numbers[-1], "failed")
    assert resume(engine, numbers[::-1]) == [numbers[2]]
    assert [one.status for one in listed(engine, Filter())] == ["running", "failed", "failed"]


@pytest.mark.parametrize("beside", ["operator", "another user", "another resource"])
def test_another_history_does_not_prevent_a_resume(engine: Engine, settings: Settings, beside: str) -> None:
    """Breaks if a failed backfill cannot be resumed while one of another history is open."""
    (old,) = announce(engine, settings, notice())
    put(engine, old, "failed")
    if beside == "operator":
        operated(engine)
    else:
        announce(engine, settings, notice("u2") if beside == "another user" else notice(resource="steps"))
    assert resume(engine, [old]) == [old]


# Operators' backfills beside announced ones


def test_one_history_is_fetched_once_at_a_time(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator's backfill and the aggregator's request the same history concurrently."""
    (announced,) = announce(engine, settings, notice())
    started, elsewhere, others = operated(engine), operated(engine, "steps"), operated(engine, user="u2")
    held = claim(engine, announced, 9, 9)
    assert held is not None
    assert claim(engine, started, 9, 9) is None
    assert all(claim(engine, number, 9, 9) for number in (elsewhere, others))
    release(engine, held, 0)
    assert claim(engine, started, 9, 9) is not None
    assert claim(engine, announced, 9, 9) is None


def test_a_waiting_backfill_comes_next(engine: Engine, settings: Settings) -> None:
    """Breaks if a backfill that waited for another one of the same history waits for the sweep."""
    (announced,) = announce(engine, settings, notice())
    started = operated(engine)
    again = Provider(heartrates([])).fetcher(engine, settings).run(announced)
    assert [one.backfill_id for one in again] == [started]


def test_an_operators_chunk_is_no_final_notice(engine: Engine, settings: Settings) -> None:
    """Breaks if the aggregator's pull counts as complete because the operator's is."""
    announce(engine, settings, notice(final=False))
    operated(engine)
    settle(engine, Provider(heartrates(daily(20))).fetcher(engine, settings))
    found = {one.requested_by: (one.status, one.chunks, one.is_final_seen) for one in listed(engine, Filter())}
    assert found == {"notice": ("running", 1, False), "operator": ("complete", 1, True)}


def test_a_final_notice_is_not_the_operators_end(engine: Engine, settings: Settings) -> None:
    """Breaks if the operator's backfill is dropped because the aggregator's pull is complete."""
    (announced,) = announce(engine, settings, notice())
    started = operated(engine, days=(-400, -300))
    provider = Provider(heartrates([]))
    fetcher = provider.fetcher(engine, settings)
    fetcher.run(announced)
    found = {one.id: (one.status, one.chunks) for one in listed(engine, Filter())}
    assert found == {announced: ("complete", 1), started: ("pending", 1)}
    settle(engine, fetcher)
    assert {one.status for one in listed(engine, Filter())} == {"complete"}


def test_a_late_notice_does_not_reopen_an_operators_backfill(engine: Engine, settings: Settings) -> None:
    """Breaks if a late chunk of the aggregator's is added to the operator's completed backfill."""
    started = operated(engine)
    settle(engine, Provider(heartrates([])).fetcher(engine, settings))
    (announced,) = announce(engine, settings, notice(final=False))
    assert announced != started
    assert {one.id: one.status for one in listed(engine, Filter())} == {started: "complete", announced: "pending"}


def test_a_second_start_adds_a_window(engine: Engine, settings: Settings) -> None:
    """Breaks if a second start of a running backfill fails, or has no effect."""
    first, second = operated(engine), operated(engine, days=(-100, -50))
    assert first == second
    provider = Provider(heartrates([]))
    settle(engine, provider.fetcher(engine, settings))
    one = only(engine)
    assert (one.requested_by, one.status, one.chunks, one.chunks_done) == ("operator", "complete", 2, 2)
    assert (one.window_start, one.window_end) == (FIRST - 100 * DAY, FIRST + 10 * DAY)
    assert len({chunk.message_id for chunk in chunks_of(engine, first)}) == 2


# Plans


def connect(engine: Engine, settings: Settings, user: str, *providers: str) -> None:
    bodies = [event("provider.connection.created", user, {"provider": {"slug": name}}) for name in providers]
    apply(engine, settings, *map(delivery, bodies))


def test_by_default_everything_is_planned(engine: Engine, settings: Settings) -> None:
    """Breaks if a provider or resource of the user is left out, or a discontinued resource is requested."""
    connect(engine, settings, "u1", "oura", "garmin")
    connect(engine, settings, "u2", "fitbit")
    names = [name for name, one in catalogue().items() if one.has_history]
    found = [(one.provider, one.resource) for one in planned(engine, settings)]
    assert found == [(provider, name) for provider in ("garmin", "oura") for name in names]
    assert {one.provider for one in planned(engine, settings, user_id="nobody")} == {""}
    assert [one.resource for one in planned(engine, settings, user_id="nobody")] == names


CHOICES: list[tuple[dict[str, Any], dict[str, Any], set[tuple[str, str]]]] = [
    ({}, {"resources": ("sleep", "steps")}, {("garmin", "sleep"), ("garmin", "steps")}),
    ({}, {"resources": ("sleep",), "providers": ("oura", "polar")}, {("oura", "sleep"), ("polar", "sleep")}),
    ({"resources": ("sleep", "steps")}, {}, {("garmin", "sleep"), ("garmin", "steps")}),
    ({"resources": ("sleep",)}, {"resources": ("sleep", "steps")}, {("garmin", "sleep")}),
    ({"providers": ("oura",)}, {"resources": ("sleep",)}, set()),
    ({"providers": ("oura",)}, {"resources": ("sleep",), "providers": ("oura", "garmin")}, {("oura", "sleep")}),
    ({}, {"resources": ("sleep_stream", "device")}, {("garmin", "sleep_stream"), ("garmin", "device")}),
]


def test_only_selected_and_stored_resources_are_planned(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator cannot select, or excluded data is fetched."""
    connect(engine, settings, "u1", "garmin")
    for kept, wanted, found in CHOICES:
        plans = planned(engine, replace(settings, **kept), **wanted)
        assert sorted((one.provider, one.resource) for one in plans) == sorted(found), (kept, wanted)


def test_a_plan_changes_nothing_and_a_start_inserts_the_user(engine: Engine, settings: Settings) -> None:
    """Breaks if a plan starts a backfill, or a backfill has a user that does not exist."""
    plans = planned(engine, settings, resources=("sleep", "steps"))
    assert rows(engine, "SELECT 1 FROM headrace.backfills UNION ALL SELECT 1 FROM headrace.users") == []
    with transaction(engine) as connection:
        numbers = [backfill_admin.start(connection, one) for one in plans]
    assert rows(engine, "SELECT user_id, client_user_id FROM health.users") == [
        {"user_id": "u1", "client_user_id": None}
    ]
    assert due(engine) == numbers
    assert {(one.window_start, one.window_end) for one in listed(engine, Filter())} == {(FIRST, FIRST + 54 * DAY)}


def test_the_future_is_not_fetched(engine: Engine) -> None:
    """Breaks if future days count as fetched."""
    tomorrow = datetime.now(UTC) + DAY
    with transaction(engine) as connection:
        backfill_admin.start(
            connection, BackfillPlan("junction", "u1", "garmin", "sleep", FIRST, tomorrow, 1, is_measured=False)
        )
    end = only(engine).window_end
    assert end is not None
    assert end < tomorrow - DAY / 2


# Limits of claims


@pytest.mark.parametrize(("per_user", "per_account", "taken"), [(2, 7, 7), (2, 100, 12), (9, 5, 5)])
def test_concurrent_claims_keep_the_limits(
    engine: Engine, settings: Settings, per_user: int, per_account: int, taken: int
) -> None:
    """Breaks if concurrent claims exceed a limit, or do not use it up."""
    users = [f"u{n}" for n in range(6)]
    names = ("workouts", "sleep", "heartrate", "steps")
    numbers = announce(engine, settings, *(notice(user, name) for user in users for name in names))
    with ExitStack() as stack:
        engines = [make_writer(settings) for _ in range(4)]
        for one in engines:
            stack.callback(one.dispose)

        def grab(thread: int) -> list[tuple[str, int]]:
            order = random.Random(thread).sample(numbers, len(numbers))
            found = [claim(engines[thread % 4], number, per_user, per_account) for number in order]
            return [(work.user_id, work.backfill_id) for work in found if work]

        with ThreadPoolExecutor(16) as pool:
            works = list(itertools.chain(*pool.map(grab, range(16))))
    assert len(works) == len(set(works)) == taken
    assert max(Counter(user for user, _ in works).values()) <= per_user
    assert rows(engine, "SELECT count(*) AS n FROM headrace.backfills WHERE lease_until > now()") == [{"n": taken}]


def test_a_paused_backfill_frees_its_place(engine: Engine, settings: Settings) -> None:
    """Breaks if paused or cancelled backfills count against the limits."""
    first, second, third = announce(engine, settings, *(notice(resource=n) for n in ("sleep", "steps", "hrv")))
    assert claim(engine, first, 1, 9)
    assert claim(engine, second, 1, 9) is None
    pause(engine, [first])
    assert claim(engine, first, 1, 9) is None
    assert claim(engine, second, 1, 9)
    cancel(engine, [second])
    assert claim(engine, third, 1, 9)


def test_due_alternates_between_users(engine: Engine, settings: Settings) -> None:
    """Breaks if one user's hundred backfills come before another user's first."""
    names = [name for name, one in catalogue().items() if one.kind == "timeseries"][:20]
    many = announce(engine, settings, *(notice("many", name) for name in names))
    few = announce(engine, settings, *(notice(f"few{n}", "sleep") for n in range(3)))
    assert set(due(engine, limit=4)) == {many[0], *few}
    assert due(engine, limit=4)[0] == many[0]
    two = announce(engine, settings, notice("few0", "steps"))
    assert set(due(engine, limit=6)) == {*many[:2], *few, *two}
    assert len(due(engine)) == 24


# Rejected requests


def dead_letter_rows(engine: Engine) -> list[dict[str, Any]]:
    return rows(engine, "SELECT aggregator, message_id, event_type, reason, sealed FROM headrace.dead_letters")


def test_a_rejected_request_is_a_dead_letter(engine: Engine, settings: Settings) -> None:
    """Breaks if the reason of a failure is not stored, or the response is stored unencrypted."""
    body = b'{"detail": [{"loc": ["query", "start_date"], "msg": "canary"}]}'
    provider = Provider(lambda _: httpx.Response(422, content=body))
    (number,) = announce(engine, settings, notice())
    assert provider.fetcher(engine, settings).run(number) == []
    one = only(engine)
    assert (one.status, one.error, one.finished_at is None) == ("failed", "status 422", False)
    (dead_letter,) = dead_letter_rows(engine)
    assert (dead_letter["event_type"], dead_letter["reason"]) == ("fetch.heartrate", "status 422")
    assert b"canary" not in dead_letter["sealed"]
    assert bodies(engine, "dead_letters") == [body]
    for _ in range(2):
        assert resume(engine, [number]) == [number]
        settle(engine, provider.fetcher(engine, settings))
        assert [one["message_id"] for one in dead_letter_rows(engine)] == [dead_letter["message_id"]]
    assert len(provider.requests) == 3
    resume(engine, [number])
    provider.answer = heartrates(daily(10))
    settle(engine, provider.fetcher(engine, settings))
    assert (only(engine).status, only(engine).error) == ("complete", None)


def test_two_rejected_requests_are_two_dead_letters(engine: Engine, settings: Settings) -> None:
    """Breaks if one rejected request hides another."""
    provider = Provider(lambda _: httpx.Response(422, json={}))
    announce(engine, settings, notice(), notice("u2"), notice(resource="workouts"))
    settle(engine, provider.fetcher(engine, settings))
    assert sorted(one["event_type"] for one in dead_letter_rows(engine)) == ["fetch.heartrate"] * 2 + ["fetch.workouts"]


def test_rejected_records_stay_as_the_error(engine: Engine, settings: Settings) -> None:
    """Breaks if a backfill with rejected records shows no error because its last page was valid."""
    refusing = iter([{"id": ""}])

    def answer(request: httpx.Request) -> httpx.Response:
        page: dict[str, Any] = workouts(daily(200))(request).json()
        return httpx.Response(200, json={"workouts": [*page["workouts"], *refusing]})

    announce(engine, settings, notice(resource="workouts", days=(0, 200)))
    settle(engine, Provider(answer).fetcher(engine, settings))
    one = only(engine)
    assert (one.status, one.records, (one.error or "")[:9]) == ("complete", 200, "1 refused")


def test_a_failure_is_cleared_by_the_next_page(engine: Engine, settings: Settings) -> None:
    """Breaks if a complete backfill shows a transient error."""
    provider = Provider(heartrates(daily(30)))
    inner = provider.answer
    provider.answer = lambda request: httpx.Response(500) if len(provider.requests) == 2 else inner(request)
    (number,) = announce(engine, settings, notice(days=(0, 30)))
    provider.fetcher(engine, settings).run(number)
    assert (only(engine).error, only(engine).attempts) == ("status 500", 1)
    settle(engine, provider.fetcher(engine, settings))
    assert (only(engine).status, only(engine).error) == ("complete", None)
