"""Erasing: nothing of a person is left or comes back, whatever is under way at that moment; nobody else's goes."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, Engine, event, text

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal
from app.errors import TryLater, UserErased
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, START, apply, delivery, heartrate, message_id, rows, workout
from tests.support import event as envelope
from tests.support.backfills import announce, notice
from tests.support.commits import struck
from tests.support.provider import Killed, Provider
from workers.ingest.apply import UNKNOWN, Applier
from workers.operate.erase import Eraser
from workers.store import backfill_admin, backfills, dead_letters, digests, erase, users
from workers.store.coverage import ResourceKey
from workers.store.crashes import record_crash
from workers.store.dead_letters import add_dead_letter
from workers.store.engine import make_writer, transaction
from workers.store.gaps import Gap, keep_gaps
from workers.store.users import upsert_users

USER, OTHER = "0c7a1a9e-person", "11111111-other"
CANARY = "canary-5f0f5c0e"
TABLES = """
SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables WHERE schemaname IN ('health', 'headrace')"""


@pytest.fixture
def reading(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may read history, and as fast as it likes."""
    return replace(settings, broker_url=broker_url, junction_api_key="sk_us_tests", request_rate="1000000/second")


def connected(user: str) -> Delivery:
    """A delivery of a connection that broke."""
    data = {"provider": {"slug": "garmin"}, "error_type": CANARY}
    return delivery(envelope("provider.connection.error", user, data, client_user_id=f"{user}-client"))


def live(user: str, number: int = 0) -> list[Delivery]:
    """One of each kind of delivery about somebody; the values are marked."""
    bodies = [
        workout(user, f"w{number}", title=CANARY),
        envelope("daily.data.workout_stream.created", user, {"workout_id": f"w{number}", "source": {"slug": "garmin"}}),
        heartrate(user, dict.fromkeys(range(30), 60 + number), device_id=CANARY),
        envelope("raw.garmin.dailies", user, {"note": CANARY}),
    ]
    named = [delivery(body | {"client_user_id": f"{user}-client"}) for body in bodies]
    return [*named, connected(user), notice(user, "sleep"), notice(user, "heartrate")]


def foreign(*within: Delivery) -> Delivery:
    """A message that a worker could not read and set aside."""
    return seal(UNKNOWN, Receipt(message_id(START)), pack(within).encode(), Sealer([ENCRYPTION_KEY]))


def set_aside(engine: Engine, *letters: Delivery) -> None:
    """Dead letters, as they come about."""
    with transaction(engine) as connection:
        for letter in letters:
            add_dead_letter(connection, letter, None, "why")


def plant(engine: Engine, settings: Settings, user: str) -> None:
    """Something of somebody wherever there can be something."""
    refused = workout(user, "bad", title=f"{CANARY}\u0000")
    deliveries = [*live(user), delivery(refused), delivery(f'{{"user_id": "{user}", "note": "{CANARY}'.encode())]
    numbers = Applier(engine, settings).apply(pack(deliveries)).backfills
    evidence = f"fetch-{numbers[0]}-0123456789abcdef"
    set_aside(engine, delivery(CANARY.encode(), name=evidence), foreign(delivery(workout(user, "w9", title=CANARY))))
    record_crash(engine, deliveries[0].key)
    with transaction(engine) as connection:
        keep_gaps(connection, "pulls", [user], [Gap(ResourceKey(user, "garmin", "sleep"), "provider", CANARY)])


def erased(engine: Engine, settings: Settings, user: str = USER) -> dict[str, int]:
    """Erases somebody, and says what was removed."""
    return Eraser(engine, settings).erase(user, lambda _: None).removed


def holding(engine: Engine, value: str) -> set[str]:
    """The tables in which a value stands anywhere; what is sealed is opened."""
    found = {
        row["name"]
        for row in rows(engine, TABLES)
        if rows(engine, f"SELECT 1 FROM {row['name']} t WHERE t::text LIKE :value LIMIT 1", value=f"%{value}%")
    }
    sealer = Sealer([ENCRYPTION_KEY])
    for table in ("headrace.archive", "headrace.dead_letters"):
        for row in rows(engine, f"SELECT aggregator || ':' || message_id AS about, sealed FROM {table}"):
            body = sealer.open(bytes(row["sealed"]), row["about"])
            if value.encode() in body:
                found.add(f"{table}, sealed")
    return found


