"""The operator's hand on backfills: how far they are, stopping them anywhere, going on, and what more would cost."""

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
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, apply, delivery, event, rows
from tests.support.backfills import STATES, announce, change, hurry, notice, planned, put, settle
from tests.support.cases import Failures
from tests.support.database import emptied
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
    """A deployment that may read history, and as fast as it likes."""
    return replace(settings, broker_url=broker_url, junction_api_key=API_KEY, request_rate="1000000/second")


def only(engine: Engine) -> Backfill:
    """The one backfill there is."""
    (one,) = listed(engine, Filter())
    return one


def killed_at(answer: Answer, number: int) -> Provider:
    """A provider that sees the worker die at the request of this number."""
    provider = Provider(answer)

    def deadly(request: httpx.Request) -> httpx.Response:
        if len(provider.asked) == number:
            raise Killed
        return answer(request)

    provider.answer = deadly
    return provider


def walked(engine: Engine, settings: Settings, provider: Provider, number: int) -> Backfill:
    """The backfill after a worker has gone on with it until it died."""
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


# How far


def test_what_nobody_has_begun_is_at_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a backfill that waits shows progress, a rate, or an end that nobody can know."""
    announce(engine, settings, notice(days=(0, 54)))
    one = only(engine)
    assert (one.status, one.share, one.seconds, one.rate, one.left) == ("pending", 0, None, None, None)
    assert (one.chunks, one.chunks_done, one.records, one.pages) == (1, 0, 0, 0)


def test_the_share_is_what_was_walked(engine: Engine, settings: Settings) -> None:
    """Breaks if progress is told that was not made, or a slice counts before its last page."""
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
            (number,) = announce(engine, settings, notice(days=(0, 54)))  # four slices of a fortnight, with the margins
            one = walked(engine, settings, killed_at(heartrates(daily(60), size), request_number), number)
            assert one.status == "running"
            assert one.share == pytest.approx(share)
            (chunk,) = chunks_of(engine, number)
            assert (chunk.amid, chunk.pages) == (amid is not None, amid or 0)
            assert (chunk.window_end + DAY - chunk.slice_end) / (56 * DAY) == pytest.approx(share)
            assert one.pages == request_number - 1
    assert failures == {}


@pytest.mark.parametrize(("request_number", "share", "done"), [(1, 0, 0), (2, 0.25, 0), (3, 0.5, 1), (4, 0.75, 1)])
def test_two_chunks_are_one_way(
    engine: Engine, settings: Settings, request_number: int, share: float, done: int
) -> None:
    """Breaks if one of two chunks looks like the whole, or between them progress falls back."""
    notices = (notice(days=(0, 26), final=False), notice(days=(30, 56)))
    number, again = announce(engine, settings, *notices)
    assert number == again
    one = walked(engine, settings, killed_at(heartrates(daily(60)), request_number), number)
    assert one.share == pytest.approx(share)
    assert (one.chunks, one.chunks_done) == (2, done)
    assert [chunk.window_end for chunk in chunks_of(engine, number)] == [FIRST + 56 * DAY, FIRST + 26 * DAY]
    settle(engine, Provider(heartrates(daily(60))).fetcher(engine, settings), 1)
    hurry(engine, leases=True)
    settle(engine, Provider(heartrates(daily(60))).fetcher(engine, settings))
    one = only(engine)
    assert (one.status, one.share, one.chunks_done, one.left) == ("complete", 1, 2, None)
    assert {chunk.status for chunk in chunks_of(engine, number)} == {"done"}


def test_what_is_left_follows_from_what_was_done(engine: Engine, settings: Settings) -> None:
    """Breaks if the time left, or the rate, is made up."""
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


def test_nobody_divides_by_nothing() -> None:
    """Breaks if a backfill that has just begun ends the picture, or one that rests is said to end soon."""
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


def test_the_list_is_in_the_order_of_interest(engine: Engine, settings: Settings) -> None:
    """Breaks if what runs stands below what is over, or the oldest of its kind first."""
    names = ("workouts", "sleep", "activity", "body", "meal", "heartrate", "steps", "weight", "glucose", "hrv")
    numbers = announce(engine, settings, *(notice(resource=name) for name in names))
    states = [
        "failed",
        "running",
        "pending",
        "complete",
        "paused",
        "cancelled",
        "running",
        "pending",
        "paused",
        "failed",
    ]
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
    ({"user_id": "u1"}, {0, 1}),
    ({"user_id": "nobody"}, set()),
    ({"provider": "garmin"}, {0, 1, 2, 3}),
    ({"provider": "oura"}, set()),
    ({"resource": "sleep"}, {1, 3}),
    ({"states": ("paused", "failed")}, {1, 2}),
    ({"states": ("complete",)}, set()),
    ({"user_id": "u2", "resource": "sleep", "states": ("pending",)}, {3}),
    ({"user_id": "u2", "states": ("running",)}, set()),
]


def test_a_filter_leaves_out_the_rest(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator sees, or stops, what was not meant."""
    notices = [notice(user, name) for user in ("u1", "u2") for name in ("workouts", "sleep")]
    numbers = announce(engine, settings, *notices)
    pause(engine, [numbers[1]])
    put(engine, numbers[2], "failed")
    for wanted, found in FILTERS:
        assert {numbers.index(one.id) for one in listed(engine, Filter(**wanted))} == found, wanted
        picked = Filter(ids=(numbers[0], numbers[3], 404), **wanted)
        assert {numbers.index(one.id) for one in listed(engine, picked)} == found & {0, 3}, wanted


# Stopping and going on


@pytest.mark.parametrize(
    ("do", "changes"),
    [
        (pause, {"pending": "paused", "running": "paused"}),
        (cancel, {"pending": "cancelled", "running": "cancelled", "paused": "cancelled"}),
        (resume, {"paused": "", "failed": "", "cancelled": ""}),
    ],
)
def test_each_hand_in_each_state(engine: Engine, settings: Settings, do: Do, changes: dict[str, str]) -> None:
    """Breaks if what is over begins again by a pause, or what was stopped cannot be gone on with."""
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


def test_what_is_resumed_is_due_at_once(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator who resumes waits for the pause after the failure that ended it."""
    (number,) = announce(engine, settings, notice())
    pause(engine, [number])
    change(engine, number, "due_at = now() + interval '1 hour'")
    assert due(engine) == []
    assert resume(engine, [number]) == [number]
    assert due(engine) == [number]


@pytest.mark.parametrize("do", [pause, cancel, resume])
def test_what_is_not_there_is_left_alone(engine: Engine, settings: Settings, do: Do) -> None:
    """Breaks if a number that was mistyped ends in an error, or hits something else."""
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
    """A provider at whose request of this number an operator does something to all there is."""
    provider = Provider(answer)

    def stop(request: httpx.Request) -> httpx.Response:
        if len(provider.asked) == at:
            for do in does:
                assert do(engine, [one.id for one in listed(engine, Filter())])
        return answer(request)

    provider.answer = stop
    return provider


def test_a_stop_amid_a_page_costs_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a page that is on its way is lost or asked for twice, or more is asked for after the stop."""
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
                assert len(provider.asked) == at
                stored = rows(engine, f"SELECT count(*) AS n FROM health.{resource}")[0]["n"]
                one = only(engine)
                assert one.status == ("paused" if stop is pause else "cancelled")
                assert one.records == stored > 0
                settle(engine, provider.fetcher(engine, settings))
                assert len(provider.asked) == at
                assert resume(engine, [number]) == [number]
                settle(engine, provider.fetcher(engine, settings))
                pages = Counter(
                    str(one.url) for one in provider.asked if resource == "workouts" or "summary" not in one.url.path
                )
                assert set(pages.values()) == {1}
                assert rows(engine, f"SELECT count(*) AS n FROM health.{resource}") == [{"n": records}]
                one = only(engine)
                assert (one.status, one.records, one.share, one.error) == ("complete", records, 1, None)
    assert failures == {}


def test_a_stop_costs_nothing_where_pages_are_committed_together(engine: Engine, settings: Settings) -> None:
    """Breaks if pages that were read around the stop are lost or asked for twice, or if it is never noticed."""
    (number,) = announce(engine, settings, notice(days=(0, 20)))
    provider = stopping(engine, heartrates(hourly(20), 20), 3, pause)
    assert provider.fetcher(engine, settings).run(number) == []
    one = only(engine)
    assert len(provider.asked) == CommitLimits().pages
    assert (one.status, one.records) == ("paused", CommitLimits().pages * 20)
    assert resume(engine, [number]) == [number]
    settle(engine, provider.fetcher(engine, settings))
    assert set(Counter(str(one.url) for one in provider.asked).values()) == {1}
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 480}]
    assert only(engine).status == "complete"