MAY_NAME = {"headrace.users", "headrace.audit"}  # the tombstone, and who put it up


def everything(engine: Engine) -> dict[str, Any]:
    """Everything that readers see of whoever is there, and the letters."""
    letters = rows(engine, "SELECT message_id FROM headrace.dead_letters ORDER BY 1")
    return {
        "views": digests.digests(engine),
        "letters": letters,
        "archive": rows(engine, "SELECT * FROM headrace.archive"),
    }


# What goes, and what does not


def test_nothing_of_the_person_is_left_and_nothing_of_others_goes(engine: Engine, settings: Settings) -> None:
    """Breaks if a value stays behind in any table, open or sealed, or if somebody else loses one."""
    plant(engine, settings, OTHER)
    before = everything(engine)
    plant(engine, settings, USER)
    assert len(holding(engine, USER)) >= 12
    counted = Eraser(engine, settings).count(USER)
    removed = erased(engine, settings)
    assert removed == counted
    assert holding(engine, USER) == MAY_NAME
    assert everything(engine)["letters"] == before["letters"]
    assert everything(engine)["archive"] == before["archive"]
    theirs = ("connections", "workouts", "heartrate", "workout_stream", "backfills")
    for view in theirs:
        assert {row["user_id"] for row in rows(engine, f"SELECT user_id FROM health.{view}")} == {OTHER}, view
    erased(engine, settings, OTHER)
    assert holding(engine, CANARY) == set()
    assert holding(engine, f"{USER}-client") == set()


def test_the_receipt_counts_what_went(engine: Engine, settings: Settings) -> None:
    """Breaks if the receipt, which is the evidence, says something else than happened."""
    plant(engine, settings, USER)
    assert erased(engine, settings) == {
        "backfills": 3,
        "chunks": 3,
        "connections": 1,
        "dead_letters": 4,
        "deliveries": 8,
        "gaps": 1,
        "archive": 7,
        "samples": 30,
        "series": 1,
        "crash_counts": 1,
        "workout_stream": 1,
        "workouts": 1,
    }
    assert erased(engine, settings) == {}


def test_the_account_still_adds_up(engine: Engine, settings: Settings) -> None:
    """Breaks if erasing somebody makes a delivery look as if it had been lost."""
    plant(engine, settings, USER)
    query = "SELECT message_id, event_type, outcome, error FROM health.deliveries ORDER BY 1"
    before = [row for row in rows(engine, query) if row["message_id"]]
    erased(engine, settings)
    after = {row["message_id"]: row for row in rows(engine, query)}
    assert [after[row["message_id"]] for row in before] == before
    assert rows(engine, "SELECT 1 FROM headrace.deliveries WHERE user_id IS NOT NULL") == []


def test_a_table_that_the_catalogue_has_forgotten_is_emptied_too(engine: Engine, settings: Settings) -> None:
    """Breaks if what was stored of a resource that is no more, or in a table that is new, outlives its owner."""
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE headrace.old_one (user_id text)"))
        connection.execute(text("INSERT INTO headrace.old_one VALUES (:one), (:other)"), {"one": USER, "other": OTHER})
    try:
        assert erased(engine, settings) == {"old_one": 1}
        assert rows(engine, "SELECT user_id FROM headrace.old_one") == [{"user_id": OTHER}]
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE headrace.old_one"))


@pytest.mark.parametrize("size", [1, 7, 30, 31])
def test_many_rows_go_in_batches(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Breaks if ten years of samples are one transaction, or a batch of any size leaves some of them."""
    plant(engine, settings, USER)
    monkeypatch.setattr(erase, "BATCH", size)
    limit: list[int] = []
    erase_all = erase.remove
    monkeypatch.setattr(erase, "remove", lambda *given: (limit.append(n) or (t, n) for t, n in erase_all(*given)))  # type: ignore[func-returns-value]
    assert erased(engine, settings)["samples"] == 30
    assert max(limit) <= size
    assert holding(engine, USER) == MAY_NAME


def test_killed_anywhere_and_begun_again_it_ends(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Breaks if a run that was broken off leaves something that the next one does not find any more."""
    monkeypatch.setattr(erase, "BATCH", 10)
    step = 2 if full else 6  # both killed before a commit and after it
    for commit in range(1, 200, step):
        user = f"killed-{commit}"
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM headrace.deliveries"))  # each run walks through all of them
        plant(engine, settings, user)
        try:
            with struck(engine, commit, "after" if commit % 4 > 1 else "before"):
                erased(engine, settings, user)
        except Killed:
            erased(engine, settings, user)
            assert holding(engine, user) == MAY_NAME, commit
            assert holding(engine, CANARY) == set(), commit
        else:
            assert commit > 30
            return
    raise AssertionError("it never came to its end")


# Dead letters, of which nobody could say whose they are


def test_letters_are_looked_into(engine: Engine, settings: Settings) -> None:
    """Breaks if what could not be parsed keeps somebody's data, or if somebody else's letter goes with it."""
    theirs = [
        delivery(b'{"user_id": "' + USER.encode() + b'", "half'),
        delivery(b"user_id=" + USER.encode() + b"&x=1"),
        delivery(b'{"user_id": "0c7a1a9e\\u002dperson"}'),
        delivery(b'{"client_user_id": "7", "half'),
    ]
    others = [delivery(b'{"value": 7, "half'), delivery(b'{"user_id": "' + USER.encode() + b'-2"}'), delivery(b"hello")]
    apply(engine, settings, delivery(workout(USER) | {"client_user_id": "7"}))
    set_aside(engine, *theirs, *others)
    assert erased(engine, settings)["dead_letters"] == len(theirs)
    assert {one.message_id for one in dead_letters.listed(engine)} == {one.message_id for one in others}


def test_a_name_that_somebody_else_has_is_no_evidence(engine: Engine, settings: Settings) -> None:
    """Breaks if a person who was connected anew under another user_id loses what is theirs."""
    for user in (USER, OTHER):
        apply(engine, settings, delivery(workout(user) | {"client_user_id": "member-7"}))
    set_aside(engine, delivery(b'{"client_user_id": "member-7", "user_id": "' + OTHER.encode() + b'", "half'))
    receipt = Eraser(engine, settings).erase(USER, lambda _: None)
    assert receipt.others == (OTHER,)
    assert len(dead_letters.listed(engine)) == 1


def test_of_a_message_that_was_set_aside_the_others_land(engine: Engine, settings: Settings) -> None:
    """Breaks if a message with several people in it keeps the erased one, or takes the others along."""
    message = foreign(*(delivery(workout(user, title=CANARY)) for user in (USER, OTHER)))
    theirs_alone = foreign(delivery(b'{"user_id": "' + USER.encode() + b'", "half'))
    set_aside(engine, message, theirs_alone, foreign(delivery(workout("third"))))
    assert erased(engine, settings)["dead_letters"] == 3  # the half one was buried by itself, and then found
    assert rows(engine, "SELECT user_id FROM health.workouts") == [{"user_id": OTHER}]
    assert len(dead_letters.listed(engine)) == 1
    assert holding(engine, USER) == MAY_NAME


def test_what_cannot_be_opened_is_told(engine: Engine, settings: Settings) -> None:
    """Breaks if the receipt claims that nothing is left where nobody can know."""
    locked = seal("junction", Receipt("locked"), USER.encode(), Sealer([bytes(32)]))
    set_aside(engine, locked, seal(UNKNOWN, Receipt("newer"), b"\x93", Sealer([ENCRYPTION_KEY])))
    receipt = Eraser(engine, settings).erase(USER, lambda _: None)
    assert (receipt.unread, receipt.removed) == (2, {})


# The tombstone


def test_what_comes_late_is_ignored_and_harms_nobody(engine: Engine, settings: Settings) -> None:
    """Breaks if an event brings an erased person back in any form, is not in the account, or costs its neighbours."""
    first = live(USER)
    apply(engine, settings, *first)
    erased(engine, settings)
    before = rows(engine, "SELECT * FROM headrace.users")
    bad = delivery(workout(USER, "bad", title="a\u0000b"))
    strange = delivery(heartrate(USER, {0: 1}, slug="a\u0000b"))
    new = [*live(USER, 1), bad, strange]
    outcomes = apply(engine, settings, *first[:3], *new, *live(OTHER))
    assert outcomes == {"ignored": 3 + len(new) + 1, "applied": 6}
    assert rows(engine, "SELECT * FROM headrace.users WHERE erased_at IS NOT NULL") == before
    assert before[0]["client_user_id"] is None
    assert holding(engine, USER) == MAY_NAME
    ledger = {row["message_id"]: row for row in rows(engine, "SELECT * FROM health.deliveries")}
    for one in new:
        row = ledger[one.message_id]
        assert (row["outcome"], row["error"]) == ("ignored", "the user was erased")
    assert [ledger[one.message_id]["outcome"] for one in first[:3]] == ["applied"] * 3
    kept = {row["message_id"] for row in rows(engine, "SELECT message_id FROM headrace.archive")}
    assert not kept & {one.message_id for one in [*first, *new]}


def test_somebody_who_was_never_seen_is_kept_out(engine: Engine, settings: Settings) -> None:
    """Breaks if the events of somebody who was erased before the first one came are stored."""
    receipt = Eraser(engine, settings).erase(USER, lambda _: None)
    assert (receipt.before, receipt.removed) == ("unknown", {})
    assert apply(engine, settings, *live(USER)) == {"ignored": 7}
    assert holding(engine, USER) == MAY_NAME
    assert Eraser(engine, settings).erase(USER, lambda _: None).before == "erased"


def test_a_second_erasure_keeps_the_first_date(engine: Engine, settings: Settings) -> None:
    """Breaks if the tombstone moves, so that nobody can say since when somebody has been erased."""
    first = Eraser(engine, settings).erase(USER, lambda _: None)
    assert Eraser(engine, settings).erase(USER, lambda _: None).erased_at == first.erased_at


def test_a_replay_brings_nobody_back(engine: Engine, settings: Settings) -> None:
    """Breaks if what a replay had read before, or what was dead, is stored after."""
    sent, dying = live(USER), delivery(b"half")
    apply(engine, settings, *sent, dying)
    erased(engine, settings)
    whole = replace_body(dying, workout(USER))
    assert set(Applier(engine, settings).replay([*sent, whole]).outcomes) == {"ignored"}
    assert holding(engine, USER) == MAY_NAME
    assert dead_letters.listed(engine) == []
    (row,) = rows(engine, "SELECT outcome, error FROM health.deliveries WHERE message_id = :id", id=dying.message_id)
    assert row == {"outcome": "ignored", "error": "the user was erased"}


def replace_body(one: Delivery, body: dict[str, Any]) -> Delivery:
    """Another attempt of the same delivery, with another body."""
    return delivery(body, name=one.message_id)


def test_nobody_is_fetched_after_they_were_erased(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator's hand opens what an event may not, or a refused request is buried with what it held."""
    erased(engine, settings)
    plan = backfill_admin.BackfillPlan("junction", USER, "garmin", "sleep", START, START, 1, is_measured=True)
    with pytest.raises(UserErased, match=r"^0c7a1a9e-person was erased"), transaction(engine) as connection:
        backfill_admin.start(connection, plan)
    assert holding(engine, USER) == MAY_NAME


@pytest.mark.parametrize("status", [200, 422, 404, 500])
def test_a_page_that_is_under_way_is_not_written(engine: Engine, reading: Settings, status: int) -> None:
    """Breaks if an answer that comes after the erasure is stored, buried, or leaves the backfill there."""
    (number,) = announce(engine, reading, notice(USER))

    def answer(_: httpx.Request) -> httpx.Response:
        erased(engine, reading)
        data = heartrate(USER, {0: 60})["data"]["data"]
        page = {"groups": {"garmin": [{"source": {"provider": "garmin", "type": CANARY}, "data": data}]}}
        return httpx.Response(status, json=page)

    assert Provider(answer).fetcher(engine, reading).run(number) == [] or status == 500
    assert holding(engine, USER) == MAY_NAME
    assert holding(engine, CANARY) == set()
    assert backfills.due(engine) == []


def test_the_audit_says_who_did_what(engine: Engine, settings: Settings) -> None:
    """Breaks if nobody can show later when somebody was erased, by whom, and what went; or if that tells too much."""
    plant(engine, settings, USER)
    removed = erased(engine, settings)
    first, last = rows(engine, "SELECT operator, action, subject, detail, at FROM headrace.audit ORDER BY id")
    assert (first["action"], first["subject"], first["detail"]) == ("erase", USER, {})
    assert (last["action"], last["subject"], last["detail"]) == ("erased", USER, removed)
    assert first["operator"] == last["operator"] != ""
    (tombstone,) = rows(engine, "SELECT erased_at FROM health.users")
    assert tombstone["erased_at"] == first["at"]  # of one transaction


# At the same moment


@contextmanager
def held_at_commit(engine: Engine) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Whoever commits in another thread waits: it is told when somebody does, and they go on when they may."""
    waits, may_go, here = threading.Event(), threading.Event(), threading.get_ident()

    def hold(_: Connection) -> None:
        if threading.get_ident() != here and not waits.is_set():
            waits.set()
            may_go.wait(30)

    event.listen(engine, "commit", hold)
    try:
        yield waits, may_go
    finally:
        may_go.set()
        event.remove(engine, "commit", hold)


def without(name: str, words: str, instead: str = "") -> Callable[[pytest.MonkeyPatch], None]:
    """A statement of the guard, weakened."""

    def weaken(patch: pytest.MonkeyPatch) -> None:
        module = users if hasattr(users, name) else erase
        whole = str(getattr(module, name))
        assert words in whole
        patch.setattr(module, name, text(whole.replace(words, instead)))

    return weaken


NO_LOCK = without("KNOWN_USERS", "FOR KEY SHARE OF known")
NO_WAIT = without("LOCK", "FOR UPDATE")
NO_RECHECK = without("RECHECK_ROW", "WHERE", "WHERE false AND")


@pytest.mark.parametrize("weaken", [None, NO_LOCK, NO_WAIT], ids=["whole", "no lock", "no wait"])
@pytest.mark.parametrize("is_known", [True, False])
def test_whoever_is_amid_applying_is_waited_for(
    engine: Engine,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    weaken: Callable[..., None] | None,
    *,
    is_known: bool,
) -> None:
    """Breaks if rows are committed after they were looked for. Without either lock of the two, that is what happens.

    Of somebody who is not known yet, the new row itself is the lock.
    """
    if weaken:
        weaken(monkeypatch)
    if is_known:
        apply(engine, settings, delivery(workout(USER, "w0")))
    other = make_writer(settings)
    with ThreadPoolExecutor(2) as pool, held_at_commit(other) as (waits, may_go):
        applying = pool.submit(apply, other, settings, delivery(workout(USER)))
        assert waits.wait(20)
        erasing = pool.submit(erased, engine, settings)
        is_whole = weaken is None or not is_known
        is_early = bool(wait([erasing], 0.3 if is_whole else 20).done)
        may_go.set()
        assert applying.result(20) == {"applied": 1}
        erasing.result(20)
    other.dispose()
    assert is_early != is_whole
    assert (holding(engine, USER) == MAY_NAME) == is_whole


@pytest.mark.parametrize("weaken", [None, NO_RECHECK, NO_WAIT], ids=["whole", "no recheck", "no wait"])
def test_whoever_looked_before_and_locks_after_looks_again(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, weaken: Callable[..., None] | None
) -> None:
    """Breaks if a worker that stood still between its look at the users and its lock takes the erased one for alive.

    FOR KEY SHARE gives the row as it was, if it was only updated since.
    """
    if weaken:
        weaken(monkeypatch)
    apply(engine, settings, *(delivery(workout(user, "w0")) for user in (USER, "00-first")))
    other = make_writer(settings)
    with ThreadPoolExecutor(1) as pool, engine.connect() as holder:
        holder.execute(text("SELECT 1 FROM headrace.users WHERE user_id = '00-first' FOR UPDATE"))
        message = [delivery(workout(user)) for user in (USER, "00-first")]
        applying = pool.submit(apply, other, settings, *message)  # in the order of their ids: it waits for the first
        query = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        deadline = time.monotonic() + 20
        while not rows(engine, query) and time.monotonic() < deadline:
            time.sleep(0.01)
        erased(engine, settings)
        holder.rollback()
        outcomes = applying.result(20)
    other.dispose()
    is_whole = weaken is None
    assert (outcomes == {"applied": 1, "ignored": 1}) == is_whole
    assert (holding(engine, USER) == MAY_NAME) == is_whole


def test_those_who_began_later_do_not_hold_it_up(engine: Engine, settings: Settings) -> None:
    """Breaks if workers that are never all idle at once keep a tombstone from standing, or it keeps them from work."""
    apply(engine, settings, delivery(workout(USER)))
    stop = threading.Event()
    began = time.monotonic()

    def always(number: int) -> int:
        own, count = make_writer(settings), 0
        while not stop.is_set():
            with transaction(own) as connection:  # overlapping: one of the others is always amid
                upsert_users(connection, {USER: None})
                time.sleep(0.05 + number * 0.017)
            count += 1
        own.dispose()
        return count

    with ThreadPoolExecutor(6) as pool:
        busy = [pool.submit(always, number) for number in range(6)]
        time.sleep(0.5)
        began = time.monotonic()
        erased(engine, settings)
        took = time.monotonic() - began
        stop.set()
        assert all(one.result(20) > 0 for one in busy)
    assert took < 5


def test_two_that_name_the_same_person_do_not_deadlock(engine: Engine, settings: Settings) -> None:
    """Breaks if the lock of those who write is so strong that two who also name the person wait for each other."""
    apply(engine, settings, delivery(workout(USER)))
    together = threading.Barrier(4)

    def name(number: int) -> None:
        own = make_writer(settings)
        for turn in range(20):
            together.wait(20)
            with transaction(own) as connection:
                upsert_users(connection, {USER: (f"{number}-{turn}", START.replace(year=2027 + turn))})
        own.dispose()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(name, range(4)))


class Crowd:
    """Eight who apply and one who fetches, while a person is erased; `pause` is between a write and its commit."""

    def __init__(self, settings: Settings, pause: float) -> None:
        self.settings = settings
        self.engines = [make_writer(settings) for _ in range(5)]
        for engine in self.engines[:4]:
            event.listen(engine, "commit", lambda _: time.sleep(pause))

    def dispose(self) -> None:
        for engine in self.engines:
            engine.dispose()

    def erase(self, user: str, after: float) -> None:
        """One round."""
        numbers = announce(self.engines[0], self.settings, notice(user), notice(user, "sleep"))
        data = heartrate(user, dict.fromkeys(range(200), 60))["data"]["data"]
        page = {"groups": {"garmin": [{"source": {"provider": "garmin", "type": "watch"}, "data": data}]}}
        provider = Provider(lambda _: httpx.Response(200, json=page | {"sleep": [], "next_cursor": None}))
        ready = threading.Barrier(10)

        def act(work: Callable[[], object]) -> None:
            ready.wait(30)
            work()

        def apply_some(number: int) -> None:
            applier = Applier(self.engines[number % 4], self.settings)
            for turn in range(4):
                applier.apply(pack([*live(user, turn), *live(f"{user}-neighbour-{number}", turn)]))

        def fetch() -> None:
            fetcher = provider.fetcher(self.engines[4], self.settings)
            for number in numbers:
                fetcher.run(number)

        def erase_then() -> None:
            time.sleep(after)
            erased(self.engines[4], self.settings, user)

        with ThreadPoolExecutor(10) as pool:
            work: list[Callable[[], object]] = [lambda n=n: apply_some(n) for n in range(8)]  # type: ignore[misc]
            done: list[Future[None]] = [pool.submit(act, one) for one in (*work, fetch, erase_then)]
            for one in done:
                one.result(60)


def remains(engine: Engine, user: str) -> dict[str, int]:
    """What is left of somebody; their neighbours' ids are longer."""
    return erase.count(engine, user)


@pytest.mark.timeout(600)
def test_in_a_crowd_nothing_is_left_however_it_falls(engine: Engine, reading: Settings, full: bool) -> None:
    """Breaks if any order of applying, fetching and erasing at once leaves something of the person."""
    with ExitStack() as ends:
        crowds = [Crowd(reading, pause) for pause in (0.0, 0.25)]
        for crowd in crowds:
            ends.callback(crowd.dispose)
        for turn in range(0, 25, 1 if full else 7):
            user = f"crowd-{turn:03}"
            crowds[turn % 2].erase(user, turn % 10 * 0.02)
            assert remains(engine, user) == {}, turn
            found = {row["user_id"] for row in rows(engine, "SELECT DISTINCT user_id FROM health.workouts")}
            assert {one for one in found if one.startswith(user)} == {f"{user}-neighbour-{n}" for n in range(8)}
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []


@pytest.mark.timeout(600)
def test_the_crowd_notices(engine: Engine, reading: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the test above could not fail."""
    NO_LOCK(monkeypatch)
    with ExitStack() as ends:
        crowd = Crowd(reading, 0.25)
        ends.callback(crowd.dispose)
        for turn in range(100):
            with suppress(TryLater):  # which may be a deadlock: the lock is what keeps the two in order
                crowd.erase(f"crowd-{turn:03}", turn % 10 * 0.02)
            if remains(engine, f"crowd-{turn:03}"):
                return
    raise AssertionError("without the lock nothing was left either")