@pytest.mark.parametrize(
    ("status_code", "stop"), [(500, pause), (404, pause), (422, cancel), (413, pause), (429, cancel)]
)
def test_a_stop_amid_a_failure_stays(engine: Engine, settings: Settings, status_code: int, stop: Do) -> None:
    """Breaks if what an operator has stopped fails or goes on, because of the answer that was on its way."""
    refused = httpx.Response(status_code, headers={"retry-after": "0"})
    provider = stopping(engine, lambda _: refused, 1, stop)
    (number,) = announce(engine, settings, notice(days=(0, 3)))
    provider.fetcher(engine, settings).run(number)
    settle(engine, provider.fetcher(engine, settings), 3)
    assert only(engine).status == ("paused" if stop is pause else "cancelled")
    assert len(provider.asked) == 1
    assert resume(engine, [number])
    provider.answer = heartrates(hourly(3))
    settle(engine, provider.fetcher(engine, settings), 80)
    assert (only(engine).status, only(engine).records) == ("complete", 72)


def test_stopped_and_resumed_before_the_page_came(engine: Engine, settings: Settings) -> None:
    """Breaks if the worker of before and the one of after both go on, and a page counts twice."""
    inner = heartrates(hourly(3), 10)

    def finish(engine: Engine, ids: Sequence[int]) -> list[int]:
        for number in ids:
            Provider(inner).fetcher(engine, settings).run(number)
        return list(ids)

    provider = stopping(engine, inner, 3, pause, resume, finish)
    (number,) = announce(engine, settings, notice(days=(0, 3)))
    assert provider.fetcher(engine, settings, pages=1).run(number) == []
    assert len(provider.asked) == 3
    assert (only(engine).status, only(engine).records, only(engine).pages) == ("complete", 72, 8)


def test_a_worker_that_dies_after_the_last_page(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a history of which every page is stored shows as running for ever."""

    def die(*_: object) -> None:
        raise Killed

    provider = Provider(heartrates(hourly(3)))
    (number,) = announce(engine, settings, notice(days=(0, 3)))
    with monkeypatch.context() as patched:
        patched.setattr(backfills, "next_chunk", die)
        with pytest.raises(Killed):
            provider.fetcher(engine, settings).run(number)
    hurry(engine, leases=True)
    settle(engine, provider.fetcher(engine, settings))
    assert len(provider.asked) == 1
    assert (only(engine).status, only(engine).chunks_done) == ("complete", 1)


def test_a_notice_waits_with_what_is_paused(engine: Engine, settings: Settings) -> None:
    """Breaks if a notice sets going what an operator has paused, or is forgotten because it came meanwhile."""
    provider = Provider(heartrates(daily(40)))
    (number,) = announce(engine, settings, notice(days=(20, 30), final=False))
    pause(engine, [number])
    assert announce(engine, settings, notice(days=(0, 10))) == [number]
    settle(engine, provider.fetcher(engine, settings))
    provider.fetcher(engine, settings).run(number)
    one = only(engine)
    assert (one.status, one.chunks, one.is_final_seen, provider.asked) == ("paused", 2, True, [])
    assert (one.window_start, one.window_end) == (FIRST, FIRST + 30 * DAY)
    resume(engine, [number])
    settle(engine, provider.fetcher(engine, settings))
    assert (only(engine).status, only(engine).chunks_done, len(provider.asked)) == ("complete", 2, 2)


def test_two_of_a_kind_are_never_open(engine: Engine, settings: Settings) -> None:
    """Breaks if an old pull is resumed beside the new one of the same history, or can never be resumed again."""
    for state, other in itertools.product(("failed", "cancelled"), ("pending", "running", "paused")):
        user = f"{state} {other}"
        (old,) = announce(engine, settings, notice(user))
        put(engine, old, state)
        (new,) = announce(engine, settings, notice(user))
        put(engine, new, other)
        assert old != new
        assert resume(engine, [old]) == []
        assert {one.id: one.status for one in listed(engine, Filter(user_id=user))} == {old: state, new: other}
        put(engine, new, "complete")
        assert resume(engine, [old]) == [old]


def test_of_two_that_are_resumed_at_once_the_first_goes_on(engine: Engine, settings: Settings) -> None:
    """Breaks if resuming everything ends in an error because two of them are of a kind."""
    numbers = []
    for _ in range(3):
        numbers += announce(engine, settings, notice())
        put(engine, numbers[-1], "failed")
    assert resume(engine, numbers[::-1]) == [numbers[2]]
    assert [one.status for one in listed(engine, Filter())] == ["running", "failed", "failed"]


@pytest.mark.parametrize("beside", ["operator", "another person", "another resource"])
def test_what_is_of_another_kind_does_not_stand_in_the_way(engine: Engine, settings: Settings, beside: str) -> None:
    """Breaks if a pull that has failed cannot be resumed while something else is open."""
    (old,) = announce(engine, settings, notice())
    put(engine, old, "failed")
    if beside == "operator":
        operated(engine)
    else:
        announce(engine, settings, notice("u2") if beside == "another person" else notice(resource="steps"))
    assert resume(engine, [old]) == [old]


# What an operator starts, beside what was announced


def test_of_one_history_only_one_is_fetched_at_a_time(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator's backfill and the aggregator's ask for the same at once."""
    (announced,) = announce(engine, settings, notice())
    started, elsewhere, others = operated(engine), operated(engine, "steps"), operated(engine, user="u2")
    held = claim(engine, announced, 9, 9)
    assert held is not None
    assert claim(engine, started, 9, 9) is None
    assert all(claim(engine, number, 9, 9) for number in (elsewhere, others))
    release(engine, held, 0)
    assert claim(engine, started, 9, 9) is not None
    assert claim(engine, announced, 9, 9) is None


def test_whoever_had_to_wait_comes_next(engine: Engine, settings: Settings) -> None:
    """Breaks if what had to wait for another backfill of the same history waits for the sweep."""
    (announced,) = announce(engine, settings, notice())
    started = operated(engine)
    again = Provider(heartrates([])).fetcher(engine, settings).run(announced)
    assert [one.backfill_id for one in again] == [started]


def test_an_operators_chunk_is_no_final_notice(engine: Engine, settings: Settings) -> None:
    """Breaks if a pull of which more was announced is called complete because an operator's is."""
    announce(engine, settings, notice(final=False))
    operated(engine)
    settle(engine, Provider(heartrates(daily(20))).fetcher(engine, settings))
    found = {one.requested_by: (one.status, one.chunks, one.is_final_seen) for one in listed(engine, Filter())}
    assert found == {"notice": ("running", 1, False), "operator": ("complete", 1, True)}


def test_a_final_notice_is_not_the_operators_end(engine: Engine, settings: Settings) -> None:
    """Breaks if what an operator has started is dropped because the aggregator's pull is complete."""
    (announced,) = announce(engine, settings, notice())
    started = operated(engine, days=(-400, -300))
    provider = Provider(heartrates([]))
    fetcher = provider.fetcher(engine, settings)
    fetcher.run(announced)
    found = {one.id: (one.status, one.chunks) for one in listed(engine, Filter())}
    assert found == {announced: ("complete", 1), started: ("pending", 1)}
    settle(engine, fetcher)
    assert {one.status for one in listed(engine, Filter())} == {"complete"}


def test_a_late_notice_does_not_open_what_an_operator_has_had(engine: Engine, settings: Settings) -> None:
    """Breaks if a chunk of the aggregator's is put to a backfill that an operator has started and seen end."""
    started = operated(engine)
    settle(engine, Provider(heartrates([])).fetcher(engine, settings))
    (announced,) = announce(engine, settings, notice(final=False))
    assert announced != started
    assert {one.id: one.status for one in listed(engine, Filter())} == {started: "complete", announced: "pending"}


def test_what_is_started_twice_is_one_with_two_windows(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator who asks for more while the first still runs gets an error, or nothing."""
    first, second = operated(engine), operated(engine, days=(-100, -50))
    assert first == second
    provider = Provider(heartrates([]))
    settle(engine, provider.fetcher(engine, settings))
    one = only(engine)
    assert (one.requested_by, one.status, one.chunks, one.chunks_done) == ("operator", "complete", 2, 2)
    assert (one.window_start, one.window_end) == (FIRST - 100 * DAY, FIRST + 10 * DAY)
    assert len({chunk.message_id for chunk in chunks_of(engine, first)}) == 2


# What is planned


def connect(engine: Engine, settings: Settings, user: str, *providers: str) -> None:
    """Connects a person."""
    bodies = [event("provider.connection.created", user, {"provider": {"slug": name}}) for name in providers]
    apply(engine, settings, *map(delivery, bodies))


def test_without_a_word_everything_is_planned(engine: Engine, settings: Settings) -> None:
    """Breaks if a provider or a resource of a person is left out, or one that the aggregator has given up is asked."""
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


def test_only_what_is_wanted_and_kept_is_planned(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator cannot choose, or what the settings leave out is fetched all the same."""
    connect(engine, settings, "u1", "garmin")
    for kept, wanted, found in CHOICES:
        plans = planned(engine, replace(settings, **kept), **wanted)
        assert sorted((one.provider, one.resource) for one in plans) == sorted(found), (kept, wanted)


def test_a_plan_changes_nothing_and_a_start_makes_known(engine: Engine, settings: Settings) -> None:
    """Breaks if asking for the price starts something, or a backfill is of somebody whom nobody knows."""
    plans = planned(engine, settings, resources=("sleep", "steps"))
    assert rows(engine, "SELECT 1 FROM headrace.backfills UNION ALL SELECT 1 FROM headrace.users") == []
    with transaction(engine) as connection:
        numbers = [backfill_admin.start(connection, one) for one in plans]
    assert rows(engine, "SELECT user_id, client_user_id FROM health.users") == [
        {"user_id": "u1", "client_user_id": None}
    ]
    assert due(engine) == numbers
    assert {(one.window_start, one.window_end) for one in listed(engine, Filter())} == {(FIRST, FIRST + 54 * DAY)}


def test_nothing_is_fetched_of_the_future(engine: Engine) -> None:
    """Breaks if days that nobody has lived yet are taken for fetched."""
    tomorrow = datetime.now(UTC) + DAY
    with transaction(engine) as connection:
        backfill_admin.start(
            connection, BackfillPlan("junction", "u1", "garmin", "sleep", FIRST, tomorrow, 1, is_measured=False)
        )
    end = only(engine).window_end
    assert end is not None
    assert end < tomorrow - DAY / 2


# Who may when


@pytest.mark.parametrize(("per_user", "per_account", "taken"), [(2, 7, 7), (2, 100, 12), (9, 5, 5)])
def test_places_are_counted_exactly(
    engine: Engine, settings: Settings, per_user: int, per_account: int, taken: int
) -> None:
    """Breaks if workers that claim at once get more places than there are, or leave some empty."""
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


def test_a_place_that_was_given_up_is_free(engine: Engine, settings: Settings) -> None:
    """Breaks if what is paused or cancelled holds up others."""
    first, second, third = announce(engine, settings, *(notice(resource=n) for n in ("sleep", "steps", "hrv")))
    assert claim(engine, first, 1, 9)
    assert claim(engine, second, 1, 9) is None
    pause(engine, [first])
    assert claim(engine, first, 1, 9) is None
    assert claim(engine, second, 1, 9)
    cancel(engine, [second])
    assert claim(engine, third, 1, 9)


def test_everybody_has_a_turn(engine: Engine, settings: Settings) -> None:
    """Breaks if one person's hundred backfills come before somebody else's first."""
    names = [name for name, one in catalogue().items() if one.kind == "timeseries"][:20]
    many = announce(engine, settings, *(notice("many", name) for name in names))
    few = announce(engine, settings, *(notice(f"few{n}", "sleep") for n in range(3)))
    assert set(due(engine, limit=4)) == {many[0], *few}
    assert due(engine, limit=4)[0] == many[0]
    two = announce(engine, settings, notice("few0", "steps"))
    assert set(due(engine, limit=6)) == {*many[:2], *few, *two}
    assert len(due(engine)) == 24


# Refused


def letters(engine: Engine) -> list[dict[str, Any]]:
    """What is set aside."""
    return rows(engine, "SELECT aggregator, message_id, event_type, reason, sealed FROM headrace.dead_letters")


def test_a_page_that_is_refused_is_a_dead_letter(engine: Engine, settings: Settings) -> None:
    """Breaks if nobody can see why a history has failed, or what the provider says lies open in the database."""
    body = b'{"detail": [{"loc": ["query", "start_date"], "msg": "canary"}]}'
    provider = Provider(lambda _: httpx.Response(422, content=body))
    (number,) = announce(engine, settings, notice())
    assert provider.fetcher(engine, settings).run(number) == []
    one = only(engine)
    assert (one.status, one.error, one.finished_at is None) == ("failed", "status 422", False)
    (letter,) = letters(engine)
    assert (letter["event_type"], letter["reason"]) == ("fetch.heartrate", "status 422")
    assert b"canary" not in letter["sealed"]
    about = f"{letter['aggregator']}:{letter['message_id']}"
    assert Sealer([ENCRYPTION_KEY]).open(letter["sealed"], about) == body
    for _ in range(2):
        assert resume(engine, [number]) == [number]
        settle(engine, provider.fetcher(engine, settings))
        assert [one["message_id"] for one in letters(engine)] == [letter["message_id"]]
    assert len(provider.asked) == 3
    resume(engine, [number])
    provider.answer = heartrates(daily(10))
    settle(engine, provider.fetcher(engine, settings))
    assert (only(engine).status, only(engine).error) == ("complete", None)


def test_two_that_are_refused_are_two_letters(engine: Engine, settings: Settings) -> None:
    """Breaks if one refusal hides another."""
    provider = Provider(lambda _: httpx.Response(422, json={}))
    announce(engine, settings, notice(), notice("u2"), notice(resource="workouts"))
    settle(engine, provider.fetcher(engine, settings))
    assert sorted(one["event_type"] for one in letters(engine)) == ["fetch.heartrate"] * 2 + ["fetch.workouts"]


def test_what_was_refused_is_told_to_the_end(engine: Engine, settings: Settings) -> None:
    """Breaks if a history of which records were left out shows no error because its last page was good."""
    refusing = iter([{"id": ""}])

    def answer(request: httpx.Request) -> httpx.Response:
        page: dict[str, Any] = workouts(daily(200))(request).json()
        return httpx.Response(200, json={"workouts": [*page["workouts"], *refusing]})

    announce(engine, settings, notice(resource="workouts", days=(0, 200)))
    settle(engine, Provider(answer).fetcher(engine, settings))
    one = only(engine)
    assert (one.status, one.records, (one.error or "")[:9]) == ("complete", 200, "1 refused")


def test_a_failure_is_forgotten_with_the_next_page(engine: Engine, settings: Settings) -> None:
    """Breaks if a history that is complete still shows the bad minute that it had."""
    provider = Provider(heartrates(daily(30)))
    inner = provider.answer
    provider.answer = lambda request: httpx.Response(500) if len(provider.asked) == 2 else inner(request)
    (number,) = announce(engine, settings, notice(days=(0, 30)))
    provider.fetcher(engine, settings).run(number)
    assert (only(engine).error, only(engine).attempts) == ("status 500", 1)
    settle(engine, provider.fetcher(engine, settings))
    assert (only(engine).status, only(engine).error) == ("complete", None)
